"""LoRA and DoRA adapters (arXiv 2106.09685, 2402.09353) with peft: attach, load, remove and merge.

Adapters are injected into the model's layers. The model keeps its class and is scored and sampled like any other.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from opdlab.errors import UsageError, first_line, require
from opdlab.out_of_memory import out_of_memory
from opdlab.packages import working_pair
from opdlab.registry import suggestion
from opdlab.scoring import LowRank
from opdlab.seeds import checked_seed, derive_seed, seeded

_NAME = "default"
_BASE_WEIGHT = ".base_layer.weight"


@dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter that is trained instead of the weights, which stay frozen.

    Args:
        r: rank of the update, at least 1.
        alpha: the update is scaled by ``alpha / r``.
        dropout: must be 0, because the student and the snapshot that it is compared with would drop different values.
        target_modules: names of the layers to adapt, such as ``[q_proj, v_proj]``; ``all-linear`` takes every linear
            layer but the output layer, which must be named (usually ``lm_head``). If the embedding shares the output
            layer's weight, the embedding is not adapted.
        use_dora: split the weights into magnitude and direction and train the magnitude too. Not for the output layer.
        seed: for the adapter's random initialization.

    Raises:
        UsageError: a value is out of range.

    Example:
        >>> AdapterConfig(r=8).alpha
        32
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    use_dora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.r >= 1, f"r is {self.r}, but must be at least 1")
        require(self.alpha > 0, f"alpha is {self.alpha}, but must be above 0")
        require(
            self.dropout == 0,
            f"dropout is {self.dropout}, but must be 0: with dropout the student's log-probabilities would "
            "differ from the snapshot's at equal weights",
        )
        named = self.target_modules == "all-linear" or (isinstance(self.target_modules, list) and self.target_modules)
        require(
            bool(named),
            f"target_modules is {self.target_modules!r}, but must be 'all-linear' or a list of layer names",
        )
        checked_seed(self.seed)


def attach_adapter(model: PreTrainedModel, config: AdapterConfig, base: str) -> None:
    """Freeze the weights and attach a new adapter, which initially leaves the outputs unchanged.

    Args:
        model: changed in place.
        config: the adapter.
        base: path or hub id of the weights, stored in the adapter's configuration.

    Raises:
        UsageError: peft is missing or does not work with transformers, or a target layer cannot be adapted.
    """
    _check_targets(model, config)
    with working_pair("peft", "model.student.adapter", "peft"):
        from peft import LoraConfig
        from peft.tuners.tuners_utils import cast_adapter_dtype

        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=0.0,
            target_modules=config.target_modules,
            use_dora=config.use_dora,
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's transposed weights
        )
        with seeded(derive_seed("adapter", config.seed), model.device), _quiet_peft():
            model.add_adapter(lora, _NAME)
        lora.base_model_name_or_path = base
        cast_adapter_dtype(model, _NAME)  # small updates would be lost in a narrow type


def load_adapter(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Freeze the weights and attach the adapter of a folder, so that it can be trained further.

    Raises:
        UsageError: peft is missing or does not work with transformers; or the adapter is not a LoRA adapter, is
            incomplete, or does not fit the model.
    """

    def refuse(reason: str) -> NoReturn:
        raise UsageError(f"model '{folder}' cannot be loaded: {reason}")

    why = f"model '{folder}'"
    with working_pair("peft", why, "peft"):
        from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
        from peft.tuners.tuners_utils import cast_adapter_dtype

    try:
        config = PeftConfig.from_pretrained(folder)
        if (kind := str(getattr(config.peft_type, "value", config.peft_type))) != "LORA":
            refuse(f"it is an adapter of type {kind}, and only LoRA and DoRA are known")
        if config.modules_to_save:
            refuse(f"its adapter replaces whole layers ({', '.join(config.modules_to_save)}); merge it first with peft")
        if getattr(config, "ensure_weight_tying", False):
            refuse("its adapter ties output layer and embedding (ensure_weight_tying); merge it first with peft")
        config.lora_dropout = 0.0
        config.inference_mode = False
        weights = load_peft_weights(str(folder), device="cpu")
        # Not model.load_adapter of transformers, which misses the magnitudes of DoRA.
        with _quiet_peft(), working_pair("peft", why, "peft"):
            model.add_adapter(config, _NAME)
        if (reason := _beyond_low_rank(model.get_output_embeddings())) is not None:
            refuse(f"its adapter puts {reason} on the output layer, where only plain LoRA is known; merge it with peft")
        _drop_base_weights(model, weights, refuse)
        report = set_peft_model_state_dict(model, weights, _NAME)
        strays = sorted({*(key for key in report.missing_keys if "lora_" in key), *report.unexpected_keys})
        if strays:
            refuse(f"the adapter does not fit its base '{base}': {strays[0]} is in one of them only")
    except UsageError:
        raise
    except Exception as error:  # peft, safetensors and json each raise their own types
        if out_of_memory(error) is not None:
            raise
        refuse(f"is the adapter of this base? ({first_line(error)})")
    config.base_model_name_or_path = base
    cast_adapter_dtype(model, _NAME)


def take_off_adapter(model: PreTrainedModel, merge: bool) -> None:
    """Remove the adapter from a model, in place.

    Args:
        model: has an adapter.
        merge: add the adapter to the weights first, instead of dropping it. If embedding and output layer share a
            weight and one of them is adapted, their weights are separate afterwards.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding, output = map(base_of, ends)
    if merge and embedding.weight is output.weight and any(base_of(end) is not end for end in ends):
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if merge:
                module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    model._hf_peft_config_loaded = False
    del model.peft_config


def base_of(layer: Any) -> Any:
    """Return the plain layer below an adapter, or the layer itself."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def low_rank_of(layer: Any) -> LowRank | None:
    """Return the adapter's update of a linear layer's weight; None if the layer has no adapter."""
    if _NAME not in getattr(layer, "lora_A", ()):
        return None
    down, up = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
    return LowRank(down, up, layer.scaling[_NAME])


def whole_model(model: PreTrainedModel, weights: Mapping[str, Tensor], merge: bool) -> PreTrainedModel:
    """Return an unsharded model with given weights, in host memory: a model that is sharded cannot be copied.

    Args:
        model: gives the architecture and the adapter's options.
        weights: of all parameters and buffers, by name; not copied.
        merge: add an adapter to the weights.
    """
    with torch.device("meta"):
        whole: PreTrainedModel = type(model)(model.config)
        if has_adapter := bool(getattr(model, "_hf_peft_config_loaded", False)):
            with _quiet_peft():
                whole.add_adapter(model.peft_config[_NAME], _NAME)
    whole.load_state_dict(dict(weights), assign=True)
    whole.generation_config = model.generation_config
    # The names by which transformers has read the weights, of which some models write others.
    whole._weight_conversions = getattr(model, "_weight_conversions", None)
    embedding, output = base_of(whole.get_input_embeddings()), base_of(whole.get_output_embeddings())
    if embedding.weight.data_ptr() == output.weight.data_ptr():  # the state dict names a tied weight twice
        output.weight = embedding.weight
    if has_adapter and merge:
        take_off_adapter(whole, merge=True)
    return whole


def save_adapter(model: PreTrainedModel, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write only the adapter, in peft's format.

    Args:
        model: has an adapter.
        folder: output folder.
        weights: the model's, by name; None for its state dict.
    """
    weights = model.state_dict() if weights is None else weights
    # peft would also write the frozen weight of an adapted output layer, which may be larger than the adapter.
    state = {key: tensor for key, tensor in weights.items() if not key.endswith(_BASE_WEIGHT)}
    with _quiet_peft():
        model.save_pretrained(folder, state_dict=state)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Suppress known harmless warnings of peft.

    Tied weights are untied when an adapter is merged. GPT-2's linear layers are transposed and its output layer is
    not; peft checks each layer and corrects the setting itself.
    """
    with warnings.catch_warnings():
        for start in ("Model has `tie_word_embeddings=True`", "fan_in_fan_out is set to", "Setting `save_embedding_l"):
            warnings.filterwarnings("ignore", message=start)
        yield


def _beyond_low_rank(layer: nn.Module) -> str | None:
    """Return the name of an adapter's change to a layer beyond a low-rank weight update; None if there is none."""
    variants = list(getattr(layer, "lora_variant", {}).values())
    if variants:
        return type(variants[0]).__name__.removesuffix("LinearVariant")
    return "a bias (lora_bias)" if any(getattr(layer, "lora_bias", {}).values()) else None


def _drop_base_weights(model: PreTrainedModel, weights: dict[str, Tensor], refuse: Callable[[str], None]) -> None:
    """Remove the frozen weights that peft also saves, and refuse the adapter if they differ from the base's."""
    for key in [key for key in weights if key.endswith(_BASE_WEIGHT)]:
        name, theirs = key.removeprefix("base_model.model."), weights.pop(key)
        own = model.get_parameter(name).detach()
        narrow = min(own.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        same = own.shape == theirs.shape and torch.allclose(own.cpu().to(narrow), theirs.to(narrow), rtol=1e-3)
        if not same:
            refuse(f"the adapter does not fit its base: {name} is another there; merge the adapter with peft")


def _check_targets(model: PreTrainedModel, adapter: AdapterConfig) -> None:
    if isinstance(adapter.target_modules, str):
        return
    names = {module: name for name, module in model.named_modules()}
    embedding, output = names[model.get_input_embeddings()], names.get(model.get_output_embeddings(), "")
    linear = [name for module, name in names.items() if isinstance(module, (nn.Linear, Conv1D))]
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in adapter.target_modules:
        require(
            not _matches(embedding, target),
            f"adapter.target_modules has '{target}', but the embedding is not adapted: take some of {', '.join(known)}",
        )
        require(
            not (adapter.use_dora and _matches(output, target)),
            f"adapter.use_dora is true and adapter.target_modules has '{target}', but the output layer takes plain "
            f"LoRA only: leave '{target}' out, or set adapter.use_dora to false",
        )
        require(
            any(_matches(name, target) for name in linear),
            f"adapter.target_modules has '{target}', but the model has no linear layer of that name"
            f"{suggestion(target, known) or ';'} it has: {', '.join(known)}",
        )


def _matches(name: str, target: str) -> bool:
    """True if a layer name matches a target, by peft's rule for lists of targets."""
    return name == target or name.endswith(f".{target}")


def keep_adapter_only(module: Any, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Remove the frozen weights below an adapter from the checkpoint; a state-dict hook."""
    for key in module.frozen_keys:
        state_dict.pop(prefix + key, None)


def put_back_frozen(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add the current values of the weights that :func:`keep_adapter_only` left out; a pre-hook for loading."""
    own = dict(module.named_parameters(remove_duplicate=False))
    for key in module.frozen_keys:
        state_dict.setdefault(prefix + key, own[key].detach())
