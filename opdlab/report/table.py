"""Tables of reports in three formats: Markdown, CSV with all digits, LaTeX with booktabs."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opdlab.viewer.text import visible

_MOST_COLUMNS = 7  # of a LaTeX table, which has to fit on a page
_MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", **{char: f"\\{char}" for char in r"\`*_{}[]#|~$!"}})
_LATEX_NAMES = {"~": "asciitilde", "^": "asciicircum", "\\": "backslash", "<": "less", ">": "greater", "|": "bar"}
_LATEX_NAMES |= {'"': "quotedbl", "⟨": "langle", "⟩": "rangle"}
_LATEX = str.maketrans(
    {**{char: f"\\{char}" for char in "&%$#_{}"}, **{char: f"\\text{it}{{}}" for char, it in _LATEX_NAMES.items()}}
)


def markdown_text(text: str) -> str:
    r"""Return text escaped for Markdown, on one line.

    Example:
        >>> markdown_text("a|b <i>*c*")
        'a\\|b &lt;i&gt;\\*c\\*'
    """
    return " ".join(visible(text).split()).translate(_MARKDOWN)


def latex_text(text: str) -> str:
    r"""Return text escaped for LaTeX.

    Example:
        >>> latex_text("50% of a_b")
        '50\\% of a\\_b'
    """
    return " ".join(visible(text).split()).translate(_LATEX)


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        header: names of the columns.
        rows: displayed cells; names come first.
        num_names: columns of text; the others are numbers, right-aligned.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_names: int = 1

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rule = [":--" if column < self.num_names else "--:" for column in range(len(self.header))]
        rows = [[markdown_text(cell) for cell in row] for row in (self.header, *self.rows)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])) + "\n"

    def latex(self) -> str:
        """Return the table as a LaTeX tabular of at most seven columns; it needs the package booktabs."""
        assert len(self.header) <= _MOST_COLUMNS, "a page of a paper has no room for more"
        columns = "l" * self.num_names + "r" * (len(self.header) - self.num_names)
        # LaTeX would read a bracket after \\ as its argument.
        head, *body = [
            r"{}" + " & ".join(self._latex_cell(column, cell) for column, cell in enumerate(row)) + r" \\"
            for row in (self.header, *self.rows)
        ]
        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        return "\n".join([*lines, r"\end{tabular}"]) + "\n"

    def _latex_cell(self, column: int, cell: str) -> str:
        """Return an escaped cell; in columns of numbers a hyphen before a digit is a minus sign."""
        text = latex_text(cell)
        return text if column < self.num_names else re.sub(r"(?<![\w.])-(?=\d)", "$-$", text)


def csv_text(records: Sequence[dict[str, Any]]) -> str:
    """Return records as CSV: all digits, empty for unknown numbers."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: None if value != value else value for key, value in row.items()} for row in records)
    return file.getvalue()
