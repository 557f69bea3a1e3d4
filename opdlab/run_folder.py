"""Folders of runs and their checkpoints: ``ROOT/version_N/checkpoints``."""

import pickle
import re
from pathlib import Path

from opdlab.errors import UsageError, require
from opdlab.records import SETTINGS_PLACEHOLDER, digest


def find_checkpoint(path: str, root: Path) -> Path:
    """Return the file for ``ckpt_path``; ``last`` is the newest checkpoint of the newest run under ``root``.

    Raises:
        UsageError: the checkpoint does not exist.
    """
    if path != "last":
        require(Path(path).is_file(), f"ckpt_path '{path}' does not exist: give a .ckpt file, or 'last'")
        return Path(path)
    found = sorted(root.glob("version_*/checkpoints/*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    require(bool(found), f"ckpt_path is 'last', but there is no checkpoint under {root}: start a run without it")
    return found[-1]


def check_checkpoint(path: Path) -> int:
    """Return the optimizer step of a checkpoint, and refuse one that cannot be read.

    Raises:
        UsageError: the file is truncated, is not a checkpoint, or holds more than tensors and plain values.
    """
    import torch  # here, because a study's job process needs it only to resume a run

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0][:200]
        raise UsageError(
            f"ckpt_path '{path}' cannot be read, it may have been cut off while it was written: give an earlier "
            f"checkpoint ({first_line})"
        ) from error
    return int(checkpoint.get("global_step", 0))


def run_folder_for(ckpt_path: str | None, root: Path) -> Path:
    """Return the folder of a run: a new ``version_N``, or the folder of the checkpoint that it resumes.

    Raises:
        UsageError: ``root`` cannot be created.
    """
    if ckpt_path is not None:
        folder = Path(ckpt_path).resolve().parent.parent
        if folder.parent == root.resolve() and re.fullmatch(r"version_\d+", folder.name):
            return root / folder.name
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"trainer.default_root_dir is '{root}', but it cannot be made ({error.strerror}): give another folder"
        ) from error
    numbers = [int(path.name.removeprefix("version_")) for path in root.glob("version_*") if path.name[8:].isdigit()]
    return root / f"version_{max(numbers, default=-1) + 1}"


def fit_samples_folder(samples: str, folder: Path) -> Path:
    """Return the folder of a run's samples; it names the root too, because runs of other roots have the same numbers.

    Args:
        samples: value of ``model.evaluation.samples``.
        folder: folder of the run.
    """
    return Path(samples) / f"{folder.name}-{digest(str(folder.resolve()))[:8]}"


def samples_folder_for(student: str, ckpt_path: str | None, root: Path) -> str:
    """Return the folder of an evaluation's samples, named after the model, with a placeholder for the settings.

    Example:
        >>> samples_folder_for("Qwen/Qwen3-1.7B-Base", None, Path("runs"))
        'runs/evaluations/Qwen3-1.7B-Base-{settings}'
        >>> samples_folder_for("Qwen/Qwen3-1.7B-Base", "runs/version_0/checkpoints/step-40.ckpt", Path("runs"))
        'runs/evaluations/version_0-step-40-{settings}'
    """
    name = Path(student).name or "model"
    if ckpt_path is not None:
        checkpoint = Path(ckpt_path).resolve()
        name = f"{checkpoint.parent.parent.name}-{checkpoint.stem}"
    return str(root / "evaluations" / f"{name}-{SETTINGS_PLACEHOLDER}")
