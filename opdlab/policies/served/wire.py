"""What ``opdlab serve-teacher`` and its client exchange: tensors as safetensors bytes, everything else as plain values.

Both sides check what they receive. Nothing is unpickled.

Shapes: B rollouts, P prompt tokens, T response tokens, K support, G the teacher's hidden size.
"""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from opdlab.errors import UsageError, printable, require
from opdlab.scoring import Head, LowRank
from opdlab.types import Rollouts, Targets, TeacherRequest

PROTOCOL = 1
"""Version of what is exchanged."""
MODELS_PATH, TARGETS_PATH, HEAD_PATH = "/v1/models", "/v1/targets", "/v1/head"
BINARY = "application/octet-stream"
MAX_ANSWER = 1 << 31
"""Bytes of the largest answer with targets."""
_TEMPERATURES = (1e-4, 1e4)
_INTEGERS = (torch.uint8, torch.uint16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def request_parameters(request: TeacherRequest, temperature: float) -> dict[str, str]:
    """Return a request as the parameters of a query.

    Example:
        >>> request_parameters(TeacherRequest(top_k=2, tail=True), 0.7)
        {'top_k': '2', 'tail': '1', 'temperature': '0.7'}
    """
    plain = TeacherRequest()
    changed = {f.name: getattr(request, f.name) for f in fields(request)}
    given = {name: str(int(value)) for name, value in changed.items() if value != getattr(plain, name)}
    return {**given, "temperature": repr(temperature)}


def read_request(parameters: Mapping[str, str], vocab_size: int) -> tuple[TeacherRequest, float]:
    """Return the request and the temperature of :func:`request_parameters`.

    Args:
        parameters: of a query; not trusted.
        vocab_size: the teacher's number of tokens.

    Raises:
        UsageError: a parameter is unknown, is no number, or is out of range.
    """
    known = {f.name: bool if f.type in (bool, "bool") else int for f in fields(TeacherRequest)}
    options: dict[str, Any] = {}
    temperature = 1.0
    for name, text in parameters.items():
        require(name in known or name == "temperature", f"the query has '{name[:40]}', which is no part of a request")
        try:
            if name == "temperature":
                temperature = float(text)
            else:
                options[name] = known[name](int(text[:12]))
        except ValueError as error:
            raise UsageError(f"{name} is '{text[:40]}', but must be a number") from error
    low, high = _TEMPERATURES
    require(low <= temperature <= high, f"temperature is {temperature}, but must be from {low} to {high}")
    request = TeacherRequest(**options)
    size = vocab_size if request.vocab_size is None else request.vocab_size
    require(1 <= size <= vocab_size, f"vocab_size is {size}, but must be from 1 to {vocab_size}")
    for name in ("top_k", "behavior_top_k"):
        k = getattr(request, name)
        require(0 <= k <= size, f"{name} is {k}, but must be from 0 to {size}, the number of tokens")
    return request, temperature


def pack_rollouts(rollouts: Rollouts, request: TeacherRequest) -> bytes:
    """Return what a teacher needs of rollouts as bytes, without columns that are padding in all rows.

    Args:
        rollouts: as the teacher sees them.
        request: if it has ``behavior_top_k``, the behavior policy's tokens are sent too.
    """
    skip, length = int(rollouts.prompt_mask.any(0).int().argmax()), response_width(rollouts)
    tensors = {
        "prompt_tokens": rollouts.prompt_tokens[:, skip:].int(),
        "prompt_mask": rollouts.prompt_mask[:, skip:].bool(),
        "tokens": rollouts.tokens[:, :length].int(),
        "mask": rollouts.mask[:, :length].bool(),
    }
    if request.behavior_top_k and rollouts.behavior_support_ids is not None:
        tensors["behavior_support_ids"] = rollouts.behavior_support_ids[:, :length]
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def response_width(rollouts: Rollouts) -> int:
    """Return the number of columns up to the last valid position of any row, at least 1."""
    used = rollouts.mask.bool().any(0)
    return int(used.nonzero().max()) + 1 if bool(used.any()) else 1


def read_rollouts(content: bytes, request: TeacherRequest, temperature: float, vocab_size: int) -> Rollouts:
    """Return the rollouts of :func:`pack_rollouts`.

    Args:
        content: not trusted.
        request: checked.
        temperature: of scoring.
        vocab_size: the teacher's number of tokens.

    Raises:
        UsageError: the bytes are no tensors, or these do not fit together or the teacher.
    """
    found = _tensors(content)
    names = {"prompt_tokens", "prompt_mask", "tokens", "mask"} | (
        {"behavior_support_ids"} if request.behavior_top_k else set()
    )
    require(found.keys() == names, f"the body has the tensors {_listed(found)}, but must have {_listed(names)}")
    for name, tensor in found.items():
        is_mask, dimensions = name.endswith("mask"), 3 if name == "behavior_support_ids" else 2
        right = tensor.dtype == torch.bool if is_mask else tensor.dtype in _INTEGERS
        require(right, f"{name} has the dtype {tensor.dtype}, but must be {'bool' if is_mask else 'an integer one'}")
        shape = tuple(tensor.shape)
        require(tensor.ndim == dimensions and 0 not in shape, f"{name} has the shape {shape}, which does not fit")
    prompt, tokens = found["prompt_tokens"].shape, found["tokens"].shape
    shapes = {"prompt_mask": prompt, "mask": tokens, "tokens": (prompt[0], tokens[1])}
    if request.behavior_top_k:
        shapes["behavior_support_ids"] = (*tokens, request.behavior_top_k)
    for name, shape in shapes.items():
        given = tuple(found[name].shape)
        require(given == tuple(shape), f"{name} has the shape {given}, but must have {tuple(shape)}")
    padded, mask = found["prompt_mask"], found["mask"]
    require(
        bool(padded[:, -1].all()) and not bool((padded[:, :-1] & ~padded[:, 1:]).any()),
        "prompt_mask is False behind a token, but prompts must be padded on the left and have a token",
    )
    size = min(vocab_size, request.vocab_size or vocab_size)
    for name, bound in (("prompt_tokens", vocab_size), ("tokens", vocab_size), ("behavior_support_ids", size)):
        if name in found:
            _check_ids(name, found[name].long(), bound)
    _check_ids("tokens", found["tokens"].long()[mask], size)
    zeros = torch.zeros(tokens[0], dtype=torch.long)
    ids = found.get("behavior_support_ids")
    both = found["prompt_tokens"].long(), padded, found["tokens"].long(), mask, torch.zeros(tokens)
    return Rollouts(*both, *5 * (zeros,), temperature=temperature, behavior_support_ids=ids)


def answer_bytes(request: TeacherRequest, num_positions: int, hidden_bytes: int) -> int:
    """Return the bytes of the targets of some positions, padding included; none is forgotten, ids count four.

    Args:
        request: what they consist of.
        num_positions: B times T.
        hidden_bytes: of one hidden state.
    """
    k = request.top_k + request.behavior_top_k
    numbers = 1 + request.entropy + 2 * request.tail + bool(k) + bool(request.behavior_top_k)
    return num_positions * (4 * numbers + 9 * k + hidden_bytes * request.hidden)


def pack_targets(targets: Targets) -> bytes:
    """Return targets as bytes."""
    return save(
        {f.name: value.contiguous() for f in fields(targets) if (value := getattr(targets, f.name)) is not None}
    )


def read_targets(content: bytes, shape: tuple[int, int]) -> Targets:
    """Return the targets of :func:`pack_targets`, of ``shape`` [B, T].

    Raises:
        UsageError: the bytes are something else.
    """
    found = _tensors(content)
    known = {f.name for f in fields(Targets)}
    require(found.keys() <= known, f"the targets have {_listed(found)}, of which some are unknown")
    for name, tensor in found.items():
        given = tuple(tensor.shape)
        require(given[:2] == shape, f"{name} has the shape {given}, but must begin with {shape}")
        kinds = {"support_ids": _INTEGERS, "support_valid": (torch.bool,)}.get(name, _FLOATS)
        require(tensor.dtype in kinds, f"{name} has the dtype {tensor.dtype}")
    return Targets(**found)


def pack_head(head: Head) -> bytes:
    """Return a head as bytes, without its temperature."""
    numbers = {"scale": head.scale, "softcap": head.softcap, "vocab_size": head.vocab_size}
    weight, bias, down, up = head.tensors
    tensors = {"weight": weight, "bias": bias, "down": down, "up": up}
    if head.low_rank is not None:
        numbers["scaling"] = head.low_rank.scaling
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
    scalars = {name: torch.tensor(float(value), dtype=torch.float64) for name, value in numbers.items() if value}
    return save({**kept, **scalars})


def read_head(content: bytes) -> Head:
    """Return the head of :func:`pack_head`, at temperature 1.

    Raises:
        UsageError: the bytes are something else.
    """
    found = _tensors(content)
    numbers = {name: float(found[name]) for name in ("scale", "softcap", "vocab_size", "scaling") if name in found}
    require("weight" in found and all(map(math.isfinite, numbers.values())), f"no head: {_listed(found)}")
    low_rank = LowRank(found["down"], found["up"], numbers["scaling"]) if "down" in found else None
    size = numbers.get("vocab_size")
    return Head(
        found["weight"],
        found.get("bias"),
        scale=numbers.get("scale", 1.0),
        softcap=numbers.get("softcap"),
        low_rank=low_rank,
        vocab_size=None if size is None else int(size),
    )


def _tensors(content: bytes) -> dict[str, Tensor]:
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise UsageError(f"the content is no safetensors data ({said})") from error


def _check_ids(name: str, ids: Tensor, bound: int) -> None:
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        wrong = low if low < 0 else high
        require(low >= 0 and high < bound, f"{name} has the id {wrong}, but ids must be from 0 to {bound - 1}")


def _listed(names: Any) -> str:
    return ", ".join(sorted(name[:40] for name in names)[:12]) or "none"


def error_text(content: bytes) -> str:
    r"""Return the message of an answer that reports an error, as one short line.

    Example:
        >>> error_text(b'{"error": {"message": "max allowed: 20"}}'), error_text(b"Bad\nGateway"), error_text(b"")
        ('max allowed: 20', 'Bad Gateway', 'no message')
    """
    text = content[:4000].decode("utf-8", "replace")
    with suppress(ValueError):
        said = json.loads(content)
        while isinstance(said, dict):
            said = said.get("error") or said.get("message") or said.get("detail")
        text = said if isinstance(said, str) else text
    return printable(" ".join(text.split()))[:300] or "no message"
