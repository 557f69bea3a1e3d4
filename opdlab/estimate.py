"""Estimate the memory of a run from its configuration alone, without reading weights.

Models are built on the meta device from their config.json, and their parameters are counted. Not included: the device's
context (about half a GiB with CUDA), fragmentation, a few floats per position, and short-lived results of single
operations.

Symbols: B rollouts of a micro-batch, T tokens of prompt and response, H hidden size, I intermediate size, L layers,
V vocabulary, N = B * T.
"""

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub.constants import ENDPOINT
from lightning.pytorch.cli import instantiate_class
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from opdlab.errors import UsageError, require
from opdlab.packages import package_trouble, require_package
from opdlab.policies.adapters import AdapterConfig, attach_adapter
from opdlab.policies.compiling import layers_of
from opdlab.policies.cpu_attention import kept_probabilities
from opdlab.policies.loading import ADAPTER_CONFIG, adapter_base, resolve
from opdlab.records import read_json
from opdlab.rollouts.pool import PART_BYTES
from opdlab.scoring.head import MAX_TILE_LOGITS

FLOAT = 4  # bytes of a float32
# Tensors of the size of a tile in :func:`opdlab.scoring.divergence_statistics`: both logits, exponentials, the mixture.
DIVERGENCE_TILES = 5


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, read from its config.json; see :func:`activation_bytes` for the assumed architecture.

    Args:
        hidden: H.
        intermediate: I; for a mixture of experts, the sum over the experts of one token.
        layers: L.
        heads: number of attention heads.
        kv_heads: number of key and value heads.
        head_dim: size of a head.
        vocab: V, rows of the head.
        qk_norm: queries and keys are normalised, as in Qwen3.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qk_norm: bool

    @classmethod
    def of(cls, model: nn.Module) -> "Shape":
        """Return the sizes of a transformers model on any device."""
        config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
        hidden, heads = config.hidden_size, config.num_attention_heads
        intermediate = getattr(config, "intermediate_size", None) or 4 * hidden  # null in GPT-2, which means 4 H
        if experts := getattr(config, "num_experts_per_tok", None):
            intermediate = experts * (getattr(config, "moe_intermediate_size", None) or intermediate)
        return cls(
            hidden=hidden,
            intermediate=intermediate,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            vocab=config.vocab_size,
            qk_norm=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        )


@dataclass(frozen=True)
class Widths:
    """Bytes per number.

    Args:
        weights: for weights and hidden states.
        compute: for results of matrix products; smaller than ``weights`` under autocast.
    """

    weights: int
    compute: int

    @property
    def autocast(self) -> bool:
        """True if matrix products have fewer bytes than the weights."""
        return self.compute < self.weights


def widths_of(dtype: str, precision: str | int | None) -> Widths:
    """Return the widths of a model whose weights are loaded as ``dtype``, under ``trainer.precision``.

    Example:
        >>> widths_of("float32", "bf16-mixed"), widths_of("float32", "bf16-true"), widths_of("bfloat16", None)
        (Widths(weights=4, compute=2), Widths(weights=2, compute=2), Widths(weights=2, compute=2))
    """
    own, name = getattr(torch, dtype).itemsize, str(precision or "")
    if name.endswith("mixed"):
        return Widths(own, 2)
    if name.endswith("-true") and not name.startswith("32"):
        own = 8 if name.startswith("64") else 2  # Lightning casts the module
    return Widths(own, own)


def activation_bytes(
    shape: Shape, tokens: int, widths: Widths, *, checkpointing: bool = False, on_cpu: int | None = None
) -> int:
    """Return the bytes that autograd keeps of one forward pass through the layers, without the head.

    Counts the operations of a pre-norm decoder with rotary positions, grouped-query attention in a fused kernel
    (``sdpa`` or flash, so no T x T matrix) and a gated MLP, as in transformers' Llama and Qwen models. With s bytes per
    weight, w bytes per product, Q = heads * head_dim and K = kv_heads * head_dim, per token and layer:

    - two RMSNorms: input in float32, the inverse root and the normalised input, ``2 (4 H + 4 + s H)``;
    - inputs of the linear layers after them: ``2 w H``; under autocast a cast copy for each of five layers, ``5 w H``;
    - norms of queries and keys, if the model has them: ``(4 + w) (Q + K) + 4 (heads + kv_heads)``;
    - attention: queries, keys, values, output and the softmax's log-normalizer, ``2 w Q + 2 w K + 4 heads``;
    - the MLP: gate before and after its activation, the up projection and their product, ``4 w I``.

    On a CPU in float32, short rows of heads that share keys keep the probabilities in place of the log-normalizer, see
    :func:`opdlab.policies.cpu_attention.kept_probabilities`.

    Korthikanti et al. (arXiv 2205.05198) count a GPT layer in the same way. With checkpointing each layer keeps only
    its input, ``s H``, and the backward pass recomputes one layer at a time.

    Args:
        shape: sizes of the model.
        tokens: N, padding included.
        widths: see :class:`Widths`.
        checkpointing: layers are recomputed in the backward pass.
        on_cpu: tokens of each row, for a model on a CPU; None on another device.

    Example:
        >>> shape = Shape(64, 192, 2, 4, 2, 16, 100, qk_norm=True)
        >>> activation_bytes(shape, tokens=100, widths=Widths(4, 4)) // 100
        12900
    """
    s, w = widths.weights, widths.compute
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norm = (FLOAT + s) * shape.hidden + FLOAT
    layer = 2 * norm + (5 if widths.autocast else 2) * w * shape.hidden
    if shape.qk_norm:
        layer += (FLOAT + w) * (queries + keys) + FLOAT * (shape.heads + shape.kv_heads)
    shares = shape.heads > shape.kv_heads
    kept = kept_probabilities(on_cpu, shape.head_dim) if on_cpu and shares and w == FLOAT else 0
    layer += 2 * w * (queries + keys) + FLOAT * shape.heads * (kept // on_cpu if on_cpu and kept else 1)
    layer += 4 * w * shape.intermediate
    layers = shape.layers * s * shape.hidden + layer if checkpointing else shape.layers * layer
    return tokens * (layers + norm)


def inference_bytes(shape: Shape, tokens: int, widths: Widths) -> int:
    """Return the peak bytes of a forward pass without gradient.

    The peak is in the MLP: its input before and after the norm, and three tensors of size I, ``(2 s + w) H + 3 w I``
    per token.
    """
    hidden = (2 * widths.weights + widths.compute) * shape.hidden
    return tokens * (hidden + 3 * widths.compute * shape.intermediate)


def kv_cache_bytes(shape: Shape, tokens: int, widths: Widths) -> int:
    """Return the bytes of keys and values of ``tokens``, without sliding windows.

    L + 1 layers are counted, because a layer is copied when it grows.
    Under autocast they have the width of the weights too: rotary positions widen the keys, and transformers' cache
    widens the values.
    """
    return (shape.layers + 1) * tokens * shape.kv_heads * shape.head_dim * 2 * widths.weights


def head_bytes(shape: Shape, tokens: int, *, training: bool, tiles: int = 2, narrow: bool = False) -> int:
    """Return the working memory of the head, bytes.

    ``opdlab.scoring`` uses tiles of at most 2^23 logits. The forward pass holds a tile and its exponentials. The
    backward pass holds a tile and a tensor of the size of the hidden states, in which their gradient is summed, and
    with ``narrow`` ones another for each tile's part; in training also the gradient of the head. A divergence over the
    vocabulary holds more ``tiles`` in both, and the second tensor in any case.
    """
    tile, hidden = FLOAT * min(MAX_TILE_LOGITS, tokens * shape.vocab), FLOAT * tokens * shape.hidden
    both = max(tiles * tile, (tiles - 1) * tile + (2 if narrow or tiles > 2 else 1) * hidden)
    return both + FLOAT * shape.vocab * shape.hidden if training else tiles * tile


def exchanged_bytes(largest: int) -> int:
    """Return the host memory that a process needs beside its rows while processes exchange the rows of a buffer.

    Tensors are exchanged one by one: the rows that it holds then, and a part of them on its way out and in.

    Args:
        largest: bytes of the largest tensor of its rows.

    Example:
        >>> exchanged_bytes(1000)
        3000
    """
    return largest + 2 * min(largest, PART_BYTES)


def gathered_bytes(buffer: int, processes: int) -> int:
    """Return the host memory that the first process needs beside its rows to gather a rollout buffer.

    A checkpoint inside a buffer holds the buffer of all P processes. It arrives in parts. A single process gathers
    nothing.

    Args:
        buffer: bytes of the buffer.
        processes: P.

    Example:
        >>> gathered_bytes(100, 2), gathered_bytes(100, 1)
        (300, 0)
    """
    return buffer + 2 * min(buffer, PART_BYTES) if processes > 1 else 0


def optimizer_bytes_per_parameter(optimizer: Mapping[str, Any], width: int) -> float:
    """Return the bytes of optimizer state per parameter, measured on one step of 256 x 256 parameters.

    Args:
        optimizer: ``class_path`` and ``init_args``.
        width: bytes of a parameter.

    Raises:
        UsageError: the optimizer cannot take this step, for example ``torch.optim.LBFGS``, which needs a closure.

    Example:
        >>> optimizer_bytes_per_parameter({"class_path": "torch.optim.AdamW"}, 4)
        8.0
    """
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[width]
    parameter = nn.Parameter(torch.zeros(256, 256, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    try:
        stepped = instantiate_class(([parameter],), dict(optimizer))
        stepped.step()
    except (TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"model.optimizer is {optimizer['class_path']}, whose state cannot be measured, since a step without "
            f"closure on {dtype} parameters on the CPU fails ({reason}): estimate with another optimizer, for example "
            "torch.optim.AdamW"
        ) from error
    state = [v for v in stepped.state[parameter].values() if isinstance(v, torch.Tensor) and v.numel() > 1]
    return sum(tensor.nbytes for tensor in state) / parameter.numel()


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts and sizes of a model.

    Args:
        path: as configured.
        parameters: number of parameters; tied ones count once.
        trainable: number of trained parameters.
        shape: sizes of its layers.
        widths: bytes per number.
        packed: bytes per parameter if quantization packs them, else None.
        rounded: number of parameters with each tensor rounded up to a power of two, as torch allocates pinned memory.
        layer: number of parameters of the largest layer.
        outside: number of parameters outside the layers.
    """

    path: str
    parameters: int
    trainable: int
    shape: Shape
    widths: Widths
    packed: float | None = None
    rounded: int = 0
    layer: int = 0
    outside: int = 0

    @property
    def has_adapter(self) -> bool:
        """True if an adapter is trained on frozen weights."""
        return self.trainable < self.parameters

    @property
    def trained_width(self) -> int:
        """Return the bytes of a trainable parameter; adapters are stored in at least float32."""
        return max(self.widths.weights, FLOAT) if self.has_adapter else self.widths.weights

    @property
    def bytes(self) -> int:
        """Return the bytes of the weights."""
        frozen = self.parameters - self.trainable if self.has_adapter else self.parameters
        adapter = self.trainable * self.trained_width if self.has_adapter else 0
        return int(frozen * (self.packed or self.widths.weights)) + adapter


def _hub_is_known() -> bool:
    """False if the hub's name cannot be looked up; its client would try again for 23 s for each file."""
    try:
        return bool(getproxies() or socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None))
    except OSError:
        return False


_PACKED = {"4bit": 0.5, "8bit": 1.0}


def model_size(options: Mapping[str, Any], precision: str | int | None) -> ModelSize:
    """Return the size of a model without reading its weights.

    Args:
        options: ``init_args`` of a :class:`opdlab.policies.LanguageModel` or :class:`opdlab.policies.LocalTeacher`.
        precision: ``trainer.precision`` if the trainer casts the model, else None.

    Raises:
        UsageError: its configuration cannot be read.

    Example:
        >>> model_size({"path": "package://opdlab.toy/models/student", "dtype": "float32"}, None).parameters
        280704
    """
    path = str(options["path"])
    if (base := adapter_base(path)) is not None:
        saved = read_json(Path(path).expanduser() / ADAPTER_CONFIG)
        kind = saved.get("peft_type")
        require(
            kind == "LORA",
            f"model '{path}' cannot be loaded: it is an adapter of type {kind}, and only LoRA and DoRA are known",
        )
        require(
            {"r", "target_modules"} <= saved.keys(),
            f"model '{path}' cannot be loaded: its {ADAPTER_CONFIG} is not what peft writes",
        )
        same = {"r": saved["r"], "target_modules": saved["target_modules"], "use_dora": saved.get("use_dora", False)}
        return model_size({**options, "path": base, "adapter": same}, precision)
    more = {key: options[key] for key in ("revision", "trust_remote_code") if options.get(key)}
    more["local_files_only"] = not _hub_is_known()
    source = resolve(path, with_config=False)  # only config.json is read; AutoConfig reports if it is missing
    gguf = {"gguf_file": options["gguf_file"]} if options.get("gguf_file") else {}
    if gguf:
        require_package("gguf", f"model '{path}'", "gguf")
    try:
        config = AutoConfig.from_pretrained(source, **more, **gguf)
        with torch.device("meta"):
            code = {"trust_remote_code": True} if options.get("trust_remote_code") else {}
            model = AutoModelForCausalLM.from_config(config, **code)
            if options.get("adapter"):
                attach_adapter(model, AdapterConfig(**options["adapter"]), path)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if (trouble := package_trouble(error)) is not None:
            raise UsageError(f"model '{path}' {trouble}") from error
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"the configuration of model '{path}' cannot be read: check the name, the connection and, for a gated "
            "model, `hf auth login`; or give a local folder, of which `opdlab estimate` needs config.json alone "
            f"({first_line})"
        ) from error
    count = sum(parameter.numel() for parameter in model.parameters())
    rounded = sum(1 << (parameter.numel() - 1).bit_length() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    packed = _PACKED.get(str(options.get("quantization")))
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers_of(model)]
    widths, outside = widths_of(options["dtype"], precision), count - sum(layers)
    largest = max(layers, default=0)
    return ModelSize(path, count, trainable, Shape.of(model), widths, packed, rounded, largest, outside)
