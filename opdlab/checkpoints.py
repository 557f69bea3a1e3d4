"""Checkpoints: written whole or not at all, checked when they are read, and found in the folders of runs."""

import itertools
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from opdlab.errors import UsageError, require
from opdlab.files import replacing
from opdlab.tree_digest import leaves, tree_digest

CHECKPOINT_KEY = "opdlab"
"""Key of opdlab's own state in a checkpoint."""
DIGEST_KEY = "opdlab_digest"
"""Key of a checkpoint's digest."""
# What Lightning and opdlab need to resume a run, with its type.
_STATE = {
    "global_step": int,
    "epoch": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    CHECKPOINT_KEY: dict,
}


class CheckpointFiles(CheckpointIO):
    """Lightning plugin that writes a checkpoint beside its target and renames it; its digest is checked on load.

    Lightning's own writes into ``$TMPDIR`` first, and copies over the target if that is another file system: a kill or
    a full disk then leaves half a checkpoint where a whole one was. It also keeps a second copy in memory.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[CheckpointFiles()], logger=False, accelerator="cpu")
        >>> type(trainer.strategy.checkpoint_io).__name__
        'CheckpointFiles'
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: nested dicts and lists of tensors and plain values.
            path: of the file.
            storage_options: must be None.

        Raises:
            FullDiskError: the disk is full. The file that was there before is still there.
        """
        require(storage_options is None, "storage_options is given, but a checkpoint is written to a local file")
        whole = {**checkpoint, DIGEST_KEY: tree_digest(checkpoint)}
        with replacing(Path(path)) as file:
            torch.save(whole, file)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Return the content of a checkpoint, on the host.

        Args:
            path: of the file.
            map_location: see :func:`torch.load`; the host by default.
            weights_only: read tensors and plain values only, which runs no code; only False allows other objects.

        Raises:
            UsageError: the file cannot be read, or its digest differs.
        """
        return read_checkpoint(Path(path), map_location or "cpu", weights_only=weights_only is not False)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path, map_location: Any = "cpu", *, weights_only: bool = True) -> dict[str, Any]:
    """Return the content of a checkpoint whose digest is right; one without a digest is read with a warning.

    Args:
        path: of the file.
        map_location: see :func:`torch.load`.
        weights_only: read tensors and plain values only, which runs no code.

    Raises:
        UsageError: the file cannot be read, or its content is not what was written.
    """
    return _checked(path, _load(path, map_location, weights_only=weights_only))


def _checked(path: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a loaded checkpoint without its digest, which is compared."""
    written = checkpoint.pop(DIGEST_KEY, None)
    if written is None:
        rank_zero_warn(f"{path} has no digest, so it cannot be checked whether it is as it was written")
    else:
        require(
            written == tree_digest(checkpoint),
            f"ckpt_path '{path}' is not as it was written, its digest differs: give an earlier checkpoint",
        )
    return checkpoint


def _load(path: Path, map_location: Any = "cpu", *, weights_only: bool = True, mapped: bool = False) -> dict[str, Any]:
    """Return the content of a checkpoint; ``mapped`` reads tensors only when they are used, while the file stays."""
    require(not path.is_dir(), f"ckpt_path '{path}' is a folder: give a .ckpt file, or 'last'")
    require(path.is_file(), f"ckpt_path '{path}' does not exist: give a .ckpt file, or 'last'")
    try:
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"
    except OSError as error:
        raise UsageError(f"ckpt_path '{path}' cannot be read ({error.strerror}): give another checkpoint") from error
    try:
        content = torch.load(path, map_location, weights_only=weights_only, mmap=mapped and is_archive)
    except Exception as error:  # torch and pickle raise almost any type on damaged files
        if not is_archive:  # what pickle says of another kind of file is about its bytes
            raise UsageError(
                f"ckpt_path '{path}' cannot be read, it is no checkpoint: give a .ckpt file, or 'last'"
            ) from error
        kind = "it may have been cut off while it was written"
        if isinstance(error, pickle.UnpicklingError):
            kind = "it is damaged, or it holds more than tensors and plain values"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UsageError(f"ckpt_path '{path}' cannot be read, {kind}: give an earlier checkpoint ({reason})") from error
    require(isinstance(content, dict), f"ckpt_path '{path}' is no checkpoint, but a {type(content).__name__}")
    checkpoint: dict[str, Any] = content
    return checkpoint


def check_checkpoint(path: Path, *, resume: bool = True) -> int:
    """Return the optimizer step of a checkpoint, and refuse one that is not sound.

    Args:
        path: of the file.
        resume: the checkpoint must have all that a run needs to go on; otherwise weights suffice.

    Raises:
        UsageError: the file is truncated, is not as it was written, is no checkpoint, holds more than tensors and plain
            values, or holds too little.
    """
    checkpoint = _load(path, mapped=True)
    step = _check_content(path, checkpoint, resume=resume)
    _checked(path, checkpoint)
    return step


def small_parts(path: Path) -> dict[str, Any]:
    """Return what a checkpoint that can be resumed says of its run; tensors are read only when they are used.

    Args:
        path: of a file that :func:`check_checkpoint` accepts.
    """
    checkpoint = _load(path, mapped=True)
    return {key: checkpoint[key] for key in ("global_step", "epoch", "loops", CHECKPOINT_KEY)}


def state_of(path: Path) -> dict[str, Tensor]:
    """Return the weights in a checkpoint that :func:`check_checkpoint` accepts; they are read when they are used."""
    weights: dict[str, Tensor] = _load(path, mapped=True)["state_dict"]
    return weights


def _check_content(path: Path, checkpoint: dict[str, Any], *, resume: bool) -> int:
    """Return the optimizer step of a checkpoint, and refuse one whose parts are missing or of another type."""
    weights = checkpoint.get("state_dict")
    require(
        isinstance(weights, dict) and all(isinstance(tensor, Tensor) for tensor in weights.values()),
        f"ckpt_path '{path}' holds no state_dict of tensors, so it is no checkpoint of opdlab: give another",
    )
    step = checkpoint.get("global_step", 0)
    if not resume:
        return step if isinstance(step, int) else 0
    require(
        CHECKPOINT_KEY in checkpoint,
        f"ckpt_path '{path}' is a checkpoint that opdlab did not write: give one from this run's checkpoints folder",
    )
    require(
        bool(checkpoint.get("optimizer_states")),
        f"ckpt_path '{path}' holds weights but no optimizer state, so a run cannot go on from it: give one that was "
        "written with checkpoint.save_weights_only false, or evaluate it with opdlab validate",
    )
    for key, kind in _STATE.items():
        value = checkpoint.get(key)
        require(
            isinstance(value, kind) and not isinstance(value, bool),
            f"ckpt_path '{path}' cannot be resumed: its {key} is {_shown(value)}, but must be "
            f"{'an integer' if kind is int else f'a {kind.__name__}'}; give another checkpoint",
        )
    loops = checkpoint["loops"].get("fit_loop")
    require(
        isinstance(loops, dict), f"ckpt_path '{path}' cannot be resumed: its loops have no fit_loop; give another one"
    )
    for name, value in leaves({key: part for key, part in loops.items() if key != "state_dict"}):
        require(
            isinstance(value, int | float) or value == {},  # counters of steps and batches
            f"ckpt_path '{path}' cannot be resumed: its loops.fit_loop.{name} is {_shown(value)}, but must be a "
            "number; give another checkpoint",
        )
    assert isinstance(step, int)
    return step


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:80]


# -- finding ---------------------------------------------------------------------------------------------------------


def find_checkpoint(path: str, root: Path, *, resume: bool = True) -> Path:
    """Return the file for ``ckpt_path``.

    ``last`` is, of the run folder under ``root`` with the highest version that has a sound checkpoint, the one with the
    most optimizer steps. A warning names the files that were skipped.

    Args:
        path: a file, or ``last``.
        root: holds the folders of the runs, ``version_N``.
        resume: see :func:`check_checkpoint`.

    Raises:
        UsageError: the file does not exist, or there is no sound checkpoint.
    """
    if path != "last":
        require(not Path(path).is_dir(), f"ckpt_path '{path}' is a folder: give a .ckpt file, or 'last'")
        require(Path(path).is_file(), f"ckpt_path '{path}' does not exist: give a .ckpt file, or 'last'")
        return Path(path)
    numbers = [int(match[1]) for folder in root.glob("*") if (match := re.fullmatch(r"version_(\d+)", folder.name))]
    skipped: list[str] = []
    try:
        for number in sorted(numbers, reverse=True):
            found = newest_checkpoint(root / f"version_{number}" / "checkpoints", skipped, resume=resume)
            if found is not None:
                return found[0]
    finally:
        if skipped:
            rank_zero_warn(f"--ckpt_path last skips what is not sound: {'; '.join(skipped)}")
    raise UsageError(f"ckpt_path is 'last', but there is no checkpoint under {root}: start a run without it")


def newest_checkpoint(
    folder: Path, skipped: list[str] | None = None, *, resume: bool = True
) -> tuple[Path, int] | None:
    """Return the sound checkpoint with the most optimizer steps in a folder, and its step; None without one.

    Args:
        folder: of the checkpoints.
        skipped: receives the reasons against other files.
        resume: see :func:`check_checkpoint`.
    """
    skipped = [] if skipped is None else skipped
    steps = checkpoint_steps(folder, skipped, resume=resume)
    for path in sorted(steps, key=lambda file: (steps[file], file.stat().st_mtime_ns), reverse=True):
        try:
            _checked(path, _load(path, mapped=True))
        except UsageError as error:
            skipped.append(str(error).removeprefix("ckpt_path "))
        else:
            return path, steps[path]
    return None


def set_aside_later(folder: Path, step: int) -> None:
    """Rename a folder's checkpoints of later steps, of a run that resumes from an earlier one, and say so.

    ``last`` would take them for those of the run as it goes on now.

    Args:
        folder: of the checkpoints.
        step: at which the run resumes.
    """
    later = {path: found for path, found in checkpoint_steps(folder, [], resume=False).items() if found > step}
    for path in later:
        names = (f"{path.name}.before-resume{number or ''}" for number in itertools.count())
        path.rename(next(free for name in names if not (free := path.with_name(name)).exists()))
    if later:
        named = ", ".join(
            f"{path.name} (step {found})" for path, found in sorted(later.items(), key=lambda one: one[1])
        )
        rank_zero_info(
            f"{folder}: the run goes on from step {step}, so that later checkpoints are no longer its own: {named} "
            "renamed to *.ckpt.before-resume"
        )


def checkpoint_steps(folder: Path, skipped: list[str], *, resume: bool) -> dict[Path, int]:
    """Return the optimizer steps of a folder's checkpoints; digests are not compared.

    Args:
        folder: of the checkpoints.
        skipped: receives the reasons against files that are left out.
        resume: see :func:`check_checkpoint`.
    """
    steps: dict[Path, int] = {}
    for path in folder.glob("*.ckpt"):
        try:
            steps[path] = _check_content(path, _load(path, mapped=True), resume=resume)
        except UsageError as error:
            skipped.append(str(error).removeprefix("ckpt_path "))
    return steps
