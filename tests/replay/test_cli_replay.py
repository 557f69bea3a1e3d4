"""``opdlab replay`` through the command line, in this process."""

import csv
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import yaml
from lightning.pytorch import seed_everything

from opdlab.cli import EXIT_USAGE, main

SMALL = """
trainer: {max_steps: 4, val_check_interval: 100, enable_progress_bar: false, enable_model_summary: false}
model:
  sampling: {max_new_tokens: 24}
  eval_sampling: {num_samples: 2, max_new_tokens: 12}
  evaluation: {pass_at: [1], teacher: false}
  optimizer: {init_args: {lr: 0.002}}
data:
  train: {class_path: opdlab.toy.ChainProblems, init_args: {num_problems: 8}}
  benchmarks:
    toy: {class_path: opdlab.toy.ChainProblems, init_args: {num_problems: 2, split: held_out}}
  reuse: {prompts_per_pool: 4, epochs: 2, batch_size: 4}
export: {enabled: false}
save_pools: true
pool_recorder: {every_n_steps: 2}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded run's folder, in a root of its own."""
    folder = tmp_path_factory.mktemp("replay")
    (folder / "small.yaml").write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.chdir(folder)
        assert main(["fit", "-c", "quickstart", "-c", "small.yaml"]) == 0
    seed_everything(0)
    return folder / "runs/quickstart/version_0"


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return Path(shutil.copytree(trained, tmp_path / "runs/version_0"))


def test_a_replay_leaves_tables_and_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["save_pools"] is True
    options = ["--gates", "block32,span", "fire_opd", "--taus", "1", "5", "--draws", "2", "--other_prompts"]
    assert main(["replay", str(run), *options]) == 0
    output = capsys.readouterr().out
    assert "under the run's own gate the recorded losses come out to the bit, at all of them" in output
    assert re.search(r"│ block64 \(the run\) +│ 1 +│", output)
    out = run / "replay"
    with (out / "replay.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} == {"2", "4"}
    assert {row["gate"] for row in rows} == {"none", "block32", "span", "fire_opd", "block64"}
    per_step = 1 + 2 * 4 * 4 * 2 + 4 + 1
    assert len(rows) == 2 * per_step
    assert all(
        float(row["weight_mean"]) == pytest.approx(1, abs=1e-5) for row in rows if row["normalization"] == "mean"
    )
    assert rows[0]["own"] == "False"
    text = (out / "replay.md").read_text()
    assert "| span | abs_mean | clipped | 5 |" in text
    for name in ("cosine-fresh", "cosine-other", "sample-size"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ET.parse(out / f"{name}.svg").getroot().tag.endswith("svg")


def test_other_objectives_have_rows_and_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--objectives", "full_divergence", "--gates", "none", "--steps", "4", "--taus", "5", "--draws", "2"]
    assert main(["replay", str(run), *options]) == 0
    with (run / "replay" / "replay.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["objective"], row["gate"]) for row in rows] == [
        *(("teacher_topk", "none"), ("teacher_topk", "block64")),
        *(("full_divergence", "none"), ("full_divergence", "block64")),
    ]
    text = (run / "replay" / "replay.md").read_text()
    assert "## Objectives" in text
    assert re.search(r"\| full_divergence \| none \|  \|( [\d.e-]+ \|){5}", text)


def test_steps_and_place_can_be_chosen(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run), "--steps", "4", "--gates", "token", "--out", "elsewhere", "--draws=2"]) == 0
    assert "results: elsewhere" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} >= {"replay.csv", "replay.md"}
    assert not (run / "replay").exists()


def test_a_gate_that_the_record_cannot_serve_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "from opdlab.gating import RuleGate\n"
        "class Judge(RuleGate):\n    needs = ('verdict',)\n"
        "    def weight(self, inputs):\n        return inputs.drift.exp()\n"
    )
    Path("judges.py").write_text(code)
    assert main(["replay", str(run), "--steps", "2", "--gates", "judges.Judge", "--draws", "2"]) == 0
    assert "left out: Judge, which needs verdict, which the record does not have" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nowhere", "'nowhere' is not a folder"),
        ("runs", "'runs' is not a run's folder, since it has no config.yaml; did you mean runs/version_0?"),
        ("bare", "has no recorded steps in pools/: train with --save_pools true"),
        ("RUN --gates blok64", "unknown gate 'blok64'; did you mean 'block64'?"),
        ("RUN --gates nowhere.Gate", "--gates has 'nowhere.Gate'"),
        ("RUN --objectives teacher_topc", "unknown objective 'teacher_topc'; did you mean 'teacher_topk'?"),
        ("RUN --objectives nowhere.Objective", "--objectives has 'nowhere.Objective'"),
        ("RUN --statistics rsm", "--statistics has 'rsm'; did you mean 'rms'?"),
        ("RUN --normalizations no", "--normalizations has 'no'"),
        ("RUN --taus many", "--taus is many, but must be numbers"),
        ("RUN --taus -1", "--taus is -1.0"),
        ("RUN --steps 3", "--steps has '3', which was not recorded; there are 2, 4"),
        ("RUN --draws 1", "--draws is 1"),
        ("RUN --draws some", "argument --draws: invalid int value: 'some'"),
        ("RUN --gatse token", "unknown option '--gatse'; did you mean '--gates'?"),
        ("RUN other", "'other' is one argument too many"),
        ("RUN --out small/file", "--out 'small/file' cannot be made"),
        ("RUN --model.gaet token", "unknown key 'model.gaet'; did you mean 'model.gate'?"),
        ("RUN --model.student.adapter.r 2", "is of another model: "),
        ("cut", "cannot be read, it may have been changed or cut off"),
        ("", "give a run's folder, such as runs/quickstart/version_0"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    run: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    if "adapter" in arguments:
        request.getfixturevalue("peft_pair")
    Path("small").touch()
    shutil.copytree(run, "bare", ignore=shutil.ignore_patterns("pools"))
    shutil.copytree(run, "cut")
    weights = Path("cut/pools/step-000002/weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    assert main(["replay", *arguments.replace("RUN", str(run)).split()]) == EXIT_USAGE
    error = capsys.readouterr().err
    reported = [line for line in error.splitlines() if line.startswith("opdlab: error:")]
    assert len(reported) == 1
    assert words in reported[0]
    assert "Traceback" not in error
    assert not (run / "replay/replay.csv").exists()
