"""The trainer and the metrics file of a run with a folder of its own."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from opdlab.files import naming_full_disk, replacing
from opdlab.loggers import Histograms, ScalarsOnly, media_writer
from opdlab.run_folder import HISTOGRAMS, metric_lines, read_histograms

_STEP = "step"
_KEPT = ("gate/weights", "gate/token_drift", "gate/segment_drift")  # not those of each segment


class RunTrainer(Trainer):
    """Lightning's trainer, with the run's folder as ``log_dir`` whatever its loggers are.

    Attributes:
        run_folder: folder of the run, known to the first process; None for Lightning's choice.
    """

    run_folder: Path | None = None

    @property
    def log_dir(self) -> str | None:
        """Return the run's folder. All processes must ask for it together."""
        if self.run_folder is None:
            return super().log_dir
        folder: str = self.strategy.broadcast(str(self.run_folder))
        return folder


class MetricsFile(Logger):
    """``metrics.csv``: one row a logged step, with a column for each metric so far.

    A row is written as soon as one of its metrics is logged, so a killed run loses none. Only the first process writes.

    Args:
        path: of the file; an existing one is continued.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.csv"
        >>> file = MetricsFile(path)
        >>> file.log_metrics({"train/loss": 0.5}, 1)
        >>> file.log_metrics({"val/toy/pass@1": 0.25}, 1)
        >>> file.log_metrics({"train/loss": 0.25}, 2)
        >>> print(path.read_text())
        step,train/loss,val/toy/pass@1
        1,0.5,0.25
        2,0.25,
        <BLANKLINE>
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}
        self._offset = 0  # of the last row, bytes

    @property
    def name(self) -> str:
        """Return the name of the file."""
        return self.path.name

    @property
    def version(self) -> str:
        """Return an empty string: the run's folder has the version."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``config.yaml`` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write metrics of a step; those of a step that is already in the last row are added to it."""
        with naming_full_disk(self.path):
            self._write_row(metrics, step or 0)

    def _write_row(self, metrics: Mapping[str, float], step: int) -> None:
        if not self._columns:
            self._load(rows := self._read())
            if rows:  # of an earlier attempt; without a row that a kill has cut off
                self._write_all(rows)
        row = {_STEP: str(step), **{name: repr(float(value)) for name, value in metrics.items()}}
        same = self._row.get(_STEP) == row[_STEP]
        if new := [name for name in row if name not in self._columns]:
            rows = self._read()
            self._columns += new
            self._write_all([*rows[: len(rows) - same], self._row | row if same else row])
            return
        if same:
            row = self._row | row
        with self.path.open("r+b") as file:
            if not same:
                self._offset = file.seek(0, io.SEEK_END)
            file.seek(self._offset)
            file.write(self._line(row))
            file.truncate()
        self._row = row

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Delete the rows of later steps, which a run that resumes at ``step`` takes again."""
        if rows := self._read():
            self._load(rows)
            self._write_all([row for row in rows if int(row[_STEP]) <= step])
        path = self.path.with_name(HISTOGRAMS)
        if path.exists():
            kept = [{_STEP: each, **tags} for each, tags in read_histograms(path).items() if each <= step]
            with replacing(path) as file:
                file.write("".join(f"{json.dumps(line)}\n" for line in kept).encode())

    def _read(self) -> list[dict[str, str]]:
        """Return the rows, without one that a kill has cut off."""
        return metric_lines(self.path)

    def _load(self, rows: list[dict[str, str]]) -> None:
        self._columns = list(rows[0]) if rows else [_STEP]
        self._row = rows[-1] if rows else {}

    def _write_all(self, rows: list[dict[str, str]]) -> None:
        lines = [self._line({name: name for name in self._columns}), *map(self._line, rows)]
        with replacing(self.path) as file:
            file.write(b"".join(lines))
        self._row = rows[-1] if rows else {}
        self._offset = sum(map(len, lines[:-1]))

    def _line(self, row: Mapping[str, str]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([row.get(name, "") for name in self._columns])
        return text.getvalue().encode()


@media_writer.register(MetricsFile)
class _Histograms(ScalarsOnly):
    """Appends the histograms of all weights and drifts to ``histograms.jsonl`` beside the metrics."""

    takes = ("histograms",)

    def histograms(self, items: Histograms, step: int) -> None:
        line = {tag: asdict(items[tag]) for tag in _KEPT if tag in items}
        path = self.logger.path.with_name(HISTOGRAMS)
        with naming_full_disk(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({_STEP: step, **line}) + "\n")
