"""Control gates against those of other packages that have one: the weights, and the gradient of a weighted loss."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opdlab.gating import GateInputs, build_gate
from tests.conformance.batch import FRESH, run
from tests.conformance.gate_formulas import INPUTS
from tests.conformance.others import against

MASK = INPUTS.mask.double()


def weights(name: str, inputs: GateInputs = INPUTS, **options: Any) -> torch.Tensor:
    return build_gate(name, **options)(inputs).weights


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@against("trl.experimental.iw_opd.iw_opd_trainer:IWOPDTrainer._compute_iw_opd_loss")
def test_iw_opd(other: Any, gamma: float) -> None:
    case = run("sampled_token", FRESH, clip=None)
    rollouts, mask = case.batch.rollouts, case.mask
    inputs = GateInputs(
        rollouts.tokens, mask, rollouts.behavior_logprobs, case.output.logprobs, case.batch.targets.logprobs
    )
    seen = weights("iw_opd", inputs, gamma=gamma)
    weighted = replace(case, output=replace(case.output, losses=case.output.losses * seen))
    metrics: Any = defaultdict(lambda: defaultdict(list))
    trainer = SimpleNamespace(
        temperature=1.0,
        iw_opd_epsilon=1e-12,
        iw_opd_gamma=gamma,
        model=SimpleNamespace(training=True),
        _metrics=metrics,
    )
    logits = torch.zeros(*mask.shape, case.student.shape[-1], dtype=torch.float64)
    logits = logits.masked_scatter(mask[..., None], case.student)
    labels = rollouts.tokens.masked_fill(~mask, -100)
    loss = other(trainer, logits, rollouts.tokens, labels, case.batch.targets.logprobs)
    # On fresh rollouts, the gradient of -log(pi) A is that of the unclipped surrogate; weights are float32.
    weighted.agrees(loss, values=False, rtol=1e-5, atol=1e-6)
    for name, value in (("min", seen[mask].min()), ("mean", seen[mask].mean()), ("max", seen[mask].max())):
        assert metrics["train"][f"iw_opd/{name}_weight"] == pytest.approx([float(value)], rel=1e-5)


@pytest.mark.parametrize("max_ratio", [1.3, 2.0])
@against("verl.trainer.ppo.rollout_corr_helper:compute_rollout_correction_weights")
def test_truncated_ratio(other: Any, max_ratio: float) -> None:
    theirs, _ = other(INPUTS.drift, MASK, "token", max_ratio)
    torch.testing.assert_close(weights("truncated_ratio", max_ratio=max_ratio), theirs.float())


@against("trl.experimental.sdpo.loss_utils:apply_importance_sampling_clipping")
def test_truncated_ratio_of_self_distillation(other: Any) -> None:
    losses = INPUTS.position_losses
    assert losses is not None
    theirs = other(losses * MASK, INPUTS.current_logprobs, INPUTS.behavior_logprobs, 1.3)
    torch.testing.assert_close((weights("truncated_ratio", max_ratio=1.3) * losses).float(), theirs.float())


@pytest.mark.parametrize(("low", "high"), [(0.7, 1.5), (0.5, 5.0)])
@against("verl.trainer.ppo.rollout_corr_helper:compute_rollout_correction_weights")
def test_ratio_mask(other: Any, low: float, high: float) -> None:
    theirs, _ = other(INPUTS.drift, MASK, "token", f"{low}_{high}")  # IcePop: the ratio inside the band, 0 outside
    seen = weights("ratio_mask", min_ratio=low, max_ratio=high)
    torch.testing.assert_close(seen * INPUTS.drift.exp().float(), theirs.float())
    assert set(seen[INPUTS.mask].tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("name", "options", "mode"),
    [
        ("ratio_mask", {"min_ratio": 0.7, "max_ratio": 1.5}, "token_k1"),
        ("sequence_ratio_mask", {"min_ratio": 0.8, "max_ratio": 1.3}, "seq_mean_k1"),
        ("sequence_ratio_mask", {"min_ratio": 0.7, "max_ratio": 2.0}, "seq_mean_k1"),
        ("sequence_ratio_mask", {"min_ratio": 0.8, "max_ratio": 5.0, "aggregate": "product"}, "seq_sum_k1"),
    ],
    ids=str,
)
@against("verl.trainer.ppo.rollout_corr_helper:compute_rollout_rejection_mask")
def test_masks(other: Any, name: str, options: dict[str, Any], mode: str) -> None:
    seen = weights(name, **options)
    # verl's band is that of the inverse ratio, of snapshot to student.
    band = f"{1 / options['max_ratio']}_{1 / options['min_ratio']}"
    theirs, _ = other(INPUTS.drift[:-1], MASK[:-1], mode, band)  # without the empty row
    assert torch.equal(seen[:-1], theirs.float())
    assert set(seen[INPUTS.mask].tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("share", [0.2, 0.5])
@against("trl.trainer.grpo_trainer:GRPOTrainer.get_high_entropy_mask")
def test_entropy_top_of_one_rollout(other: Any, share: float) -> None:
    # TRL takes the quantile of the whole batch; with one rollout of 40 tokens both keep the same number.
    alone = INPUTS.map(lambda values: values[:1])
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            pad_across_processes=lambda values, dim, pad_index: values, gather=lambda values: values
        )
    )
    theirs = other(trainer, alone.entropy, alone.mask, 1 - share)
    assert torch.equal(weights("entropy_top", alone, share=share, normalization="none"), theirs.float())
