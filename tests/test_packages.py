"""A package that is missing, broken, or refused by another one gives one line with the command that fixes it."""

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from opdlab.cli import EXIT_USAGE, main
from opdlab.errors import UsageError
from opdlab.packages import is_installed, refusal, require_package
from opdlab.policies import AdapterConfig, LanguageModel, LocalTeacher
from tests.children import run_child
from tests.toy_run import STUDENT

Said = Callable[..., str]
REPOSITORY = Path(__file__).resolve().parents[1]
CONSTRAINTS = REPOSITORY / "constraints.txt"
ADAPTER = AdapterConfig(r=2)


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """Run `opdlab fit` on the toy without some packages; return the one line with which it ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["opdlab"])
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(arguments: str, *hidden: str) -> str:
        for name in hidden:
            monkeypatch.setitem(sys.modules, name, None)
        options = "--trainer.fast_dev_run true --check_memory false"
        assert main(["fit", "-c", "quickstart", *arguments.split(), *options.split()]) == EXIT_USAGE
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
        assert len(lines) == 1
        return lines[0].removeprefix("opdlab: error: ")

    return run


def fake(folder: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package in front of all others, and out of the way afterwards."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)


# -- missing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "arguments", "words"),
    [
        (
            "peft",
            "--model.student.init_args.adapter.r 2",
            "model.student.adapter needs peft, which is not installed: pip install 'opdlab[peft]'",
        ),
        ("gguf", "--model.student.init_args.gguf_file x.gguf", "needs gguf, .*: pip install 'opdlab\\[gguf\\]'$"),
        (
            "accelerate",
            "--model.student.init_args.gguf_file x",
            "needs accelerate, .*: pip install 'opdlab\\[gguf\\]'$",
        ),
        (
            "bitsandbytes",
            "--model.teacher.init_args.quantization 4bit",
            r"models/teacher' needs bitsandbytes, which is not installed: pip install 'opdlab\[bitsandbytes\]'$",
        ),
        (
            "flash_attn",
            "--model.student.init_args.attn_implementation flash_attention_2",
            "attn_implementation 'flash_attention_2' cannot be used: .*; pip install flash-attn --no-build-isolation",
        ),
        (
            # Not the name that another test uses: transformers 5.21 takes a kernel that it has refused once.
            "kernels",
            "--model.student.init_args.attn_implementation nobody/other",
            r"attn_implementation 'nobody/other' cannot be used: .*; pip install 'transformers\[kernels\]', or leave",
        ),
        ("wandb", "--trainer.logger own.Own", "^trainer.logger needs wandb, .*: pip install wandb$"),
        ("wandb", "--trainer.callbacks+=own.Own", "^trainer.callbacks needs wandb, .*: pip install wandb$"),
        ("wandb", "--trainer.logger nowhere.Own", "^trainer.logger is nowhere.Own, but there is no module 'nowhere': "),
    ],
)
def test_a_missing_package_is_one_line(said: Said, hidden: str, arguments: str, words: str) -> None:
    Path("own.py").write_text("import wandb\n\n\nclass Own: ...\n")
    line = said(arguments, hidden)
    assert line == words or re.search(words, line)


@pytest.mark.parametrize(
    ("logger", "package"),
    [("WandbLogger", "wandb"), ("lightning.pytorch.loggers.MLFlowLogger", "mlflow"), ("CometLogger", "comet-ml")],
)
def test_a_logger_without_its_package(said: Said, logger: str, package: str) -> None:
    if is_installed(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    words = f"trainer.logger needs {package}, which is not installed: pip install {package}"
    assert said(f"--trainer.logger {logger}") == words


def test_what_opdlab_itself_requires_is_missing() -> None:
    program = (
        "import sys; sys.modules['torch'] = None; sys.argv[1:] = ['gates']; from opdlab.__main__ import start; start()"
    )
    ended = run_child([sys.executable, "-c", program], cwd=REPOSITORY)
    assert ended.returncode == EXIT_USAGE
    assert ended.stderr == "opdlab: error: opdlab needs torch, which is not installed: pip install opdlab\n"


def test_a_folder_of_that_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder_of_runs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="^x needs folder-of-runs, which is not installed: pip install 'opdlab"):
        require_package("folder_of_runs", "x", "peft")


# -- broken ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "raise OSError('libcuda.so: no such file\\nmore')",
            r"needs bitsandbytes, but importing bitsandbytes .* fails \(libcuda.so: no such file\): "
            "pip install --force-reinstall --no-deps bitsandbytes$",
        ),
        ("import absent_below", r"\(No module named 'absent_below'\): pip install 'opdlab\[bitsandbytes\]'$"),
    ],
)
def test_a_broken_package_is_one_line(source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "bitsandbytes", source, monkeypatch)
    with pytest.raises(UsageError, match=words):
        LocalTeacher(STUDENT, quantization="4bit")


# -- versions --------------------------------------------------------------------------------------------------------


def faked_version(name: str, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a package say that it has another version."""
    true = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: number if asked == name else true(asked))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("peft", "--model.student.init_args.adapter.r 2"), ("gguf", "--model.student.init_args.gguf_file x.gguf")],
)
def test_transformers_refuses_the_version(
    said: Said, name: str, arguments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    faked_version(name, "0.0.9", monkeypatch)
    words = (
        rf": transformers [\d.]+ refuses {name} 0.0.9 \(it asks for [\d.]+ or newer\): pip install 'opdlab\[{name}\]', "
    )
    assert re.search(words, line := said(arguments)), line


@pytest.mark.usefixtures("peft_pair")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ValueError("The version of PEFT you are using is not compatible, please use a version >= 99.1.0"),
            r"refuses peft [\d.]+ \(it asks for 99.1.0 or newer\): pip install 'opdlab\[peft\]', which takes a pair",
        ),
        (
            ImportError("cannot import name 'x' from 'peft'"),
            r"^model.student.adapter: transformers [\d.]+ and peft [\d.]+ do not work together \(cannot import name ",
        ),
    ],
)
def test_a_pair_that_fails_at_work(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise error

    saved = LanguageModel(STUDENT, adapter=ADAPTER)
    monkeypatch.setattr(PreTrainedModel, "add_adapter", refuse)
    with pytest.raises(UsageError, match=words):
        LanguageModel(STUDENT, adapter=ADAPTER)
    assert saved.has_adapter


@pytest.mark.usefixtures("peft_pair")
def test_an_adapter_folder_and_a_pair_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("The version of PEFT you are using is not compatible, please use a version >= 99.1.0")

    LanguageModel(STUDENT, adapter=ADAPTER).save(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "add_adapter", refuse)
    with pytest.raises(UsageError, match=r"^model '.*': transformers [\d.]+ refuses peft"):
        LanguageModel(str(tmp_path))


@pytest.mark.parametrize("name", ["peft", "gguf", "accelerate"])
def test_the_constrained_versions_work_together(name: str) -> None:
    """So that the constrained suite never skips adapters in silence."""
    if not CONSTRAINTS.is_file():
        pytest.skip("there is no constraints.txt")
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE))
    pair = {each: pins[each] for each in ("transformers", name)}
    for each, pinned in pair.items():
        installed = importlib.metadata.version(each) if is_installed(each) else "missing"
        if installed != pinned:
            pytest.skip(f"{each} is {installed}, not {pinned} of constraints.txt")
    assert refusal(name) is None
    if name == "peft":
        assert LanguageModel(STUDENT, adapter=ADAPTER).has_adapter
