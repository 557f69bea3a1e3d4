"""A guard that says when training has gone wrong, and may stop it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from opdlab.callbacks.progress_bar import LabProgressBar
from opdlab.callbacks.sample_logger import rollout_texts, write_rollout_page
from opdlab.callbacks.stop_checkpoint import StopCheckpoint
from opdlab.collectives import sum_over_processes
from opdlab.diagnostics import StepTrace
from opdlab.diagnostics.collapse import (
    BufferSigns,
    CollapseLimits,
    buffer_signs,
    buffer_sums,
    dead,
    entropy_sign,
    entropy_sums,
    step_sums,
)
from opdlab.diagnostics.trace import to_host
from opdlab.loggers import log_scalars
from opdlab.module import OPDModule
from opdlab.types import Minibatch
from opdlab.viewer import choose_rollouts

_Buffer = tuple[Tensor, Mapping[str, float]]
_SIZES = (4, 4, 3)  # numbers of `step_sums`, `buffer_sums` and `entropy_sums`
_DEAD = {
    "weights": "the gate's weights were all 0 in {} steps: nothing is trained",
    "loss": "the loss was exactly 0 in {} steps, though student and teacher differ",
}


class CollapseGuard(pl.Callback):
    """Warns when training has gone wrong: ``collapse: …`` in the log, and in the line under the bars.

    It looks at each logged step (``trainer.log_every_n_steps``), with one copy to the host, and names each of these
    signs once in a run:

    - weights: those of some steps are all 0, so the effective sample size is undefined and the step trains nothing;
    - loss: it is exactly 0 in some steps though student and teacher differ;
    - entropy: far below the teacher's on the same positions, or 0, or that of equal probabilities;
    - responses of a buffer, against the first buffer's: 4-grams repeat, responses are cut off, lengths;
    - reverse KL to the teacher on fresh rollouts: far above the run's best.

    It changes nothing about training. With several processes the sums are those of all, so that all find the same and
    stop together; the page has rollouts of the first one.

    Args:
        enabled: look at all.
        stop: stop at the first sign, with a checkpoint and a page of the step's rollouts; ``opdlab fit`` then has
            exit code 3.
        limits: see :class:`opdlab.diagnostics.collapse.CollapseLimits`.

    Raises:
        UsageError: a limit is out of range.

    Example:
        >>> guard = CollapseGuard(max_repeated=0.8)
        >>> guard.messages, guard.limits.max_repeated
        ([], 0.8)
    """

    def __init__(self, enabled: bool = True, stop: bool = False, **limits: Any) -> None:
        self.enabled, self.stop = enabled, stop
        self.limits = CollapseLimits(**limits)
        self._forget()

    def _forget(self) -> None:
        self.messages: list[str] = []
        """What was found, each beginning with ``collapse:``."""
        self.stopped = False
        """True if the guard has stopped the run."""
        self._found: list[str] = []  # names of the signs
        self._streak = 0  # logged steps in a row with a wrong entropy
        self._first: BufferSigns | None = None
        self._best_reverse_kl = float("inf")
        # Sums on the device, of all processes after whole optimizer batches; see `opdlab.diagnostics.collapse`.
        self._dead = torch.zeros(2, dtype=torch.long)
        self._buffer: _Buffer | None = None  # with the metrics of its sampling
        self._finished: list[_Buffer] = []
        # Of the current optimizer batch, which a run that resumes inside it repeats from its start.
        self._sums: list[Tensor] = []
        self._traces: list[StepTrace] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier run; a checkpoint's state is loaded after this."""
        if stage == "fit" and trainer.global_step == 0:
            self._forget()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Minibatch, batch_idx: int
    ) -> None:
        """Add the micro-batch to the sums, and look at a logged step."""
        assert isinstance(pl_module, OPDModule)
        if not self.enabled:
            return
        trace: StepTrace = outputs["trace"]
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined] # set by Lightning's logger connector
        looks = every > 0 and (trace.step + 1) % every == 0
        if batch.position == 0:
            self._sums, self._traces = [], []
        self._sums.append(_micro_batch_sums(trace, looks))
        if looks and self.stop:
            self._traces.append(replace(trace, targets=None))  # for the page
        if batch.position + 1 < len(batch.micro_batches):
            return
        sums = torch.stack(self._sums).sum(0)
        if trainer.world_size > 1:  # at each step, because a checkpoint has the sums of the first process only
            sums = sum_over_processes(sums)
        step, rollouts, entropy = sums.split_with_sizes(_SIZES)
        self._dead = self._dead.to(sums.device) + dead(step, self.limits)
        self._add_to_buffer(trace.reuse_epoch, rollouts, batch.pool_metrics)
        if looks:
            self._look(trainer, pl_module, entropy)

    def _add_to_buffer(self, reuse_epoch: int, sums: Tensor, metrics: Mapping[str, float]) -> None:
        """Add rollouts that are seen for the first time; a buffer is finished after its first pass."""
        if self._buffer is not None and (reuse_epoch > 0 or self._buffer[1] != metrics):
            self._finished.append(self._buffer)
            self._buffer = None
        if reuse_epoch == 0:
            self._buffer = (sums if self._buffer is None else self._buffer[0].to(sums.device) + sums, metrics)

    def _look(self, trainer: pl.Trainer, module: OPDModule, entropy: Tensor) -> None:
        """Look for signs, at the end of an optimizer batch with these sums of :func:`entropy_sums`."""
        finished, self._finished = self._finished, []
        sums = {"dead": self._dead, "entropy": entropy, **{str(n): each for n, (each, _) in enumerate(finished)}}
        host = to_host(sums)
        metrics: dict[str, float] = {}
        signs: dict[str, str] = {}
        for (name, text), count in zip(_DEAD.items(), host["dead"].tolist(), strict=True):
            if count >= self.limits.patience:
                signs[name] = text.format(count)
        num, student, teacher = host["entropy"].tolist()
        if num:
            if not math.isnan(teacher):
                metrics["train/teacher_entropy"] = teacher / num
            wrong = entropy_sign(student / num, teacher / num, module.student.vocab_size, self.limits)
            self._streak = self._streak + 1 if wrong else 0
            if wrong and self._streak >= self.limits.patience:
                signs["entropy"] = wrong
        for n, (_, sampling) in enumerate(finished):
            tokens, gap, repeats, grams = host[str(n)].tolist()
            now = BufferSigns(
                length=sampling["rollout/length"],
                truncated=sampling["rollout/truncated_share"],
                repeated=repeats / max(grams, 1),
                reverse_kl=gap / tokens if tokens else math.nan,
            )
            metrics["rollout/repeated_share"] = now.repeated
            if not math.isnan(now.reverse_kl):  # the teacher knows the sampled tokens, and there are some
                metrics["rollout/reverse_kl"] = now.reverse_kl
            self._first = self._first or now
            signs |= buffer_signs(now, self._first, self._best_reverse_kl, self.limits)
            self._best_reverse_kl = min(self._best_reverse_kl, now.reverse_kl)
        if trainer.is_global_zero:
            log_scalars(trainer.loggers, metrics, trainer.global_step)
        self._report(trainer, module, signs)

    def _report(self, trainer: pl.Trainer, module: OPDModule, signs: Mapping[str, str]) -> None:
        new = {name: text for name, text in signs.items() if name not in self._found}
        self._found += new
        for text in new.values():
            message = f"collapse: step {trainer.global_step}: {text}"
            self.messages.append(message)
            rank_zero_info(message)
            if isinstance(bar := trainer.progress_bar_callback, LabProgressBar):
                bar.note(message)
        if not self.stop:
            return
        wrong = bool(new)
        if trainer.world_size > 1:  # they see the same; a process that stopped alone would leave the others waiting
            wrong = trainer.strategy.reduce_boolean_decision(wrong, all=False)
        if wrong:
            self._stop(trainer, module)

    def _stop(self, trainer: pl.Trainer, module: OPDModule) -> None:
        """Stop after this step, with a page and a checkpoint."""
        self.stopped = trainer.should_stop = True
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # Lightning exchanges it between all processes
        rollouts = choose_rollouts(self._traces, 8)
        if trainer.is_global_zero and rollouts:
            texts = rollout_texts(trainer, module.student.tokenizer, rollouts)
            try:
                page = write_rollout_page(
                    folder / "rollouts", trainer, module, rollouts, texts, collapse="; ".join(self.messages)
                )
                rank_zero_info(f"collapse: stopping; the step's rollouts are in {page}")
            except OSError as error:
                rank_zero_info(f"collapse: stopping; {folder} cannot be written ({error.strerror or error})")
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by Lightning's connector
        if not any(isinstance(callback, StopCheckpoint) for callback in callbacks):  # which saves at every stop
            trainer.save_checkpoint(folder / "checkpoints" / "collapsed.ckpt", weights_only=False)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what was found, and the sums since the last look."""

        def saved(buffer: _Buffer) -> dict[str, Any]:
            return {"sums": buffer[0].cpu(), "metrics": dict(buffer[1])}

        return {
            "messages": list(self.messages),
            "found": list(self._found),
            "streak": self._streak,
            "first": None if self._first is None else asdict(self._first),
            "best_reverse_kl": self._best_reverse_kl,
            "dead": self._dead.cpu(),
            "buffer": None if self._buffer is None else saved(self._buffer),
            "finished": [saved(each) for each in self._finished],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        buffers = [(each["sums"], each["metrics"]) for each in (state_dict["buffer"], *state_dict["finished"]) if each]
        self._buffer = buffers.pop(0) if state_dict["buffer"] else None
        self._finished = buffers
        self.messages, self._found = list(state_dict["messages"]), list(state_dict["found"])
        self._streak, self._dead = state_dict["streak"], state_dict["dead"]
        self._first = state_dict["first"] and BufferSigns(**state_dict["first"])
        self._best_reverse_kl = state_dict["best_reverse_kl"]


def _micro_batch_sums(trace: StepTrace, looks: bool) -> Tensor:
    """Return the sums of a micro-batch, [11] float64 on the device: 0 where they are not needed.

    Args:
        trace: of the micro-batch.
        looks: True if the guard looks at this step.
    """
    step, nothing = step_sums(trace), trace.loss_shares.new_zeros(4, dtype=torch.float64)
    rollouts = buffer_sums(trace) if trace.reuse_epoch == 0 else nothing
    return torch.cat([step, rollouts, entropy_sums(trace) if looks else nothing[:3]])
