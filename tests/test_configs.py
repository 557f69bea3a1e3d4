"""Every shipped configuration runs: with tiny models, local problems and short responses, but otherwise unchanged.

The test finds the files, so a new one is covered without a change here. A partial configuration is stacked on the
quickstart, as users do.
"""

import inspect
import json
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace, dict_to_namespace
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opdlab import objectives
from opdlab.cli import EXIT_USAGE, main
from opdlab.cli.config_files import config_chain
from opdlab.cli.parsing import fit_parser, parse_fit
from opdlab.cli.shipped import shipped_configs
from opdlab.errors import UsageError
from opdlab.gating import RuleGate, build_gate, gate_names

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(shipped_configs())
# Those that tests/test_base_config.py runs are not stacked on the quickstart.
OWN_TESTS = ("base", "trainer/", "models/")
PAPER = [name for name in NAMES if name.startswith("paper/") and name != "paper/base"]
NO_PROCESSES = dict_to_namespace({"class_path": "opdlab.verifiers.BoxedVerifier", "init_args": {}})
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def stack(name: str) -> list[str]:
    """What to hand to -c: the configuration, on the quickstart where it lacks what every run needs."""
    keys: set[str] = set()
    for file in config_chain(str(CONFIGS / f"{name}.yaml")):
        keys |= set(yaml.safe_load(Path(file).read_text()).get("model", {}))
    return [name] if {"student", "teacher", "objective", "gate"} <= keys else ["quickstart", name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with a tokenizer of single bytes, and problems."""
    folder = tmp_path_factory.mktemp("configs")
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=CHAT_TEMPLATE)
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(alphabet),
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        eos_token_id=len(alphabet) - 1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    for name in ("train", "held_out"):  # each with its own text: a training prompt that is held out is dropped
        rows = [{"id": str(n), "problem": f"{name}: what is {n} + 1?", "answer": str(n + 1)} for n in range(4)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def change(section: Namespace, **values: Any) -> None:
    section.update(dict_to_namespace(values))


def sources(config: Any) -> Iterator[tuple[str, Any]]:
    yield "train", config.data.train.init_args
    for source in (config.data.benchmarks or {}).values():
        yield "held_out", source.init_args


def shrink(config: Any, folder: Path) -> None:
    """Tiny models, local problems, short responses, two optimizer steps."""
    change(
        config.trainer,
        accelerator="cpu",
        max_steps=2,
        max_time=None,
        accumulate_grad_batches=min(config.trainer.accumulate_grad_batches, 2),
        val_check_interval=1000,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir="run",
    )
    for model in (config.model.student, config.model.teacher):
        if not model.init_args.path.startswith("package://"):
            model.init_args.path = str(folder / "model")
    for sampling in (config.model.sampling, config.model.eval_sampling):
        change(sampling, num_samples=2, max_new_tokens=6)
    config.model.evaluation.pass_at = [1, 2]
    change(config.data.reuse, prompts_per_pool=2, batch_size=2)
    config.data.max_prompt_tokens = 256  # in the tiny tokenizers a character is a token
    config.behavior_refresh.every_n_steps = 4
    for name, options in sources(config):
        if "path" in options:
            change(options, path=str(folder / f"{name}.jsonl"), offset=0, limit=None)
        elif "num_problems" in options:
            options.num_problems = 4
        if "verifier" in options:
            options.verifier = NO_PROCESSES.clone()


# The tiny tokenizers have only the characters of sums, and the run says so.
@pytest.mark.filterwarnings("ignore:.*characters that the student's tokenizer does not know")
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(OWN_TESTS)])
def test_runs(
    name: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = name.removeprefix("loggers/")
    if package in ("wandb", "mlflow") and find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install {package}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = parse_fit([part for each in stack(name) for part in ("-c", each)])
    del config.config
    shrink(config, folder)
    fit_parser().save(config, "small.yaml", skip_none=False)
    assert main(["fit", "-c", "small.yaml"]) == 0
    output = capsys.readouterr().out
    assert "pass@1" in output
    assert "after" in output
    (path,) = tmp_path.rglob("config.yaml")
    saved = yaml.safe_load(path.read_text())
    assert "extends" not in saved
    assert (path.parent / "student/model.safetensors").is_file() == saved["export"]["enabled"]


PAPER_GATES = {"": "NoGate", "block64": "Block64Gate", "newline": "SpanGate"}
PAPER_OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "opd": ("SampledTokenOPD", {"reference": "behavior", "clip": 0.2, "dual_clip": 3.0, "advantage_clamp": None}),
    "lsm": ("TeacherTopK", {"k": 32}),
}


@pytest.mark.parametrize("gate", gate_names())
def test_the_command_lines_defaults_are_the_gates_own(gate: str) -> None:
    options = parse_fit(["-c", "quickstart", "--model.gate", gate]).model.gate.init_args
    made, own = build_gate(gate, **options.as_dict()), build_gate(gate)
    assert vars(made) == vars(own)
    assert made.normalization.name == (own.own_normalization if isinstance(own, RuleGate) else "mean")


def test_paper_configurations_are_the_papers() -> None:
    assert len(PAPER) == 6
    rest = []
    for name in PAPER:
        config = parse_fit(["-c", name])
        check_paper_hyperparameters(config)
        objective, _, gate = name.removeprefix("paper/").partition("-")
        cls, settings = PAPER_OBJECTIVES[objective]
        assert config.model.objective.class_path.rpartition(".")[2] == cls
        own = {p.name: p.default for p in inspect.signature(getattr(objectives, cls)).parameters.values()}
        assert config.model.objective.init_args.as_dict() == {**own, **settings}
        assert config.model.gate.class_path.rpartition(".")[2] == PAPER_GATES[gate]
        options = config.model.gate.init_args
        assert (options.tau, options.statistic, options.normalization) == (1.0, "signed_mean", "mean")
        assert config.trainer.default_root_dir == f"runs/{name}"
        del config.config, config.model.gate, config.model.objective
        del config.trainer.default_root_dir, config.trainer.logger, config.checkpoint.dirpath
        rest.append(config)
    assert all(config == rest[0] for config in rest)  # no other difference


def test_the_papers_smaller_mini_batch_as_its_readme_has_it() -> None:
    readme = (CONFIGS / "paper/README.md").read_text().replace("\\\n", " ")
    command = re.search(r"^opdlab fit (.* --data\.reuse\.batch_size 8 .*)$", readme, re.MULTILINE)
    assert command is not None
    config = parse_fit(shlex.split(command[1]))
    check_paper_hyperparameters(config)
    assert config.behavior_refresh.every_n_steps == 8  # the steps of a buffer: the first is without drift


def check_paper_hyperparameters(config: Any) -> None:
    for sampling in (config.model.sampling, config.model.eval_sampling):
        figures = (sampling.num_samples, sampling.temperature, sampling.top_p, sampling.max_new_tokens)
        assert figures == (8, 1.0, 0.9, 16384)
    assert config.model.student.init_args.path == "Qwen/Qwen3-1.7B-Base"
    assert config.model.teacher.init_args.path == "Thinking-Space/Qwen3-4B-Base-GRPO"
    assert config.model.optimizer.init_args.lr == 2e-6
    assert config.data.max_prompt_tokens == 2048
    assert set(config.data.benchmarks) == {"math500", "aime24", "aime25", "amc23"}
    reuse = config.data.reuse
    steps_per_pool = reuse.epochs * reuse.prompts_per_pool * config.model.sampling.num_samples // reuse.batch_size
    assert (reuse.prompts_per_pool, reuse.epochs) == (4, 2)
    assert config.behavior_refresh.every_n_steps == steps_per_pool
    assert config.trainer.max_steps == 200 * steps_per_pool
    assert reuse.batch_size == config.trainer.accumulate_grad_batches  # micro-batches of one rollout


# -- extends ----------------------------------------------------------------------------------------------------------


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.yaml").parent.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(text)


def test_a_configuration_wins_over_what_it_extends(tmp_path: Path) -> None:
    write(
        tmp_path,
        bottom="extends: quickstart\ntrainer: {max_steps: 1, log_every_n_steps: 7}",
        middle="extends: [bottom.yaml, gates/token]\ntrainer: {max_steps: 2}",
        top="extends: middle\nmodel: {gate: {init_args: {tau: 3}}}",
    )
    config = parse_fit(["-c", str(tmp_path / "top.yaml"), "--data.reuse.epochs", "9"])
    assert (config.trainer.max_steps, config.trainer.log_every_n_steps, config.data.reuse.epochs) == (2, 7, 9)
    assert config.model.gate.class_path.endswith("TokenGate")
    assert config.model.gate.init_args.tau == 3
    assert "extends" not in config


def files_read(*arguments: str) -> list[str]:
    """What ``fit -c quickstart ARGUMENTS`` reads after the quickstart."""
    return [str(file) for file in parse_fit(["-c", "quickstart", *arguments]).config][1:]


def test_what_was_read_is_not_read_again_as_a_base(tmp_path: Path) -> None:
    write(tmp_path, base="{}", one="extends: base", two="extends: [base, one]")
    base, one, two = (str(tmp_path / f"{name}.yaml") for name in ("base", "one", "two"))
    assert files_read("-c", two) == [base, one, two]
    assert files_read("-c", one, f"--config={two}") == [base, one, two]
    assert files_read("-c", base, "-c", one, "-c", base) == [base, one, base]  # as requested


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: bad", "extends leads in a circle"),
        ("extends: [quickstart, detour]", "extends leads in a circle"),
        ("extends: quickstrat", "extends is 'quickstrat', which is not in"),
        ("extends: quickstrat", "did you mean 'quickstart'?"),
        ("extends: {quickstart: 1}", "must be the name of a configuration or a list of names"),
        ("extends: [1]", "must be the name of a configuration or a list of names"),
        ("", "is empty: give it keys, for example extends: quickstart"),
        ("# nothing but a comment", "is empty: give it keys"),
        ("extends: quickstart\nmodel: {gaet: none}", "unknown key 'model.gaet'"),
    ],
)
def test_a_bad_base_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    write(tmp_path, bad=text, detour="extends: ./bad")
    assert main(["fit", "-c", str(tmp_path / "bad.yaml")]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_one_file_under_two_names_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, base="{}", one="extends: base", two=f"extends: [./base, one, {tmp_path}/base.yaml]")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "base.yaml")
    write(tmp_path, three="extends: [link, base]", circle="extends: round", round=f"extends: {tmp_path}/circle.yaml")
    assert files_read("-c", "./base.yaml", "-c", "one.yaml") == ["./base.yaml", "one.yaml"]
    assert files_read("-c", str(tmp_path / "base.yaml"), "-c", "two.yaml")[1:] == ["one.yaml", "two.yaml"]
    assert files_read("-c", "three.yaml") == ["link.yaml", "three.yaml"]
    with pytest.raises(UsageError, match="extends leads in a circle"):
        files_read("-c", "circle.yaml")


@pytest.mark.parametrize("flag", ["-c{}", "-c={}", "--config={}", "--config {}", "-c {}"])
def test_extends_is_obeyed_however_the_flag_is_written(tmp_path: Path, flag: str) -> None:
    write(tmp_path, base="extends: quickstart\ntrainer: {max_steps: 7}", top="extends: base")
    assert parse_fit(flag.format(tmp_path / "top.yaml").split()).trainer.max_steps == 7


@pytest.mark.parametrize("arguments", [["--model"], ["--model.objective"], ["--trainer"]])
def test_extends_elsewhere_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    write(tmp_path, part="extends: quickstart\nclass_path: TeacherTopK")
    assert main(["fit", "-c", "quickstart", *arguments, str(tmp_path / "part.yaml")]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "obeyed only in files given to -c" in error
    assert len(error.splitlines()) == 1


def test_keys_that_earlier_versions_saved_as_null_are_read_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(
        tmp_path,
        old="extends: quickstart\noptimizer: null\nlr_scheduler: null\nmodel: {reduction: token_mean}",
        bad="optimizer: Adam",
    )
    config = parse_fit(["-c", str(tmp_path / "old.yaml")])
    assert "optimizer" not in config
    assert "lr_scheduler" not in config
    assert main(["fit", "-c", "quickstart", "-c", str(tmp_path / "bad.yaml")]) == EXIT_USAGE
    assert "unknown key 'optimizer'; did you mean 'model.optimizer'?" in capsys.readouterr().err
