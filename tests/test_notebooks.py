"""Every notebook is stored without outputs, runs from top to bottom, and shows the results that its text states."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = {path.stem: path for path in (Path(__file__).parents[1] / "notebooks").glob("*.ipynb")}
NUMBER = r"(\d+(?:\.\d+)?)"


@dataclass
class Shown:
    """What a notebook shows: its text, and how many pictures."""

    text: str
    num_pictures: int

    def numbers(self, pattern: str) -> list[float]:
        """The numbers that a pattern's groups match, wherever they stand."""
        (found,) = set(re.findall(pattern, self.text))
        return [float(number) for number in ([found] if isinstance(found, str) else found)]


def check_first_run(shown: Shown) -> None:
    assert "gold:\n66" in shown.text
    cell = r" +│ \d\.\d{3} ± \d\.\d{3}"
    before_and_after = re.search("toy/pass@8" + 2 * cell, shown.text)
    assert before_and_after is not None
    for k in (8, 1):
        (line,) = re.findall(rf"pass@{k}:(.*)", shown.text)
        plotted = {int(step): float(value) for step, value in re.findall(r"step (\d+) (\S+)", line)}
        assert list(plotted) == [0, 4, 8, 12]
        assert plotted[12] > plotted[0] + 0.2
        in_table = shown.numbers(rf"toy/pass@{k} +│ {NUMBER} ± \S+ │ {NUMBER} ")
        assert in_table == [plotted[0], plotted[12]]
    assert "gate/effective_sample_size" in shown.text
    assert "loaded: Qwen3ForCausalLM same weights: True" in shown.text
    assert shown.num_pictures == 1


def check_write_a_gate(shown: Shown) -> None:
    weights = [float(weight) for weight in re.findall(r"segment \d  weight (\S+)", shown.text)]
    texts = re.findall(r"segment \d  weight \S+  '(.*)'", shown.text)
    assert [text[-1:] for text in texts[::2]] == ["="] * 3
    assert [text[-2:] for text in texts[1::2]] == [r"\n"] * 3
    assert weights[1] < 1 < weights[0]  # the drift was put into the first result
    assert len(set(weights)) == 2
    assert shown.numbers(r"(\d+) laws hold")[0] >= 14
    assert "law 'padding_invariance' does not hold for ThirdsOfTheWidth" in shown.text
    copying, results = shown.numbers(rf"mean weight of copying {NUMBER}, of results {NUMBER}")
    assert copying != results
    assert shown.num_pictures == 1


def check_read_the_gates(shown: Shown) -> None:
    by_age = {age: shown.numbers(rf"age/drift/{age} .*: {NUMBER} {NUMBER}") for age in ("000", "005", "015")}
    assert by_age["000"] == [0, 0]  # fresh rollouts
    assert by_age["015"][0] > by_age["005"][0] > 0
    row = rf"{NUMBER} to +{NUMBER} +mean {NUMBER} +ESS {NUMBER} +drifted tenth +{NUMBER}%"
    taus = [shown.numbers(rf"block32 tau={tau} +{row}") for tau in ("0.0", "0.5", "1.0", "5.0", "20.0")]
    assert taus[0][:4] == [1, 1, 1, 1]  # tau 0: no gate
    assert [rounded[3] for rounded in taus] == sorted((values[3] for values in taus), reverse=True)
    assert taus[-1][4] < taus[0][4] == pytest.approx(10, abs=0.5)
    low, high, mean, _, _ = shown.numbers(rf"normalization=none +{row}")
    assert low <= mean <= high <= 1
    assert shown.numbers(rf"normalization=clipped +{row}")[2] == 1
    token, block, sequence = (shown.numbers(rf"{name} tau=5.0 +{row}") for name in ("token", "block32", "sequence"))
    assert token[4] < 5 < block[4] < sequence[4]  # the numbers that the text states for them
    assert token[3] > block[3]
    assert shown.num_pictures == 6  # two heat maps, block histograms, by age, by tau, by age for another gate


CHECKS: dict[str, Callable[[Shown], None]] = {
    "01_first_run": check_first_run,
    "02_write_a_gate": check_write_a_gate,
    "03_read_the_gates": check_read_the_gates,
}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.reads(NOTEBOOKS[name].read_text(), as_version=4)  # type: ignore[no-untyped-call, no-any-return]


def test_every_notebook_is_checked() -> None:
    assert set(CHECKS) == set(NOTEBOOKS)


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_outputs_are_stripped(name: str) -> None:
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count or cell.metadata for cell in code)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's client, not of opdlab
@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_notebook_shows_what_it_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two processes of tests share two cores
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = read(name)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    # A line that is printed may come in two outputs, so nothing is put between them.
    text = "".join(output.get("text", f"{output.get('data', {}).get('text/plain', '')}\n") for output in outputs)
    CHECKS[name](Shown(text, sum("image/png" in output.get("data", {}) for output in outputs)))
