"""How figures get into TensorBoard: histograms, pictures, and a page that groups the scalars."""

from collections.abc import Mapping, Sequence

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from opdlab.diagnostics.histograms import Histogram

# Charts by category: lines of all tags that a regular expression matches from their start, or a line in a band
# (value, lower, upper).
_Chart = tuple[str, list[str]]
LAYOUT: dict[str, dict[str, _Chart]] = {
    "drift": {
        "drift, nats": ("Multiline", [r"train/drift/(token|segment)_mean$"]),
        "largest drift, nats": ("Multiline", [r"train/drift/max$"]),
        "share of positions with drift above 0.1": ("Multiline", [r"train/drift/share_above_0\.1$"]),
    },
    "gate": {
        "weight: mean, min, max": ("Margin", ["gate/mean", "gate/min", "gate/max"]),
        "weight: standard deviation": ("Multiline", [r"gate/std$"]),
        "effective sample size": ("Multiline", [r"gate/effective_sample_size$"]),
        "share of weights below 0.5, above 2": ("Multiline", [r"gate/share_(below|above)_"]),
        "correlation of the weight with": ("Multiline", [r"gate/correlation/"]),
    },
    "gated against ungated step": {
        "gated / ungated loss": ("Multiline", [r"gate/loss_ratio$"]),
        "cosine of the gradients": ("Multiline", [r"gate/gradient_cosine$"]),
        "gated / ungated gradient norm": ("Multiline", [r"gate/gradient_norm_ratio$"]),
    },
    "age": {
        "drift by steps since the refresh, nats": ("Multiline", [r"age/drift/"]),
        "weight spread by steps since the refresh": ("Multiline", [r"age/weight_std/"]),
        "mean weight by steps since the refresh": ("Multiline", [r"age/weight_mean/"]),
        "drift by reuse epoch, nats": ("Multiline", [r"reuse_epoch/drift/"]),
        "weight spread by reuse epoch": ("Multiline", [r"reuse_epoch/weight_std/"]),
        "mean weight by reuse epoch": ("Multiline", [r"reuse_epoch/weight_mean/"]),
    },
    "loss": {
        "loss, gated and ungated": ("Multiline", [r"train/loss$", r"gate/ungated_loss$"]),
        "teacher gap, nats": ("Multiline", [r"train/(teacher_gap|advantage)$"]),
        "entropy, nats": ("Multiline", [r"train/entropy$"]),
        "support mass": ("Multiline", [r"train/(teacher|student)_support_mass$"]),
        "clip share": ("Multiline", [r"train/clip_share$"]),
    },
    "rollout": {
        "length, tokens": ("Multiline", [r"rollout/length$"]),
        "accuracy, truncated share": ("Multiline", [r"rollout/(accuracy|truncated_share)$"]),
        "age, steps": ("Multiline", [r"rollout/age$"]),
    },
    "validation": {
        "pass@k, mean of the benchmarks": ("Multiline", [r"val/mean/pass@\d+$"]),
        "pass@k": ("Multiline", [r"val/(?!mean/)[^/]+/pass@\d+$"]),
        "length, tokens": ("Multiline", [r"val/(?!mean/)[^/]+/length$"]),
    },
}


def writers(loggers: Sequence[Logger]) -> list[SummaryWriter]:
    """The writers of those loggers that are TensorBoard's."""
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def write_layout(writer: SummaryWriter) -> None:
    """Set up the page of custom scalars, once for each writer."""
    writer.add_custom_scalars(LAYOUT)


def write_histograms(writer: SummaryWriter, histograms: Mapping[str, Histogram], step: int) -> None:
    """Write histograms by tag."""
    for tag, h in histograms.items():
        writer.add_histogram_raw(tag, h.min, h.max, h.num, h.sum, h.sum_squares, h.limits, h.counts, step)


def write_images(writer: SummaryWriter, images: Mapping[str, NDArray[np.uint8]], step: int) -> None:
    """Write pictures by tag, each [height, width, 3]."""
    for tag, image in images.items():
        writer.add_image(tag, image, step, dataformats="HWC")
