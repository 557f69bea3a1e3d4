"""Samplers of other kinds: weights at each refresh, log-probabilities of their own, correction of the loss."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from opdlab.cli import EXIT_USAGE, main
from opdlab.cli.parsing import parse_fit
from opdlab.data import DemonstrationConfig
from opdlab.diagnostics import StepTrace
from opdlab.errors import UsageError
from opdlab.objectives import reduce_losses
from opdlab.policies import (
    BehaviorPolicy,
    LanguageModel,
    Sampler,
    Samples,
    SamplingConfig,
    TransformersSampler,
    sample_rollouts,
    sampler_registry,
)
from opdlab.progress import Progress
from tests.toy_run import STUDENT, Run

MakeRun = Callable[..., Run]


class CopyingSampler(TransformersSampler):
    """Samples from a copy of the weights, as an engine in another process does."""

    def __init__(self) -> None:
        self.refreshed_at: list[int] = []

    def refresh(self, model: LanguageModel, step: int) -> None:
        self.refreshed_at.append(step)
        super().refresh(copy.deepcopy(model), step)


class EngineSampler(CopyingSampler):
    """Gives log-probabilities of its own, which differ from the snapshot's."""

    gives_logprobs = True

    def __init__(self, difference: float = 0.0) -> None:
        super().__init__()
        self.difference = difference

    def sample(
        self, prompts: Sequence[Sequence[int]], streams: Tensor, config: SamplingConfig, progress: Progress
    ) -> Samples:
        inner = TransformersSampler()
        inner.refresh(self._model, 0)
        rollouts = sample_rollouts(inner, self._model, prompts, streams, config, progress=progress)
        logprobs = torch.zeros(rollouts.tokens.shape)
        for rows, scored in self._model.score_in_chunks(rollouts, 32):
            logprobs[rows] = scored.padded(scored.statistics().logprobs).detach()
        signs = 1.0 - 2.0 * (rollouts.tokens % 2)  # the engine finds even tokens more likely, odd ones less
        return Samples(rollouts.tokens, rollouts.mask, logprobs + self.difference * signs)


class Traces(Callback):
    """Keeps the trace of each step."""

    def __init__(self) -> None:
        self.steps: list[StepTrace] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append(outputs["trace"])


# -- weights ----------------------------------------------------------------------------------------------------------


def test_a_sampler_with_a_copy_of_the_weights_always_has_the_right_ones(make_run: MakeRun) -> None:
    # Evaluations of the student come between two buffers of one snapshot, so the copy must change to and fro.
    runs = []
    for sampler in (TransformersSampler(), CopyingSampler()):
        run = make_run(sampler=sampler, refresh=6, max_new_tokens=8)
        metrics: list[dict[str, float]] = []
        options: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": 2, "num_sanity_val_steps": 0}
        trainer = run.fit(9, **options)
        metrics.append({name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name})
        runs.append((run.recorder.losses, metrics))
    assert runs[0] == runs[1]
    assert isinstance(sampler, CopyingSampler)
    # The evaluations are at steps 2, 4, 6 and 8; the buffers begin at 0, 4 and 8, with the snapshots of 0, 0 and 6.
    assert sampler.refreshed_at == [0, 2, 4, 0, 6, 8, 6]


def test_weights_are_taken_over_only_if_they_have_changed() -> None:
    sampler = CopyingSampler()
    student = LanguageModel(STUDENT)
    behavior = BehaviorPolicy(student, SamplingConfig(max_new_tokens=8), sampler=sampler)

    def sample() -> Tensor:
        return behavior.sample([[5, 6, 7]] * 4, [0, 1, 2, 3], seed=0).tokens

    first = sample()
    assert torch.equal(sample(), first)
    assert sampler.refreshed_at == [0]
    state = copy.deepcopy(behavior.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.5)
    behavior.refresh(student, 7)
    assert not torch.equal(sample(), first)
    assert sampler.refreshed_at == [0, 7]
    behavior.load_state_dict(state)
    assert torch.equal(sample(), first)
    assert sampler.refreshed_at == [0, 7, 0]


def test_a_refresh_that_fails_is_tried_again() -> None:
    class Failing(CopyingSampler):
        def refresh(self, model: LanguageModel, step: int) -> None:
            super().refresh(model, step)
            if len(self.refreshed_at) == 1:
                raise ConnectionError

    sampler, model = Failing(), LanguageModel(STUDENT)
    with pytest.raises(ConnectionError):
        sampler.use(model, 0, 1)
    sampler.use(model, 0, 1)
    sampler.use(model, 0, 1)
    assert sampler.refreshed_at == [0, 0]


def test_another_model_than_the_student_is_never_given_to_the_sampler(make_run: MakeRun) -> None:
    sampler = CopyingSampler()
    run = make_run(sampler=sampler, max_new_tokens=8)
    trainer = run.fit(1, limit_val_batches=1.0)
    refreshed = len(sampler.refreshed_at)
    with run.module.evaluating("teacher", run.module.teacher.model):  # type: ignore[attr-defined]
        trainer.validate(run.module, datamodule=run.data, verbose=False)
    assert len(sampler.refreshed_at) == refreshed


# -- log-probabilities of their own -----------------------------------------------------------------------------------


def test_the_snapshot_scores_whatever_sampled(make_run: MakeRun) -> None:
    plain = make_run(max_new_tokens=12)
    plain.fit(2)
    run = make_run(sampler=EngineSampler(0.01), max_new_tokens=12)
    run.fit(2)
    assert run.recorder.losses == plain.recorder.losses  # without a correction only the log differs
    assert run.recorder.steps[1]["train/drift/max"] < 1e-5
    for step in run.recorder.steps.values():
        assert step["train/sampler_gap"] == pytest.approx(0.01, rel=1e-3)
        assert step["train/sampler_gap_max"] == pytest.approx(0.01, rel=1e-3)
    assert not [name for name in plain.recorder.steps[1] if "sampler" in name]


def test_a_large_difference_is_warned_of_once(make_run: MakeRun) -> None:
    run = make_run(sampler=EngineSampler(0.06), max_new_tokens=8)
    words = (
        r"at step 0 the log-probabilities of model.sampler differ from the snapshot's by 0.06 nats a token, more than"
    )
    with pytest.warns(UserWarning, match=words) as caught:
        run.fit(2)
    assert len([each for each in caught if "model.sampler" in str(each.message)]) == 1


@pytest.mark.parametrize(("kind", "factors", "accumulate"), [("tis", (2.0, 0.4066), 2), ("icepop", (0.0, 0.0), 1)])
def test_a_correction_multiplies_losses_and_no_weights(
    make_run: MakeRun, kind: str, factors: tuple[float, float], accumulate: int
) -> None:
    steps: list[list[StepTrace]] = []
    runs = []
    for correction in ("none", kind):
        traces = Traces()
        run = make_run(
            sampler=EngineSampler(0.9),
            sampler_correction=correction,
            callbacks=(traces,),
            accumulate=accumulate,
            max_new_tokens=12,
        )
        with pytest.warns(UserWarning, match="model.sampler differ"):
            run.fit(1)
        steps.append(traces.steps)
        runs.append(run)
    loss = torch.zeros(())
    for without, corrected in zip(*steps, strict=True):
        even = without.rollouts.tokens % 2 == 0
        # Even tokens are more likely in the engine, so their ratio is exp(-0.9), below the lower bound of icepop.
        factor = torch.where(even, factors[1], factors[0])
        assert torch.equal(corrected.gates.weights, without.gates.weights)
        torch.testing.assert_close(corrected.loss_shares, without.loss_shares * factor, rtol=1e-3, atol=0)
        losses = without.inputs.position_losses
        assert losses is not None
        assert torch.equal(corrected.inputs.position_losses, losses)
        loss = loss + reduce_losses(losses * factor, without.gates.weights, without.loss_shares)
    assert runs[1].recorder.losses == [pytest.approx(float(loss), rel=1e-3, abs=1e-7)]
    logged = runs[1].recorder.steps[1]
    rows = [trace.rollouts for trace in steps[0]]
    odd = torch.cat([(each.tokens % 2 == 1)[each.mask].float() for each in rows]).mean()
    assert logged["train/sampler_correction"] == pytest.approx(
        float(odd * factors[0] + (1 - odd) * factors[1]), rel=1e-3
    )
    share = float(odd) if kind == "tis" else 1.0
    assert logged["train/sampler_correction_share"] == pytest.approx(share, rel=1e-5)


def test_responses_from_the_data_are_not_corrected(make_run: MakeRun) -> None:
    traces = Traces()
    run = make_run(
        sampler=EngineSampler(3.0),
        sampler_correction="icepop",
        callbacks=(traces,),
        data={"demonstrations": DemonstrationConfig(0.5, "solution")},
        max_new_tokens=16,
    )
    with pytest.warns(UserWarning, match="model.sampler differ"):
        run.fit(2)
    for trace in traces.steps:
        assert trace.rollouts.demonstration is not None
        given = trace.rollouts.demonstration[:, None] & trace.rollouts.mask
        assert bool((trace.loss_shares[given] > 0).all())
        assert not trace.loss_shares[~given].any()  # all sampled tokens are beyond the bound
        assert torch.isfinite(trace.loss_shares).all()


def test_a_buffer_of_an_earlier_version_has_no_log_probabilities_of_a_sampler(make_run: MakeRun) -> None:
    loader: Any = make_run(max_new_tokens=8).fit(1).train_dataloader
    state = loader.state_dict()
    assert state["pool"]["rollouts"].pop("sampler_logprobs") is None
    other = make_run(max_new_tokens=8, sampler=EngineSampler(), sampler_correction="tis")
    other.fit(1)
    loader = other.data.train_dataloader()
    loader.load_state_dict(state)
    batch = next(iter(loader))
    assert batch.rollouts.sampler_logprobs is None
    with pytest.raises(
        UsageError, match="model.sampler_correction is 'tis', but the rollouts of this buffer have no lo"
    ):
        other.module.training_step(batch, 0)


# -- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: replace(s, tokens=s.tokens[1:]),
            r"returned tokens of shape \(1, \d\) with a mask of shape \(2, \d\)",
        ),
        (
            lambda s: replace(s, mask=torch.zeros_like(s.mask)),
            "up to 0 valid positions, but must return 2 responses of 1",
        ),
        (lambda s: replace(s, tokens=s.tokens + 40), "returned the token .* but the student has 38 tokens that it may"),
        (lambda s: replace(s, logprobs=None), "gives_logprobs is true, but its sample returned none: return them, or"),
    ],
)
def test_wrong_samples_are_refused(change: Callable[[Samples], Samples], message: str) -> None:
    class Wrong(EngineSampler):
        def sample(self, *arguments: Any) -> Samples:
            return change(super().sample(*arguments))

    model = LanguageModel(STUDENT)
    with pytest.raises(UsageError, match=message):
        BehaviorPolicy(model, SamplingConfig(max_new_tokens=4), sampler=Wrong()).sample([[5], [6]], [0, 1], seed=0)


def test_a_correction_needs_log_probabilities_of_the_sampler(make_run: MakeRun) -> None:
    words = "sampler_correction is 'tis', but sampler is TransformersSampler, which gives no log-probabilities of its"
    with pytest.raises(UsageError, match=words):
        make_run(sampler_correction="tis")
    with pytest.raises(UsageError, match="sampler_correction is 'ice'; did you mean 'icepop'"):
        make_run(sampler=EngineSampler(), sampler_correction="ice")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model.sampler_correction tis", "model.sampler_correction is 'tis', but sampler is TransformersSampler"),
        ("--model.sampler transformer", "unknown sampler 'transformer'; did you mean 'transformers'?"),
        (
            "--model.sampler vllm --model.eval_sampling.temperature 0.001",
            "model.eval_sampling.temperature is 0.001, but vLLM samples at 0.01 or above",
        ),
        (
            "--model.teacher ServedTeacher --model.teacher.url localhost:8700",
            "model.teacher.url is 'localhost:8700', but must begin with http:// or https://",
        ),
        ("--model.sampler my_samplers.Picky", "model.sampler.size is 0, but must be at least 1"),
    ],
)
def test_wrong_samplers_are_refused_before_models_are_loaded(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("my_samplers.py").write_text(
        "from opdlab.errors import require\nfrom opdlab.policies import TransformersSampler\n\n\n"
        "class Picky(TransformersSampler):\n"
        "    def __init__(self, size: int = 0) -> None:\n"
        '        require(size >= 1, f"size is {size}, but must be at least 1")\n'
    )
    options = ["--model.student.path", "nowhere", *arguments.split()]
    assert main(["fit", "-c", "quickstart", *options]) == EXIT_USAGE
    assert message in capsys.readouterr().err


def test_the_name_of_a_sampler_stands_for_its_class(tmp_path: Path) -> None:
    assert "transformers" in sampler_registry().names()
    given = parse_fit(["-c", "quickstart", "--model.sampler", "transformers"]).model.sampler
    path = tmp_path / "own.yaml"
    path.write_text("extends: quickstart\nmodel: {sampler: transformers}\n")
    for sampler in (given, parse_fit(["-c", str(path)]).model.sampler):
        assert sampler.class_path.startswith("opdlab.policies.")
        assert sampler.class_path.endswith(".TransformersSampler")
    assert parse_fit(["-c", str(path), "--model.sampler", "null"]).model.sampler is None
    assert parse_fit(["-c", "quickstart"]).model.sampler is None


def test_a_class_that_is_no_sampler_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "quickstart", "--model.sampler", "opdlab.toy.ChainProblems"]) == EXIT_USAGE
    assert "model.sampler" in capsys.readouterr().err


def test_the_interface_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Sampler()  # type: ignore[abstract]
