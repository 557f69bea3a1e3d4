"""Folders of runs, and of evaluations' samples."""

import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

from opdlab.errors import UsageError, require
from opdlab.files import remove_partial_files
from opdlab.locks import lock_holder, locked
from opdlab.records import RESULTS, SETTINGS_PLACEHOLDER, digest
from opdlab.yaml_files import read_yaml

CONFIG, METRICS, EVALUATIONS, HISTOGRAMS = "config.yaml", "metrics.csv", "evaluations", "histograms.jsonl"
EXAMPLE = "such as runs/quickstart/version_0"
_VERSION = re.compile(r"version_(\d+)")
_MEND = "mend it, or remove it"
# Keys without a default, which the configuration of each run has.
_REQUIRED = ("model.student", "model.teacher", "model.objective", "model.gate", "data.train")


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run of ``opdlab fit``, whatever its loggers: ``ROOT/version_N``.

    ::

        config.yaml      configuration of the run
        results.json     evaluations, costs, seeds, versions and state
        metrics.csv      logged metrics, one row a step
        histograms.jsonl histograms of weights and drifts, one line a monitored step
        checkpoints/     checkpoints
        evaluations/     samples of the evaluations, unless ``model.evaluation.samples`` names another folder
        student/         the trained student
        rollouts/        pages of rollouts
        lock             names the process that trains in the folder

    Args:
        path: of the folder.
        made: folders above it that were made for it, the innermost first.
    """

    path: Path
    made: tuple[Path, ...] = ()

    @classmethod
    def create(cls, root: Path) -> Self:
        """Create the folder of a new run: the first free ``version_N`` after all that exist.

        Two runs that start at the same moment get two folders, because a folder belongs to the run that created it.

        Raises:
            UsageError: ``root`` cannot be written.
        """
        try:
            made = tuple(folder for folder in (root, *root.parents) if not folder.exists())
            root.mkdir(parents=True, exist_ok=True)
            names = (_VERSION.fullmatch(path.name) for path in root.iterdir())
            number = max((int(name[1]) for name in names if name), default=-1) + 1
            while True:
                with suppress(FileExistsError):
                    (root / f"version_{number}").mkdir()
                    return cls(root / f"version_{number}", made)
                number += 1
        except OSError as error:
            raise UsageError(
                f"trainer.default_root_dir is '{root}', which cannot be written ({error.strerror}): give another folder"
            ) from error

    @classmethod
    def of_checkpoint(cls, ckpt_path: Path, root: Path) -> Self | None:
        """Return the folder of the run under ``root`` that wrote a checkpoint; None if there is none."""
        folder = ckpt_path.resolve().parent.parent
        inside = folder.parent == root.resolve() and _VERSION.fullmatch(folder.name)
        return cls(root / folder.name) if inside else None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Return the folder of a run that exists.

        Raises:
            UsageError: it is not a run's folder.
        """
        require(path.is_dir(), f"'{path}' is not a folder: give a run's folder, {EXAMPLE}")
        inside = sorted(path.glob(f"version_*/{CONFIG}"), key=lambda file: file.stat().st_mtime_ns)
        hint = f"; did you mean {inside[-1].parent}?" if inside else f": give a folder {EXAMPLE}"
        require((path / CONFIG).is_file(), f"'{path}' is not a run's folder, since it has no {CONFIG}{hint}")
        return cls(path)

    @property
    def config(self) -> Path:
        """Return the path of the configuration."""
        return self.path / CONFIG

    @property
    def results(self) -> Path:
        """Return the path of the results."""
        return self.path / RESULTS

    @property
    def metrics(self) -> Path:
        """Return the path of the logged metrics."""
        return self.path / METRICS

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.path / "checkpoints"

    def discard(self) -> None:
        """Delete the folder of a run that was refused, and those made for it if nothing else is in them."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            for folder in self.made:
                folder.rmdir()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the folder's lock while the block runs; files that a kill left half written are removed.

        Raises:
            UsageError: another process trains in this folder.
        """
        with ExitStack() as held:
            try:
                free = held.enter_context(locked(self.path))
            except OSError as error:
                raise UsageError(
                    f"ckpt_path is of the run in {self.path}, which cannot be written ({error.strerror}): copy "
                    "the run, or start one without ckpt_path"
                ) from error
            if not free:
                holder = lock_holder(self.path) or {}
                raise UsageError(
                    f"ckpt_path is of the run in {self.path}, which process {holder.get('pid', '?')} on "
                    f"{holder.get('host', '?')} is training: wait for its end, or start a run without ckpt_path"
                )
            remove_partial_files(self.path)
            yield


def fit_samples_folder(samples: str | None, folder: Path) -> Path:
    """Return the folder of a run's samples: in its own folder by default.

    Elsewhere the name contains the root too, because runs of other roots have the same numbers.

    Args:
        samples: value of ``model.evaluation.samples``.
        folder: folder of the run.
    """
    if samples is None:
        return folder / EVALUATIONS
    return Path(samples) / f"{folder.name}-{digest(str(folder.resolve()))[:8]}"


def samples_of_other_runs(samples: Path) -> list[Path]:
    """Return the existing folders of samples of the other runs beside a run's, see :func:`fit_samples_folder`."""
    own = samples.parent if samples.name == EVALUATIONS else samples
    others = (path / EVALUATIONS if samples.name == EVALUATIONS else path for path in own.parent.glob("version_*"))
    return [path for path in sorted(others) if path.is_dir() and path != samples]


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


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a run, from ``config.yaml``.

    Raises:
        UsageError: the file cannot be read, is not YAML, or is not whole: a key that each run has is not there, or the
            end of the last line. One that extends others may leave keys to them.
    """
    content = read_yaml(path)
    config = content if isinstance(content, dict) else {}
    sections = {key: config.get(key.partition(".")[0]) for key in _REQUIRED}
    lacking = [
        key
        for key, section in sections.items()
        if not isinstance(section, dict) or section.get(key.partition(".")[2]) is None
    ]
    lacks = ", ".join(lacking) if lacking and "extends" not in config else ""
    if not lacks and not path.read_bytes().endswith(b"\n"):
        lacks = "the end of its last line"
    require(
        not lacks,
        f"{path} lacks {lacks}: it may be cut off; mend it, such as with student/opdlab.yaml, the copy that an export "
        "has",
    )
    return cast(dict[str, Any], config)


def read_results(path: Path) -> dict[str, Any]:
    """Return the content of ``results.json``; empty without the file, which a killed run does not write.

    Raises:
        UsageError: the file is not as a run has written it.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): make it readable, or remove it") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON, as a run writes it: {_MEND} ({error})") from error
    require(isinstance(content, dict), f"{path} holds a {type(content).__name__}, but must hold an object: {_MEND}")
    for name, value in content.items():
        if name in ("before", "after", "best") or name.startswith("teacher"):
            require(_is_evaluation(value), f"{path}: {name} is {_shown(value)}, which is no evaluation: {_MEND}")
    warnings = content.get("warnings", [])
    require(isinstance(warnings, list), f"{path}: warnings is {_shown(warnings)}, but must be a list: {_MEND}")
    return cast(dict[str, Any], content)


def _is_evaluation(value: Any) -> bool:
    """Return whether a value has a number and its standard error for each metric; either may be null."""
    return isinstance(value, dict) and all(
        isinstance(metric, dict)
        and all(isinstance(metric.get(part), int | float | None) for part in ("value", "standard_error"))
        for metric in value.values()
    )


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]


def metric_lines(path: Path) -> list[dict[str, str]]:
    """Return the rows of ``metrics.csv`` as text, without one that a kill has cut off; none without the file.

    Raises:
        UsageError: the file is not as a run has written it.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8, as a run writes it: {_MEND}") from error
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    require("step" in (reader.fieldnames or ["step"]), f"{path} has no column 'step', as a run writes it: {_MEND}")
    return [row for row in reader if (row["step"] or "").isdigit() and None not in row.values()]


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Return the metrics of each logged step by name, from ``metrics.csv``.

    Args:
        path: of the file.

    Raises:
        UsageError: see :func:`metric_lines`; or a value is no number.
    """
    metrics: dict[int, dict[str, float]] = {}
    for row in metric_lines(path):
        values = metrics[int(row["step"])] = {}
        for name, value in row.items():
            try:
                if name != "step" and value:
                    values[name] = float(value)
            except (ValueError, TypeError) as error:  # of a row with more cells than columns, a list
                raise UsageError(
                    f"{path}, step {row['step']}: {name} is {value!r}, which is no number: {_MEND}"
                ) from error
    return metrics


def read_histograms(path: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """Return the histograms of each monitored step by tag, from ``histograms.jsonl``; none without the file.

    Args:
        path: of the file. A line that a kill has cut off, or that is no histogram, is left out.
    """
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):
            read = json.loads(line)
            if isinstance(read, dict) and isinstance(read.get("step"), int):
                found[read.pop("step")] = read
    return found
