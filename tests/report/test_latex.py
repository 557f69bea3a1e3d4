"""Tables for a paper: LaTeX that compiles where a TeX is installed, and has the form of it everywhere."""

import re
import shutil
from pathlib import Path

import pytest

from opdlab.report import make_report
from opdlab.report.table import Table
from tests.children import run_child
from tests.report.synthetic_study import SyntheticStudy

ODD = r"50% of $a_b$ & #1 {x} ^~\ <T> |"
# A small TeX may lack the package; its three rules are lines.
_RULES = (
    r"\IfFileExists{booktabs.sty}{\usepackage{booktabs}}{\let\toprule\hline\let\midrule\hline\let\bottomrule\hline}"
)
_TEX = next(filter(None, map(shutil.which, ("pdflatex", "xelatex", "lualatex", "tectonic"))), None)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    study = SyntheticStudy(
        {"none": 0.0, "span": 0.2, "odd": -0.1},
        range(4),
        [20, 40],
        {"toy": 8, "g_s%m": 6},
        num_samples=4,
        labels={"odd": ODD},
        baselines={"odd": "span"},
    )
    report = make_report(study.write(tmp_path_factory.mktemp("study"))).write()
    return sorted((report.parent / "tables").glob("*.tex"))


def test_tables_have_seven_columns_at_most_and_balanced_cells(tables: list[Path]) -> None:
    assert [path.stem for path in tables] == ["comparisons", "metrics"]
    for path in tables:
        text = path.read_text()
        columns = re.match(r"\\begin\{tabular\}\{([lr]+)\}\n\\toprule\n", text)
        assert columns is not None
        assert len(columns[1]) <= 7
        assert text.endswith("\\bottomrule\n\\end{tabular}\n")
        rows = [line for line in text.splitlines() if line.endswith(r" \\")]
        plain = [re.sub(r"\\(?:text\w+\{\}|[&%$#_{}])", "", row.removesuffix(r" \\")) for row in rows]
        for row in plain:
            assert row.count("&") == len(columns[1]) - 1
            assert not re.search(r"[%#_^~\\]", row)
            assert row.count("$") % 2 == 0
            assert row.count("{") == row.count("}") == 1  # the empty group before a row
    body = tables[0].read_text()
    assert "& $-$0." in body
    assert r"(to span)" in body


@pytest.mark.skipif(_TEX is None, reason="no TeX is installed")
def test_tables_compile(tables: list[Path], tmp_path: Path) -> None:
    inputs = "\n\n".join(f"\\input{{{path}}}" for path in tables)
    document = f"\\documentclass{{article}}\n{_RULES}\n\\begin{{document}}\n{inputs}\n\\end{{document}}\n"
    (tmp_path / "paper.tex").write_text(document)
    assert _TEX is not None
    options = [] if "tectonic" in _TEX else ["-interaction=nonstopmode", "-halt-on-error"]
    done = run_child([_TEX, *options, "paper.tex"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").stat().st_size > 1000


def test_a_table_of_eight_columns_is_none() -> None:
    with pytest.raises(AssertionError, match="no room"):
        Table(list("abcdefgh"), []).latex()
