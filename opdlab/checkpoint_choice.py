"""Which checkpoint of a run is meant by ``best``, ``last`` or a path, and the student's weights in it.

The best one follows from ``checkpoint.monitor`` in ``config.yaml`` and the evaluations in ``metrics.csv``. A checkpoint
whose step has no evaluation has no score.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from opdlab.checkpoints import check_checkpoint, checkpoint_steps, newest_checkpoint, state_of
from opdlab.errors import UsageError, require
from opdlab.run_folder import RunFolder, read_metrics

Mode = Literal["max", "min"]
BEST, LAST = "best", "last"
_STUDENT = "student."


def best_step(scores: Mapping[int, float], mode: Mode) -> int | None:
    """Return the step with the best score, the earlier one of equal scores; None without a score. NaN is none.

    Args:
        scores: by optimizer step.
        mode: which value is best.

    Example:
        >>> best_step({40: 0.5, 20: 0.5, 10: float("nan")}, "max")
        20
    """
    known = {step: score for step, score in sorted(scores.items()) if score == score}
    best = max if mode == "max" else min
    return best(known, key=known.__getitem__, default=None)


def choose_checkpoint(folder: RunFolder, name: str, monitor: str | None, mode: Mode | None) -> tuple[Path, int]:
    """Return a checkpoint of a run and its optimizer step.

    Args:
        folder: of the run.
        name: ``best``, ``last``, or the path of a file.
        monitor: metric by which checkpoints are compared.
        mode: which of its values is best.

    Raises:
        UsageError: there is no such checkpoint, or it is not known which one is the best.
    """
    if name not in (BEST, LAST):
        path = Path(name) if Path(name).exists() else folder.checkpoints / name
        there = ", ".join(sorted(file.name for file in folder.checkpoints.glob("*.ckpt"))) or "no file"
        require(
            path.is_file(),
            f"--checkpoint is '{name}', which is not a file: give {BEST}, {LAST} or a .ckpt file; {folder.checkpoints} "
            f"has {there}",
        )
        return path, _checked_step(path)
    skipped: list[str] = []
    if name == LAST:
        newest = newest_checkpoint(folder.checkpoints, skipped, resume=False)
        if newest is None:
            raise _no_checkpoint(folder, skipped)
        _warn_of_skipped(name, skipped)
        return newest
    if monitor is None or mode is None:
        raise UsageError(
            f"--checkpoint is {BEST}, but the run has no checkpoint.monitor and checkpoint.mode: give --checkpoint "
            f"{LAST} or a file, and train with --checkpoint.monitor val/mean/pass@1 --checkpoint.mode max"
        )
    scores = {step: row[monitor] for step, row in read_metrics(folder.metrics).items() if monitor in row and step}
    steps = checkpoint_steps(folder.checkpoints, skipped, resume=False)
    files = {steps[path]: path for path in sorted(steps, key=lambda path: path.stat().st_mtime_ns)}
    if not files:
        raise _no_checkpoint(folder, skipped)
    _warn_of_skipped(name, skipped)
    best = best_step({step: score for step, score in scores.items() if step in files}, mode)
    if best is None:
        known = ", ".join(map(str, sorted(files)))
        raise UsageError(
            f"--checkpoint is {BEST}, but no checkpoint of '{folder.path}' has an evaluation with {monitor}: sound "
            f"ones are of steps {known}; give --checkpoint {LAST} or a file"
        )
    return files[best], _checked_step(files[best])


def _no_checkpoint(folder: RunFolder, skipped: list[str]) -> UsageError:
    why = "; ".join(skipped) or "let it train on"
    return UsageError(f"'{folder.path}' has no sound checkpoint in {folder.checkpoints.name}/: {why}")


def _warn_of_skipped(name: str, skipped: list[str]) -> None:
    if skipped:
        rank_zero_warn(f"--checkpoint {name} skips what is not sound: {'; '.join(skipped)}")


def _checked_step(path: Path) -> int:
    """Return the step of a sound checkpoint; messages name the option, not the key with which a run goes on."""
    try:
        return check_checkpoint(path, resume=False)
    except UsageError as error:
        raise UsageError(str(error).replace("ckpt_path ", "--checkpoint ", 1)) from error


def student_weights(path: Path) -> dict[str, Tensor]:
    """Return the student's weights in a checkpoint, by the name that the student has for them.

    Args:
        path: of a checkpoint that :func:`opdlab.checkpoints.check_checkpoint` accepts.

    Raises:
        UsageError: it holds none.
    """
    weights = {name.removeprefix(_STUDENT): w for name, w in state_of(path).items() if name.startswith(_STUDENT)}
    require(bool(weights), f"'{path}' holds no weights of a student: give a checkpoint that opdlab fit has written")
    return weights
