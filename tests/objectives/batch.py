"""A scored batch of two rollouts, with plain logits of student and teacher."""

import torch
from torch import Tensor

from opdlab.policies.language_model import Scored
from opdlab.scoring import Head
from opdlab.types import Rollouts, Targets


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def scored_batch(vocab_size: int = 40) -> tuple[Scored, Rollouts, Targets, Tensor, Tensor]:
    """Two rollouts of 3 and 2 tokens with their plain logits, student's and teacher's; top 4 as targets."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    tokens = torch.tensor([[3, 7, 1], [9, 2, 0]])
    hidden = random_logits(5, 6).float().requires_grad_()
    weight, temperature = random_logits(vocab_size, 6, seed=1).float() / 3, 0.8
    student, teacher = hidden @ weight.T / temperature, random_logits(5, vocab_size, seed=2).float()
    scored = Scored.of(hidden, Head(weight, temperature=temperature), mask, tokens[mask])
    rollouts = Rollouts(
        *(torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool), tokens, mask),
        behavior_logprobs=torch.full((2, 3), -1.5).masked_fill(~mask, 0),
        stop_reasons=torch.zeros(2, dtype=torch.long),
        rollout_ids=torch.arange(2),
        prompt_ids=torch.arange(2),
        sampled_at_step=torch.zeros(2, dtype=torch.long),
        snapshot_step=torch.zeros(2, dtype=torch.long),
        temperature=temperature,
    )
    top = teacher.topk(4)
    log_q = teacher.log_softmax(-1)
    targets = Targets(
        scored.padded(log_q.gather(1, tokens[mask][:, None]).squeeze(1)),
        scored.padded(top.indices.int()),
        scored.padded(top.values),
        scored.padded(log_q.gather(1, top.indices).exp().sum(-1)),
    )
    return scored, rollouts, targets, student, teacher
