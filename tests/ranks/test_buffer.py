"""Two processes train on the rows of one: every pass, every state, every field, whatever the number of processes."""

import gc
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, distributed

from opdlab.data import ReuseConfig
from opdlab.errors import UsageError
from opdlab.estimate import exchanged_bytes, gathered_bytes
from opdlab.policies import BehaviorPolicy, LanguageModel, LocalTeacher, SamplingConfig, TeacherRequest
from opdlab.rollouts import Collector, Pool, RolloutLoader, Rollouts, Targets
from opdlab.rollouts.collector import with_groups
from opdlab.rollouts.pool import PART_BYTES
from opdlab.seeds import derive_seed
from opdlab.toy import chain_tokenizer
from opdlab.types import Problem, Prompt, StopReason, left_padded
from opdlab.verifiers import BoxedVerifier
from tests.ranks.pair import Processes
from tests.test_resume import SaveAt
from tests.toy_run import STUDENT, TEACHER, Run

PAD = 9
PROMPTS = [Prompt(i, Problem(str(i), str(i), None), tuple(range(1, 2 + i % 3))) for i in range(13)]
SIZES: dict[str, Any] = {"samples_per_prompt": 2, "prompts_per_pool": 6, "batch_size": 6, "reuse_epochs": 3}
Seen = list[dict[str, Any]]


def collect(
    prompts: Sequence[Prompt],
    *,
    share: range,
    seed: int,
    first_rollout_id: int,
    first_batch: Tensor,
    without: str | None = None,
) -> Pool:
    """Return two rollouts of each prompt, whose values depend on seed, prompt and sample; as wide as the share's."""
    rows = []
    for prompt in (prompts[i] for i in share):
        for sample in range(2):
            generator = torch.Generator().manual_seed(derive_seed(seed, prompt.index, sample))
            length = int(torch.randint(1, 8, (), generator=generator))
            rows.append((length, torch.rand(length, 5, generator=generator), torch.randint(2, (), generator=generator)))
    count, width = len(rows), max(length for length, _, _ in rows)
    values = torch.zeros(count, width, 5)
    mask = torch.zeros(count, width, dtype=torch.bool)
    for row, (length, drawn, _) in enumerate(rows):
        values[row, :length], mask[row, :length] = drawn, True
    ids = torch.arange(share.start * 2, share.stop * 2)
    padded = left_padded([prompts[i].tokens for i in share for _ in range(2)], PAD)
    behavior = values[..., 0].clone()
    behavior[torch.isin(ids, first_batch)] = 0.0  # the training step fills them in
    support = (values[..., :2] * 60_000).to(torch.uint16)
    zeros = torch.zeros(count, dtype=torch.long)
    rollouts = Rollouts(
        *padded,
        torch.where(mask, (values[..., 0] * 100).long(), PAD),
        mask,
        behavior,
        torch.full((count,), int(StopReason.EOS)),
        ids + first_rollout_id,
        torch.tensor([prompts[i].index for i in share]).repeat_interleave(2),
        *(zeros, zeros),
        temperature=0.7,
        correct=torch.stack([each for _, _, each in rows]).to(torch.int8),
        behavior_support_ids=support,
        teacher_prompt_tokens=torch.nn.functional.pad(padded[0], (1, 0), value=PAD),
        teacher_prompt_mask=torch.nn.functional.pad(padded[1], (1, 0)),
        demonstration=ids % 5 == 0,
    )
    scores = Targets(
        values[..., 1], support, values[..., :2], values[..., 2], values[..., 3], mask[..., None].expand(-1, -1, 2)
    )
    targets = replace(scores, log_normalizer=values[..., 4], hidden=values.bfloat16())
    if without is not None and share.start:
        targets = replace(targets, **{without: None})  # type: ignore[arg-type]
    metrics = {"rollout/length": float(mask.sum(1).float().mean()), "targets/cache_misses": float(count)}
    metrics["targets/retries"] = float(count)
    if share.start == 0:  # the other process has no rollout of this teacher
        metrics["targets/a/request_seconds"] = 0.4
    metrics |= {"time/sample_seconds": 1.0 + share.start, "rollout/sampled_tokens_per_second": float(mask.sum())}
    drawn = rollouts.demonstration.logical_not()  # type: ignore[union-attr]
    metrics["rollout/accuracy"] = float(rollouts.correct[drawn].float().mean())  # type: ignore[index]
    weights = {"rollout/accuracy": float(drawn.sum())}
    return Pool(with_groups(rollouts), targets, metrics, True, weights, PAD)


def loader(rank: int = 0, **options: Any) -> RolloutLoader:
    world_size = distributed.get_world_size() if distributed.is_initialized() else 1
    return RolloutLoader(PROMPTS, collect, rank=rank, world_size=world_size, **{**SIZES, **options})


def filled(made: RolloutLoader, batch: Any) -> dict[str, Any]:
    """Fill in the behavior log-probabilities as a training step does, and return a micro-batch as plain values."""
    if not batch.behavior_known:
        assert not bool(batch.rollouts.behavior_logprobs.any())
        assert batch.targets.hidden is not None
        made.fill_behavior(batch.rows, batch.targets.hidden[..., 0].float())
    return {**vars(batch), "micro_batches": len(batch.micro_batches)}


def train(
    rank: int, options: dict[str, Any], state: dict[str, Any] | None, num: int, keep: Sequence[int] = ()
) -> tuple[Seen, dict[int, Any]]:
    """Return ``num`` micro-batches from a state on, and the states after some of them."""
    made = loader(rank, **options)
    seen: Seen = []
    states: dict[int, Any] = {}
    if state is not None:
        made.load_state_dict(state)
    while len(seen) < num:
        for batch in islice(made, num - len(seen)):
            seen.append(filled(made, batch))
            if len(seen) in keep:
                states[len(seen)] = made.state_dict()
    return seen, states


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the parts of a micro-batch that several processes have, as one."""
    whole = {**parts[0], "rows": torch.cat([part["rows"] for part in parts])}
    for name in ("num_tokens", "num_rollouts"):
        whole[name] = sum(part[name] for part in parts)
    for name in ("rollouts", "targets"):
        states = [part[name].state_dict() for part in parts]
        for key, first in states[0].items():
            if not isinstance(first, Tensor):
                continue
            tensors = [state[key] for state in states]
            width = max(each.shape[1] if each.dim() > 1 else 0 for each in tensors)
            fill = PAD if key.endswith("tokens") else 0
            states[0][key] = torch.cat([padded(each, width, fill, left="prompt" in key) for each in tensors])
        whole[name] = type(parts[0][name])(**states[0])
    return whole


def padded(tensor: Tensor, width: int, fill: int, *, left: bool) -> Tensor:
    if tensor.dim() == 1 or tensor.shape[1] == width:
        return tensor
    more = torch.full((len(tensor), width - tensor.shape[1], *tensor.shape[2:]), fill, dtype=tensor.dtype)
    return torch.cat([more, tensor] if left else [tensor, more], 1)


def same(ours: Any, theirs: Any, where: str = "") -> None:
    """Compare values bit for bit; metrics, which are means over other parts, to rounding."""
    if isinstance(theirs, Rollouts | Targets):
        ours, theirs = ours.state_dict(), theirs.state_dict()
    if where.endswith("metrics"):
        times = {"time/sample_seconds", "rollout/sampled_tokens_per_second"}
        assert ours.keys() == theirs.keys()
        assert {k: v for k, v in ours.items() if k not in times} == pytest.approx(
            {k: v for k, v in theirs.items() if k not in times}
        )
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            same(ours[key], value, f"{where}.{key}")
    elif isinstance(theirs, Tensor):
        assert ours.dtype == theirs.dtype, where
        assert ours.shape == theirs.shape, where
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_rows_of_two_processes_are_those_of_one_in_every_pass(pair: Processes, micro_batches: int) -> None:
    options = {"micro_batches": micro_batches}
    num = 2 * len(loader(**options))  # two passes over the prompts, of two buffers of three passes
    keep = range(1, num, 2)
    alone, states = train(0, options, None, num, keep)
    (first, of_first), (second, of_second) = pair.run(train, options, None, num, keep)
    for one, *parts in zip(alone, first, second, strict=True):
        same(joined(parts), one)
        assert [len(part["rows"]) for part in parts] == [6 // micro_batches // 2] * 2
    for number, state in states.items():
        same(of_first[number], state, "state")
        assert "pool" not in of_second[number]


def rest_of(alone: Seen, options: dict[str, Any], start: int, state: dict[str, Any], processes: Any) -> None:
    """Compare what processes train on from a state with what is left of an uninterrupted run of one process."""
    parts = [seen for seen, _ in processes.run(train, options, state, len(alone) - start)]
    for one, *each in zip(alone[start:], *parts, strict=True):
        same(joined(each), one)


class Alone:
    """This process, in place of several."""

    def run(self, function: Any, *args: Any) -> list[Any]:
        return [function(0, *args)]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_run_goes_on_with_any_number_of_processes(pair: Processes, micro_batches: int) -> None:
    options = {"micro_batches": micro_batches}
    num = len(loader(**options))
    cuts = [each * micro_batches for each in (1, 2, 3, 5, 6, 7)]  # six optimizer batches are a buffer
    alone, states = train(0, options, None, num, cuts)
    of_two = pair.run(train, options, None, num, cuts)[0][1]
    for cut in cuts:
        rest_of(alone, options, cut, of_two[cut], Alone())
        rest_of(alone, options, cut, states[cut], pair)
        rest_of(alone, options, cut, of_two[cut], pair)


def test_three_processes_go_on_where_two_stopped_and_back(pair: Processes) -> None:
    alone, _ = train(0, {}, None, len(loader()))
    three = Processes(3)
    try:
        of_two = pair.run(train, {}, None, 3, (1, 3))[0][1]
        of_three = three.run(train, {}, None, 3, (1, 3))[0][1]
        for cut in (1, 3):
            rest_of(alone, {}, cut, of_two[cut], three)
            rest_of(alone, {}, cut, of_three[cut], pair)
    finally:
        three.close()


def test_another_batch_size_goes_on_with_two_processes(pair: Processes) -> None:
    state = train(0, {}, None, 4, (4,))[1][4]  # two passes of two batches
    alone, _ = train(0, {"batch_size": 4, "reuse_epochs": 4}, state, 8)
    parts = [seen for seen, _ in pair.run(train, {"batch_size": 4, "reuse_epochs": 4}, state, 8)]
    for one, *each in zip(alone, *parts, strict=True):
        same(joined(each), one)


def test_leftover_prompts_are_left_out_in_both(pair: Processes) -> None:
    alone, _ = train(0, {}, None, len(loader()))
    parts = [seen for seen, _ in pair.run(train, {}, None, len(loader()))]
    used = [{int(i) for batch in seen for i in batch["rollouts"].prompt_ids} for seen in (alone, *parts)]
    assert len(used[0]) == 12  # of 13
    assert used[1] | used[2] == used[0]


def test_metrics_are_those_of_the_whole_buffer(pair: Processes) -> None:
    (first, _), (second, _) = pair.run(train, {}, None, 1)
    metrics = first[0]["pool_metrics"]
    assert metrics == second[0]["pool_metrics"]
    calls: list[tuple[Any, Any]] = []

    def noted(prompts: Sequence[Prompt], **options: Any) -> Pool:
        calls.append((prompts, options))
        return collect(prompts, **options)

    alone = next(iter(RolloutLoader(PROMPTS, noted, **SIZES))).pool_metrics
    for name in ("rollout/length", "rollout/accuracy", "targets/cache_misses", "targets/retries"):
        assert metrics[name] == pytest.approx(alone[name]), name
    ((prompts, options),) = calls
    shares = [collect(prompts, **{**options, "share": range(start, start + 3)}).metrics for start in (0, 3)]
    assert [each["time/sample_seconds"] for each in shares] == [1.0, metrics["time/sample_seconds"]]
    tokens = sum(each["rollout/sampled_tokens_per_second"] * each["time/sample_seconds"] for each in shares)
    assert metrics["rollout/sampled_tokens_per_second"] == pytest.approx(tokens / 4.0)
    assert metrics["targets/a/request_seconds"] == pytest.approx(0.4)


def refused(rank: int, without: str) -> str:
    made = RolloutLoader(PROMPTS, partial(collect, without=without), rank=rank, world_size=2, **SIZES)
    with pytest.raises(UsageError) as error:
        next(iter(made))
    return str(error.value)


def test_a_teacher_with_other_fields_in_one_process_is_refused(pair: Processes) -> None:
    for said in pair.run(refused, "entropy"):
        assert said.startswith("the processes have other targets.entropy of one rollout buffer (('torch.float32', ")
        assert said.endswith("a teacher must return the same fields for every share of a buffer")


# -- the collector, with models ----------------------------------------------------------------------------------


def encode(text: str) -> tuple[int, ...]:
    return tuple(chain_tokenizer()(text)["input_ids"])


def problems() -> list[Prompt]:
    """Four problems with demonstrations; for one, the teacher sees another prompt."""
    made = []
    for index, text in enumerate(("1 a+1\n", "98 a+1 b+5\n", "7 b+5\n", "12 a+1 b+5 a+1\n")):
        response = encode("a+1: 2"[: 2 + index])
        other = encode(f"hint 2\n{text}") if index == 1 else None
        answer = str(index + 2)
        made.append(
            Prompt(index, Problem(str(index), text, answer), encode(text), other, response, (True,) * len(response))
        )
    return made


def collected(rank: int, request: TeacherRequest, demonstrations: float) -> Any:
    """Return one buffer of the toy's models as a checkpoint holds it, of any number of processes."""
    student, teacher = LanguageModel(STUDENT), LocalTeacher(TEACHER)
    teacher.bind(student)
    # The most likely token alone is sampled, so that the random numbers have no influence.
    behavior = BehaviorPolicy(student, SamplingConfig(num_samples=4, max_new_tokens=24, top_p=1e-6))
    collector = Collector(behavior, teacher, request, masked_first=[encode("a")[0]])

    def fill(prompts: Sequence[Prompt], *, first_batch: Tensor, **options: Any) -> Pool:
        verifier = BoxedVerifier()
        return collector.collect(
            prompts, unscored=first_batch, verifier=verifier, demonstrations=demonstrations, **options
        )

    world_size = distributed.get_world_size() if distributed.is_initialized() else 1
    sizes: dict[str, Any] = {"samples_per_prompt": 4, "prompts_per_pool": 4, "batch_size": 8}
    made = RolloutLoader(problems(), fill, rank=rank, world_size=world_size, **sizes)
    assert next(iter(made)).behavior_known is False
    return made.state_dict().get("pool")


@pytest.mark.parametrize(
    ("request_", "demonstrations"),
    [
        (TeacherRequest(top_k=3, behavior_top_k=2, entropy=True, tail=True), 0.0),
        (TeacherRequest(hidden=True), 0.3),
    ],
    ids=["union", "hidden states, demonstrations"],
)
def test_the_collector_of_two_processes_fills_the_buffer_of_one(
    pair: Processes, request_: TeacherRequest, demonstrations: float
) -> None:
    alone, (both, none) = collected(0, request_, demonstrations), pair.run(collected, request_, demonstrations)
    assert none is None
    for part in ("rollouts", "targets"):
        for name, value in alone[part].items():
            if isinstance(value, Tensor) and value.is_floating_point():
                torch.testing.assert_close(both[part][name], value, rtol=1e-4, atol=1e-4, msg=f"{part}.{name}")
            else:
                same(both[part][name], value, f"{part}.{name}")
    assert alone["rollouts"]["teacher_prompt_tokens"] is not None
    assert alone["rollouts"]["group_size"] is not None
    if demonstrations:
        assert int(both["rollouts"]["demonstration"].sum()) == round(0.3 * 16)
    exact = [name for name in alone["metrics"] if name.startswith("rollout/") and not name.endswith("second")]
    assert {name: both["metrics"][name] for name in exact} == pytest.approx(
        {name: alone["metrics"][name] for name in exact}
    )


# -- sampling ahead ----------------------------------------------------------------------------------------------


class Responses(Callback):
    """Keeps the responses of each step, without padding."""

    def __init__(self) -> None:
        self.steps: dict[int, list[list[int]]] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rows = zip(batch.rollouts.tokens, batch.rollouts.mask, strict=True)
        self.steps[trainer.global_step] = [tokens[mask].tolist() for tokens, mask in rows]


def sampled_ahead(
    rank: int, processes: int, folder: Path, max_steps: int, ckpt_path: Path | None = None, save: Path | None = None
) -> tuple[dict[int, list[list[int]]], dict[int, dict[str, float]]]:
    """Return responses and metrics of each step of a run with overlap, in which no worker uses a collective."""
    responses, callers = Responses(), set[str]()
    names = ("all_reduce", "all_gather", "all_gather_object", "all_to_all_single", "broadcast", "barrier")
    kept = {name: getattr(distributed, name) for name in names}

    def noting(function: Any) -> Any:
        def noted(*args: Any, **options: Any) -> Any:
            callers.add(threading.current_thread().name)
            return function(*args, **options)

        return noted

    for name, function in kept.items():
        setattr(distributed, name, noting(function))
    try:
        # The most likely token alone is sampled, so that rounding has no influence.
        made = Run(
            folder,
            lr=1e-4,
            callbacks=(responses, *([] if save is None else [SaveAt(save, 6)])),
            sampling={"top_p": 1e-6, "max_new_tokens": 12},
            data={"reuse": ReuseConfig(8, 2, 8, overlap=1)},
        )
        strategy: dict[str, Any] = {"strategy": "ddp", "devices": processes} if processes > 1 else {}
        made.fit(max_steps, ckpt_path, use_distributed_sampler=False, **strategy)
    finally:
        for name, function in kept.items():
            setattr(distributed, name, function)
    assert processes == 1 or callers == {"MainThread"}
    return responses.steps, made.recorder.steps


def test_two_processes_sample_ahead_as_one_does_and_resume_its_run(pair: Processes, tmp_path: Path) -> None:
    path = tmp_path / "inside.ckpt"
    whole, logged = sampled_ahead(0, 1, tmp_path, 10, save=path)
    for start, results in (
        (0, pair.run(sampled_ahead, 2, tmp_path, 10)),
        (6, pair.run(sampled_ahead, 2, tmp_path, 10, path)),
    ):
        (first, metrics), (second, _) = results
        assert {step: first[step] + second[step] for step in first} == {
            step: rows for step, rows in whole.items() if step > start
        }
        for step, values in metrics.items():
            assert values["rollout/age"] == logged[step]["rollout/age"]
            assert values["train/loss"] == pytest.approx(logged[step]["train/loss"], rel=1e-2, abs=1e-5)
            assert 0.0 <= values["rollout/hidden_share"] <= 1.0
    assert [values["rollout/age"] for values in logged.values()] == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6]


# -- memory ------------------------------------------------------------------------------------------------------


class Peak:
    """The peak of this process's resident memory over a block, above what it was before, bytes."""

    def __enter__(self) -> "Peak":
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._high_water_mark()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = self._high_water_mark() - self._before

    @staticmethod
    def _high_water_mark() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10


def with_hidden_states(prompts: Sequence[Prompt], *, share: range, first_rollout_id: int, **_: Any) -> Pool:
    """Return one rollout of each prompt: 512 tokens with hidden states of size 1024, 1 MiB a rollout."""
    size = (len(share), 512)
    mask, ids = torch.ones(size, dtype=torch.bool), torch.arange(share.start, share.stop) + first_rollout_id
    states = torch.ones(*size, 1024, dtype=torch.bfloat16) * ids[:, None, None]
    rollouts = Rollouts(ids[:, None], mask[:, :1], mask.long(), mask, mask.float(), ids, ids, ids, ids, ids)
    return Pool(rollouts, Targets(mask.float(), hidden=states))


def memory(rank: int) -> dict[str, tuple[int, float]]:
    """Return the peak memory and the seconds of the parts of a loader's work on 256 rollouts."""
    prompts = [Prompt(n, Problem(str(n), "", None), (n,)) for n in range(256)]
    sizes: dict[str, Any] = {"prompts_per_pool": 256, "batch_size": 2}
    made = RolloutLoader(prompts, with_hidden_states, rank=rank, world_size=2, **sizes)
    found = {}
    batches, seen = iter(made), []
    for name, count in (("first pass", 1), ("rest of it", 127), ("second pass", 1)):
        started = time.perf_counter()
        with Peak() as peak:
            parts = (
                (batch.rollouts.rollout_ids, batch.targets.state_dict()["hidden"][0, 5, 7])
                for batch in islice(batches, count)
            )
            seen += [(int(number), float(value)) for number, value in parts]
        found[name] = peak.bytes, time.perf_counter() - started
    assert all(number == value for number, value in seen)
    started = time.perf_counter()
    with Peak() as peak:
        state = made.state_dict()
    found["state"] = peak.bytes, time.perf_counter() - started
    assert rank or torch.equal(state["pool"]["targets"]["hidden"][:, 3, 9], torch.arange(256).bfloat16())
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="needs Linux to measure the peak")
def test_a_process_holds_its_share_and_what_is_under_way(pair: Processes) -> None:
    share, small = 128 << 20, 12 << 20  # a minibatch, tokens and log-probabilities
    for rank, found in enumerate(pair.run(memory)):
        print(rank, {name: f"{size / 2**20:.0f} MiB, {seconds:.2f} s" for name, (size, seconds) in found.items()})
        limits = {
            "first pass": share + exchanged_bytes(share),
            "rest of it": 0,
            "second pass": exchanged_bytes(share),
            "state": 2 * PART_BYTES if rank else gathered_bytes(2 * share, 2),
        }
        for name, limit in limits.items():
            assert found[name][0] < limit + small, (name, found[name])
        assert found["first pass"][0] > 2 * share  # what is measured is there
