"""Seeds derived from the position in a run, so that random draws need no state beyond a few counters."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order, the same on every machine.

    Example:
        >>> derive_seed("pool", 7, 0) == derive_seed("pool", 7, 0), derive_seed("pool", 7, 0) == derive_seed("pool", 70)
        (True, False)
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run the block under ``seed``, then restore the global generators.

    ``generate`` of transformers draws from the global generator and accepts no other.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
