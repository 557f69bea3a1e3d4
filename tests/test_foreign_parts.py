"""Private parts of other packages: each is listed here, exists in the installed versions, and works as opdlab needs.

A release of another package may rename any of them. The tests then fail here, with the name, instead of in a feature
that switches itself off.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from opdlab.policies import LanguageModel, SamplingConfig
from opdlab.policies.decoding import why_not_selectable
from tests.policies.tiny_models import sampled
from tests.toy_run import STUDENT

ROOT = Path(__file__).parents[1]

# Private name -> (module, class or object that has it, what opdlab needs it for).
ATTRIBUTES = {
    "_is_stateful": ("transformers", "PreTrainedModel", "which models the decoding loop can take"),
    "_supports_default_dynamic_cache": ("transformers", "GenerationMixin", "which models the decoding loop can take"),
    "_attn_implementation": ("transformers", "PretrainedConfig", "whether rows may be packed"),
    "_hf_peft_config_loaded": ("transformers", "PreTrainedModel", "whether a model has an adapter"),
    "_call_impl": ("torch.nn", "Module", "compiled layers that decode as they are"),
    "_compiled_call_impl": ("torch.nn", "Module", "compiled layers that decode as they are"),
    "_apply": ("torch.nn", "Module", "a snapshot that stays on the host"),
    "_set_params_and_buffers_to_ignore_for_model": (
        "torch.nn.parallel",
        "DistributedDataParallel",
        "a snapshot that stays on the host",
    ),
    "_get_file_writer": ("torch.utils.tensorboard", "SummaryWriter", "hyperparameters with their metrics"),
    "_logger_connector": ("lightning.pytorch", "Trainer()", "the metrics of a run's last step"),
    "_accelerator_connector": ("lightning.pytorch", "Trainer()", "who starts the processes, and SLURM's signal"),
    "_checkpoint_connector": ("lightning.pytorch", "Trainer()", "whether an error came while a run was restored"),
    "_signal_connector": ("lightning.pytorch", "Trainer()", "queueing a SLURM job again once it has saved"),
    "_loaded_checkpoint": (
        "lightning.pytorch.trainer.connectors.checkpoint_connector",
        "_CheckpointConnector(None)",
        "whether an error came while a run was restored",
    ),
    "_slurm_sigusr_handler_fn": (
        "lightning.pytorch.trainer.connectors.signal_connector",
        "_SignalConnector",
        "queueing a SLURM job again once it has saved",
    ),
    "_child_processes": (
        "lightning.fabric.strategies.launchers.subprocess_script",
        "_ChildProcessObserver(None, [])",
        "processes that have stopped together are not killed",
    ),
    "_SubprocessScriptLauncher": (
        "lightning.pytorch.strategies.launchers.subprocess_script",
        "",
        "which processes Lightning has started, and how they ended",
    ),
    "_monitor_candidates": ("lightning.pytorch.callbacks", "ModelCheckpoint()", "saving the best checkpoint"),
    "_save_topk_checkpoint": ("lightning.pytorch.callbacks", "ModelCheckpoint()", "saving the best checkpoint"),
    "_should_remove_checkpoint": ("lightning.pytorch.callbacks", "ModelCheckpoint()", "keeping the best checkpoint"),
    "_remove_checkpoint": ("lightning.pytorch.callbacks", "ModelCheckpoint()", "one best checkpoint"),
    "_init_progress": ("lightning.pytorch.callbacks", "RichProgressBar", "the line below the bars"),
    "_stop_progress": ("lightning.pytorch.callbacks", "RichProgressBar", "the line below the bars"),
    "_add_task": ("lightning.pytorch.callbacks", "RichProgressBar", "bars for sampling and scoring"),
    "_update": ("lightning.pytorch.callbacks", "RichProgressBar", "the bar of a resumed run"),
    "_buffers": ("torch.nn", "Module()", "buffers that a model replaced while it was on the device"),
    "_to_sync": ("torchmetrics", "MeanMetric()", "whether a metric is summed over processes"),
    "_exit": ("os", "", "ends a fork without the parent's clean-up"),
}
# The same for what a class of opdlab sets that inherits it: the search below takes it for the class's own.
INHERITED = {
    "_last_checkpoint_saved": ("lightning.pytorch.callbacks", "ModelCheckpoint()", "no checkpoint twice"),
    "_last_global_step_saved": ("lightning.pytorch.callbacks", "ModelCheckpoint()", "no checkpoint twice"),
}
# Private name -> (module that sets and reads it in some models only, use).
SOMETIMES = {
    "_weight_conversions": ("transformers.core_model_loading", "an export with the names that a model was read with"),
}
MODULES = {
    "torch._inductor.cpp_builder": ("get_cpp_compiler", "whether torch finds a compiler"),
    "torch._inductor.exc": ("InvalidCxxCompiler", "whether torch finds a compiler"),
}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in ("opdlab", "strategies", "callbacks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(part.is_symlink() for part in (path, *path.parents)):
                yield path, ast.parse(path.read_text())


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def definitions(cls: ast.ClassDef) -> set[str]:
    """Return the private attributes that a class sets: methods, class variables, `self._name = …`."""
    found = {node.name for node in cls.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for node in ast.walk(cls):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            found |= {node.id} if isinstance(node, ast.Name) else set()
            found |= {node.attr} if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self" else set()
    return {name for name in found if private(name)}


def foreign_attributes() -> set[str]:
    """Return the private attributes that opdlab reads or sets and that no class of its own defines."""
    classes = [node for _, tree in sources() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    named: dict[str, list[ast.ClassDef]] = {}  # files may have classes of the same name
    for cls in classes:
        named.setdefault(cls.name, []).append(cls)
    own = {cls: definitions(cls) for cls in classes}

    def inherited(cls: ast.ClassDef) -> set[str]:
        bases = [ast.unparse(base).partition("[")[0] for base in cls.bases]
        return own[cls].union(*(inherited(base) for name in bases for base in named.get(name, ()) if base is not cls))

    foreign: set[str] = set()
    seen: set[int] = set()
    for cls in classes:
        for node in ast.walk(cls):
            if isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node.value) in ("self", "cls"):
                seen.add(id(node))
                foreign |= {node.attr} - inherited(cls)
    everywhere: set[str] = set().union(*own.values())
    for _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and private(node.attr) and id(node) not in seen:
                constant = node.attr.isupper()  # of another module of opdlab
                ours = node.attr in everywhere and ast.unparse(node.value) != "super()"
                foreign |= set() if constant or ours else {node.attr}
    return foreign


def test_every_private_part_of_another_package_is_listed() -> None:
    modules = set()
    for _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("opdlab"):
                assert not any(private(alias.name) for alias in node.names), ast.unparse(node)
                if any(private(part) for part in node.module.split(".")):
                    modules.add(node.module)
    assert foreign_attributes() == {*ATTRIBUTES, *SOMETIMES}
    assert modules == set(MODULES)


@pytest.mark.parametrize("name", [*ATTRIBUTES, *INHERITED])
def test_it_exists(name: str) -> None:
    module, owner, use = (ATTRIBUTES | INHERITED)[name]
    holder: Any = importlib.import_module(module)
    if owner:
        cls, made, arguments = owner.partition("(")
        holder = getattr(holder, cls)
        holder = holder(*ast.literal_eval(f"[{arguments[:-1]}]")) if made else holder
    assert hasattr(holder, name), f"{module}.{owner} has no {name} any more, which opdlab needs for {use}"


@pytest.mark.parametrize("name", SOMETIMES)
def test_it_is_set_and_read(name: str) -> None:
    module, use = SOMETIMES[name]
    code = inspect.getsource(importlib.import_module(module))
    assert f"model.{name} = " in code, use
    assert f'getattr(model, "{name}", None)' in code, use


@pytest.mark.parametrize("module", MODULES)
def test_private_modules_exist(module: str) -> None:
    name, use = MODULES[module]
    assert hasattr(importlib.import_module(module), name), use


# -- their uses --------------------------------------------------------------------------------------------------------


def smollm2() -> Any:
    """Return a small model of SmolLM2's architecture, random."""
    config = LlamaConfig(
        vocab_size=38,
        hidden_size=18,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        rope_theta=100_000,
        attention_bias=False,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("architecture", ["toy", "SmolLM2"])
def test_the_decoding_loop_is_on(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    model = LanguageModel(STUDENT)
    if architecture == "SmolLM2":
        model.model = smollm2()
    assert why_not_selectable(model.model) is None
    with caplog.at_level("INFO"):
        samples = sampled(model, SamplingConfig(num_samples=2, max_new_tokens=5), [[5, 6, 7], [8, 9]])
    assert samples.tokens.shape[0] == 4
    assert not any("transformers' own loop" in record.getMessage() for record in caplog.records)


def test_a_model_that_cannot_use_the_loop_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = LanguageModel(STUDENT)
    monkeypatch.setattr(type(model.model), "_is_stateful", True)
    with caplog.at_level("INFO"):
        for seed in (0, 1):
            sampled(model, SamplingConfig(max_new_tokens=3), [[5, 6, 7]], seed)
    lines = [record.getMessage() for record in caplog.records if "transformers' own loop" in record.getMessage()]
    assert lines == [
        "sampling: Qwen3ForCausalLM is decoded by transformers' own loop, which is slower, because it carries more "
        "than keys and values from token to token"
    ]
