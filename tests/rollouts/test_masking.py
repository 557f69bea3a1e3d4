"""Tokens that are left out of the loss, and only of the loss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opdlab.diagnostics import step_metrics
from opdlab.errors import UsageError
from opdlab.objectives import loss_shares, reduce_losses
from opdlab.rollouts import Rollouts
from opdlab.rollouts.masking import mask_first_occurrences
from tests.policies.tiny_models import rollouts
from tests.test_resume import SaveAt
from tests.toy_run import Run

MakeRun = Callable[..., Run]


def expected_mask(batch: Rollouts, token_ids: list[int]) -> torch.Tensor:
    """The same, by hand."""
    mask = batch.mask.clone()
    for row, tokens in enumerate(batch.tokens.tolist()):
        for token in token_ids:
            places = [column for column, other in enumerate(tokens) if other == token and batch.mask[row, column]]
            if places:
                mask[row, places[0]] = False
    return mask


def test_first_occurrences_leave_the_mask() -> None:
    batch = rollouts()
    # Few different tokens, so that they occur again; also at masked positions.
    batch = replace(batch, tokens=3 + batch.tokens % 3, behavior_logprobs=-batch.mask.float())
    for token_ids in ([], [3], [4, 5], [3, 4, 5], [37]):
        masked = mask_first_occurrences(batch, token_ids)
        assert torch.equal(masked.mask, expected_mask(batch, token_ids))
        assert torch.equal(masked.behavior_logprobs, -masked.mask.float())
        assert torch.equal(masked.tokens, batch.tokens)
    assert not torch.equal(mask_first_occurrences(batch, [3]).mask, batch.mask)


@pytest.mark.parametrize("gate", ["span", "block32", "token", "sequence"])
def test_a_run_with_holes(make_run: MakeRun, gate: str) -> None:
    plain, masked = make_run(gate=gate), make_run(gate=gate, mask_first=["<eos>", "1", "+"])
    plain.fit(1)
    masked.fit(4)
    first, other = plain.recorder.steps[1], masked.recorder.steps[1]
    for name in ("rollout/length", "rollout/truncated_share", "rollout/accuracy"):
        assert other.get(name) == first.get(name)
    assert other["train/loss"] != first["train/loss"]
    assert all(torch.isfinite(torch.tensor(loss)) for loss in masked.recorder.losses)


def test_resume_with_holes(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    whole = make_run(gate="span", mask_first=["1", "2"])
    whole.trainer_options["callbacks"].append(SaveAt(path, 2))
    whole.fit(5)
    state = torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["pool"]
    saved = Rollouts.from_state_dict(state["rollouts"])
    holes = (saved.mask.int().diff(dim=1) == 1).any(1)  # valid again after a hole
    assert bool(holes.any())
    resumed = make_run(gate="span", mask_first=["1", "2"])
    resumed.fit(5, ckpt_path=path)
    assert resumed.recorder.losses == whole.recorder.losses[2:]


def test_what_is_no_token_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(UsageError, match="mask_first has '12', which is no single token"):
        make_run(mask_first=["12"])


def test_a_batch_without_any_position_left_is_worth_nothing() -> None:
    empty = torch.zeros(2, 3, dtype=torch.bool)
    losses = torch.ones(2, 3, requires_grad=True)
    for reduction in ("token_mean", "sequence_mean"):
        shares = loss_shares(empty, reduction=reduction, num_tokens=0, num_rollouts=0)
        loss = reduce_losses(losses, torch.zeros(2, 3), shares)
        assert loss.detach() == 0
    nothing = torch.zeros(0)
    assert step_metrics({"drift": nothing, "segment_drift": nothing, "weight": nothing, "entropy": nothing}) == {}
