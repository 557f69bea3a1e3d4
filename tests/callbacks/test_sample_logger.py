"""SampleLogger on real runs of the toy world; the pages themselves are in test_viewer and in tests/browser."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opdlab.callbacks import GateMonitor, SampleLogger
from opdlab.diagnostics import StepTrace
from opdlab.errors import UsageError
from opdlab.gating import DriftGate, GateInputs
from opdlab.objectives import SampledTokenOPD
from opdlab.rollouts import Pool
from tests.toy_run import Run
from tests.viewer_pages import page_data

MakeRun = Callable[..., Run]


class Keeper(SampleLogger):
    """Keeps the traces that it was shown."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: dict[int, list[StepTrace]] = {}

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, traces: Sequence[StepTrace]) -> None:
        self.kept[trainer.global_step] = list(traces)
        super().on_step(trainer, pl_module, traces)


class ParityGate(DriftGate):
    """Even and odd positions: segments that are no runs."""

    def segment_ids(self, inputs: GateInputs) -> torch.Tensor:
        return torch.arange(inputs.mask.shape[1]).remainder(2).expand(inputs.mask.shape)


def pages(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "rollouts").glob("step-*.html"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_pages_are_written_at_their_steps(make_run: MakeRun, tmp_path: Path, accumulate: int) -> None:
    keeper = Keeper(every_n_steps=2, num_rollouts=3)
    trainer = make_run(callbacks=(keeper,), accumulate=accumulate).fit(5)
    assert trainer.log_dir is not None
    assert pages(Path(trainer.log_dir)) == ["step-000002.html", "step-000004.html"]
    for step, traces in keeper.kept.items():
        assert len(traces) == accumulate
        read = page_data(Path(trainer.log_dir) / f"rollouts/step-{step:06d}.html")["rollouts"]
        assert_values(read, traces)
        drift = torch.cat([(t.inputs.drift.abs().sum(1) / t.rollouts.num_tokens) for t in traces])
        ids = torch.cat([trace.rollouts.rollout_ids for trace in traces])
        if step == 2:  # the snapshot is refreshed after step 3
            assert float(drift.max()) > 0
        assert read[0]["id"] == ids[drift.argmax()]


def assert_values(read: list[dict[str, Any]], traces: Sequence[StepTrace]) -> None:
    """What the page has of each rollout is what its trace has."""
    for rollout in read:
        trace, row = next(
            (t, t.rollouts.rollout_ids.tolist().index(rollout["id"]))
            for t in traces
            if rollout["id"] in t.rollouts.rollout_ids
        )
        mask = trace.inputs.mask[row].bool()
        expected = {
            **trace.values,
            "drift": trace.inputs.drift,
            "weight": trace.gates.weights,
            "segment_drift": trace.gates.segment_drift,
            "position_loss": trace.inputs.position_losses,
            "behavior_logprob": trace.inputs.behavior_logprobs,
            "student_logprob": trace.inputs.current_logprobs,
            "teacher_logprob": trace.inputs.teacher_logprobs,
        }
        assert rollout["values"].keys() == {*expected, "teacher_gap"}
        for name, values in expected.items():
            assert values is not None
            assert rollout["values"][name] == values[row][mask].tolist(), name
        assert rollout["segments"] == trace.gates.segment_ids[row][mask].tolist()
        assert rollout["ids"] == trace.rollouts.tokens[row][mask].tolist()
        assert (rollout["age"], rollout["reuse_epoch"]) == (int(trace.age[row]), trace.reuse_epoch)


@pytest.mark.parametrize("gate", ["span", "token"])
def test_the_other_objective_and_gates(make_run: MakeRun, gate: str) -> None:
    keeper = Keeper(every_n_steps=1, num_rollouts=2)
    trainer = make_run(callbacks=(keeper,), objective=SampledTokenOPD(), gate=gate).fit(2)
    assert trainer.log_dir is not None
    data = page_data(Path(trainer.log_dir) / "rollouts/step-000002.html")
    assert_values(data["rollouts"], keeper.kept[2])
    assert {"advantage", "clip_share"} <= {quantity["name"] for quantity in data["quantities"]}


def test_a_gate_whose_segments_are_no_runs(make_run: MakeRun) -> None:
    keeper = Keeper(every_n_steps=1)
    run = make_run(callbacks=(keeper,))
    run.module.gate = ParityGate(tau=2.0)
    trainer = run.fit(2)
    assert trainer.log_dir is not None
    assert_values(page_data(Path(trainer.log_dir) / "rollouts/step-000002.html")["rollouts"], keeper.kept[2])


def test_text_and_gold_answer_are_shown(make_run: MakeRun, tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="events")
    keeper = Keeper(every_n_steps=3, num_rollouts=2)
    run = make_run(callbacks=(keeper,), max_new_tokens=150)
    run.fit(3, logger=logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith("rollouts/")]
    assert tags == ["rollouts/0/text_summary", "rollouts/1/text_summary"]
    (event,) = events.Tensors(tags[0])
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 3
    (shown, _) = page_data(Path(logger.log_dir) / "rollouts/step-000003.html")["rollouts"]
    trace = keeper.kept[3][0]
    row = trace.rollouts.rollout_ids.tolist().index(shown["id"])
    assert run.data.train_prompts is not None
    problem = run.data.train_prompts.prompts[int(trace.rollouts.prompt_ids[row])].problem
    tokens = trace.rollouts.tokens[row][trace.rollouts.mask[row]]
    response = run.module.student.tokenizer.decode(tokens)
    assert "".join(shown["texts"]) == response
    assert shown["special"] == [index for index, text in enumerate(shown["texts"]) if text == "<eos>"] != []
    assert (shown["gold"], shown["prompt"]) == (problem.answer, problem.text)
    assert shown["stop"] == ("eos" if response.endswith("<eos>") else "length")
    assert trace.rollouts.correct is not None
    assert shown["correct"] == bool(trace.rollouts.correct[row])
    for block in (problem.text.strip(), response, str(problem.answer)):
        assert "    " + block.replace("\n", "\n    ") in text
    assert f"answer: **{'correct' if shown['correct'] else 'wrong'}**" in text
    assert re.search(r"stopped by: \*\*(eos|length)\*\* · age: \*\*2 steps\*\*", text)


def test_a_step_of_which_every_token_is_left_out_has_no_page(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(callbacks=(SampleLogger(every_n_steps=1), GateMonitor(every_n_steps=1)))
    collect = run.module.collect

    def without_tokens(*arguments: Any, **options: Any) -> Pool:
        pool = collect(*arguments, **options)
        nothing = torch.zeros_like(pool.rollouts.mask)
        return replace(pool, rollouts=replace(pool.rollouts, mask=nothing))

    run.module.collect = without_tokens  # type: ignore[method-assign]
    run.fit(2, logger=TensorBoardLogger(str(tmp_path), name="", version=""))
    assert run.recorder.losses == [0.0, 0.0]
    assert not list(tmp_path.rglob("*.html"))


class WithoutProblems(SampleLogger):
    """A logger whose data module no longer knows its problems."""

    def on_step(self, trainer: Any, pl_module: pl.LightningModule, traces: Sequence[StepTrace]) -> None:
        trainer.datamodule.train_prompts = None
        super().on_step(trainer, pl_module, traces)


def test_problems_that_are_not_known_are_left_out(make_run: MakeRun) -> None:
    trainer = make_run(callbacks=(WithoutProblems(every_n_steps=1),)).fit(1)
    assert trainer.log_dir is not None
    shown = page_data(Path(trainer.log_dir) / "rollouts/step-000001.html")["rollouts"]
    assert [rollout["gold"] for rollout in shown] == [None] * len(shown)


def test_without_a_logger_pages_are_in_the_root(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(callbacks=(SampleLogger(every_n_steps=1),)).fit(1, logger=False)
    assert pages(tmp_path) == ["step-000001.html"]


def test_an_unwritable_folder_is_warned_of_once_and_training_goes_on(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "rollouts").write_text("a file where the folder should be")
    run = make_run(callbacks=(SampleLogger(every_n_steps=1),))
    with pytest.warns(UserWarning, match="rollouts cannot be written .*training goes on") as caught:
        trainer = run.fit(3, logger=False)
    assert trainer.global_step == 3
    assert len([warning for warning in caught if "cannot be written" in str(warning.message)]) == 1


def test_training_is_not_changed_by_looking(make_run: MakeRun) -> None:
    plain, watched = make_run(), make_run(callbacks=(SampleLogger(every_n_steps=1),))
    plain.fit(3, logger=False)
    watched.fit(3, logger=False)
    assert plain.recorder.losses == watched.recorder.losses


def test_bad_options_are_refused() -> None:
    with pytest.raises(UsageError, match="every_n_steps is 0"):
        SampleLogger(every_n_steps=0)
    with pytest.raises(UsageError, match="num_rollouts is 0"):
        SampleLogger(num_rollouts=0)
