"""The seeds of a run, and seeds derived from the position in it.

A run has three seeds: ``seed_everything`` for the global generators, ``data.seed`` for the order of the prompts and the
rollouts, ``model.evaluation.seed`` for the answers in evaluations. The last two are null by default and follow the
first. The problems do not depend on them: a problem source has its own seed.

Random draws are seeded by their position (buffer, pass, batch), so they need no state beyond a few counters. Each
rollout and each answer has a random stream of its own, :func:`derive_streams`.
"""

import hashlib
import os
import secrets
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from opdlab.errors import UsageError, require

FOLLOWING_SEEDS = ("data.seed", "model.evaluation.seed")
"""Keys that follow ``seed_everything`` if they are null."""
DEFAULT_SEED = 0
"""Value of a null seed in a Python program, where there is no ``seed_everything`` key."""
EVALUATION_SEED_KEY = "opdlab_evaluation_seed"
"""Key of the evaluation seed in a checkpoint."""
LARGEST_SEED = 2**32 - 1
"""Of all seeds that a user gives: the global generators of NumPy take no larger one."""
_NUM_PROCESSES = ("WORLD_SIZE", "SLURM_NTASKS")  # set by launchers that start all processes of a run


def checked_seed(given: int, key: str = "seed") -> int:
    """Return a seed that a user has given, if it is one.

    Args:
        given: the seed.
        key: that names it, for the message.

    Raises:
        UsageError: it is out of range.

    Example:
        >>> checked_seed(7)
        7
        >>> checked_seed(-1)
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: seed is -1, but must lie between 0 and 4294967295
    """
    require(0 <= given <= LARGEST_SEED, f"{key} is {given}, but must lie between 0 and {LARGEST_SEED}")
    return given


def run_seed(given: bool | int | None) -> int:
    """Return the number that a value of ``seed_everything`` stands for; true takes a random one.

    Processes that Lightning starts take the number of the first process from the environment.

    Raises:
        UsageError: the value is false, null or out of range, or it is true and the processes cannot agree on a number.

    Example:
        >>> run_seed(7)
        7
        >>> run_seed(False)
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: seed_everything is false, but a run needs a seed: give a number, or true for any
    """
    if given is None or given is False:
        value = "null" if given is None else "false"
        raise UsageError(f"seed_everything is {value}, but a run needs a seed: give a number, or true for any")
    if given is True:
        shared = os.environ.get("PL_GLOBAL_SEED")
        require(
            shared is not None or all(os.environ.get(name, "1") == "1" for name in _NUM_PROCESSES),
            "seed_everything is true, but the processes of a run need the same seed: give a number",
        )
        given = int(shared) if shared is not None else secrets.randbelow(LARGEST_SEED + 1)
    return checked_seed(given, "seed_everything")


def evaluation_seed(given: int | None, checkpoint: str | Path | None) -> int | None:
    """Return the seed of an evaluation: the given one, or that of the run that wrote the checkpoint.

    None if neither exists: checkpoints of earlier versions do not hold it.
    """
    if given is not None or checkpoint is None:
        return given
    mapped = zipfile.is_zipfile(checkpoint)  # torch's older format cannot be
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=mapped)
    seed = content.get(EVALUATION_SEED_KEY) if isinstance(content, dict) else None
    return seed if type(seed) is int else None


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order, the same on every machine.

    Example:
        >>> derive_seed("pool", 7, 0) == derive_seed("pool", 7, 0), derive_seed("pool", 7, 0) == derive_seed("pool", 70)
        (True, False)
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def derive_streams(*parts: int | str, keys: Sequence[int | str], num_samples: int) -> Tensor:
    """Return the random stream of each sample: a seed that depends on ``parts``, its key and its number.

    The number is that of the sample among those of its key, so a key that occurs again gets further samples. A stream
    does not depend on other keys, on their order, or on a process's rank.

    Args:
        *parts: what the samples belong to, such as the seed of a rollout buffer.
        keys: one for each prompt: its number or its name.
        num_samples: samples of each prompt.

    Returns:
        [number of keys, num_samples] long, from 0 to 2^63 - 1.

    Example:
        >>> both = derive_streams("rollouts", 7, keys=[3, 5], num_samples=2)
        >>> torch.equal(derive_streams("rollouts", 7, keys=[5], num_samples=2), both[1:])
        True
        >>> len(derive_streams("rollouts", 7, keys=[3, 3], num_samples=2).unique())
        4
    """
    counts: Counter[int | str] = Counter()
    rows = []
    for key in keys:
        rows.append([derive_seed(*parts, key, counts[key] + number) for number in range(num_samples)])
        counts[key] += num_samples
    return torch.tensor(rows, dtype=torch.long).view(len(keys), num_samples)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run the block under ``seed``, then restore the global generators."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
