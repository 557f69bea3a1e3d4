"""Fresh rollouts of a recorded step's student: the rollouts of a step without reuse.

Shapes: B rollouts, J draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.module import OPDModule
from opdlab.objectives import loss_shares
from opdlab.replay.record import RecordedBatch, RecordedStep
from opdlab.replay.step_gradients import Autocast
from opdlab.replay.targets import gives_entropy
from opdlab.seeds import checked_seed, derive_seed
from opdlab.types import Problem, Prompt, Rollouts, Targets, prompts_at, trimmed
from opdlab.verifiers.verifier import Verifier

Tokens = tuple[int, ...]
Draws = dict[str, list[tuple[RecordedBatch, ...]]]
"""Micro-batches of each of J draws, by the name of the reference, ``fresh`` or ``other``."""


@dataclass(frozen=True)
class Sampling:
    """Which fresh rollouts are sampled at each step.

    Args:
        draws: J, independent batches of fresh rollouts per step, at least 2.
        seed: of the sampling.
        other_prompts: also sample from prompts that the step has not used.

    Raises:
        UsageError: a value is out of range.
    """

    draws: int = 4
    seed: int = 0
    other_prompts: bool = False

    def __post_init__(self) -> None:
        require(self.draws >= 2, f"--draws is {self.draws}, but must be at least 2: their spread is the noise")
        checked_seed(self.seed, "--seed")


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
    return prompts_at(prompts, chosen.tolist())


def sampled_draws(
    module: OPDModule,
    record: RecordedStep,
    sampling: Sampling,
    prompts: Sequence[Prompt],
    autocast: Autocast,
    verifier: Verifier | None = None,
) -> Draws:
    """Return rollouts that the student samples now, one response to each prompt, with the teacher's targets.

    The targets are those of the run's own objective and the teacher's entropy, which the same pass gives if the teacher
    knows it. Behavior log-probabilities are left out: the student itself is the sampling policy.

    Args:
        module: with the student's weights from before the step, and a sampler of one response per prompt.
        record: of the step; each draw is cut into as many micro-batches.
        sampling: how many draws, of which prompts.
        prompts: the run's training prompts, for other prompts than the step's and for gold answers.
        autocast: context of forward passes.
        verifier: checks the answers, for objectives that read verdicts; the group of a prompt has those of all draws.

    Raises:
        UsageError: other prompts are asked for, but the step uses all.
    """
    module.behavior.refresh(module.student, record.facts.step)
    same = recorded_prompts(record, module.teacher.names)
    if prompts:
        same = [replace(prompt, problem=prompts[prompt.index].problem) for prompt in same]
    wanted = {"fresh": [same] * sampling.draws}
    if sampling.other_prompts:
        wanted["other"] = [other_prompts(record, prompts, draw, sampling.seed) for draw in range(sampling.draws)]
        require(bool(wanted["other"][0]), f"step {record.number} uses every training prompt: leave out --other_prompts")
    temperature = record.batches[0].rollouts.temperature
    entropy = module.request.entropy or gives_entropy(module.teacher, temperature)
    collector = module.collector.asking(replace(module.request, entropy=entropy))
    found: Draws = {}
    for name, draws in wanted.items():
        drawn = [prompt for draw in draws for prompt in draw]
        pool = collector.collect(
            drawn,
            seed=derive_seed("replay", name, sampling.seed, record.number),
            num_samples=1,
            step=record.facts.step,
            unscored=torch.arange(len(drawn)),
            verifier=verifier,
            autocast=autocast,
        )
        rows = torch.split(torch.arange(len(drawn)), [len(draw) for draw in draws])
        found[name] = [_micro_batches(module, record, pool.rollouts.rows(r), pool.targets.rows(r)) for r in rows]
    return found


def _micro_batches(
    module: OPDModule, record: RecordedStep, rollouts: Rollouts, targets: Targets
) -> tuple[RecordedBatch, ...]:
    """Return a draw cut into as many micro-batches as the step has, with the shares of its positions in the loss."""
    # A record of an earlier version has one process's share of the step; a fresh batch counts as much.
    part = float(sum(b.shares.sum() for b in record.batches)) if record.facts.num_processes > 1 else 1.0
    num_tokens = rollouts.num_tokens
    counts = {"num_tokens": int(num_tokens.sum()), "num_rollouts": int((num_tokens > 0).sum())}
    batches = []
    for chunk in torch.arange(len(rollouts)).tensor_split(len(record.batches)):
        if len(chunk):
            piece = trimmed(rollouts.rows(chunk), targets.rows(chunk))
            shares = part * loss_shares(piece[0].mask, reduction=module.reduction, **counts)
            batches.append(RecordedBatch(*piece, shares))
    return tuple(batches)
