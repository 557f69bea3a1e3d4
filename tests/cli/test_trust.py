"""A checkpoint is data: nothing in it reaches the configuration, and no class that it names is imported."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from opdlab.checkpoints import CheckpointFiles, read_checkpoint
from opdlab.cli import EXIT_USAGE, main
from opdlab.cli.parsing import parse_fit
from opdlab.cli.study import plain_config
from opdlab.errors import UsageError
from opdlab.studies.study import read_study
from tests.cli.test_fit import SMALL

QUICK = ["-c", "quickstart", "-c", "small.yaml", "--model.evaluation.teacher", "false"]
MARK = "imported.txt"
# As LightningCLI writes and reads them: a class for the module, and options of it.
NAMED: dict[str, dict[str, Any]] = {
    "a class with a side effect": {"_class_path": "effect.Module", "_instantiator": "effect.instantiate"},
    "options": {
        "student": {"class_path": "effect.Student", "init_args": {"trust_remote_code": True}},
        "teacher": {"class_path": "opdlab.policies.LocalTeacher", "init_args": {"trust_remote_code": True}},
        "gate": {"class_path": "effect.Gate"},
        "reduction": "sequence_mean",
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one step."""
    folder = tmp_path_factory.mktemp("trust")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("small.yaml").write_text(SMALL)
        Path("effect.py").write_text(f"import pathlib\npathlib.Path({str(folder / MARK)!r}).touch()\n")
        assert main(["fit", *QUICK, "--trainer.max_steps", "1"]) == 0
        shutil.copy("runs/quickstart/version_0/checkpoints/step-1.ckpt", "first.ckpt")
    return folder


@pytest.fixture(params=NAMED)
def checkpoint(trained: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The run's checkpoint with hyperparameters that name a class."""
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = Path("runs/quickstart/version_0/checkpoints/named.ckpt")
    named = {"hyper_parameters": NAMED[request.param], "hparams_name": "kwargs"}
    CheckpointFiles().save_checkpoint({**read_checkpoint(Path("first.ckpt")), **named}, file)
    return str(file)


def test_no_command_takes_anything_from_a_checkpoint(checkpoint: str) -> None:
    before = plain_config([*QUICK, "--trainer.max_steps", "2"])
    config = plain_config([*QUICK, "--trainer.max_steps", "2", "--ckpt_path", checkpoint])
    assert config == before | {"ckpt_path": checkpoint}
    for command in ("fit", "validate", "test", "estimate"):
        assert (
            parse_fit([*QUICK, "--ckpt_path", checkpoint], command).model.student.init_args.trust_remote_code is False
        )
        assert main([command, *QUICK, "--trainer.max_steps", "2", "--ckpt_path", checkpoint]) == 0
    saved = yaml.safe_load(Path("runs/quickstart/version_0/config.yaml").read_text())["model"]
    assert saved["student"]["class_path"] == "opdlab.policies.LanguageModel"
    assert saved["student"]["init_args"]["trust_remote_code"] is False
    assert (saved["gate"]["class_path"], saved["reduction"]) == ("opdlab.strategies.block.Block64Gate", "token_mean")
    assert main(["replay", "runs/quickstart/version_0", "--ckpt_path", checkpoint]) == EXIT_USAGE
    study = {"name": "trust", "base": ["quickstart"], "seeds": [0], "budgets": [2], "baseline": "a"}
    variants = [{"name": name, "overrides": [f"--ckpt_path={checkpoint}"]} for name in "ab"]
    Path("study.yaml").write_text(yaml.safe_dump({**study, "variants": variants}))
    with pytest.raises(UsageError, match="ckpt_path follows from what a run left"):  # its runs are `opdlab fit`
        read_study(Path("study.yaml"))
    assert not Path(MARK).exists()
    assert "effect" not in sys.modules


def test_a_class_that_a_configuration_names_is_imported(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The other side: it shows that the test above would notice.
    monkeypatch.chdir(trained)
    monkeypatch.syspath_prepend(str(trained))
    assert main(["fit", *QUICK, "--model.gate", "effect.Gate"]) == EXIT_USAGE
    assert Path(MARK).exists()
    Path(MARK).unlink()
    sys.modules.pop("effect", None)
