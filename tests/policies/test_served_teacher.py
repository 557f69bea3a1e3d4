"""A teacher on a server of vLLM: its numbers are those of the local one, or the run ends in one line."""

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from opdlab.callbacks import CollapseGuard, GateMonitor
from opdlab.cli import main
from opdlab.errors import Stopped, UsageError
from opdlab.objectives import SampledTokenOPD, SupportDivergence, TeacherTopK
from opdlab.policies import LanguageModel, LocalTeacher, RoutedTeacher, ServedTeacher, TargetCache, TeacherRequest
from opdlab.policies.served.address import TOKEN_VARIABLE
from opdlab.types import Rollouts, Targets
from tests.policies.fake_vllm import FakeVLLM
from tests.policies.test_routed_teacher import some_rollouts
from tests.policies.test_teacher import saved
from tests.toy_run import STUDENT, TEACHER, Run

MakeRun = Callable[..., Run]
STUDENT_FOLDER = Path(__file__).parents[2] / "opdlab/toy/models/student"


def rollouts(**changes: Any) -> Rollouts:
    """Four rollouts of different lengths; one has a masked position inside, on which the others are conditioned."""
    made = replace(some_rollouts([0] * 4), teacher_ids=None)
    mask = made.mask.clone()
    mask[0, 2] = False
    prompt_mask = made.prompt_mask.clone()
    prompt_mask[1, 0] = False
    return replace(made, mask=mask, prompt_mask=prompt_mask, **changes)


def bound(*servers: FakeVLLM, student: LanguageModel | None = None, **options: Any) -> ServedTeacher:
    options = {"retry_seconds": 0.01, "timeout": 20.0, **options}
    teacher = ServedTeacher([server.url for server in servers], **options)
    teacher.bind(student or LanguageModel(STUDENT))
    for server in servers:
        server.counts = True
    return teacher


@contextmanager
def servers(*options: dict[str, Any]) -> Iterator[list[FakeVLLM]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FakeVLLM(**each)) for each in options]


@pytest.fixture(scope="module")
def server() -> Iterator[FakeVLLM]:
    with FakeVLLM() as made:
        yield made


def assert_close(served: Targets, local: Targets, *, without: tuple[str, ...] = (), rtol: float = 1e-5) -> None:
    for name in ("logprobs", "support_ids", "support_logits", "support_mass", "log_normalizer", "log_tail"):
        if name in without:
            continue
        ours, theirs = getattr(served, name), getattr(local, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == theirs.dtype, name
            torch.testing.assert_close(ours.float(), theirs.float(), atol=2e-5, rtol=rtol, msg=name)


# -- equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "request_",
    [TeacherRequest(), TeacherRequest(top_k=5), TeacherRequest(top_k=5, tail=True), TeacherRequest(tail=True)],
)
def test_targets_are_those_of_the_local_teacher(server: FakeVLLM, request_: TeacherRequest, temperature: float) -> None:
    rows, teacher, local = rollouts(temperature=temperature), bound(server), LocalTeacher(TEACHER)
    if temperature != 1 and (request_.tail or not request_.top_k):
        with pytest.raises(UsageError, match="log-probabilities at temperature 0.7"):
            teacher.score(rows, request_)
        return
    if temperature != 1:
        request_ = replace(request_, logprobs=False)
    ours, theirs = teacher.score(rows, request_), local.score(rows, request_)
    # Logits are known up to the log-normalizer, which is 0 here: what follows from them is equal.
    if theirs.support_logits is not None and ours.support_logits is not None:
        masked = ~rows.mask
        scale = (theirs.support_logits - ours.support_logits).mean(-1).masked_fill(masked, 0)
        theirs = replace(
            theirs, support_logits=(theirs.support_logits - scale[..., None]).masked_fill(masked[..., None], 0)
        )
        if theirs.log_normalizer is not None and theirs.log_tail is not None:
            shifted = (theirs.log_normalizer - scale, theirs.log_tail - scale)
            theirs = replace(theirs, log_normalizer=shifted[0], log_tail=shifted[1])
    elif theirs.log_normalizer is not None:
        theirs = replace(theirs, log_normalizer=torch.zeros_like(theirs.log_normalizer))
    if temperature == 1:
        assert ours.known_logprobs is ours.logprobs
        if ours.log_tail is not None and theirs.log_tail is not None:
            # 1 - Q is known to the rounding of Q only.
            torch.testing.assert_close(ours.log_tail.exp(), theirs.log_tail.exp(), atol=2e-6, rtol=1e-3)
        assert_close(ours, theirs, without=("log_tail",))
    else:
        assert (ours.support_mass, ours.known_logprobs) == (None, None)
        assert_close(ours, theirs, without=("logprobs", "support_mass"))
    assert ours.log_tail is None or float(ours.log_tail.min()) >= torch.tensor(1e-6).log() - 1e-4


def test_a_prompt_of_its_own_and_rows_without_valid_tokens(server: FakeVLLM) -> None:
    own = torch.tensor([[7, 8, 9]]).repeat(4, 1)
    rows = replace(rollouts(), teacher_prompt_tokens=own, teacher_prompt_mask=torch.ones(4, 3, dtype=torch.bool))
    rows = replace(rows, mask=rows.mask & (torch.arange(4) != 2)[:, None])
    teacher, wanted = bound(server), TeacherRequest(top_k=3)
    before = len(server.answered)
    ours = teacher.score(rows, wanted)
    assert_close(ours, LocalTeacher(TEACHER).score(rows, wanted), without=("support_logits",))
    assert len(server.answered) - before == 3
    none = teacher.score(rows.rows(torch.tensor([], dtype=torch.long)), wanted)
    assert none.support_ids is not None
    assert none.support_ids.shape == (0, 6, 3)
    empty = teacher.score(rows.rows(torch.tensor([2])), TeacherRequest())
    assert empty.logprobs.tolist() == [[0.0] * 6]


def test_ids_that_the_student_lacks_are_dropped(tmp_path: Path) -> None:
    folder, wanted = saved(tmp_path, num_rows=48), TeacherRequest(top_k=12, vocab_size=38)
    options = {"folder": folder, "likeliest": 38}
    with servers({"max_logprobs": 40, **options}, {"max_logprobs": 20, **options}) as (wide, narrow):
        ours = bound(wide).score(rollouts(), wanted)
        assert len(wide.asked) == 8  # 20 are not enough beside 10 that the student lacks
        theirs = LocalTeacher(str(folder)).score(rollouts(), wanted)
        assert ours.support_ids is not None
        assert ours.support_logits is not None
        assert theirs.support_ids is not None
        assert theirs.support_logits is not None
        assert torch.equal(ours.support_ids.long(), theirs.support_ids.long())
        ratios = ours.support_logits.log_softmax(-1), theirs.support_logits.log_softmax(-1)
        torch.testing.assert_close(*ratios, atol=2e-5, rtol=1e-5)
        with pytest.raises(UsageError, match=r"max allowed: 20\); of its 20 .* --max-logprobs 40 or more"):
            bound(narrow).score(rollouts(), wanted)


@pytest.mark.parametrize(
    ("limit", "k", "refused"),
    [(12, 5, None), (5, 5, None), (4, 5, "does not give so many .* --max-logprobs 13"), (40, 32, None)],  # 38 tokens
)
def test_k_is_checked_before_training(limit: int, k: int, refused: str | None, make_run: MakeRun) -> None:
    with FakeVLLM(max_logprobs=limit) as made:
        teacher = ServedTeacher(made.url, retry_seconds=0.01)
        if refused is None:
            make_run(teacher=teacher, objective=TeacherTopK(k=k))
            assert_close(
                teacher.score(rollouts(), TeacherRequest(top_k=k)),
                LocalTeacher(TEACHER).score(rollouts(), TeacherRequest(top_k=k)),
                without=("support_logits",),
            )
            return
        with pytest.raises(UsageError, match=refused):
            make_run(teacher=teacher, objective=TeacherTopK(k=k))


@pytest.mark.parametrize(
    ("request_", "temperature", "said"),
    [
        (TeacherRequest(hidden=True), 1.0, "hidden states"),
        (TeacherRequest(entropy=True), 1.0, "entropy"),
        (TeacherRequest(behavior_top_k=3), 1.0, "support student or union"),
        (TeacherRequest(top_k=3, behavior_top_k=3), 1.0, "support student or union"),
        (TeacherRequest(), 0.5, "temperature 0.5"),
        (TeacherRequest(top_k=3, tail=True, logprobs=False), 2.0, "temperature 2, but.*renormalize"),
    ],
)
def test_what_the_protocol_lacks_is_refused(
    server: FakeVLLM, request_: TeacherRequest, temperature: float, said: str
) -> None:
    teacher = bound(server)
    with pytest.raises(UsageError, match=said) as error:
        teacher.check_request(request_, temperature)
    assert "LocalTeacher" in str(error.value)
    assert "opdlab serve-teacher" in str(error.value)
    with pytest.raises(UsageError, match="no hidden states and no head"):
        teacher.head()


def test_the_floor_of_the_tail_is_said_once(server: FakeVLLM, caplog: pytest.LogCaptureFixture) -> None:
    teacher = bound(server)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            teacher.check_request(TeacherRequest(top_k=3, tail=True), 1.0)
    assert caplog.text.count("at least 1e-06") == 1


# -- a run ------------------------------------------------------------------------------------------------------------


class FlooredTeacher(LocalTeacher):
    """A local teacher whose tail is as small as a served one's at the least."""

    def score(self, *args: Any) -> Targets:
        targets = super().score(*args)
        if targets.log_tail is None or targets.log_normalizer is None:
            return targets
        return replace(targets, log_tail=targets.log_tail.maximum(targets.log_normalizer + math.log(1e-6)))


@pytest.mark.parametrize("objective", [TeacherTopK(k=8), SampledTokenOPD(), SupportDivergence(k=8, tail="bucket")])
def test_a_run_is_that_with_the_local_teacher(server: FakeVLLM, objective: Any, make_run: MakeRun) -> None:
    losses = []
    for teacher in (ServedTeacher(server.url), FlooredTeacher(TEACHER)):
        run = make_run(teacher=teacher, objective=objective, max_new_tokens=12)
        run.fit(2)
        losses.append(run.recorder.losses)
        metrics = run.recorder.steps[2]
        assert ("targets/request_seconds" in metrics) == isinstance(teacher, ServedTeacher)
    # 1 - Q, next to its floor, has the rounding of Q.
    tolerance = 2e-3 if isinstance(objective, SupportDivergence) and objective.tail == "bucket" else 1e-4
    assert losses[0] == pytest.approx(losses[1], rel=tolerance, abs=1e-5)


def test_at_another_temperature_what_is_not_known_is_not_logged(server: FakeVLLM, make_run: MakeRun) -> None:
    steps = []
    for teacher in (ServedTeacher(server.url), LocalTeacher(TEACHER)):
        callbacks = (GateMonitor(every_n_steps=1), CollapseGuard())
        run = make_run(
            teacher=teacher, objective=TeacherTopK(k=8), temperature=0.7, callbacks=callbacks, max_new_tokens=12
        )
        run.fit(2)
        steps.append(run.recorder)
    assert steps[0].losses == pytest.approx(steps[1].losses, rel=1e-4, abs=1e-5)
    gone = steps[1].steps[2].keys() - steps[0].steps[2].keys()
    assert {"train/teacher_gap", "train/teacher_support_mass"} <= gone
    assert all(torch.isfinite(torch.tensor(value)) for value in steps[0].steps[2].values())
    with pytest.raises(UsageError, match=r"temperature 0\.7"):
        make_run(teacher=ServedTeacher(server.url), objective=SampledTokenOPD(), temperature=0.7)


# -- troubles ---------------------------------------------------------------------------------------------------------


def four(base: Rollouts, times: int = 3) -> Rollouts:
    """Twelve different rollouts."""
    parts = [replace(base, tokens=base.tokens.roll(step, 1)) for step in range(times)]
    joined: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name, value in vars(base).items()
        if isinstance(value, torch.Tensor)
    }
    return replace(base, **joined)


@pytest.mark.parametrize("trouble", ["error", "cut", "short", "slow", "few"])
def test_a_failed_request_is_sent_again_and_no_other(trouble: str, caplog: pytest.LogCaptureFixture) -> None:
    rows, wanted = four(rollouts()), TeacherRequest(top_k=3)
    with FakeVLLM(troubles={2: trouble, 5: trouble}, slow=1.5) as made:
        teacher = bound(made, timeout=1.0 if trouble == "slow" else 20.0, concurrency=4)
        with caplog.at_level("INFO"):
            ours = teacher.score(rows, wanted)
        assert teacher.metrics()["targets/retries"] in (2, 3)  # a kept connection may be closed just before a request
        assert caplog.text.count("failed requests are sent again, up to 6 times") == 1
        assert len(made.asked) == 14
        assert len(made.answered) == len({tuple(each) for each in made.answered}) == 12
        assert made.most <= 4
    assert_close(ours, LocalTeacher(TEACHER).score(rows, wanted), without=("support_logits",))


def test_another_server_takes_over_from_a_dead_one() -> None:
    rows, wanted = four(rollouts()), TeacherRequest(top_k=3)
    with servers({"troubles": {2: "die"}}, {}) as (first, second):
        ours = bound(first, second, concurrency=2).score(rows, wanted)
        answered = [*first.answered, *second.answered]
        assert len(answered) == len({tuple(each) for each in answered}) == 12
        assert len(first.answered) >= 1
        assert len(second.answered) >= 6
    assert_close(ours, LocalTeacher(TEACHER).score(rows, wanted), without=("support_logits",))


def test_a_dead_server_is_one_line_and_what_it_scored_is_kept(tmp_path: Path) -> None:
    rows, wanted = four(rollouts()), TeacherRequest(top_k=3)

    def cache(made: FakeVLLM) -> TargetCache:
        cached = TargetCache(ServedTeacher(made.url, retries=1, retry_seconds=0.01, concurrency=2), str(tmp_path))
        cached.bind(LanguageModel(STUDENT))
        made.counts = True
        return cached

    with FakeVLLM(troubles={6: "die"}) as made:
        with pytest.raises(UsageError, match=r"does not answer .*; the request was sent 2 times: look at") as error:
            cache(made).score(rows, wanted)
        assert len(str(error.value).splitlines()) == 1
        scored = len(made.answered)
    assert scored >= 5
    assert len(list(tmp_path.rglob("*.safetensors"))) == scored
    with FakeVLLM() as made:
        again = cache(made)
        ours = again.score(rows, wanted)
        assert len(made.answered) == 12 - scored == 12 - again.metrics()["targets/cache_hits"]
    assert_close(ours, LocalTeacher(TEACHER).score(rows, wanted), without=("support_logits",))


def test_a_signal_ends_the_wait_for_a_slow_server() -> None:
    class Stopping:
        @contextmanager
        def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
            started = time.monotonic()

            def advance(num: int) -> None:
                if time.monotonic() - started > 0.3:
                    raise Stopped

            yield advance

    with FakeVLLM(troubles={0: "slow"}, slow=3.0) as made:
        teacher, started = bound(made), time.monotonic()
        with pytest.raises(Stopped):
            teacher.score(rollouts().rows(torch.tensor([0])), TeacherRequest(), Stopping())
        assert time.monotonic() - started < 2.5


def test_a_rollout_that_is_too_long_is_refused() -> None:
    with FakeVLLM(max_model_len=25) as made:
        long = replace(
            rollouts(),
            tokens=torch.full((4, 30), 5),
            mask=torch.ones(4, 30).bool(),
            behavior_logprobs=torch.zeros(4, 30),
        )
        teacher = bound(made)
        with pytest.raises(UsageError, match="takes 24: start vLLM with --max-model-len 33 or more"):
            teacher.score(long, TeacherRequest())


# -- the start --------------------------------------------------------------------------------------------------------


def test_the_model_is_found_or_named(server: FakeVLLM) -> None:
    with pytest.raises(UsageError, match="'toi', but .* serves toy; did you mean 'toy'"):
        bound(server, model="toi")
    server.names.append("adapter")
    try:
        with pytest.raises(UsageError, match="serves 2 models, toy, adapter: name one"):
            bound(server)
        bound(server, model="toy")
    finally:
        server.names[:] = ["toy"]


def test_a_server_of_another_kind_is_named_with_the_key() -> None:
    mend = "give the URL of vLLM or `opdlab serve-teacher` in model.teacher.url"
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, args=(0.02,), daemon=True).start()
        teacher = ServedTeacher(f"http://127.0.0.1:{other.server_port}", retries=0)
        with pytest.raises(UsageError, match=f"refuses a request .404: .*File not found.*: {mend}"):
            teacher.bind(LanguageModel(STUDENT))
        other.shutdown()
    with FakeVLLM() as made:
        made.names.clear()
        with pytest.raises(UsageError, match=f"it lists no models: {mend}"):
            bound(made, retries=0)


def test_a_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeVLLM(token="secret") as made:
        with pytest.raises(UsageError, match=rf"401: Unauthorized\); give its token in {TOKEN_VARIABLE}"):
            bound(made)
        monkeypatch.setenv(TOKEN_VARIABLE, "secret")
        bound(made)
        monkeypatch.setenv(TOKEN_VARIABLE, "sec\nret")
        with pytest.raises(UsageError, match="characters that cannot be sent"):
            bound(made)


def test_no_server_is_one_line() -> None:
    with FakeVLLM() as made:
        pass
    with pytest.raises(UsageError, match="does not answer .*; the request was sent 3 times"):
        bound(made, retries=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shift": 1}, r"shifted by \+1 position"),
        ({"shift": -1}, r"shifted by -1 position"),
        ({"bos": True}, "25 entries for 24 tokens"),
        ({"hot": 4.0}, "differ by .* nats from those that it samples from"),
    ],
)
def test_shifts_and_templates_are_found(options: dict[str, Any], said: str) -> None:
    with FakeVLLM(**options) as made, pytest.raises(UsageError, match=said):
        bound(made, retries=0)


def test_another_vocabulary_is_found(server: FakeVLLM) -> None:
    texts = dict(server._texts)
    server._texts = {index: "x" + server.tokenizer.decode([index]) for index in range(38)}
    try:
        with pytest.raises(UsageError, match="has another vocabulary: token .* is 'x.*' to it"):
            bound(server)
    finally:
        server._texts = texts


def test_servers_must_be_equal(server: FakeVLLM) -> None:
    with FakeVLLM(STUDENT_FOLDER) as other, pytest.raises(UsageError, match="all must serve the same weights"):
        bound(server, other)


def test_agreement_with_a_local_teacher_is_measured_and_logged(
    server: FakeVLLM, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        bound(server, reference=TEACHER)
    line = next(record.getMessage() for record in caplog.records if "probe" in record.getMessage())
    assert re.search(r"with themselves, to \S+ nats; with what they sample from, to \S+; with package://\S+, to", line)
    largest = re.search(r"models/teacher, to (\S+) \(mean (\S+); moved by a position -1: (\S+), \+1: (\S+)\)", line)
    assert largest is not None
    assert float(largest[1]) < 1e-4
    assert float(largest[3]) > 0.5
    assert float(largest[4]) > 0.5
    with pytest.raises(UsageError, match="differ by .* nats in the mean"):
        bound(server, reference=STUDENT)


def test_a_configuration_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.teacher", "opdlab.policies.ServedTeacher", "--model.teacher.url", "[http://a:1, http://b:1]"]
    assert main(["estimate", "-c", "quickstart", *options, "--trainer.accelerator", "cpu"]) == 0
    assert "teacher weights" not in capsys.readouterr().out


# -- identity ---------------------------------------------------------------------------------------------------------


def test_a_second_run_with_a_cache_asks_for_nothing(tmp_path: Path) -> None:
    with servers({}, {}, {"folder": STUDENT_FOLDER}) as (one, same, other):
        hits = []
        for made in (one, same, other):
            cached = TargetCache(ServedTeacher(made.url), str(tmp_path))
            cached.bind(LanguageModel(STUDENT))
            cached.check_request(TeacherRequest(top_k=3), 1.0)
            made.counts = True
            cached.score(rollouts(), TeacherRequest(top_k=3))
            hits.append(cached.metrics()["targets/cache_hits"])
        assert hits == [0, 4, 0]
        assert (len(same.asked), len(other.asked)) == (0, 4)


def test_a_served_teacher_among_several(server: FakeVLLM) -> None:
    teachers: dict[str, Any] = {"served": ServedTeacher(server.url), "local": TEACHER}
    teacher = RoutedTeacher(teachers)
    teacher.bind(LanguageModel(STUDENT))
    with pytest.raises(UsageError, match="the teacher's entropy"):
        teacher.check_request(TeacherRequest(entropy=True), 1.0)
    rows = some_rollouts([0, 1, 0, 1])
    ours = teacher.score(rows, TeacherRequest(top_k=3))
    assert_close(ours, LocalTeacher(TEACHER).score(rows, TeacherRequest(top_k=3)), without=("support_logits",))
    mixed = teacher.score(replace(rows, temperature=0.5), TeacherRequest(top_k=3, logprobs=False))
    assert mixed.known_logprobs is None
    assert teacher.metrics()["targets/local/logprob"] < 0
    assert "targets/served/logprob" not in teacher.metrics()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "localhost:8000"}, "must begin with http"),
        ({"url": []}, "url is an empty list"),
        ({"url": ["http://a", "http://a/v1"]}, "names a server twice"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"timeout": 0.0}, "timeout is 0"),
        ({"timeout": float("inf")}, "timeout is inf, but must be above 0 and finite"),
        ({"retries": -1}, "retries is -1"),
        ({"retry_seconds": float("inf")}, "retry_seconds is inf, but must be at least 0 and finite"),
        ({"url": "http://user:password@host"}, "^url of host has a name or a password: leave it out, and give a token"),
        ({"url": "http://a/v1?key=1"}, "but must end with the host or its path: leave out 'key=1'"),
        ({"url": "http://a b"}, "must begin with http"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ServedTeacher(**{"url": "http://localhost:1", **options})
