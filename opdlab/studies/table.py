"""Output during a study: a live table on a terminal, otherwise a line for each change."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from opdlab.studies.launch import Launcher, RunState
from opdlab.studies.schema import FAILED, FINISHED, RUNNING, WAITING

_MARKS = {WAITING: ("·", "dim"), RUNNING: ("…", "yellow"), FINISHED: ("✓", "green"), FAILED: ("✗", "red")}
_MAX_COLUMNS = 20  # Up to this number seeds are shown one by one; beyond it runs are counted.
_REDRAW_SECONDS = 0.5


def clock(seconds: float) -> str:
    """Return hours, minutes and seconds.

    Example:
        >>> clock(3723.4)
        '1:02:03'
    """
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


class StudyTable:
    """Table of a launcher's runs.

    Args:
        launcher: of the study.
        console: output.
    """

    def __init__(self, launcher: Launcher, console: Console) -> None:
        self._launcher = launcher
        self._console = console
        self._live: Live | None = None
        self._began = time.monotonic()
        self._drawn = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the table while the block runs, if there is a terminal; it stays on the screen afterwards."""
        if not self._console.is_terminal:
            yield
            return
        self._live = Live(self._view(), console=self._console, auto_refresh=False)
        self._live.start()
        try:
            yield
        finally:
            with suppress(OSError):
                self._live.update(self._view(), refresh=True)
                self._live.stop()
            self._live = None

    def changed(self, run: RunState) -> None:
        """Update the table, or print a line; see :class:`opdlab.studies.launch.Watcher`."""
        self._drawn = 0.0
        if self._live is None:
            took = f" after {clock(run.spec.run_folder.seconds)}" if run.state in (FINISHED, FAILED) else ""
            begun = "stopped" if self._launcher.stopping else "to be started again"
            state = begun if run.state == WAITING else run.state
            line = f"{run.spec.variant} seed {run.spec.seed}: {state}{took} ({self.summary()})"
            with suppress(OSError):  # The output is closed; the runs must still end in order.
                self._console.print(line, highlight=False, soft_wrap=True)

    def tick(self) -> None:
        """Update the clock; see :class:`opdlab.studies.launch.Watcher`."""
        if self._live is not None and time.monotonic() - self._drawn > _REDRAW_SECONDS:
            self._drawn = time.monotonic()
            with suppress(OSError):  # The terminal is closed.
                self._live.update(self._view(), refresh=True)

    def summary(self) -> str:
        """Return counts, the elapsed time, and an estimate of the remaining time."""
        count = self._launcher.count()
        parts = [f"{count[state]} {state}" for state in (FINISHED, RUNNING, WAITING, FAILED) if count[state]]
        left = self._seconds_left()
        rest = "" if left is None or not count[RUNNING] + count[WAITING] else f"; about {clock(left)} left"
        return f"{', '.join(parts)}; {clock(time.monotonic() - self._began)}{rest}"

    def _seconds_left(self) -> float | None:
        """Return an estimate from the mean time of finished runs and the number of concurrent runs."""
        runs = self._launcher.runs
        took = [seconds for run in runs if run.state == FINISHED and (seconds := run.spec.run_folder.seconds) > 0]
        if not took:
            return None
        mean = sum(took) / len(took)
        rests = [max(mean - (time.monotonic() - run.since), 0.0) for run in runs if run.state == RUNNING]
        waiting = self._launcher.count()[WAITING]
        return max((sum(rests) + mean * waiting) / self._launcher.jobs, max(rests, default=0.0))

    def _view(self) -> Group:
        runs = self._launcher.runs
        seeds = list(dict.fromkeys(run.spec.seed for run in runs))
        single = len(seeds) <= _MAX_COLUMNS
        table = Table(box=None, padding=(0, 1, 0, 0))
        table.add_column("variant", no_wrap=True)
        for column in seeds if single else ["runs"]:
            table.add_column(str(column), justify="right", no_wrap=True)
        for variant in dict.fromkeys(run.spec.variant for run in runs):
            own = [run for run in runs if run.spec.variant == variant]
            table.add_row(variant, *(map(_cell, own) if single else [_counts(own)]))
        lines = [Text(self.summary())]
        if self._launcher.stopping:
            lines.append(Text("stopping: runs finish their step and save a checkpoint (again to stop at once)"))
        return Group(table, *lines)


def _cell(run: RunState) -> Text:
    mark, style = _MARKS[run.state]
    if run.state == RUNNING:
        mark = f"{run.spec.run_folder.step}/{run.spec.evaluated_at[-1]}"
    return Text(mark, style=style)


def _counts(runs: Sequence[RunState]) -> Text:
    text = Text()
    for state, (mark, style) in _MARKS.items():
        if number := sum(run.state == state for run in runs):
            text.append(f" {number}{mark}", style=style)
    return text
