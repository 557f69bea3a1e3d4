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
from opdlab.rollouts import Rollouts, Targets
from opdlab.training import gate_inputs


class Trained:
    """A student, AdamW and random rollouts.

    Args:
        plan: shapes.
        path: of the student.
        vocabulary: rows of its head, as if each had a token.
        device: of the models.
        dtype: of the weights.
        mesh: over whose processes models are sharded; None for whole ones.
        options: further ones of the student.
    """

    def __init__(
        self,
        plan: Plan,
        path: str,
        vocabulary: int,
        device: torch.device,
        dtype: str,
        mesh: Any = None,
        **options: Any,
    ) -> None:
        self.plan, self.device = plan, device
        self.student = LanguageModel(path, dtype, gradient_checkpointing=True, **options).to(device)  # type: ignore[arg-type]
        self.student.accumulate_head_grad = mesh is None
        self.student.vocab_size = vocabulary
        self.load()
        if mesh is not None:
            for model in self.models():
                model.shard(mesh)
        self.optimizer = torch.optim.AdamW([p for p in self.student.parameters() if p.requires_grad], lr=2e-6)
        self.objective, self.gate = TeacherTopK(plan.k), build_gate("block64")

    def load(self) -> None:
        """Load the other models; by default there are none."""

    def models(self) -> list[LanguageModel]:
        """Return all models."""
        return [self.student]

    def response(self, *lengths: int) -> Rollouts:
        """Return responses of random tokens, on the host."""
        generator = torch.Generator().manual_seed(lengths[0])
        shape = len(lengths), self.plan.prompt + max(lengths)
        tokens = torch.randint(2, self.student.vocab_size, shape, generator=generator)
        prompt, response = tokens.split([self.plan.prompt, max(lengths)], dim=1)
        zero = torch.zeros(len(lengths), dtype=torch.long)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        logprobs = torch.full(response.shape, -12.0) * mask
        return Rollouts(
            prompt, torch.ones_like(prompt, dtype=torch.bool), response * mask, mask, logprobs, *5 * (zero,)
        )

    def targets(self, rollouts: Rollouts) -> Targets:
        """Return random targets."""
        shape, k = rollouts.tokens.shape, self.plan.k
        ids = torch.arange(k, dtype=torch.int32, device=self.device).expand(*shape, k)
        zeros = torch.zeros(shape, device=self.device)
        return Targets(zeros, ids, torch.randn(*shape, k, device=self.device), zeros + 1)

    def update(self, rollouts: Rollouts, targets: Any) -> None:
        """Train on a micro-batch that is the whole optimizer batch."""
        with torch.autocast(self.device.type, torch.bfloat16):
            positions = self.objective.position_losses(self.student.score(rollouts), rollouts, targets)
        weights = self.gate(gate_inputs(rollouts, targets, positions)).weights
        sizes = {"num_tokens": int(rollouts.mask.sum()), "num_rollouts": len(rollouts)}
        shares = loss_shares(rollouts.mask, reduction="token_mean", **sizes)
        loss = reduce_losses(positions.losses, weights, shares)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not bool(torch.isfinite(loss)):
            raise RuntimeError(f"the loss is {float(loss.detach())}")


class Resident(Trained):
    """Student, snapshot, AdamW and teacher on the device, as in a run.

    Args:
        plan: shapes.
        student: name of the student.
        folder: with the models, see :func:`save_models`.
        device: of the models.
        dtype: of the student's weights.
        mesh: see :class:`Trained`.
    """

    def __init__(
        self, plan: Plan, student: str, folder: Path, device: torch.device, dtype: str, mesh: Any = None
    ) -> None:
        self._teacher = str(folder / "teacher")
        super().__init__(plan, str(folder / "student"), plan.students[student].vocab_size, device, dtype, mesh)

    def load(self) -> None:
        """Load the snapshot and the teacher."""
        rows, length = self.plan.sampled
        self.behavior = BehaviorPolicy(self.student, SamplingConfig(max_new_tokens=length, batch_size=rows))
        self.behavior.to(self.device)
        self.teacher = LocalTeacher(self._teacher, dtype="bfloat16", batch_size=1)
        self.teacher.vocab_size = self.plan.teacher.vocab_size
        self.teacher.to(self.device)

    def models(self) -> list[LanguageModel]:
        """Return all models."""
        return [self.student, self.behavior.policy, *self.teacher.local_models()]

    def sample(self) -> int:
        """Sample short responses and score them; return the number of tokens."""
        rows = self.plan.sampled[0]
        prompts = random_prompts(self.student, rows, self.plan.prompt)
        rollouts = self.behavior.sample(prompts, list(range(rows)), seed=0)
        return int(rollouts.mask.sum())

    def score(self, rollouts: Rollouts) -> Any:
        """Return the teacher's targets."""
        return self.teacher.score(rollouts, TeacherRequest(self.plan.k))


def random_prompts(model: LanguageModel, rows: int, length: int) -> list[list[int]]:
    """Return prompts of random tokens."""
    generator = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = torch.randint(2, model.vocab_size, (rows, length), generator=generator).tolist()
    return prompts


def save_models(plan: Plan, student: str, folder: Path, device: torch.device, dtype: str) -> None:
    """Write a random student and a random teacher into a folder."""
    plan.students[student].save(folder / "student", getattr(torch, dtype), device)
    plan.teacher.save(folder / "teacher", torch.bfloat16, device)


def timed(work: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return seconds and peak memory of the second call; the first one warms up."""
    work()
    peak = PeakMemory(None if device.type == "cpu" else device)
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak.peak_bytes()}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def phase_row(phase: str, tokens: int, work: Callable[[], Any], device: torch.device, **known: float) -> dict[str, Any]:
    """Return the measured phase, or that memory ran out."""
    try:
        return {"phase": phase, "tokens": tokens, **timed(work, device), **known}
    except torch.OutOfMemoryError:
        return {"phase": phase, "tokens": tokens, "skipped": "out of memory"}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure_student(
    plan: Plan, student: str, folder: Path, device: torch.device, dtype: str, mesh: Any = None
) -> dict[str, Any]:
    """Measure all phases of one student, at each length.

    Args:
        plan: shapes.
        student: name of the student.
        folder: with the models, see :func:`save_models`.
        device: of the models.
        dtype: of the student's weights.
        mesh: see :class:`Trained`; tokens are those of all its processes.
    """
    resident, shape = Resident(plan, student, folder, device, dtype, mesh), plan.students[student]
    count = 1 if mesh is None else mesh.size()
    first = resident.response(min(plan.lengths))
    resident.update(first.to(device), resident.score(first).to(device))  # AdamW creates its state
    held = PeakMemory(None if device.type == "cpu" else device).peak_bytes()
    with torch.autocast(device.type, torch.bfloat16):
        sampled = resident.sample()
        phases = [phase_row("sample", count * sampled, resident.sample, device)]
    for length in plan.lengths:
        rollouts = resident.response(length)
        tokens = count * length
        phases.append(phase_row("teacher", tokens, lambda rollouts=rollouts: resident.score(rollouts), device))
        moved, targets = rollouts.to(device), resident.score(rollouts).to(device)
        flops = shape.update_flops(plan.prompt, length, plan.k)  # of each process
        phases.append(
            phase_row(
                "update",
                tokens,
                lambda moved=moved, targets=targets: resident.update(moved, targets),
                device,
                flops=flops,
            )
        )
    if mesh is not None:
        phases.append(phase_row("refresh", 0, lambda: resident.behavior.refresh(resident.student), device))
    return {"resident_bytes": held, "phases": phases}
