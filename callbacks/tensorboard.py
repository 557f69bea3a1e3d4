"""Output to TensorBoard: histograms, images, and a page that groups the scalars."""

from collections.abc import Mapping, Sequence

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from opdlab.diagnostics.histograms import Histogram
from opdlab.diagnostics.metric_table import chart_layout


def writers(loggers: Sequence[Logger]) -> list[SummaryWriter]:
    """Return the writers of all TensorBoard loggers."""
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


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


def write_histograms(writer: SummaryWriter, histograms: Mapping[str, Histogram], step: int) -> None:
    """Write histograms by tag."""
    for tag, h in histograms.items():
        writer.add_histogram_raw(tag, h.min, h.max, h.num, h.sum, h.sum_squares, h.limits, h.counts, step)


def write_images(writer: SummaryWriter, images: Mapping[str, NDArray[np.uint8]], step: int) -> None:
    """Write images by tag, each [height, width, 3]."""
    for tag, image in images.items():
        writer.add_image(tag, image, step, dataformats="HWC")
