"""`opdlab serve-teacher`: what a local teacher computes, and nothing for those who may not ask."""

import asyncio
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from safetensors.torch import save

from opdlab.errors import UsageError
from opdlab.objectives import FullDivergence
from opdlab.policies import LanguageModel, LocalTeacher, ServedTeacher, TargetCache, TeacherRequest
from opdlab.policies.served.address import TOKEN_VARIABLE
from opdlab.policies.served.server import TeacherServer
from opdlab.policies.served.wire import BINARY, pack_rollouts, read_rollouts
from opdlab.types import Rollouts, Targets
from tests.policies.test_served_teacher import four, rollouts
from tests.policies.test_teacher import saved
from tests.toy_run import STUDENT, TEACHER, Run

MakeRun = Callable[..., Run]


@contextmanager
def serving(teacher: LocalTeacher, **options: Any) -> Iterator[str]:
    """Serve a teacher in a thread, and yield its URL."""
    server = TeacherServer(teacher, "toy", 32, **options)
    loop, runner = asyncio.new_event_loop(), web.AppRunner(server.application(), handler_cancellation=True)

    async def start() -> str:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        server.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(LocalTeacher(TEACHER), max_body=1 << 14) as made:
        yield made


def bound(url: str, **options: Any) -> ServedTeacher:
    teacher = ServedTeacher(url, **{"retry_seconds": 0.01, "retries": 1, **options})
    teacher.bind(LanguageModel(STUDENT))
    return teacher


def post(url: str, content: bytes, query: str = "", **headers: str) -> tuple[int, str]:
    """Send a body, and return the status and the message of the answer."""
    headers = {"Content-Type": BINARY, **headers}
    request = urllib.request.Request(f"{url}/v1/targets?{query}", content, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())["error"]["message"]


def assert_equal(one: Targets, other: Targets) -> None:
    for field in fields(one):
        first, second = getattr(one, field.name), getattr(other, field.name)
        assert (first is None) == (second is None), field.name
        assert first is None or (first.dtype == second.dtype and torch.equal(first, second)), field.name


# -- equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "request_",
    [
        TeacherRequest(),
        TeacherRequest(top_k=5, tail=True, entropy=True, vocab_size=37),
        TeacherRequest(behavior_top_k=2, tail=True),
        TeacherRequest(top_k=3, behavior_top_k=2, logprobs=False),
        TeacherRequest(hidden=True),
    ],
)
def test_targets_are_those_of_the_local_teacher(url: str, request_: TeacherRequest, temperature: float) -> None:
    rows = four(rollouts(temperature=temperature))
    rows = replace(rows, mask=rows.mask & (torch.arange(12) != 7)[:, None], tokens=rows.tokens.clamp(max=36))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(37, (12, 6, 2), generator=generator).to(torch.uint8)
    rows = replace(rows, behavior_support_ids=ids)
    teacher, local = bound(url), LocalTeacher(TEACHER)
    teacher.check_request(request_, temperature)
    assert_equal(teacher.score(rows, request_), local.score(rows, request_))
    if request_.hidden:
        ours, theirs = teacher.head(temperature), local.head(temperature)
        assert torch.equal(ours.weight, theirs.weight)
        assert (ours.scale, ours.softcap, ours.vocab_size, ours.temperature) == (1.0, None, 38, temperature)
    none = rows.rows(torch.tensor([], dtype=torch.long))
    assert_equal(teacher.score(none, request_), local.score(none, request_))


def test_large_answers_come_in_parts(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opdlab.policies.served.arrays._GOAL_BYTES", 700)  # the real bound needs a large teacher
    teacher, rows, wanted = bound(url), four(rollouts()), TeacherRequest(top_k=5)
    parts = [part for part, _ in teacher.score_in_parts(rows, wanted)]
    assert len(parts) > 3
    assert sorted(torch.cat(parts).tolist()) == list(range(12))
    theirs = LocalTeacher(TEACHER).score(rows, wanted)
    torch.testing.assert_close(teacher.score(rows, wanted).logprobs, theirs.logprobs, atol=1e-5, rtol=1e-5)


def test_a_run_over_the_whole_vocabulary(url: str, make_run: MakeRun) -> None:
    losses = []
    for teacher in (ServedTeacher(url), LocalTeacher(TEACHER)):
        run = make_run(teacher=teacher, objective=FullDivergence(), max_new_tokens=12)
        run.fit(2)
        losses.append(run.recorder.losses)
    assert losses[0] == losses[1]


def test_identity_is_that_of_the_local_teacher(url: str, tmp_path: Path) -> None:
    teacher, local = bound(url), LocalTeacher(TEACHER)
    assert teacher.fingerprint() == local.fingerprint()
    assert teacher.weights_digest() == local.weights_digest()
    assert teacher.stop_tokens == local.stop_tokens
    hits = []
    for each in (local, ServedTeacher(url)):  # they share the files
        cached = TargetCache(each, str(tmp_path))
        cached.bind(LanguageModel(STUDENT))
        cached.score(rollouts(), TeacherRequest(top_k=3))
        hits.append(cached.metrics()["targets/cache_hits"])
    assert hits == [0, 4]


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_other_vocabularies_and_other_teachers_are_refused(url: str, tmp_path: Path) -> None:
    with serving(LocalTeacher(STUDENT)) as other, pytest.raises(UsageError, match="serve different teachers"):
        bound([url, other])  # type: ignore[arg-type]
    with serving(LocalTeacher(str(saved(tmp_path)))) as other:
        teacher = LanguageModel(STUDENT)
        teacher.tokenizer.add_tokens(["<extra>"])
        with pytest.raises(UsageError, match="different vocabularies"):
            ServedTeacher(other).bind(teacher)


def test_a_token_is_needed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(LocalTeacher(TEACHER), token="right") as made:
        for wrong in ("", "wrong", "rigth", "right2"):
            monkeypatch.setenv(TOKEN_VARIABLE, wrong)
            with pytest.raises(
                UsageError, match=rf"401: the token is missing or wrong\); give its token in {TOKEN_VARIABLE}"
            ):
                bound(made)
        assert "401 the token is missing or wrong" in capfd.readouterr().err
        monkeypatch.setenv(TOKEN_VARIABLE, "right")
        bound(made)


def packed(change: Mapping[str, torch.Tensor | None] | None = None) -> bytes:
    base = {
        "prompt_tokens": torch.full((2, 3), 5),
        "prompt_mask": torch.tensor([[True] * 3, [False, True, True]]),
        "tokens": torch.full((2, 4), 7),
        "mask": torch.ones(2, 4, dtype=torch.bool),
    }
    return save({name: tensor for name, tensor in {**base, **(change or {})}.items() if tensor is not None})


@pytest.mark.parametrize(
    ("content", "query", "said"),
    [
        (packed(), "top_k=x", "top_k is 'x', but must be a number"),
        (packed(), "top_k=39", "top_k is 39, but must be from 0 to 38"),
        (packed(), "top_k=-1", "top_k is -1"),
        (packed(), "vocab_size=0", "vocab_size is 0, but must be from 1 to 38"),
        (packed(), "temperature=0", "temperature is 0.0, but must be from"),
        (packed(), "temperature=nan", "temperature is nan"),
        (packed(), "path=/etc/passwd", "'path', which is no part of a request"),
        (b"", "", "no safetensors data"),
        (b"\x80\x04\x95 pickle", "", "no safetensors data"),
        (packed()[:-5], "", "no safetensors data"),
        (packed({"mask": None}), "", "must have mask, prompt_mask, prompt_tokens, tokens"),
        (packed({"more": torch.zeros(1)}), "", "the tensors mask, more"),
        (packed(), "behavior_top_k=2", "must have behavior_support_ids"),
        (packed({"mask": torch.ones(2, 4)}), "", "mask has the dtype torch.float32, but must be bool"),
        (packed({"tokens": torch.ones(2, 4)}), "", "tokens has the dtype torch.float32, but must be an integer"),
        (packed({"mask": torch.ones(2, 5).bool()}), "", r"mask has the shape (2, 5), but must have (2, 4)"),
        (packed({"tokens": torch.ones(0, 4).int()}), "", "tokens has the shape (0, 4), which does not fit"),
        (packed({"tokens": torch.ones(8).int()}), "", "tokens has the shape (8,), which does not fit"),
        (packed({"tokens": torch.full((2, 4), 38)}), "", "tokens has the id 38, but ids must be from 0 to 37"),
        (packed({"prompt_tokens": torch.full((2, 3), -1)}), "", "prompt_tokens has the id -1"),
        (packed({"tokens": torch.full((2, 4), 37)}), "vocab_size=37", "tokens has the id 37"),
        (packed({"prompt_mask": torch.tensor([[True, False, True]] * 2)}), "", "must be padded on the left"),
        (packed({"prompt_mask": torch.zeros(2, 3).bool()}), "", "must be padded on the left and have a token"),
    ],
)
def test_bad_requests_are_one_line(
    url: str, content: bytes, query: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    status, message = post(url, content, query)
    assert (status, said in message) == (400, True), message
    printed = capfd.readouterr().err
    assert len(printed.splitlines()) == 1
    assert f"POST /v1/targets: 400 {message}" in printed


def test_large_bodies_and_other_types_are_refused(url: str) -> None:
    assert post(url, bytes(1 << 17))[0] == 413
    status, message = post(url, packed(), **{"Content-Type": "text/plain"})
    assert (status, message) == (400, f"the body is text/plain, but must be {BINARY}")
    wide = rollouts()
    wide = replace(wide, prompt_tokens=wide.prompt_tokens.repeat(1, 60), prompt_mask=torch.ones(4, 120).bool())
    teacher, many = bound(url), four(wide, 8)
    with pytest.raises(UsageError, match=r"413: a body is larger than 16384 bytes: raise --max_body_mib"):
        teacher.score(many, TeacherRequest())


def test_random_bytes_do_not_end_the_server(url: str) -> None:
    numbers = random.Random(0)
    good = packed()
    for _ in range(40):
        content = bytearray(good)
        for _ in range(numbers.randrange(1, 6)):
            content[numbers.randrange(len(content))] = numbers.randrange(256)
        assert post(url, bytes(content))[0] in (200, 400)
    assert post(url, good)[0] == 200


def test_what_is_packed_is_read_again() -> None:
    rows: Rollouts = rollouts()
    request = TeacherRequest(behavior_top_k=2)
    rows = replace(rows, behavior_support_ids=torch.zeros(4, 6, 2, dtype=torch.uint8))
    again = read_rollouts(pack_rollouts(rows, request), request, 1.0, 38)
    for name in ("prompt_tokens", "prompt_mask", "tokens", "mask", "behavior_support_ids"):
        assert torch.equal(getattr(again, name), getattr(rows, name)), name
