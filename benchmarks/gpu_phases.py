"""The phases of a run in ``gpu.py``: sampling, the teacher's scoring, the update."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import REPOSITORY, PeakMemory
from gpu_models import Plan

sys.path.insert(0, str(REPOSITORY))

from opdlab.gating import build_gate
from opdlab.objectives import TeacherTopK, loss_shares, reduce_losses
from opdlab.policies import BehaviorPolicy, LanguageModel, LocalTeacher, SamplingConfig, TeacherRequest
from opdlab.rollouts import Rollouts
from opdlab.training import gate_inputs


class Resident:
    """Student, snapshot, AdamW and teacher on the device, as in a run.

    Args:
        plan: shapes.
        student: name of the student.
        folder: for random models.
        device: of the models.
        dtype: of the student's weights.
    """

    def __init__(self, plan: Plan, student: str, folder: Path, device: torch.device, dtype: str) -> None:
        self.plan, self.device = plan, device
        shape = plan.students[student]
        path = shape.save(folder / "student", getattr(torch, dtype), device)
        self.student = LanguageModel(path, dtype, gradient_checkpointing=True).to(device)  # type: ignore[arg-type]
        self.student.accumulate_head_grad = True
        rows, length = plan.sampled
        self.behavior = BehaviorPolicy(self.student, SamplingConfig(max_new_tokens=length, batch_size=rows))
        self.behavior.to(device)
        path = plan.teacher.save(folder / "teacher", torch.bfloat16, device)
        self.teacher = LocalTeacher(path, dtype="bfloat16", batch_size=1)
        self.teacher.to(device)
        self.optimizer = torch.optim.AdamW([p for p in self.student.parameters() if p.requires_grad], lr=2e-6)
        self.objective, self.gate = TeacherTopK(plan.k), build_gate("block64")

    def sample(self) -> int:
        """Sample short responses and score them; return the number of tokens."""
        rows = self.plan.sampled[0]
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(2, self.student.vocab_size, (rows, self.plan.prompt), generator=generator).tolist()
        rollouts = self.behavior.sample(prompts, list(range(rows)), seed=0)
        return int(rollouts.mask.sum())

    def response(self, length: int) -> Rollouts:
        """Return one response of random tokens, on the host."""
        generator = torch.Generator().manual_seed(length)
        tokens = torch.randint(2, self.student.vocab_size, (1, self.plan.prompt + length), generator=generator)
        prompt, response = tokens.split([self.plan.prompt, length], dim=1)
        zero = torch.zeros(1, dtype=torch.long)
        ones = torch.ones_like(response, dtype=torch.bool)
        logprobs = torch.full(response.shape, -12.0)
        return Rollouts(prompt, torch.ones_like(prompt, dtype=torch.bool), response, ones, logprobs, *5 * (zero,))

    def score(self, rollouts: Rollouts) -> Any:
        """Return the teacher's targets."""
        return self.teacher.score(rollouts, TeacherRequest(self.plan.k))

    def update(self, rollouts: Rollouts, targets: Any) -> None:
        """Train on a micro-batch that is the whole optimizer batch."""
        with torch.autocast(self.device.type, torch.bfloat16):
            positions = self.objective.position_losses(self.student.score(rollouts), rollouts, targets)
        weights = self.gate(gate_inputs(rollouts, targets, positions)).weights
        num_tokens = rollouts.mask.numel()
        shares = loss_shares(rollouts.mask, reduction="token_mean", num_tokens=num_tokens, num_rollouts=1)
        loss = reduce_losses(positions.losses, weights, shares)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not bool(torch.isfinite(loss)):
            raise RuntimeError(f"the loss is {float(loss.detach())}")


def timed(work: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return seconds and peak memory of the second call; the first one warms up."""
    work()
    peak = PeakMemory(None if device.type == "cpu" else device)
    _synchronize(device)
    began = time.perf_counter()
    work()
    _synchronize(device)
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak.peak_bytes()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _phase(phase: str, tokens: int, work: Callable[[], Any], device: torch.device, **known: float) -> dict[str, Any]:
    try:
        return {"phase": phase, "tokens": tokens, **timed(work, device), **known}
    except torch.OutOfMemoryError:
        return {"phase": phase, "tokens": tokens, "skipped": "out of memory"}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure_student(plan: Plan, student: str, folder: Path, device: torch.device, dtype: str) -> dict[str, Any]:
    """Measure all phases of one student, at each length."""
    resident = Resident(plan, student, folder, device, dtype)
    shape = plan.students[student]
    first = resident.response(min(plan.lengths))
    resident.update(first.to(device), resident.score(first).to(device))  # AdamW creates its state
    held = PeakMemory(None if device.type == "cpu" else device).peak_bytes()
    with torch.autocast(device.type, torch.bfloat16):
        sampled = resident.sample()
        phases = [_phase("sample", sampled, resident.sample, device)]
    for length in plan.lengths:
        rollouts = resident.response(length)
        phases.append(_phase("teacher", length, lambda rollouts=rollouts: resident.score(rollouts), device))
        moved, targets = rollouts.to(device), resident.score(rollouts).to(device)
        flops = shape.update_flops(plan.prompt, length, plan.k)
        phases.append(
            _phase(
                "update",
                length,
                lambda moved=moved, targets=targets: resident.update(moved, targets),
                device,
                flops=flops,
            )
        )
    return {"resident_bytes": held, "phases": phases}
