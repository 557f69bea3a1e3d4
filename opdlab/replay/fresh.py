"""Fresh rollouts of a recorded step's student: the rollouts of a step without reuse.

Shapes: B rollouts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from opdlab.module import OPDModule
from opdlab.objectives import loss_shares
from opdlab.replay.record import RecordedBatch, RecordedStep
from opdlab.replay.step_gradients import Autocast, StepGradients
from opdlab.seeds import derive_seed
from opdlab.types import Problem, Prompt, trimmed

Tokens = tuple[int, ...]


def recorded_prompts(record: RecordedStep, names: Sequence[str] = ()) -> list[Prompt]:
    """Return the prompt of each rollout of a step, and what the teacher has seen instead.

    Args:
        record: of the step.
        names: of the teachers, if there are several.
    """
    prompts = []
    for rollouts in (batch.rollouts for batch in record.batches):
        own = _unpadded(rollouts.prompt_tokens, rollouts.prompt_mask)
        seen: list[Tokens | None] = [None] * len(own)
        if rollouts.teacher_prompt_tokens is not None and rollouts.teacher_prompt_mask is not None:
            seen = list(_unpadded(rollouts.teacher_prompt_tokens, rollouts.teacher_prompt_mask))
        ids = [None] * len(own) if rollouts.teacher_ids is None else rollouts.teacher_ids.tolist()
        for index, teacher, tokens, of_teacher in zip(rollouts.prompt_ids.tolist(), ids, own, seen, strict=True):
            problem = Problem(str(index), "", None, teacher=None if teacher is None else names[teacher])
            prompts.append(Prompt(index, problem, tokens, of_teacher))
    return prompts


def _unpadded(tokens: Tensor, mask: Tensor) -> list[Tokens]:
    return [tuple(row[valid].tolist()) for row, valid in zip(tokens, mask, strict=True)]


def other_prompts(record: RecordedStep, prompts: Sequence[Prompt], draw: int, seed: int) -> list[Prompt]:
    """Return prompts of the run that the step has not used: as many as the step has, or all if there are fewer."""
    used = {int(i) for batch in record.batches for i in batch.rollouts.prompt_ids}
    free = torch.tensor([index for index in range(len(prompts)) if index not in used], dtype=torch.long)
    generator = torch.Generator().manual_seed(derive_seed("other prompts", seed, record.number, draw))
    chosen = free[torch.randperm(len(free), generator=generator)][: sum(len(b.rollouts) for b in record.batches)]
    return [prompts[index] for index in chosen.tolist()]


def fresh_gradients(
    module: OPDModule, record: RecordedStep, draws: Sequence[Sequence[Prompt]], seed: int, autocast: Autocast
) -> Tensor:
    """Return ungated gradients on rollouts that the student samples now, one response to each prompt.

    The teacher scores them, and the behavior log-probabilities are the student's own, as in training when the student
    itself is the sampling policy.

    Args:
        module: with the student's weights from before the step, and a sampler of one response per prompt.
        record: of the step; the batch is cut into as many micro-batches.
        draws: the prompts of each draw.
        seed: of the sampling.
        autocast: context of forward passes.

    Returns:
        [len(draws), P] float32.
    """
    module.behavior.refresh(module.student, record.facts.step)
    prompts = [prompt for draw in draws for prompt in draw]
    pool = module.collector.collect(
        prompts,
        seed=seed,
        num_samples=1,
        step=record.facts.step,
        unscored=torch.arange(len(prompts)),
        autocast=autocast,
    )
    rollouts, targets = pool.rollouts, pool.targets
    # A record of an earlier version has one process's share of the step; a fresh batch counts as much.
    part = float(sum(b.shares.sum() for b in record.batches)) if record.facts.num_processes > 1 else 1.0
    found = []
    for rows in torch.split(torch.arange(len(prompts)), [len(draw) for draw in draws]):
        num_tokens = rollouts.num_tokens[rows]
        chunks = [chunk for chunk in rows.tensor_split(len(record.batches)) if len(chunk)]
        counts = {"num_tokens": int(num_tokens.sum()), "num_rollouts": int((num_tokens > 0).sum())}
        batches = []
        for chunk in chunks:
            piece = trimmed(rollouts.rows(chunk), targets.rows(chunk))
            shares = part * loss_shares(piece[0].mask, reduction=module.reduction, **counts)
            batches.append(RecordedBatch(*piece, shares))
        found.append(StepGradients(module, batches, record.facts.step, autocast, behavior_known=False).gradient())
    return torch.stack(found)
