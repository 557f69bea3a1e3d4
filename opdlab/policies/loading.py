"""Loading of models and tokenizers from folders, the hub, GGUF files and adapter folders, with checks."""

import importlib.resources
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from opdlab.errors import UsageError, first_line, require
from opdlab.files import below, expanded
from opdlab.out_of_memory import out_of_memory
from opdlab.packages import is_installed, package_trouble, require_package
from opdlab.policies.sharding import local
from opdlab.policies.tokenizers import StopTokens, single_token_ids

DType = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["4bit", "8bit"]
_PACKAGE_SCHEME = "package://"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ModelSource:
    """The source of a model and its loading options; see :class:`opdlab.policies.LanguageModel` for the fields."""

    path: str
    dtype: DType = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    gguf_file: str | None = None
    quantization: Quantization | None = None

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return model and tokenizer, without dropout.

        Raises:
            UsageError: something is missing, incomplete or not installed.
        """
        require(
            self.quantization in (None, *get_args(Quantization)),
            f"quantization is '{self.quantization}', but must be one of {', '.join(get_args(Quantization))}",
        )
        # transformers needs accelerate for both.
        for extra, value in (("gguf", self.gguf_file), ("bitsandbytes", self.quantization)):
            for package in (extra, "accelerate") if value else ():
                require_package(package, f"model '{self.path}'", extra)
        source = resolve(self.path, with_config=self.gguf_file is None)
        options = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        options |= {"gguf_file": self.gguf_file} if self.gguf_file else {}
        logging.getLogger(PreTrainedModel.__module__).addFilter(_not_of_masks)
        with self._explained(source):
            config = AutoConfig.from_pretrained(source, **options)
            # Dropout would give student and snapshot different log-probabilities at equal weights.
            for key in [key for key in vars(config) if "drop" in key]:  # resid_pdrop, attention_dropout, layerdrop, …
                if isinstance(getattr(config, key), float):
                    setattr(config, key, 0.0)
            with quiet_bars():
                model, report = AutoModelForCausalLM.from_pretrained(
                    source, config=config, output_loading_info=True, **self._model_options(), **options
                )
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        missing = sorted(report["missing_keys"])
        require(
            not missing, f"model '{self.path}' is incomplete: it lacks {len(missing)} weights, among them {missing[:1]}"
        )
        if self.gguf_file:
            unmark_quantized(model)
        return model, tokenizer

    def _model_options(self) -> dict[str, Any]:
        dtype = getattr(torch, self.dtype)
        options: dict[str, Any] = {"dtype": dtype}
        if self.attn_implementation:
            options["attn_implementation"] = self.attn_implementation
        if self.quantization == "4bit":
            # The compute type of the products; NF4 is QLoRA's (arXiv 2305.14314).
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        elif self.quantization == "8bit":
            options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
        elif self.gguf_file and hasattr(transformers, "GgufConfig"):
            # Newer versions keep weights packed if they have a kernel for it; such weights cannot be trained or saved.
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        return options

    @contextmanager
    def _explained(self, source: str) -> Iterator[None]:
        """Convert exceptions of transformers to a UsageError with a one-line message."""
        try:
            yield
        except Exception as error:  # parsers of damaged files raise many types, tokenizers a bare Exception
            if out_of_memory(error) is not None:
                raise
            reason, kernel = first_line(error), self.attn_implementation
            if kernel and (isinstance(error, ImportError) or "attn_implementation" in reason):
                reason = f"attn_implementation '{kernel}' cannot be used: {reason.rstrip('.')}"
                raise UsageError(f"model '{self.path}': {reason}; {_kernel_mend(kernel, error)}") from error
            if (trouble := package_trouble(error)) is not None:  # a tokenizer's or a quantized model's package
                raise UsageError(f"model '{self.path}' {trouble}") from error
            hint = (
                "check that the folder is complete"
                if Path(source).is_dir()
                else "check the name and the connection, or give a folder written by save_pretrained"
            )
            raise UsageError(f"model '{self.path}' cannot be loaded: {hint} ({reason})") from error


def _not_of_masks(record: logging.LogRecord) -> bool:
    """Drop transformers' advice to give a mask: rows are packed, or padded on the right where causality hides it."""
    return not record.getMessage().startswith("We strongly recommend passing in an `attention_mask`")


def _kernel_mend(kernel: str, error: Exception) -> str:
    """Return the fix for an attention kernel that cannot be used, with the command that installs its package."""
    default = "leave it out for the default"
    if not isinstance(error, ImportError):
        return default
    if kernel.endswith("flash_attention_2") and not is_installed("flash_attn"):
        return f"pip install flash-attn --no-build-isolation, or {default}"
    if not is_installed("kernels") and ("/" in kernel or "flash_attention" in kernel):
        return f"pip install 'transformers[kernels]', or {default}"
    return default


def resolve(path: str, with_config: bool = True) -> str:
    """Return the local folder of a path, or the path unchanged if it is a hub id.

    Args:
        path: a folder, a hub id, or ``package://some.package/folder``.
        with_config: whether a folder must hold a configuration and a tokenizer; a GGUF file holds both itself.

    Raises:
        UsageError: the folder is missing or incomplete.
    """
    if path.startswith(_PACKAGE_SCHEME):
        package, _, folder = path.removeprefix(_PACKAGE_SCHEME).partition("/")
        try:
            shipped = Path(str(importlib.resources.files(package))) / folder
        except ModuleNotFoundError as error:
            raise UsageError(f"model '{path}': there is no package '{package}'") from error
        require(shipped.is_dir(), f"model '{path}': package '{package}' holds no folder '{folder}'")
        return str(shipped)
    local = expanded(path, "path")
    looks_local = local.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or path.endswith("/")
    require(
        local.is_dir() or not looks_local,
        f"model '{path}' does not exist{below(local)}: give a folder written by save_pretrained, or a hub id such as "
        "Qwen/Qwen3-0.6B",
    )
    if not local.is_dir():
        return path
    if with_config:
        require(
            (local / "config.json").is_file(),
            f"model '{path}' is incomplete: config.json is missing; write the folder again with save_pretrained",
        )
        # Without these files, transformers silently creates an empty tokenizer.
        require(
            has_tokenizer(local),
            f"model '{path}' is incomplete: the tokenizer's files are missing; save the tokenizer into the folder too",
        )
    return str(local)


def has_tokenizer(folder: Path) -> bool:
    """True if a folder holds tokenizer files."""
    return any(file for pattern in ("*token*", "vocab*", "*.model") for file in folder.glob(pattern))


def adapter_base(path: str) -> str | None:
    """Return the path of the base model if ``path`` is a folder that holds only an adapter, else None.

    Raises:
        UsageError: the adapter does not name its base.
    """
    folder = expanded(path, "path")
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (json.JSONDecodeError, AttributeError) as error:
        raise UsageError(f"model '{path}' cannot be loaded: {ADAPTER_CONFIG} is not what peft writes") from error
    require(bool(base), f"model '{path}' is an adapter, but base_model_name_or_path in {ADAPTER_CONFIG} is empty")
    return str(base)


def stop_tokens_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str, given: Sequence[str] | None = None
) -> StopTokens:
    """Return the stop tokens of tokenizer and generation config, which may differ (e.g. base and instruct models).

    Given ones take the place of both, also in the model's generation config, so that an exported model stops there.

    Raises:
        UsageError: there is no stop token, or a given one is not a single token.
    """
    if given is not None:
        require(bool(given), "stop_tokens is empty, so no response could ever end: give a token, or null")
        chosen = single_token_ids(tokenizer, given, "stop_tokens")
        if (config := model.generation_config) is not None:
            config.eos_token_id = chosen
            try:
                config.validate(strict=True)
            except ValueError:
                # Its sampling options, which opdlab does not use, contradict one another: a temperature without
                # do_sample. transformers does not save such a configuration once it was changed.
                kept = {name: getattr(config, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
                model.generation_config = GenerationConfig(**kept)
        return StopTokens(frozenset(chosen), frozenset(chosen))
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    stops = StopTokens(frozenset({tokenizer.eos_token_id} - {None}), frozenset(ids) - {None})
    require(bool(stops.ids), f"model '{path}': its tokenizer has no eos_token, so no response could ever end; set one")
    return stops


def non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with a NaN or infinite value; None if there is none.

    Args:
        tensors: names and tensors; integers and packed weights are skipped.

    Example:
        >>> non_finite([("a", torch.ones(2)), ("b", torch.tensor([1.0, torch.nan]))])
        'b'
    """
    for name, tensor in tensors:
        # The extremes of a tensor with a NaN are NaN. Floats of one byte are packed weights.
        if tensor.is_floating_point() and tensor.itemsize > 1 and local(tensor).numel():
            low, high = local(tensor.detach()).aminmax()
            if not bool(low.isfinite() & high.isfinite()):
                return name
    return None


def unmark_quantized(model: PreTrainedModel) -> None:
    """Remove the quantization attributes, because ``save_pretrained`` refuses them though the weights are unpacked."""
    model.hf_quantizer = None
    model.is_quantized = False
    for holder, name in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(holder, name):
            delattr(holder, name)


def save_network(model: PreTrainedModel, folder: Path) -> None:
    """Write weights and configuration in Hugging Face's format, in any process of a run.

    transformers' ``save_pretrained`` writes nothing in all processes but the first.

    Args:
        model: with plain tensors as weights.
        folder: output folder.
    """
    saving: Any = model
    saving.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        saving.save_pretrained(folder)
    finally:
        del saving.should_save_on_this_rank


def checkpoint_gradients(model: PreTrainedModel, path: str) -> None:
    """Enable gradient checkpointing: recompute activations within layers in the backward pass.

    Args:
        model: loaded, in eval mode.
        path: path of the model, for the message.

    Raises:
        UsageError: the architecture does not support gradient checkpointing.
    """
    require(
        model.supports_gradient_checkpointing,
        f"model '{path}' ({type(model).__name__}) has no gradient checkpointing in transformers: "
        "set gradient_checkpointing to false",
    )
    # Renamed in transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # a hook that only reentrant checkpointing needs
    # transformers loads models in eval mode, which disables checkpointing, and Lightning does not change the mode.
    # Dropout is off, so train mode has no other effect.
    model.train()


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Disable transformers' progress bars for loading and saving weights, because they would disrupt our own."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
