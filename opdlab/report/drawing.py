"""Drawing and saving of figures, equal on every run.

No global state of matplotlib changes: settings hold only inside :func:`drawing`. Names are shown literally; by default
matplotlib reads ``$`` as mathematics.
"""

import base64
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from opdlab.viewer.text import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Dates and versions, by which equal figures would differ.
_METADATA = {"png": ["Software"], "svg": ["Date", "Creator"], "pdf": ["CreationDate", "Creator", "Producer"]}
_DPI = 110
_LONGEST = 40  # characters of a name


@contextmanager
def drawing() -> Iterator[None]:
    """Apply the settings for drawing and saving figures, equal on every run; restore the old ones at the end."""
    import matplotlib as mpl

    # Without a salt, names of elements in an SVG are random.
    settings: dict[Any, Any] = {
        "text.parse_math": False,
        "svg.hashsalt": "opdlab",
        "svg.fonttype": "path",
        "pdf.fonttype": 42,
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # Names may be in any script.
        yield


def save(figure: "Figure", kind: Literal["png", "svg", "pdf"]) -> bytes:
    """Return a figure as the content of a file; equal figures give equal bytes."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=dict.fromkeys(_METADATA[kind]))
    return file.getvalue()


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def short_name(text: str) -> str:
    """Return a name on one line; a long one is cut in the middle, since names of runs differ at their end."""
    text = " ".join(visible(text).split())
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - half - 1]}…{text[-half:]}"


@dataclass(frozen=True)
class Picture:
    """A plot in a report.

    Args:
        name: of its files, without extension.
        alt: text alternative.
        files: content of its files by extension: png, svg and pdf.
    """

    name: str
    alt: str
    files: dict[str, bytes]

    @property
    def source(self) -> str:
        """Return the plot as a data URL, so that the page needs no other file."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.files['svg']).decode('ascii')}"


def picture(figure: "Figure", name: str, alt: str) -> Picture:
    """Return the files of a figure.

    Args:
        figure: drawn inside :func:`drawing`.
        name: of the files.
        alt: text alternative.
    """
    png = save(figure, "png")
    figure.set_layout_engine("none")  # The layout is already computed, and it is most of the work.
    return Picture(name, alt, {"png": png, "svg": save(figure, "svg"), "pdf": save(figure, "pdf")})
