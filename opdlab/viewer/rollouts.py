"""The shown rollouts of a step, with the values of each of their positions.

Shapes: B rollouts, P prompt tokens, T response tokens. Log-probabilities are in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opdlab.diagnostics.trace import StepTrace, to_host
from opdlab.rollouts import StopReason

_PADDING = -1  # no token id


@dataclass(frozen=True)
class ShownRollout:
    """A rollout of a training step, on the host.

    Args:
        rank: rank among the step's rollouts by mean absolute drift; 0 is the largest.
        num_ranked: number of ranked rollouts.
        rollout_id: unique within the run.
        prompt_id: the prompt's row in the prompt set.
        prompt_tokens: [P] long, without padding.
        tokens: [T] long: up to the last position that counts in the loss.
        mask: [T] bool: True for positions in the loss.
        segment_ids: [T] long, the gate's; -1 at masked positions.
        values: [T] float32 each, by the name of the quantity; see :mod:`opdlab.viewer.token_colors`.
        stop_reason: reason for the end of the response.
        correct: the verdict, or None.
        age: optimizer steps since the last refresh of the snapshot that sampled it.
        reuse_epoch: passes over its buffer before this one.
        teacher_prompt_tokens: [P'] long, without padding: the prompt that the teacher has seen; None if it has seen
            ``prompt_tokens``.
        demonstration: True if the response comes from the data.
    """

    rank: int
    num_ranked: int
    rollout_id: int
    prompt_id: int
    prompt_tokens: Tensor
    tokens: Tensor
    mask: Tensor
    segment_ids: Tensor
    values: dict[str, Tensor]
    stop_reason: StopReason
    correct: bool | None
    age: int
    reuse_epoch: int
    teacher_prompt_tokens: Tensor | None = None
    demonstration: bool = False

    @property
    def mean_drift(self) -> float:
        """Return the mean absolute drift over the positions in the loss, nats."""
        return float(self.values["drift"][self.mask].abs().mean())


def choose_rollouts(traces: Sequence[StepTrace], num_rollouts: int) -> list[ShownRollout]:
    """Return rollouts of a step that differ in drift, from the most drifted to the least.

    The step's rollouts that have a token in the loss are ranked by the mean of the absolute drift over those tokens,
    the earlier rollout first among equals. The choice is ``num_rollouts`` evenly spaced ranks from first to last, or
    all if there are fewer: with 3 the largest, the median and the smallest, with 1 the largest. It needs no random
    numbers and no scoring. It is made on the device, with one copy to the host.

    Args:
        traces: of the step's micro-batches.
        num_rollouts: number of rollouts, at least 1.

    Returns:
        At most ``num_rollouts``, in the order of their ranks.
    """
    columns = _joined([_columns(trace) for trace in traces])
    counts = columns["mask"].sum(1)
    mean = columns["value/drift"].abs().sum(1) / counts.clamp(min=1)
    order = mean.masked_fill(counts == 0, -1.0).argsort(descending=True, stable=True)  # those without a token come last
    num_ranked = (counts > 0).sum()
    # The number of ranks stays on the device.
    share = torch.linspace(0, 1, min(num_rollouts, len(order)), device=order.device)
    ranks = (share * (num_ranked - 1).clamp(min=0)).round().long()
    chosen = {name: tensor[order[ranks]] for name, tensor in columns.items()}
    host = to_host({**chosen, "rank": ranks, "num_ranked": num_ranked.expand(len(ranks))})
    rows = [{name: tensor[row] for name, tensor in host.items()} for row in range(len(ranks))]
    distinct = {int(row["rank"]): row for row in rows if row["num_ranked"]}  # with fewer rollouts a rank is repeated
    return [_shown(row) for row in distinct.values()]


def _columns(trace: StepTrace) -> dict[str, Tensor]:
    """Return the shown columns of all rollouts of a micro-batch: [B], [B, P] and [B, T]."""
    rollouts, inputs = trace.rollouts, trace.inputs
    prompts = {"prompt_tokens": rollouts.prompt_tokens.masked_fill(~rollouts.prompt_mask, _PADDING)}
    if rollouts.teacher_prompt_tokens is not None and rollouts.teacher_prompt_mask is not None:
        seen = rollouts.teacher_prompt_tokens.masked_fill(~rollouts.teacher_prompt_mask, _PADDING)
        prompts["teacher_prompt_tokens"] = seen
    values = {
        **trace.values,
        "drift": inputs.drift,
        "segment_drift": trace.gates.segment_drift,
        "weight": trace.gates.weights,
        "position_loss": inputs.position_losses,
        "behavior_logprob": inputs.behavior_logprobs,
        "student_logprob": inputs.current_logprobs,
        "teacher_logprob": inputs.teacher_logprobs,
        "teacher_gap": inputs.teacher_gap,
        "gradient_norm": trace.gradient_norms,
    }
    return {
        **{f"value/{name}": value.detach().float() for name, value in values.items() if value is not None},
        **prompts,
        "tokens": rollouts.tokens,
        "mask": rollouts.mask.long(),
        "segment_ids": trace.gates.segment_ids,
        "rollout_id": rollouts.rollout_ids,
        "prompt_id": rollouts.prompt_ids,
        "stop_reason": rollouts.stop_reasons,
        "correct": torch.full_like(rollouts.prompt_ids, -1) if rollouts.correct is None else rollouts.correct.long(),
        "age": trace.age,
        "demonstration": torch.zeros_like(rollouts.prompt_ids)
        if rollouts.demonstration is None
        else rollouts.demonstration.long(),
        "reuse_epoch": torch.full_like(rollouts.prompt_ids, trace.reuse_epoch),
    }


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the stacked micro-batches, padded to the longest of them."""
    joined = {}
    for name in (name for name in parts[0] if all(name in part for part in parts)):
        tensors = [part[name] for part in parts]
        width = max(tensor.shape[-1] for tensor in tensors)
        if tensors[0].dim() == 2:
            padding = _PADDING if name.endswith("prompt_tokens") else 0
            tensors = [nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=padding) for tensor in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def _shown(row: dict[str, Tensor]) -> ShownRollout:
    length = int(row["mask"].nonzero().max()) + 1
    verdict = int(row["correct"])
    named = ("rank", "num_ranked", "rollout_id", "prompt_id", "age", "reuse_epoch")
    numbers: dict[str, Any] = {name: int(row[name]) for name in named}
    prompts: dict[str, Any] = {name: row[name] for name in row if name.endswith("prompt_tokens")}
    return ShownRollout(
        **numbers,
        **{name: tokens[tokens != _PADDING] for name, tokens in prompts.items()},
        tokens=row["tokens"][:length],
        mask=row["mask"][:length].bool(),
        segment_ids=row["segment_ids"][:length],
        values={name.removeprefix("value/"): row[name][:length] for name in row if name.startswith("value/")},
        stop_reason=StopReason(int(row["stop_reason"])),
        correct=None if verdict < 0 else bool(verdict),
        demonstration=bool(row["demonstration"]),
    )
