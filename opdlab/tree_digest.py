"""A digest of nested dicts and lists of tensors and plain values."""

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

_HASHING_THREADS = 4
_PART = 1 << 26  # bytes


def tree_digest(tree: Any) -> str:
    """Return a digest of all tensors and plain values in nested dicts and lists: names, types, shapes and content.

    A tensor counts by the CRC-32 of its bytes, which finds every flipped bit and is several times as fast as a
    cryptographic hash. Types besides tensors and plain values count by their name alone.

    Example:
        >>> import torch
        >>> one = {"weights": torch.tensor([1.0, 2.0]), "steps": [3, None]}
        >>> tree_digest(one) == tree_digest({"weights": torch.tensor([1.0, 2.0]), "steps": [3, None]})
        True
        >>> tree_digest(one) == tree_digest({"weights": torch.tensor([1.0, 2.0]), "steps": [4, None]})
        False
    """
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        lines = pool.map(_leaf_line, list(leaves(tree)))
        return sha256("\n".join(lines).encode("utf-8", "backslashreplace")).hexdigest()


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all leaves of nested dicts and lists with their dotted names; empty ones are leaves.

    Args:
        tree: nested dicts, lists and tuples.
        name: before the names of the leaves.
    """
    if isinstance(tree, dict | list | tuple) and tree:
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, tree


def _leaf_line(leaf: tuple[str, Any]) -> str:
    name, value = leaf
    if not isinstance(value, Tensor):
        plain = value is None or isinstance(value, bool | int | float | str | bytes | dict | list | tuple)
        return f"{name} {value!r}" if plain else f"{name} {type(value).__name__}"
    flat = value.detach().reshape(-1).view(torch.uint8) if value.numel() else value.new_empty(0, dtype=torch.uint8)
    crc = 0
    for start in range(0, len(flat), _PART):  # copies of parts bound the host memory for tensors on a device
        crc = zlib.crc32(flat[start : start + _PART].cpu().numpy().data, crc)
    return f"{name} {value.dtype} {tuple(value.shape)} {crc:08x}"
