"""The bare side of ``step.py``: a hand-written loop for exactly this run.

A buffer is used up exactly when the behavior snapshot would be refreshed, so the student itself samples.
Shapes: B rollouts, P prompt tokens, T response tokens, V vocabulary, K support.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from step_common import (
    BETAS,
    BLOCK,
    CLIP_NORM,
    SUPPORT,
    TAU,
    WARM_UP_FROM,
    WARM_UP_STEPS,
    WEIGHT_DECAY,
    Run,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


@dataclass(frozen=True)
class Pool:
    """Rollouts with teacher scores: tokens and attention [B, P + T], all others [B, T] or [B, T, K]."""

    tokens: Tensor
    attention: Tensor
    response: Tensor
    mask: Tensor
    behavior: Tensor
    support: Tensor
    teacher_logprobs: Tensor


def response_logits(model: Any, tokens: Tensor, attention: Tensor, length: int) -> Tensor:
    """Return the logits that predict the response: [B, P + T] -> [B, T, V]."""
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    output = model(tokens, attention_mask=attention, position_ids=positions, use_cache=False, logits_to_keep=length + 1)
    logits: Tensor = output.logits[:, :-1]
    return logits


def sampled_logprobs(logits: Tensor, response: Tensor) -> Tensor:
    """Return the log-probabilities of the sampled tokens: [B, T, V] and [B, T] -> [B, T]."""
    return logits.log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1)


def block_weights(drift: Tensor, mask: Tensor) -> Tensor:
    """Return weights with mean 1 over the valid positions: [B, T] drift -> [B, T]."""
    rows, length = drift.shape
    padding = -length % BLOCK
    blocks = torch.nn.functional.pad(drift * mask, (0, padding)).view(rows, -1, BLOCK)
    counts = torch.nn.functional.pad(mask, (0, padding)).view(rows, -1, BLOCK).sum(-1)
    gates = (-TAU * (blocks.sum(-1) / counts.clamp(min=1)).abs()).exp()
    gates = gates.repeat_interleave(BLOCK, 1)[:, :length] * mask
    return gates * mask.sum() / gates.sum()


class Loop:
    """Training loop and its models."""

    def __init__(self, run: Run) -> None:
        case = self.case = run.task.sizes
        torch.manual_seed(run.task.seed)
        self.run = run
        self.student = AutoModelForCausalLM.from_pretrained(run.task.student, dtype=torch.float32)
        teacher = AutoModelForCausalLM.from_pretrained(run.task.teacher, dtype=torch.float32)
        self.teacher = teacher.eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(run.task.student, padding_side="left")
        self.texts = case.prompts()
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=case.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        self.schedule = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, start_factor=WARM_UP_FROM, total_iters=WARM_UP_STEPS
        )
        self.generation = GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=case.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def train(self) -> int:
        """Train, and return the number of steps taken."""
        step, stop = 0, False
        update = self.run.parts.around("update", self._update)
        self.run.clock.start()
        prompts = self._shuffled(self.tokenizer(self.texts)["input_ids"])
        self.run.clock.begin_steps()
        while step < self.run.task.steps and not stop:
            pool = self._collect([next(prompts) for _ in range(self.case.prompts_per_pool)])
            for _ in range(self.case.reuse_epochs):
                for rows in torch.split(torch.randperm(len(pool.tokens)), self.case.batch_size):
                    if step == self.run.task.steps or stop:
                        break
                    update(pool, rows)
                    step += 1
                    stop = self.run.after_step(step, self.student, self.tokenizer)
        self.run.clock.end_steps()
        self.run.clock.stop()
        return step

    @staticmethod
    def _shuffled(prompts: list[list[int]]) -> Iterator[list[int]]:
        while True:
            yield from (prompts[index] for index in torch.randperm(len(prompts)).tolist())

    @torch.no_grad()
    def _collect(self, prompts: list[list[int]]) -> Pool:
        samples = self.run.parts.around("sample", self._sample)(prompts)
        support, logprobs = self.run.parts.around("teacher", self._score)(*samples[:3])
        self.run.tokens["sampled"] += int(samples[3].sum())
        return Pool(*samples, support, logprobs)

    def _sample(self, prompts: list[list[int]]) -> tuple[Tensor, ...]:
        repeated = [prompt for prompt in prompts for _ in range(self.case.samples_per_prompt)]
        batch = self.tokenizer.pad({"input_ids": repeated}, return_tensors="pt")
        tokens = self.student.generate(**batch, generation_config=self.generation)
        response = tokens[:, batch["input_ids"].shape[1] :]
        stops = (response == self.tokenizer.eos_token_id).long()
        valid = (stops.cumsum(1) - stops) == 0
        attention = torch.cat([batch["attention_mask"], valid.long()], 1)
        length = response.shape[1]
        behavior = torch.cat(
            [
                sampled_logprobs(response_logits(self.student, tokens[rows], attention[rows], length), response[rows])
                for rows in self._parts(tokens)
            ]
        )
        return tokens, attention, response, valid.float(), behavior

    def _score(self, tokens: Tensor, attention: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
        tops = [
            response_logits(self.teacher, tokens[rows], attention[rows], response.shape[1]).topk(SUPPORT, dim=-1)
            for rows in self._parts(tokens)
        ]
        return torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops]).log_softmax(-1)

    def _parts(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return torch.split(torch.arange(len(tokens)), self.case.batch_size)

    def _update(self, pool: Pool, rows: Tensor) -> None:
        mask, response = pool.mask[rows], pool.response[rows]
        logits = response_logits(self.student, pool.tokens[rows], pool.attention[rows], response.shape[1])
        with torch.no_grad():
            weights = block_weights(sampled_logprobs(logits, response) - pool.behavior[rows], mask)
        logp = logits.gather(-1, pool.support[rows]).log_softmax(-1)
        losses = (logp.exp() * (logp - pool.teacher_logprobs[rows])).sum(-1)
        loss = (weights * losses * mask).sum() / mask.sum()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.run.tokens["trained"] += int(mask.sum())


def train(run: Run) -> dict[str, Any]:
    """Train, and return the measured run."""
    return run.result(Loop(run).train())
