"""Output during a study: a live table on a terminal, otherwise a line for each change."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from opdlab.studies.launch import Launcher, RunState
from opdlab.studies.schema import FAILED, FINISHED, RUNNING, WAITING

_MARKS = {FINISHED: ("✓", "green"), RUNNING: ("…", "yellow"), WAITING: ("·", "dim"), FAILED: ("✗", "red")}
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

    def update(self, run: RunState | None) -> None:
        """Show a run whose state has changed; None updates the clock."""
        with suppress(OSError):  # The output is closed; the runs must still end in order.
            if self._live is not None:
                if run is not None or time.monotonic() - self._drawn > _REDRAW_SECONDS:
                    self._drawn = time.monotonic()
                    self._live.update(self._view(), refresh=True)
            elif run is not None:
                took = f" after {clock(run.spec.seconds)}" if run.state in (FINISHED, FAILED) else ""
                begun = "stopped" if self._launcher.signals else "to be started again"
                state = begun if run.state == WAITING else run.state
                line = f"{run.spec.variant} seed {run.spec.seed}: {state}{took} ({self.summary()})"
                self._console.print(line, highlight=False, soft_wrap=True)

    def summary(self) -> str:
        """Return counts, the elapsed time, and an estimate of the remaining time from the mean of finished runs."""
        count, runs = self._launcher.count(), self._launcher.runs
        parts = [f"{count[state]} {state}" for state in _MARKS if count[state]]
        took = [seconds for run in runs if run.state == FINISHED and (seconds := run.spec.seconds) > 0]
        rest = ""
        if took and count[RUNNING] + count[WAITING]:
            mean = sum(took) / len(took)
            rests = [max(mean - (time.monotonic() - run.since), 0.0) for run in runs if run.state == RUNNING]
            left = max((sum(rests) + mean * count[WAITING]) / self._launcher.jobs, max(rests, default=0.0))
            rest = f"; about {clock(left)} left"
        return f"{', '.join(parts)}; {clock(time.monotonic() - self._began)}{rest}"

    def _view(self) -> Group:
        runs = self._launcher.runs
        seeds = list(dict.fromkeys(run.spec.seed for run in runs))
        single = len(seeds) <= _MAX_COLUMNS
        table = Table(box=None, padding=(0, 1, 0, 0))
        table.add_column("variant", no_wrap=True)
        for column in seeds if single else ["runs"]:
            table.add_column(str(column), justify="right", no_wrap=True)
        for variant in dict.fromkeys(run.spec.variant for run in runs):
            cells = []
            for run in [run for run in runs if run.spec.variant == variant] if single else []:
                mark, style = _MARKS[run.state]
                step = f"{run.spec.step}/{run.spec.evaluated_at[-1]}" if run.state == RUNNING else mark
                cells.append(Text(step, style=style))
            if not single:
                count = Counter(run.state for run in runs if run.spec.variant == variant)
                marks = [(f" {count[state]}{mark}", style) for state, (mark, style) in _MARKS.items() if count[state]]
                cells = [Text.assemble(*marks)]
            table.add_row(variant, *cells)
        lines = [Text(self.summary())]
        if self._launcher.signals:
            lines.append(Text("stopping: runs finish their step and save a checkpoint (again to stop at once)"))
        return Group(table, *lines)
