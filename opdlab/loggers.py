"""Histograms, images and text for loggers: one place that knows what each logger takes besides scalars.

TensorBoard and Weights & Biases take all three, MLflow images and text (as artifacts), other loggers none. Another
logger is added with ``media_writer.register``.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import singledispatch
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from opdlab.diagnostics.histograms import Histogram
from opdlab.diagnostics.metric_table import chart_layout
from opdlab.errors import FullDiskError
from opdlab.files import full_disk

Histograms = Mapping[str, Histogram]
Images = Mapping[str, NDArray[np.uint8]]
Texts = Mapping[str, str]

_TOLD: WeakKeyDictionary[Logger, set[str]] = WeakKeyDictionary()


class MediaWriter:
    """Base of the writers of one logger; it takes nothing.

    A subclass names in :attr:`takes` what its logger takes, and defines the method of each.

    Args:
        logger: the logger.
    """

    takes: tuple[str, ...] = ()
    """Of ``histograms``, ``images``, ``texts``."""
    named = True
    """True if the log names what the logger leaves out."""

    def __init__(self, logger: Logger) -> None:
        self.logger: Any = logger

    def histograms(self, items: Histograms, step: int) -> None:
        """Write histograms by tag."""

    def images(self, items: Images, step: int) -> None:
        """Write images by tag, each [height, width, 3]."""

    def texts(self, items: Texts, step: int) -> None:
        """Write Markdown by tag."""


@singledispatch
def media_writer(logger: Logger) -> MediaWriter:
    """Return the writer for a logger; one that takes nothing if its class is not registered.

    Args:
        logger: dispatched by its class.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> media_writer(CSVLogger("runs")).takes
        ()
    """
    return MediaWriter(logger)


@media_writer.register(DummyLogger)
class ScalarsOnly(MediaWriter):
    """Writer of a logger that is for scalars only, of which nobody expects anything else."""

    named = False


@media_writer.register(TensorBoardLogger)
class _TensorBoard(MediaWriter):
    takes = ("histograms", "images", "texts")

    def histograms(self, items: Histograms, step: int) -> None:
        for tag, h in items.items():
            self.logger.experiment.add_histogram_raw(
                tag, h.min, h.max, h.num, h.sum, h.sum_squares, h.limits, h.counts, step
            )

    def images(self, items: Images, step: int) -> None:
        for tag, image in items.items():
            self.logger.experiment.add_image(tag, image, step, dataformats="HWC")

    def texts(self, items: Texts, step: int) -> None:
        for tag, text in items.items():
            self.logger.experiment.add_text(tag, text, step)


@media_writer.register(WandbLogger)
class _Wandb(MediaWriter):
    takes = ("histograms", "images", "texts")

    def _log(self, items: Mapping[str, Any], step: int) -> None:
        self.logger.log_metrics(items, step=step)  # one call, since each makes a row

    def histograms(self, items: Histograms, step: int) -> None:
        from wandb import Histogram as WandbHistogram

        self._log({tag: WandbHistogram(np_histogram=(h.counts, [h.min, *h.limits])) for tag, h in items.items()}, step)

    def images(self, items: Images, step: int) -> None:
        from wandb import Image

        self._log({tag: Image(image) for tag, image in items.items()}, step)

    def texts(self, items: Texts, step: int) -> None:
        from wandb import Table

        # A cell of a table shows text as it is; the page of HTML would interpret it.
        self._log({tag: Table(columns=["text"], data=[[text]]) for tag, text in items.items()}, step)


@media_writer.register(MLFlowLogger)
class _MLflow(MediaWriter):
    takes = ("images", "texts")

    def images(self, items: Images, step: int) -> None:
        for tag, image in items.items():
            self.logger.experiment.log_image(self.logger.run_id, image, artifact_file=f"{tag}/step-{step:06d}.png")

    def texts(self, items: Texts, step: int) -> None:
        for tag, text in items.items():
            self.logger.experiment.log_text(self.logger.run_id, text, artifact_file=f"{tag}/step-{step:06d}.md")


def log_media(
    loggers: Sequence[Logger],
    step: int,
    *,
    histograms: Histograms | None = None,
    images: Images | None = None,
    texts: Texts | None = None,
) -> None:
    """Write histograms, images and text to every logger that takes them; the others are named once in the log.

    Args:
        loggers: of the trainer.
        step: optimizer steps taken.
        histograms: by tag.
        images: by tag, each [height, width, 3].
        texts: Markdown by tag.
    """
    given = {"histograms": histograms, "images": images, "texts": texts}
    for logger in loggers:
        writer = media_writer(logger)
        for kind, items in given.items():
            if items and kind in writer.takes:
                with _naming_folder(logger):
                    getattr(writer, kind)(items, step)
            elif items and writer.named:
                told = _TOLD.setdefault(logger, set())
                if kind not in told:
                    names = ", ".join(sorted(items)[:3]) + (", …" if len(items) > 3 else "")
                    rank_zero_info(f"{type(logger).__name__} takes no {kind}; left out: {names}")
                told.add(kind)


def log_scalars(
    loggers: Sequence[Logger],
    metrics: Mapping[str, Any],
    step: int,
    known: Mapping[tuple[Logger, int], Container[str]] | None = None,
) -> None:
    """Write scalars, each to the loggers that do not have it at this step; :func:`save_all` brings them to the disk.

    Args:
        loggers: of the trainer.
        metrics: numbers or scalar tensors by name.
        step: optimizer steps taken.
        known: names that a logger has at a step already; None if it has none of these.
    """
    values = {name: float(value) for name, value in metrics.items()} if loggers else {}
    for logger in loggers:
        there = known.get((logger, step), ()) if known else ()
        with _naming_folder(logger):
            logger.log_metrics({name: value for name, value in values.items() if name not in there}, step=step)


def save_all(loggers: Sequence[Any]) -> None:
    """Bring all that was logged to the disk."""
    for logger in loggers:
        with _naming_folder(logger):
            logger.save()


@contextmanager
def _naming_folder(logger: Logger) -> Iterator[None]:
    """Raise a :class:`FullDiskError` with the logger's folder, if it names one, if the block finds the disk full."""
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:
        folder = (getattr(logger, "log_dir", None) or logger.save_dir) if full_disk(error) is not None else None
        if folder is None:
            raise
        raise FullDiskError(Path(folder)) from error


def log_layout(loggers: Sequence[Logger]) -> None:
    """Write TensorBoard's page "Custom scalars"; other loggers have none."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(layout())


def layout() -> dict[str, dict[str, tuple[str, list[str]]]]:
    """Return the charts of the page "Custom scalars", in the form that ``SummaryWriter.add_custom_scalars`` takes.

    A ``Multiline`` chart has a line for each name that one of its regular expressions matches, a ``Margin`` chart a
    line in a band, given by the names of value, lower and upper bound.
    """
    pages: dict[str, dict[str, tuple[str, list[str]]]] = {}
    for page, charts in chart_layout().items():
        pages[page] = {}
        for title, rows in charts.items():
            band = any(row.chart is not None and row.chart.band for row in rows)
            names = [row.name if band else row.pattern for row in rows]
            pages[page][title] = ("Margin" if band else "Multiline", names)
    return pages
