"""``opdlab replay`` through the command line, in this process."""

import csv
import hashlib
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
import yaml

from opdlab.cli import EXIT_USAGE, main
from opdlab.cli.replay_sources import on_device
from opdlab.errors import require
from opdlab.policies import LocalTeacher
from opdlab.replay.pack import ABOUT, FORMAT, MARK
from opdlab.types import TeacherRequest
from tests.replay.conftest import SMALL


def test_a_replay_leaves_tables_and_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["save_pools"] is True
    options = ["--gates", "block32,span", "fire_opd", "--taus", "1", "5", "--draws", "2", "--other_prompts"]
    assert main(["replay", str(run), *options]) == 0
    output = capsys.readouterr().out
    assert "under the run's own gate the recorded losses come out to the bit, at all of them" in output
    assert re.search(r"│ block32 +│ 1 +│", output)
    assert "block64" not in output
    out = run / "replay"
    with (out / "replay.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} == {"2", "4"}
    assert {row["gate"] for row in rows} == {"block32", "span", "fire_opd"}
    per_step = 2 * 4 * 4 * 2 + 4
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
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_parts_have_rows_and_a_table_until_a_replay_without_them(run: Path) -> None:
    options = ["--gates", "block32", "--statistics", "signed_mean", "rms", "--taus", "5", "--draws", "2"]
    assert main(["replay", str(run), *options, "--parts", "--other_prompts"]) == 0
    assert {path.suffix for path in (run / "replay").glob("cosine-other.*")} == {".png", ".svg", ".pdf"}
    with (run / "replay" / "parts.csv").open() as file:
        rows = list(csv.DictReader(file))
    of_paper = ("none", ""), ("block32", "signed_mean"), ("block64", "signed_mean")  # block64 is the run's own
    assert {(row["gate"], row["statistic"], row["step"]) for row in rows} == {
        (gate, statistic, step) for gate, statistic in of_paper for step in "24"
    }
    assert {"quarter 1", "first tokens", "digit"} <= {row["part"] for row in rows}
    text = (run / "replay" / "replay.md").read_text()
    assert "| teacher_topk | block64 (the run) | 1 | quarter 1 |" in text
    stale = [float(row["weight_mean"]) for row in rows if (row["gate"], row["part"]) == ("block32", "digit")]
    ages = {row["age"] for row in rows}
    assert "0.0" not in ages, "the table is compared with all rows"
    cell = re.search(r"\| block32 \| 5 \| digit \| \S+ \| \S+ \| (\S+) \|", text)
    assert cell is not None
    assert float(cell[1]) == pytest.approx(sum(stale) / len(stale), rel=5e-3)
    assert re.search(r"\| teacher_topk \| block32 \| 5 \| quarter 2 \|( -?[\d.e-]+ \|){7}", text)
    assert main(["replay", str(run), *options]) == 0
    assert not [path for name in ("parts.csv", "cosine-other.*") for path in (run / "replay").glob(name)]
    assert "## Parts" not in (run / "replay" / "replay.md").read_text()


def test_other_objectives_have_rows_and_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--objectives", "full_divergence", "--gates", "none", "--steps", "4", "--taus", "5", "--draws", "2"]
    assert main(["replay", str(run), *options]) == 0
    with (run / "replay" / "replay.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["objective"], row["gate"]) for row in rows] == [
        ("teacher_topk", "none"),
        ("full_divergence", "none"),
    ]
    text = (run / "replay" / "replay.md").read_text()
    assert "## Objectives" in text
    assert re.search(r"\| full_divergence \| none \|  \|( [\d.e-]+ \|){5}", text)


def test_options_of_gates_and_objectives(run: Path) -> None:
    options = ["--objectives", "support_divergence:tail=drop,k=8,teacher_topk:k=4", "--gates", "block:block_size=16"]
    assert main(["replay", str(run), *options, "--steps", "4", "--taus", "5", "--statistics", "rms", "--draws=2"]) == 0
    with (run / "replay" / "replay.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["teacher_topk", "support_divergence:tail=drop,k=8", "teacher_topk:k=4"]
    assert list(dict.fromkeys(row["objective"] for row in rows)) == names
    assert {row["gate"] for row in rows} == {"block:block_size=16"}
    losses = {row["loss"] for row in rows if row["normalization"] == "mean"}
    assert len(losses) == 3


def test_a_pack_gives_the_table_of_its_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run), "--pack", "moved/run.pack", "--draws", "2", "--other_prompts"]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^moved/run.pack: \d+\.\d\d MiB \(weights .*, steps 2, 4, 2 draws each, digest [0-9a-f]{16}$", said, re.M
    )
    options = ["--gates", "span", "block:block_size=16", "tip", "--taus", "5", "--objectives", "teacher_topk:k=16"]
    assert main(["replay", str(run), *options, "--draws", "2", "--other_prompts"]) == 0
    expected = (run / "replay" / "replay.csv").read_bytes()
    shutil.rmtree(run)
    assert main(["replay", "moved/run.pack", *options, "--other_prompts"]) == 0
    assert "the recorded losses come out to the bit, at all of them" in capsys.readouterr().out
    assert (tmp_path / "moved/run.pack-replay/replay.csv").read_bytes() == expected
    capsys.readouterr()
    for objective, words in (
        ("full_divergence", "which needs the teacher's hidden states, but the record has the teacher's 32 most likely"),
        ("teacher_topk:k=33", "which needs the teacher's 33 most likely tokens, but the record has the teacher's 32"),
    ):
        assert main(["replay", "moved/run.pack", "--objectives", objective]) == EXIT_USAGE
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--objectives has '{objective}', {words}" in line
        assert "or replay the run's folder" in line


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


def test_gates_that_need_what_the_teacher_cannot_give_are_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server's protocol may have no entropy, which the run itself does not need."""

    def check_request(teacher: LocalTeacher, request: TeacherRequest, temperature: float) -> None:
        require(not request.entropy, "no entropy")

    monkeypatch.setattr(LocalTeacher, "check_request", check_request)
    chosen = ["--gates", "none", "token", "fire_opd", "--draws", "2", "--steps", "2"]
    assert main(["replay", str(run), *chosen]) == 0
    assert "left out: fire_opd, which needs teacher_entropy, which the record does not have" in capsys.readouterr().out
    gates = {row["gate"] for row in csv.DictReader((run / "replay/replay.csv").read_text().splitlines())}
    assert gates == {"none", "token"}
    assert main(["replay", str(run), "--pack", "small.pack", "--draws", "2", "--steps", "2"]) == 0
    capsys.readouterr()
    assert main(["replay", "small.pack", "--gates", "none", "fire_opd"]) == 0
    assert "left out: fire_opd, which needs teacher_entropy" in capsys.readouterr().out


def test_steps_before_a_damaged_one_are_kept(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run / "pools/step-000004/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert main(["replay", str(run), "--gates", "none", "token", "--draws", "2"]) == EXIT_USAGE
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("opdlab: error:")]
    assert "step-000004" in line
    assert "not replayed: step 4" in captured.out
    assert "not replayed: step 4" in (run / "replay/replay.md").read_text()
    steps = {row["step"] for row in csv.DictReader((run / "replay/replay.csv").read_text().splitlines())}
    assert steps == {"2"}


def test_records_of_steps_that_are_taken_again_are_deleted(run: Path) -> None:
    """Those after the step at which a run is resumed are not of this run any more."""
    Path("small.yaml").write_text(SMALL)
    later = run / "pools/step-000099"
    shutil.copytree(run / "pools/step-000004", later)
    (checkpoint,) = run.glob("checkpoints/*.ckpt")
    command = [
        "fit",
        "-c",
        "quickstart",
        "-c",
        "small.yaml",
        "--trainer.max_steps",
        "6",
        "--trainer.default_root_dir",
        "runs",
    ]
    assert main([*command, "--ckpt_path", str(checkpoint)]) == 0
    assert sorted(path.name for path in (run / "pools").iterdir()) == ["step-000002", "step-000004", "step-000006"]


def test_float16_is_replayed_in_float32() -> None:
    """Its gradients would fall below the smallest number, since the scale of the loss is not recorded."""
    with pytest.warns(UserWarning, match="trainer.precision is 16-mixed, for which a replay has no loss scale"):
        autocast = on_device(torch.nn.Linear(2, 2), "cpu", "16-mixed")
    with autocast():
        assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype == torch.float32


@pytest.fixture(scope="module")
def good_pack(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packs") / "good.pack"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        assert main(["replay", str(trained), "--pack", str(path), "--steps", "2", "--draws", "2"]) == 0
    return path


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("objective", {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}}),
        (
            "gate",
            {
                "class_path": "opdlab.strategies.TokenGate",
                "init_args": {"tau": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}}},
            },
        ),
    ],
)
def test_a_pack_that_names_another_class_runs_nothing(
    good_pack: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
    section: dict[str, object],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with zipfile.ZipFile(good_pack) as good, zipfile.ZipFile("other.pack", "w") as other:
        for name in good.namelist():
            if name != ABOUT:
                other.writestr(name, good.read(name))
        about = json.loads(good.read(ABOUT))
        about["model"][key] = section
        other.writestr(ABOUT, text := json.dumps(about).encode())
        other.comment = f"{MARK} {FORMAT} {hashlib.sha256(text).hexdigest()}".encode()
    assert main(["replay", "other.pack", "--gates", "token"]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert " cannot be built: " in error
    assert "Traceback" not in error
    assert not Path("ran").exists()


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
        ("RUN --objectives support_divergence:support=student", "needs the snapshot's 32 most likely tokens, but the"),
        ("RUN --objectives support_divergence:k=many", "has 'support_divergence:k=many': k is many, but must be an"),
        ("RUN --gates block:tau=2", "--gates has 'block:tau=2', but a replay varies tau: give --taus instead"),
        ("RUN --steps 3", "--steps has '3', which was not recorded; there are 2, 4"),
        ("RUN --draws 1", "--draws is 1"),
        ("RUN --seed -1", "--seed is -1, but must lie between 0 and 4294967295"),
        ("RUN --draws some", "argument --draws: invalid int value: 'some'"),
        ("RUN --gatse token", "unknown option '--gatse'; did you mean '--gates'?"),
        ("RUN other", "'other' is one argument too many"),
        ("RUN --out small/file", "--out 'small/file' cannot be written to"),
        ("RUN --out taken", "--out 'taken' has a folder 'parts.csv' where a file is to be written: move it"),
        ("RUN --model.gaet token", "unknown key 'model.gaet'; did you mean 'model.gate'?"),
        ("RUN --model.student.adapter.r 2", "is of another model: "),
        ("cut", "cannot be read, it may have been changed or cut off"),
        ("RUN --pack x.pack --gates token", "--gates has no effect with --pack: give it when the pack is replayed"),
        ("RUN --pack runs", "--pack 'runs' is a folder: give the name of a file, such as runs/run.pack"),
        ("RUN --pack small/x.pack", "--pack 'small/x.pack' cannot be made"),
        ("RUN --pack x.pack --steps 3", "--steps has '3', which was not recorded"),
        ("RUN --pack x.pack --draws 1", "--draws is 1, but must be at least 2"),
        ("small --pack x.pack", "'small' is a file: give --pack with a run's folder"),
        ("small", "'small' is not a file that opdlab replay --pack has written"),
        ("", "give a run's folder, such as runs/quickstart/version_0"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    run: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    if "adapter" in arguments:
        request.getfixturevalue("peft_pair")
    Path("small").touch()
    Path("taken/parts.csv").mkdir(parents=True)
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


@pytest.mark.parametrize("option", ["--steps", "--gates", "--objectives", "--taus", "--statistics"])
@pytest.mark.parametrize("value", ["", ","])
def test_an_empty_list_is_refused(run: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run), option, value]) == EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"opdlab: error: {option} is empty: give at least one")
