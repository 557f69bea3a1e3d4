"""Wrong calls of the command line: one line that names the key and the way out, exit code 2, no traceback.

Calls run in this process, and end before a model is loaded: the student does not exist, so a call whose values are all
valid ends with a line about the student. Such a call is not counted. ``pytest -s`` prints the counts.
"""

import copy
import json
import random
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from opdlab.cli import EXIT_USAGE, main
from opdlab.cli.commands import COMMANDS
from opdlab.cli.shipped import shipped_configs
from opdlab.gating import gate_registry
from opdlab.objectives.base import objective_registry
from tests.children import run_child

NO_MODEL = "./no_such_model"
VALID = f"model '{NO_MODEL}' does not exist"
# Words of a way out.
WAY_OUT = re.compile(
    r"\b(must|give|given|did you mean|lists?|see|leave|use|choose|keep|put|write|take|check|change|lower|is not YAML)\b"
    r"|\b(there (is|are)|its (keys|section)) |\b(keys|shipped|registered|commands): "
)
Call = Callable[[str], str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with broken files."""
    folder = tmp_path_factory.mktemp("calls")
    files = {
        "list.yaml": "- 1\n",
        "text.yaml": "hello\n",
        "empty.yaml": "# nothing\n",
        "null_trainer.yaml": "trainer: null\n",
        "null_sampling.yaml": "model: {sampling: null}\n",
        "list_model.yaml": "model: [1]\n",
        "null_gate.yaml": "model: {gate: null}\n",
        "list_gate.yaml": "model: {gate: [1, 2]}\n",
        "nan_gate.yaml": "model: {gate: .nan}\n",
        "true_gate.yaml": "model: {gate: true}\n",
        "nan_tau.yaml": "model: {gate: {class_path: block64, init_args: {tau: .nan}}}\n",
        "no_class_path.yaml": "model: {gate: {class_path: null}}\n",
        "number_class_path.yaml": "model: {gate: {class_path: 7}}\n",
        "text_init_args.yaml": "model: {gate: {class_path: block64, init_args: 3}}\n",
        "null_student.yaml": "model: {student: null}\n",
        "null_optimizer.yaml": "model: {optimizer: null}\n",
        "list_train.yaml": "data: {train: [a]}\n",
        "null_benchmark.yaml": "data: {benchmarks: {toy: null}}\n",
        "foreign_benchmark.yaml": "data: {benchmarks: {toy: {class_path: torch.nn.Linear}}}\n",
        "misspelled_benchmark.yaml": "data: {benchmarks: {toy: {init_args: {num_problemz: 3}}}}\n",
        "missing_benchmark.yaml": (
            "data: {benchmarks: {amc23: {class_path: opdlab.data.Benchmark, init_args: {name: amc23, path: ./x}}}}\n"
        ),
        "number_key.yaml": "model: {1: 2}\n",
        "null_key.yaml": "{null: 2}\n",
        "spaced_key.yaml": "model: {a b: 2}\n",
        "empty_key.yaml": "model: {'': 2}\n",
        "open.yaml": "model: {gate: [1, 2\n",
        "tab.yaml": "model:\n\tgate: block64\n",
        "twice.yaml": "trainer: {max_steps: 1}\nmodel: {}\ntrainer: {max_steps: 2}\n",
        "deep.yaml": "a: " + "[" * 3000 + "]" * 3000,
        "loop.yaml": "model: &a\n  gate: *a\n",
        "surrogate.yaml": 'trainer: {default_root_dir: "\\ud800"}\n',
        "escape.yaml": 'model: {gate: "\\e[31mred"}\n',
        "circle.yaml": "extends: circle\n",
        "bad_base.yaml": "extends: quickstrat\n",
        "number_base.yaml": "extends: 3\n",
        "callback.yaml": "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: a, patience: x}}]}\n",
        "callback_mode.yaml": "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: a, mode: x}}]}\n",
        "threads.yaml": "base: quickstart\nthreads: x\n",
        "syntax.py": "def gate(:\n",
        "fails.py": "x = 1\nraise RuntimeError('boom')\n",
        "script.py": "import sys\nsys.exit('usage')\n",
        "refuses.py": (
            "from opdlab.gating import DriftGate\nclass Gate(DriftGate):\n    def __init__(self, width: int = 3):\n"
            "        raise ValueError('width is bad')\n    def segment_ids(self, inputs):\n        return inputs\n"
        ),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "random.yaml").write_bytes(random.Random(0).randbytes(200))
    (folder / "utf16.yaml").write_text("trainer: {max_steps: 1}\n", encoding="utf-16")
    return folder


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command that is refused, and return its line; empty for a call that is valid."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(arguments: str) -> str:
        assert main(shlex.split(arguments)) == EXIT_USAGE, arguments
        errors = capsys.readouterr().err.splitlines()
        lines = [line for line in errors if line.startswith("opdlab: error: ")]
        assert len(lines) == 1, (arguments, errors)
        assert lines[0] == errors[-1]
        assert lines[0].isprintable()
        return "" if VALID in lines[0] else lines[0].removeprefix("opdlab: error: ")

    return run


FIT = f"fit -c quickstart --model.student.path {NO_MODEL}"

# The call, and words of its message: the key or the file.
FILES = [
    ("list.yaml", "list.yaml holds a list, but must hold keys"),
    ("text.yaml", "text.yaml holds a single value, but must hold keys"),
    ("empty.yaml", "empty.yaml is empty"),
    ("null_trainer.yaml", "null_trainer.yaml: trainer is null, but it is a section"),
    ("null_sampling.yaml", "null_sampling.yaml: model.sampling is null, but it is a section"),
    ("list_model.yaml", "list_model.yaml: model is [1], but it is a section"),
    ("null_gate.yaml", "model.gate is missing: give a class path"),
    ("list_gate.yaml", "list_gate.yaml: model.gate is [1, 2], but must be one of block, block128"),
    ("nan_gate.yaml", "nan_gate.yaml: model.gate is nan, but must be one of block, block128"),
    ("true_gate.yaml", "true_gate.yaml: model.gate is true, but must be one of block, block128"),
    ("nan_tau.yaml", "model.gate.tau is nan, but must be a number"),
    ("no_class_path.yaml", "no_class_path.yaml: model.gate.class_path is None, but must be the path of a class"),
    ("number_class_path.yaml", "number_class_path.yaml: model.gate.class_path is 7"),
    ("text_init_args.yaml", "text_init_args.yaml: model.gate.init_args is 3, but must be a section of keys"),
    ("null_student.yaml", "model.student"),
    ("null_optimizer.yaml", "model.optimizer is null"),
    ("list_train.yaml", "list_train.yaml: data.train is ['a'], but must be the path of a class that extends Problem"),
    ("null_benchmark.yaml", "data.benchmarks.toy is null, but must be the path of a class that extends ProblemSource"),
    ("foreign_benchmark.yaml", "data.benchmarks.toy is torch.nn.Linear, but must be the path of a class that extends"),
    ("misspelled_benchmark.yaml", "data.benchmarks: unknown key 'num_problemz'"),
    ("number_key.yaml", "number_key.yaml: the key 1 is not text: put it in quotes"),
    ("null_key.yaml", "null_key.yaml: the key null is not text: put it in quotes"),
    ("spaced_key.yaml", 'unknown key "a b"'),
    ("empty_key.yaml", 'unknown key ""'),
    ("open.yaml", "open.yaml, line 2, is not YAML: expected ',' or ']'"),
    ("tab.yaml", "tab.yaml, line 2, is not YAML: found character '\\t'"),
    ("twice.yaml", "twice.yaml, line 3: the key 'trainer' stands in lines 1 and 3: keep one of the two"),
    ("deep.yaml", "deep.yaml, line 1: it nests values more than 50 levels deep"),
    ("loop.yaml", "loop.yaml has aliases"),
    ("surrogate.yaml", "surrogate.yaml, line 1: it has half a surrogate pair, \\ud800"),
    ("escape.yaml", "escape.yaml, line 1: it has the control character \\x1b"),
    ("random.yaml", "random.yaml, line 1"),
    ("utf16.yaml", "utf16.yaml, line 1, is not text in UTF-8"),
    ("circle.yaml", "extends leads in a circle"),
    ("bad_base.yaml", "extends is 'quickstrat'"),
    ("number_base.yaml", "extends is 3"),
    ("callback.yaml", "trainer.callbacks.0.patience is x, but must be an integer"),
    ("callback_mode.yaml", "trainer.callbacks.0"),
    ("missing.yaml", "no configuration file 'missing.yaml'"),
]
FLAGS = [
    ("--trainer.accelerator foo", "trainer.accelerator is foo"),
    ("--trainer.strategy foo", "trainer.strategy is foo"),
    ("--trainer.devices 0", "trainer.devices is 0"),
    ("--trainer.devices x", "trainer.devices is x"),
    ("--trainer.devices 10000000000", "trainer.devices is 10000000000, but must be at most 4096"),
    ("--trainer.devices 3", "data.reuse.batch_size is 32, which 3 processes (trainer.devices * trainer.num_nodes)"),
    ("--trainer.num_nodes 0", "trainer.num_nodes is 0"),
    ("--trainer.precision 7", "trainer.precision is 7, but must be one of"),
    ("--trainer.max_steps -7", "trainer.max_steps is -7"),
    ("--trainer.max_epochs -7", "trainer.max_epochs is -7"),
    ("--trainer.max_time x", "trainer.max_time is x"),
    ("--trainer.val_check_interval 0", "trainer.val_check_interval is 0"),
    ("--trainer.val_check_interval 2.5", "trainer.val_check_interval is 2.5"),
    ("--trainer.val_check_interval -1", "trainer.val_check_interval is -1"),
    ("--trainer.check_val_every_n_epoch 0", "trainer.check_val_every_n_epoch is 0"),
    ("--trainer.limit_val_batches -1", "trainer.limit_val_batches is -1"),
    ("--trainer.limit_train_batches 1.5", "trainer.limit_train_batches is 1.5"),
    ("--trainer.num_sanity_val_steps -5", "trainer.num_sanity_val_steps is -5"),
    ("--trainer.log_every_n_steps 0", "trainer.log_every_n_steps is 0"),
    ("--trainer.gradient_clip_val -1", "trainer.gradient_clip_val is -1"),
    ("--trainer.gradient_clip_algorithm foo", "trainer.gradient_clip_algorithm is foo"),
    ("--trainer.profiler foo", "trainer.profiler is foo"),
    ("--trainer.logger wandb", "must be one of CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger"),
    ("--trainer.callbacks foo", "trainer.callbacks is foo"),
    ("--trainer.callbacks [1]", "trainer.callbacks.0 is 1"),
    ("--trainer.plugins foo", "trainer.plugins is foo"),
    ("--seed_everything x", "seed_everything is x"),
    ("--seed_everything -1", "seed_everything is -1, but must lie between 0 and 4294967295"),
    ("--seed_everything 4294967296", "seed_everything is 4294967296"),
    ("--checkpoint.save_top_k -7", "checkpoint cannot be built, change its keys: Invalid value for save_top_k=-7"),
    ("--checkpoint.mode x", "checkpoint"),
    ("--ckpt_path nowhere.ckpt", "ckpt_path 'nowhere.ckpt'"),
    ("--ckpt_path last", "ckpt_path is 'last'"),
    ("--ckpt_path open.yaml", "it is no checkpoint: give a .ckpt file, or 'last'"),
    ("--save_pools maybe", "save_pools is maybe"),
    ("--model.optimizer.lr -1", "model.optimizer cannot be built, change its init_args (lr, betas, "),
    ("--model.optimizer.betas [1]", "model.optimizer.betas is [1]"),
    ("--model.optimizer.lrr 1", "model.optimizer: unknown key 'lrr' of torch.optim.AdamW; did you mean 'lr'?"),
    ("--model.optimizer torch.nn.Linear", "model.optimizer is torch.nn.Linear"),
    ("--model.optimizer torch.optim.AdamX", "torch.optim has no 'AdamX'; did you mean"),
    ("--model.lr_scheduler.start_factor 7", "model.lr_scheduler cannot be built"),
    ("--model.lr_scheduler foo", "model.lr_scheduler is foo"),
    ("--data.benchmarks.toi.num_problems 3", "unknown key 'data.benchmarks.toi.num_problems'"),
    ("--data.train foo", "data.train is foo, but must be the path of a class"),
    ("--data.train foo.Bar", "data.train is foo.Bar, but there is no module 'foo'"),
    ("--data.train opdlab.toy.Chainproblems", "opdlab.toy has no 'Chainproblems'; did you mean 'ChainProblems'?"),
    ("--data.train.num_problems x", "data.train.num_problems is x"),
    ("--data.train.split x", "data.train.split is x, but must be one of"),
    ("--model.gate syntax.Gate", "syntax.py, line 1: SyntaxError"),
    ("--model.gate fails.Gate", "fails.py, line 2: RuntimeError: boom"),
    ("--model.gate script.Gate", "script.py, line 2: SystemExit: usage; put what a script does below `if __name__"),
    (
        "--data.train opdlab.data.JsonlProblems --data.train.path open.yaml --data.train.verifier script.check",
        "importing script fails, change",
    ),
    ("--model.gate refuses.Gate", "model.gate cannot be built: Gate fails, change its options or"),
    ("--model.gate refuses.Gat", "model.gate is refuses.Gat, but refuses has no 'Gat'; did you mean 'Gate'?"),
    ("--model.gate torch.nn.Linear", "model.gate is torch.nn.Linear, but must be one of block"),
    ("--model.gate opdlab.gating.DriftGate", "model.gate is opdlab.gating.DriftGate, which is abstract"),
    ("--model.gate blok64", "unknown gate 'blok64'; did you mean 'block64'?"),
    ("--model.objective x", "unknown objective 'x'"),
    ("--model.teacher 7", "model.teacher is 7"),
    ("--model.teacher opdlab.policies.Teacher", "model.teacher is opdlab.policies.Teacher, which is abstract"),
    ("--model.student opdlab.policies.LocalTeacher", "model.student is opdlab.policies.LocalTeacher"),
    ("--model.student.adapter 3", "model.student.adapter is 3"),
    ("--model.student.adapter.rr 3", "model.student.adapter"),
    ("--model.student.dtype f8", "model.student.dtype is f8"),
    ("--model.sampling x", "model.sampling is x, but it is a section"),
    ("--model.sampling.temperature null", "model.sampling.temperature is null"),
    ("--model.sampling.temperature .nan", "model.sampling.temperature is nan"),
    ("--model.sampling.top_p 2", "model.sampling.top_p is 2"),
    ("--model.sampling.top_p null", "model.sampling.top_p is null, but must be a number"),
    ("--model.sampling open.yaml", "model.sampling is open.yaml, a file that cannot be read: line 2, is not YAML"),
    ("--model.objective.k null", "model.objective.k is null, but must be an integer"),
    ("--model.optimizer.lr null", "model.optimizer.lr is null, but must be a number"),
    ("--model.student.dtype null", "model.student.dtype is null, but must be one of"),
    ("--trainer.accumulate_grad_batches null", "trainer.accumulate_grad_batches is null, but must be an integer"),
    ("--data.reuse.epochs null", "data.reuse.epochs is null, but must be an integer"),
    ("--model.optimizer.weight_decay .nan", "model.optimizer.weight_decay is nan, but must be a number"),
    ("--data.train.num_problems 0", "data.train.num_problems is 0"),
    (
        "--data.train opdlab.data.JsonlProblems --data.train.path x",
        "data.train.path is x, but this file does not exist",
    ),
    ("--data.train opdlab.data.TableProblems --data.train.path x.csv", "data.train.path is x.csv, but this file does"),
    (
        "--data.benchmarks.mine opdlab.data.JsonlProblems --data.benchmarks.mine.path .",
        "data.benchmarks.mine.path is ., which is a folder: give the path of a JSON Lines file",
    ),
    ("-c missing_benchmark.yaml", "data.benchmarks.amc23.path is ./x, but this file does not exist"),
    ("--model '{gate: blok}'", "model.gate is blok, but must be the path of a class"),
    ("--model.gate '{class_path: blok}'", "model.gate is blok, but must be the path of a class"),
    ("--trainer.max_steps ''", "trainer.max_steps is '', but must be an integer"),
    ("--model.evaluation.pass_at [x]", "model.evaluation.pass_at is x"),
    ("--model.reduction sum", "model.reduction is sum"),
    ("--model.mask_first 5", "model.mask_first is 5"),
    ("--data.reuse.batch_size 3", "data.reuse.batch_size is 3"),
    ("--data.max_prompt_tokens 0", "data.max_prompt_tokens is 0"),
    ("--data.eval_batch_size 0", "data.eval_batch_size is 0"),
    ("--data.clean.no x", "unknown key 'data.clean.no'"),
    ("--model.gate", "--model.gate has no value"),
    (
        "--data.benchmarks.mine opdlab.data.JsonlProblems --data.benchmarks.mine.verifier --data.seed 3",
        "--data.benchmarks.mine.verifier has no value",
    ),
    ("--data.seed -1", "data.seed is -1, but must lie between 0 and 4294967295"),
    ("--data.train.seed 4294967296", "data.train.seed is 4294967296, but must lie between 0"),
    ("--model.evaluation.seed -1", "model.evaluation.seed is -1, but must lie between 0 and 4294967295"),
    (
        "--model.student.adapter.r 4 --model.student.adapter.seed -1",
        "model.student.adapter.seed is -1, but must lie between 0 and 4294967295",
    ),
    ("quickstart", "'quickstart' is one argument too many; did you mean -c quickstart?"),
    ("stray", "'stray' is one argument too many"),
    ("-c", "--config has no value"),
    ("--trainer.default_root_dir $'\\x1b[31m'", "not text: it has the control character \\x1b"),
]
OTHERS = [
    ("study run nowhere", "there is no study 'nowhere'"),
    ("study run list.yaml", "list.yaml"),
    ("study run twice.yaml", "twice.yaml"),
    ("study run open.yaml", "open.yaml"),
    ("study run threads.yaml", "threads"),
    ("study run paper-toy-mild --threads x", "threads is x"),
    ("study run paper-toy-mild --jobs 0", "--jobs is 0"),
    ("study report nowhere", "nowhere"),
    ("study ru", "no 'ru'; did you mean 'run'?"),
    ("replay nowhere", "'nowhere' is not a folder"),
    ("replay . --draws x", "--draws"),
    ("replay . --gates syntax.Gate", "importing --gates syntax.Gate fails, change"),
    ("replay . --gates script.Gate", "importing --gates script.Gate fails, change"),
    ("validate -c quickstart --model.gaet x", "unknown key 'model.gaet'; did you mean 'model.gate'?"),
    ("test -c nowhere", "no configuration file 'nowhere'"),
    (f"estimate -c quickstart --model.student.dtype f8 --model.student.path {NO_MODEL}", "model.student.dtype is f8"),
    ("gates x", "unrecognized arguments: x; see opdlab gates --help"),
    ("fti", "unknown command 'fti'; did you mean 'fit'?"),
    ("", "give a command"),
]
SECTIONS = (
    *("trainer", "model", "model.sampling", "model.evaluation", "data", "data.reuse", "data.clean", "checkpoint"),
    *("behavior_refresh", "gate_monitor", "sample_logger", "pool_recorder", "export"),
)


def written() -> Iterator[tuple[str, str]]:
    """Yield the calls that are written down, or made from a table of names, with words of their message."""
    yield from ((f"{FIT} -c {file}", words) for file, words in FILES)
    yield from ((f"{FIT} {flags}", words) for flags, words in FLAGS)
    yield from OTHERS
    for name in COMMANDS:
        yield f"{name} --quux 1", "quux"
        yield f"{name} $'\\x1b[31m'", "control character \\x1b"
    for section in SECTIONS:
        yield f"{FIT} --{section}.quux 1", f"unknown key '{section}.quux'"
        yield f"{FIT} --{section} 7", f"{section} is 7, but it is a section"
    for name in gate_registry().names():
        yield f"{FIT} --model.gate {name} --model.gate.quux 1", "model.gate: unknown key 'quux'"
        yield f"{FIT} --model.gate {name} --model.gate.normalization meen", "model.gate.normalization is meen"
    for name in objective_registry().names():
        yield f"{FIT} --model.objective {name} --model.objective.quux 1", "model.objective: unknown key 'quux'"


def places(value: Any, key: str = "") -> Iterator[str]:
    """Yield the keys of all values in a configuration."""
    for name, part in value.items():
        yield f"{key}{name}"
        if isinstance(part, dict):
            yield from places(part, f"{key}{name}/")


def mutants(config: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield copies of a configuration with one value changed: the kind of change, the key, and the copy."""
    for place in places(config):
        *parents, last = place.split("/")
        section = config
        for parent in parents:
            section = section[parent]
        value = section[last]
        changes: list[tuple[str, Any]] = [("null", None), ("a list", [{"x": 1}]), ("text", "n0 such value")]
        changes += [("a number", 7.5), ("unknown key", value)]
        if isinstance(value, int | float) and not isinstance(value, bool):
            changes += [("out of range", other) for other in (-1 - value, float("nan"), 10**40)]
        if isinstance(value, str):
            changes.append(("missing file", "./missing/file.yaml"))
        for kind, other in changes:
            mutant = copy.deepcopy(config)
            inside = mutant
            for parent in parents:
                inside = inside[parent]
            inside[f"{last}x" if kind == "unknown key" else last] = other
            if kind == "unknown key":
                del inside[last]
            yield kind, last, mutant


def test_calls_that_are_written_down(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    calls = list(written())
    for arguments, words in calls:
        line = call(arguments.replace("$'\\x1b[31m'", "'\x1b[31m'"))
        assert words in line, arguments
        assert WAY_OUT.search(line), line
    assert len(calls) >= 150
    with capsys.disabled():
        print(f"\n{len(calls)} written calls refused")


def test_no_internal_class_is_offered(call: Call) -> None:
    line = call(f"{FIT} --trainer.logger wandb")
    assert "MetricsFile" not in line
    assert "DummyLogger" not in line


def test_a_logger_that_cannot_make_its_folder(call: Call) -> None:
    """It makes the folder when all else is ready."""
    line = call("fit -c quickstart --trainer.logger CSVLogger --trainer.logger.save_dir open.yaml/x")
    assert line.startswith("trainer.logger cannot write, give another save_dir: ")
    assert "open.yaml/x" in line


def test_mutated_configurations(call: Call, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Without the logger's package the refusal names that instead.
    absent = {f"loggers/{name}" for name in ("wandb", "mlflow") if find_spec(name) is None}
    # Without a GPU the refusal names that instead; of the base, which lacks paths, the first of them.
    absent |= {"base", "trainer/gpu", "trainer/ddp", "trainer/fsdp2"}
    files = {name: path for name, path in shipped_configs().items() if name not in absent}
    shipped = {name: yaml.safe_load(path.read_text()) for name, path in files.items()}
    every = [(name, *mutant) for name, config in shipped.items() for mutant in mutants(config)]
    shutil.copytree(shipped_configs()["quickstart"].parent, folder / "configs")  # a mutant extends those beside it
    for file in re.findall(r"[\w/]+\.jsonl", " ".join(path.read_text() for path in shipped_configs().values())):
        (folder / file).touch()  # problems that the user brings
    refused: Counter[str] = Counter()
    chosen = random.Random(0).sample(every, 300)
    for name, kind, key, mutant in chosen:
        file = (folder / "configs" / name).with_name("mutant.yaml")
        file.write_text(yaml.safe_dump(mutant, sort_keys=False))
        if line := call(f"fit -c quickstart -c {file} --model.student.path {NO_MODEL}"):
            refused[kind] += 1
            assert key.removesuffix("x") in line or key == "class_path", (name, kind, key, line)
            assert WAY_OUT.search(line), line
    assert refused.total() >= 150
    with capsys.disabled():
        print(f"\n{refused.total()} of {len(chosen)} mutants refused: {dict(refused)}; the rest is valid")


PROCESSES = (
    *("", "fti", "--quux", "foo --help", "gates x", "study", "study ru", "study run nowhere", "study run list.yaml"),
    *("study run open.yaml", "study report nowhere", "study run --quux 1", "study list x", "study run threads.yaml"),
    *(
        "gates $'\\x1b'",
        "fit $'\\x1b'",
        "fit -c open.yaml",
        "fit quickstart",
        "fit -c quickstart --model.gate fails.Gate",
    ),
    *("replay nowhere", "estimate -c quickstart -c null_trainer.yaml"),
)


# Loads the libraries once; each call is then a process of its own, which ends as any other. Its texts go to two files.
_CALLER = """
import json, os, sys
import opdlab.cli.app, opdlab.cli.replay
from opdlab.cli.commands import console
codes = []
for number, words in enumerate(json.loads(sys.argv[1])):
    if (child := os.fork()) == 0:
        for descriptor in (1, 2):
            os.dup2(os.open(f"{number}.{descriptor}", os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = ["opdlab", *words]
        console()
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def test_wrong_calls_as_processes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = [shlex.split(arguments.replace("$'\\x1b'", "'\x1b'")) for arguments in PROCESSES]
    done = run_child([sys.executable, "-c", _CALLER, json.dumps(calls)], cwd=folder, check=True)
    texts = [((folder / f"{n}.1").read_text(), (folder / f"{n}.2").read_text()) for n in range(len(calls))]
    ended = list(zip(PROCESSES, calls, json.loads(done.stdout), texts, strict=True))
    for arguments, words, *_ in (ended[0], ended[-1]):  # as a user starts them: one loads no library, one loads all
        alone = run_child([sys.executable, "-m", "opdlab", *words], cwd=folder)
        ended.append((arguments, words, alone.returncode, (alone.stdout, alone.stderr)))
    for arguments, _, code, (out, error) in ended:
        assert code == EXIT_USAGE, (arguments, error)
        assert out == ""
        (line,) = error.splitlines()
        assert line.startswith("opdlab: error: ")
        assert line.isprintable()
        assert WAY_OUT.search(line), line
    with capsys.disabled():
        print(f"\n{len(PROCESSES)} processes refused")
