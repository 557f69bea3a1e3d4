"""Log-probabilities of an engine that sampled, beside the snapshot's: the correction of the loss, and a warning.

Shapes: B rollouts, T response tokens. Log-probabilities are in nats.
"""

from typing import get_args

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from opdlab.errors import require
from opdlab.objectives.divergences import require_choice
from opdlab.objectives.functional import Correction, sampler_correction
from opdlab.policies import Sampler
from opdlab.types import Rollouts

LARGEST_MEAN_GAP = 0.05
"""Mean difference in nats per token above which a run warns."""


def check_correction(kind: str, sampler: Sampler) -> None:
    """Raise a UsageError if a correction is unknown, or its sampler gives no log-probabilities."""
    require_choice("sampler_correction", kind, get_args(Correction))
    require(
        kind == "none" or sampler.gives_logprobs,
        f"sampler_correction is '{kind}', but sampler is {type(sampler).__name__}, which gives no log-probabilities "
        "of its own to compare with the snapshot's: set it to none",
    )


def corrected(shares: Tensor, rollouts: Rollouts, kind: Correction) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the shares of the positions in the loss times the correction, and values of the positions for the log.

    The weights of the gate do not contain the correction, and the denominators of the loss count all positions.

    Args:
        shares: [B, T], see :func:`opdlab.objectives.loss_shares`.
        rollouts: with behavior log-probabilities.
        kind: see :func:`opdlab.objectives.functional.sampler_correction`.

    Returns:
        [B, T], and [B, T] each by name: ``sampler_gap``, the absolute difference in nats, 0 for tokens that no engine
        sampled; with a correction also its factor and 1 where its bound acts.

    Raises:
        UsageError: there is a correction, but the rollouts have no log-probabilities of their sampler.
    """
    engine = rollouts.sampler_logprobs
    if engine is None:
        require(
            kind == "none",
            f"model.sampler_correction is '{kind}', but the rollouts of this buffer have no log-probabilities of their "
            "sampler, which knows none at their temperature and top_p, or took them before it was chosen: set it to "
            "none",
        )
        return shares, {}
    values = {"sampler_gap": (rollouts.behavior_logprobs - engine).abs().masked_fill(engine.isnan(), 0.0)}
    if kind == "none":
        return shares, values
    factors, bound_acts = sampler_correction(rollouts.behavior_logprobs, engine, kind)
    values |= {"sampler_correction": factors, "sampler_correction_share": bound_acts.float()}
    return shares * factors, values


def warn_if_large(gap: float, step: int) -> bool:
    """Warn if the mean difference of an optimizer batch is above its bound, and return whether it is.

    Args:
        gap: ``train/sampler_gap``, nats per token.
        step: optimizer steps taken.
    """
    if gap <= LARGEST_MEAN_GAP:
        return False
    rank_zero_warn(
        f"at step {step} the log-probabilities of model.sampler differ from the snapshot's by {gap:.3g} nats a token, "
        f"more than {LARGEST_MEAN_GAP}: compare dtype, temperature and weights of both, or set "
        "model.sampler_correction to tis or icepop"
    )
    return True
