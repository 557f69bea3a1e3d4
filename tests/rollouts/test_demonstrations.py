"""Responses from the data in place of sampled ones, and positions that count in nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opdlab.callbacks import PoolRecorder, SampleLogger
from opdlab.data import DemonstrationConfig, JsonlProblems, PromptDataModule
from opdlab.errors import UsageError
from opdlab.gating import DriftGate, GateInputs
from opdlab.objectives import SampledTokenOPD
from opdlab.policies import BehaviorPolicy, LanguageModel, LocalTeacher, SamplingConfig, TeacherRequest
from opdlab.replay import read_record, record_folders
from opdlab.rollouts import Collector, Pool, StopReason
from opdlab.rollouts.demonstrations import choose_demonstrations
from opdlab.toy import ChainProblems, chain_tokenizer
from opdlab.types import Part, Problem, Prompt
from opdlab.verifiers import BoxedVerifier
from tests.test_resume import SaveAt
from tests.toy_run import STUDENT, TEACHER, Run

MakeRun = Callable[..., Run]
EOS = 1


@pytest.fixture(scope="module")
def student() -> LanguageModel:
    return LanguageModel(STUDENT)


@pytest.fixture(scope="module")
def teacher() -> LocalTeacher:
    return LocalTeacher(TEACHER)


def encode(text: str) -> list[int]:
    ids: list[int] = chain_tokenizer()(text)["input_ids"]
    return ids


def prompts(*responses: str, loss: bool = True) -> list[Prompt]:
    made = []
    for index, text in enumerate(responses):
        ids = tuple(encode(text))
        problem = Problem(str(index), f"{index}2 a+1\n", "3")
        made.append(Prompt(index, problem, tuple(encode(problem.text)), None, ids, (loss,) * len(ids)))
    return made


def collected(student: LanguageModel, teacher: LocalTeacher, given: list[Prompt], share: float, **options: Any) -> Pool:
    sampling = SamplingConfig(**{"num_samples": 2, "max_new_tokens": 12, **options.pop("sampling", {})})
    behavior = BehaviorPolicy(student, sampling)
    collector = Collector(behavior, teacher, TeacherRequest(top_k=3))
    return collector.collect(given, seed=3, demonstrations=share, **options)


def text_of(pool: Pool, row: int) -> list[int]:
    tokens: list[int] = pool.rollouts.tokens[row][pool.rollouts.mask[row]].tolist()
    return tokens


@torch.no_grad()
def own_logprobs(model: LanguageModel, prompt: Any, response: list[int]) -> Tensor:
    logits = model.model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("share", "counts"), [(0.25, (0, 1)), (0.5, (1, 1)), (0.75, (1, 2)), (1.0, (2, 2))])
def test_a_share_of_the_buffer_comes_from_the_data(
    student: LanguageModel, teacher: LocalTeacher, share: float, counts: tuple[int, int]
) -> None:
    given = prompts("a+1: 2", "7", "a+1: 12+1=13\n", "=")
    pool = collected(student, teacher, given, share)
    rollouts, marked = pool.rollouts, pool.rollouts.demonstration
    assert marked is not None
    assert int(marked.sum()) == share * 8 == pool.metrics["rollout/demonstration_share"] * 8
    assert {int(marked[2 * index : 2 * index + 2].sum()) for index in range(4)} == set(counts)
    assert rollouts.prompt_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for row in range(8):
        prompt, response = given[row // 2], text_of(pool, row)
        own = rollouts.prompt_tokens[row][rollouts.prompt_mask[row]]
        assert tuple(own.tolist()) == prompt.tokens
        if marked[row]:
            whole = [*(prompt.demonstration or ()), EOS]
            assert response == whole[:12]
            reason = StopReason.EOS if len(whole) <= 12 else StopReason.LENGTH
            assert rollouts.stop_reasons[row] == reason
        for values, model in ((rollouts.behavior_logprobs, student), (pool.targets.logprobs, teacher.model)):
            expected = own_logprobs(model, prompt.tokens, response)
            torch.testing.assert_close(values[row][rollouts.mask[row]], expected, rtol=0, atol=1e-4)


def test_a_share_is_rounded_and_the_seed_chooses_the_prompts() -> None:
    given = prompts("1", "2", "3", "4")
    counts = [[one.count for one in choose_demonstrations(given, 2, 0.6, seed) or ()] for seed in range(20)]
    assert {tuple(sorted(each)) for each in counts} == {(1, 1, 1, 2)}  # 4.8 rollouts
    assert {each.index(2) for each in counts} == set(range(4))


def test_share_zero_is_the_run_without(student: LanguageModel, teacher: LocalTeacher) -> None:
    without = collected(student, teacher, [replace(each, demonstration=None) for each in prompts("1", "2")], 0.0)
    assert without.rollouts.demonstration is None
    assert "rollout/demonstration_share" not in without.metrics
    assert torch.equal(without.rollouts.tokens, collected(student, teacher, prompts("1", "2"), 0.0).rollouts.tokens)


def test_stop_tokens_and_length(student: LanguageModel, teacher: LocalTeacher) -> None:
    pool = collected(student, teacher, prompts("1" * 11, "1" * 12, "2<eos>34"), 1.0)
    assert [text_of(pool, row) for row in (0, 2, 4)] == [[*encode("1" * 11), EOS], encode("1" * 12), encode("2<eos>")]
    assert pool.rollouts.stop_reasons[::2].tolist() == [StopReason.EOS, StopReason.LENGTH, StopReason.EOS]


@pytest.mark.parametrize(("stop_ids", "appended"), [([EOS, 29, 33], EOS), ([29, 33], 29)])
def test_the_tokenizers_stop_token_is_appended(
    student: LanguageModel, teacher: LocalTeacher, monkeypatch: pytest.MonkeyPatch, stop_ids: list[int], appended: int
) -> None:
    monkeypatch.setattr(student, "stop_ids", stop_ids)
    pool = collected(student, teacher, prompts("1"), 1.0)
    assert text_of(pool, 0) == [*encode("1"), appended]
    assert pool.rollouts.stop_reasons.tolist() == [StopReason.EOS] * 2


def test_accuracy_is_that_of_sampled_rollouts(student: LanguageModel, teacher: LocalTeacher) -> None:
    answer = r"\boxed{3}"
    half = collected(student, teacher, prompts(answer, answer), 0.5, verifier=BoxedVerifier())
    assert half.rollouts.correct is not None
    assert half.rollouts.correct[::2].tolist() == [1, 1]
    assert half.metrics["rollout/accuracy"] == float(half.rollouts.correct[1::2].float().mean())
    whole = collected(student, teacher, prompts(answer, answer), 1.0, verifier=BoxedVerifier())
    assert "rollout/accuracy" not in whole.metrics
    assert whole.metrics["rollout/sampled_tokens_per_second"] == 0


# -- positions that count in nothing ----------------------------------------------------------------------------------


def with_tool(index: int = 0) -> Prompt:
    """A response whose middle is the output of a tool."""
    ids, flags = encode("a+1: 2+1=3\n"), [True] * 5 + [False] * 5 + [True]
    problem = Problem(str(index), "2 a+1\n", "3")
    return Prompt(index, problem, tuple(encode(problem.text)), None, tuple(ids), tuple(flags))


def test_uncounted_positions_are_conditioned_on_and_count_in_nothing(
    student: LanguageModel, teacher: LocalTeacher
) -> None:
    prompt = with_tool()
    pool = collected(student, teacher, [prompt], 1.0, sampling={"num_samples": 1})
    rollouts = pool.rollouts
    assert rollouts.loss_mask is None
    assert prompt.demonstration is not None
    kept = torch.tensor([*prompt.demonstration_loss, True])
    assert torch.equal(rollouts.mask[0], kept)
    for values, model in ((rollouts.behavior_logprobs, student), (pool.targets.logprobs, teacher.model)):
        expected = own_logprobs(model, prompt.tokens, [*prompt.demonstration, EOS])
        torch.testing.assert_close(values[0][kept], expected[kept], rtol=0, atol=1e-4)
        assert not values[0][~kept].any()


class Watched(DriftGate):
    """Keeps the masks that a gate receives."""

    def __init__(self) -> None:
        super().__init__(tau=1.0)
        self.masks: list[Tensor] = []

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        self.masks.append(inputs.mask.clone())
        return torch.zeros_like(inputs.tokens)


def rows_file(folder: Path, solution: Any = None) -> str:
    path = folder / "rows.jsonl"
    rows = [
        {"id": each.id, "problem": each.text, "answer": each.answer, "solution": solution or f"={each.answer}"}
        for each in ChainProblems(16).problems()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_gate_and_loss_leave_uncounted_positions_out(make_run: MakeRun, tmp_path: Path) -> None:
    parts = [{"content": "a+1"}, {"content": ": 2", "loss": False}, {"content": "=\n"}]
    data = {
        "train": JsonlProblems(rows_file(tmp_path, parts)),
        "demonstrations": DemonstrationConfig(1.0, "solution"),
    }
    gate = Watched()
    run = make_run(data=data, gate=gate, callbacks=(PoolRecorder(steps=[1]),), max_new_tokens=9)
    trainer = run.fit(1)
    expected = torch.tensor([True] * 3 + [False] * 3 + [True] * 3)  # the last one is the stop token
    assert torch.equal(gate.masks[0], expected.expand(8, 9))
    (folder,) = record_folders(Path(str(trainer.log_dir))).values()
    (batch,) = read_record(folder).batches
    assert torch.equal(batch.shares, expected.expand(8, 9) / (6 * 8))
    assert batch.rollouts.demonstration is not None
    assert bool(batch.rollouts.demonstration.all())


# -- in a run ---------------------------------------------------------------------------------------------------------


def demonstrated(make_run: MakeRun, share: float = 0.5, **options: Any) -> Run:
    data = {"demonstrations": DemonstrationConfig(share, "solution"), **options.pop("data", {})}
    return make_run(data=data, **options)


def test_a_resumed_run_goes_on_with_its_demonstrations(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "inside.ckpt"
    pages = SampleLogger(every_n_steps=1, num_rollouts=8)
    whole = demonstrated(make_run, callbacks=(pages,), max_new_tokens=24)
    whole.trainer_options["callbacks"].append(SaveAt(path, 2))
    trainer = whole.fit(6)
    assert whole.recorder.steps[1]["rollout/demonstration_share"] == 0.5
    # Fresh rollouts have no drift, demonstrations included; later they drift as all others.
    assert whole.recorder.steps[1]["train/drift/max"] < 1e-5
    assert whole.recorder.steps[3]["train/drift/max"] > 1e-3
    page = (Path(str(trainer.log_dir)) / "rollouts" / "step-000001.html").read_text()
    assert '"demonstration":true' in page
    assert '"demonstration":false' in page
    resumed = demonstrated(make_run, max_new_tokens=24)
    resumed.fit(6, ckpt_path=path)
    assert resumed.recorder.losses == whole.recorder.losses[2:]
    with pytest.raises(UsageError, match="data.demonstrations.share is 0.25, but 0.5 in ckpt_path"):
        demonstrated(make_run, 0.25, max_new_tokens=24).fit(6, ckpt_path=path)


def test_biased_estimators_are_warned_of(make_run: MakeRun) -> None:
    with pytest.warns(UserWarning, match="policy_gradient from sampled tokens, but nobody sampled the tokens of demo"):
        demonstrated(make_run, objective=SampledTokenOPD(), max_new_tokens=8).fit(1)


@pytest.mark.parametrize(
    ("solution", "message"),
    [
        ([{"content": 1.5, "loss": 1}], "line 1: the field 'solution.0.loss' is 1, but must be true or false"),
        ([{"text": "1"}], "line 1, has no field 'content'"),
        (["1"], "line 1: the field 'solution.0' is a str, but must have content"),
        ([{"content": "1", "loss": False}], "line 1: the field 'solution' has no part that counts in the loss"),
        ({"a": 1}, "the field 'solution' is a dict, but must be text or a finite number or a list of parts"),
    ],
)
def test_wrong_fields_are_refused_with_the_row(tmp_path: Path, solution: Any, message: str) -> None:
    data = PromptDataModule(
        JsonlProblems(rows_file(tmp_path, solution)), demonstrations=DemonstrationConfig(0.5, "solution")
    )
    with pytest.raises(UsageError, match=message):
        data.prepare(chain_tokenizer(), training=True)


def test_wrong_use_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    for share in (-0.1, 1.5):
        with pytest.raises(UsageError, match=f"share is {share}, but must be a share from 0 to 1"):
            DemonstrationConfig(share)
    with pytest.raises(UsageError, match="share is 0.01, which is no rollout of a buffer of 16: raise it, or set it"):
        demonstrated(make_run, 0.01).fit(1)
    with pytest.raises(UsageError, match="no field 'solutions'; its fields: problem, answer, solution"):
        make_run(data={"demonstrations": DemonstrationConfig(0.5, "solutions")}).fit(1)
    with pytest.raises(UsageError, match="share is 0.5, but row 1 of .* .id 'train-0-0'. has no demonstration: give"):
        make_run(data={"demonstrations": DemonstrationConfig(0.5)}).fit(1)


def test_a_source_may_give_parts_itself(student: LanguageModel, teacher: LocalTeacher) -> None:
    class Own(ChainProblems):
        def problems(self) -> list[Problem]:
            return [replace(each, demonstration=(Part("1"), Part("2", loss=False))) for each in super().problems()]

    data = PromptDataModule(Own(4), demonstrations=DemonstrationConfig(1.0))
    data.prepare(student.tokenizer, training=True)
    assert data.train_prompts is not None
    pool = collected(student, teacher, list(data.train_prompts.prompts), 1.0)
    assert pool.rollouts.mask.int().tolist() == [[1, 0, 1]] * 8
