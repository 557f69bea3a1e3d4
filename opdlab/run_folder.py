"""Folders of runs: ``ROOT/version_N``."""

import re
from pathlib import Path

from opdlab.errors import UsageError
from opdlab.records import SETTINGS_PLACEHOLDER, digest


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
