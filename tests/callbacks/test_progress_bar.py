"""Content of the bars and the line below them, read from a console of known width."""

import io
import logging
import re
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import rich
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console, RenderableType
from torch.utils._python_dispatch import TorchDispatchMode

from opdlab.callbacks import CollapseGuard, LabProgressBar
from opdlab.callbacks.progress_bar import SummaryLine
from opdlab.diagnostics.metric_table import progress_items
from tests.toy_run import Run


def printed(what: RenderableType, width: int) -> str:
    output = io.StringIO()
    Console(file=output, width=width, force_terminal=True, color_system=None).print(what)
    return output.getvalue()


class Frames(pl.Callback):
    """Keeps what is on the screen after each training batch, by optimizer step."""

    def __init__(self, bar: LabProgressBar, width: int) -> None:
        self.bar, self.width = bar, width
        self.at: dict[int, list[str]] = {}
        self.at_start: list[str] = []
        self.evaluating: list[list[str]] = []

    def on_train_start(self, *args: Any) -> None:
        self.at_start = self.screen()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.at[trainer.global_step] = self.screen()

    def on_validation_batch_end(self, *args: Any) -> None:
        self.evaluating.append(self.screen())

    def screen(self) -> list[str]:
        assert self.bar.progress is not None
        return printed(self.bar.progress.get_renderable(), self.width).splitlines()


class Terminal:
    """A run with bars in a terminal that writes into a string."""

    def __init__(self, folder: Path, *, width: int = 120, is_terminal: bool = True, **options: Any) -> None:
        self.output = io.StringIO()
        console = {"file": self.output, "width": width, "force_terminal": is_terminal, "color_system": None}
        self.bar = LabProgressBar(console_kwargs=console)
        self.frames = Frames(self.bar, width)
        self.run = Run(folder, callbacks=(self.bar, self.frames), max_new_tokens=12, **options)

    def fit(self, max_steps: int, **options: Any) -> pl.Trainer:
        return self.run.fit(max_steps, **{"enable_progress_bar": True, "logger": False, **options})


@pytest.fixture(autouse=True)
def _own_console() -> Iterator[None]:
    yield
    rich.reconfigure()


def numbers_in(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", line)]


def test_the_line_says_what_was_logged(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    terminal.fit(4)
    for step, logged in terminal.run.recorder.steps.items():
        bar, line = terminal.frames.at[step]  # one bar, one line: nothing scrolls
        assert f" {step}/4 " in bar
        assert "loss" not in bar
        values = [
            logged[f"{name}"]
            for name in ("train/loss", "train/drift/token_mean", "train/drift/max", "gate/min", "gate/max")
        ] + [logged["gate/effective_sample_size"], logged["rollout/age"]]
        assert numbers_in(line)[: len(values)] == pytest.approx(values, abs=0.05)
        assert numbers_in(line)[0] == pytest.approx(values[0], abs=5e-5)
    assert len({line for _, line in terminal.frames.at.values()}) == 4
    assert re.fullmatch(
        r"loss \S+ · drift \S+ \(max \S+\) · weights \S+ · ESS \S+ · age \d · [\d.]+k? tok/s",
        terminal.frames.at[4][-1].rstrip(),
    )


def test_eighty_columns_hold_all_but_the_rate(tmp_path: Path) -> None:
    worst = {"train/loss": -0.0123, "train/drift/token_mean": 0.2, "train/drift/max": 20.9, "gate/min": 0.07}
    worst |= {"gate/max": 12.3, "gate/effective_sample_size": 0.9, "rollout/age": 12.5}
    assert len(" · ".join(progress_items(worst))) <= 80
    terminal = Terminal(tmp_path, width=80)
    terminal.fit(3)
    bar, line = terminal.frames.at[3]
    assert "· age 2" in line
    assert "tok/s" not in line
    assert max(len(bar), len(line)) <= 80


def test_a_narrow_terminal_shows_the_first_items_that_fit() -> None:
    line = SummaryLine()
    line.items = items = ["loss 0.01", "drift 0.034", "ESS 1.00", "age 3"]
    lengths = list(accumulate(map(len, items), lambda length, more: length + 3 + more))
    for width in range(1, 60):
        assert printed(line, width).rstrip("\n") == " · ".join(items[: sum(length <= width for length in lengths)])


def test_between_logged_steps_the_last_metrics_stay(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    terminal.fit(5, log_every_n_steps=3)
    lines = {step: frame[-1] for step, frame in terminal.frames.at.items()}
    assert "drift" not in lines[2]
    assert "loss" in lines[2]
    drift = {step: re.findall("drift.*age", lines[step]) for step in (3, 4, 5)}
    assert drift[3]
    assert drift[3] == drift[4] == drift[5]
    assert len({numbers_in(line)[0] for line in lines.values()}) == 5  # the loss changes with each step


def test_without_logging_the_loss_is_left(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    terminal.fit(2, log_every_n_steps=0)
    assert re.fullmatch(r"loss \S+ *", terminal.frames.at[2][-1])


def test_the_bar_counts_optimizer_steps_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    first = Terminal(tmp_path, accumulate=2)
    trainer = first.fit(3)
    assert [re.search(r"(\d+)/(\d+)", frame[0])[0] for frame in first.frames.at.values()] == [  # type: ignore[index]
        "0/3",
        "1/3",
        "2/3",
        "3/3",
    ]
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = Terminal(tmp_path, accumulate=2)
    resumed.fit(5, ckpt_path=tmp_path / "stopped.ckpt")
    assert " 3/5 " in resumed.frames.at_start[0]  # in the middle of a pass over the prompts
    assert " 0/5 " not in resumed.output.getvalue()  # not even briefly
    assert " 4/5 " in resumed.frames.at[4][0]
    assert " 5/5 " in resumed.frames.at[5][0]


class Passes(pl.Callback):
    """Keeps where the bar stands, and when it was started, at the beginning of each pass over the prompts."""

    def __init__(self, bar: LabProgressBar) -> None:
        self.bar = bar
        self.seen: list[tuple[float, float | None]] = []

    def on_train_epoch_start(self, *args: Any) -> None:
        self.seen.append((self.bar.train_progress_bar.completed, self.bar.train_progress_bar.start_time))


def test_the_bar_goes_on_from_pass_to_pass_over_the_prompts(tmp_path: Path) -> None:
    first = Terminal(tmp_path)  # 16 problems, 8 a buffer, 4 steps a buffer: 8 steps a pass
    passes = Passes(first.bar)
    first.run.trainer_options["callbacks"].append(passes)
    trainer = first.fit(16)
    assert [steps for steps, _ in passes.seen] == [0, 8]
    assert len({started for _, started in passes.seen}) == 1
    trainer.save_checkpoint(tmp_path / "after_two_passes.ckpt")
    resumed = Terminal(tmp_path)
    passes = Passes(resumed.bar)
    resumed.run.trainer_options["callbacks"].append(passes)
    resumed.fit(17, ckpt_path=tmp_path / "after_two_passes.ckpt")
    assert [steps for steps, _ in passes.seen] == [16]


def test_evaluations_on_the_way_keep_the_line(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    terminal.fit(3, limit_val_batches=1.0, val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=0)
    assert terminal.frames.at[3][-1].startswith("loss")
    (frame,) = terminal.frames.evaluating
    assert [line.split()[0] for line in frame] == ["Training", "Validation", "loss"]
    assert frame[-1] == terminal.frames.at[2][-1]


def test_a_file_gets_each_bar_and_the_line_once(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, is_terminal=False, width=80)
    terminal.fit(4)
    lines = terminal.output.getvalue().split("\n")
    assert [line.split()[0] for line in lines if line.strip()] == ["Training", "loss"]


def test_a_collapse_is_at_the_beginning_of_the_line(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, temperature=1e-6)
    guard = CollapseGuard()
    terminal.run.trainer_options["callbacks"].insert(0, guard)
    terminal.fit(4)
    (message,) = guard.messages
    assert terminal.frames.at[2][-1].startswith("loss ")
    assert terminal.frames.at[4][-1].startswith(f"{message} · loss ")


def test_a_note_that_does_not_fit_is_cut() -> None:
    line = SummaryLine()
    line.note, line.items = "collapse: step 3", ["loss 0.1"]
    assert printed(line, 30) == "collapse: step 3 · loss 0.1\n"
    assert printed(line, 20) == "collapse: step 3\n"
    assert printed(line, 10) == "collapse:…\n"


def test_no_bar_means_no_line(tmp_path: Path) -> None:
    output = io.StringIO()
    bar = LabProgressBar(refresh_rate=0, console_kwargs={"file": output, "force_terminal": True})
    Run(tmp_path, callbacks=(bar,), max_new_tokens=12).fit(2, enable_progress_bar=True, logger=False)
    assert output.getvalue() == ""


class CountFetches(TorchDispatchMode):
    """Counts the values that are fetched from the device one by one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def fetches_by_step(bar: type[RichProgressBar], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many values the bar fetches one by one at each step, Lightning's own fetching on its behalf included."""
    counts = []
    show = bar.on_train_batch_end

    def counted(*args: Any) -> None:
        with CountFetches() as fetches:
            show(*args)
        counts.append(fetches.count)

    with monkeypatch.context() as patch:
        patch.setattr(bar, "on_train_batch_end", counted)
        terminal = Terminal(folder)
        terminal.run.trainer_options["callbacks"][1:3] = [bar(console_kwargs={"file": io.StringIO()})]
        terminal.fit(7, log_every_n_steps=5)
    return counts


def test_hardly_more_is_fetched_than_by_lightnings_own_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = fetches_by_step(RichProgressBar, tmp_path, monkeypatch)
    ours = fetches_by_step(LabProgressBar, tmp_path, monkeypatch)
    extra = [more - less for more, less in zip(ours, own, strict=True)]
    # Lightning fetches values logged with `prog_bar`, two metrics, whenever it is asked for logged metrics.
    assert extra == [0, 0, 0, 0, 2, 0, 0]


def test_messages_are_written_above_the_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Speaker(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            rank_zero_info(f"step {trainer.global_step} is over")

    elsewhere = io.StringIO()
    handler = logging.StreamHandler(elsewhere)
    monkeypatch.setattr(sys, "stderr", elsewhere)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [handler])
    terminal = Terminal(tmp_path)
    terminal.run.trainer_options["callbacks"].append(Speaker())
    terminal.fit(2)
    assert re.search("step 1 is over *\n", terminal.output.getvalue())
    assert "is over" not in elsewhere.getvalue()
    assert handler.stream is elsewhere  # after the bars have stopped
