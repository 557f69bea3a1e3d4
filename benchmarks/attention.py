"""Attention on a CPU in float32: opdlab's products of blocks against torch's kernel, as transformers calls it.

Rows without padding, forward and backward, for shapes of heads and lengths; and one query per row against a cache, as
in the decoding loop, with the mask of some padding. Both run in turns in one process; ratios are taken round by round.
Values and gradients must agree before anything is timed.

``OMP_NUM_THREADS=2 python benchmarks/attention.py --json attention.json`` takes a minute.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import REPOSITORY, machine, median, pairwise_ratios, spread, versions
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(REPOSITORY))

from opdlab.policies.cpu_attention import cpu_attention, kept_probabilities, own_attention

# Rows, heads, heads of keys, tokens, head size.
SHAPES = [
    (32, 4, 2, 194, 24),  # an update of the quickstart
    (8, 9, 3, 94, 64),  # SmolLM2
    (8, 9, 3, 256, 64),
    (4, 9, 3, 768, 64),  # the longest of its rows
]
CACHED = [(64, 4, 2, 128, 24), (16, 9, 3, 256, 64)]


def states(shape: tuple[int, ...], queries: int) -> Iterator[Tensor]:
    """Yield queries, keys and values as models give them: in memory that is ordered by tokens; a cache's by heads."""
    rows, heads, of_keys, width, size = shape
    for count, length in ((heads, queries), (of_keys, width), (of_keys, width)):
        made = torch.randn(rows, length, count, size).transpose(1, 2)
        yield made.contiguous() if queries == 1 else made


def programs(shape: tuple[int, ...], queries: int) -> tuple[Callable[[bool], Tensor], list[Tensor]]:
    """Return a function that computes the attention, by opdlab if it is given True, and its inputs."""
    layer = SimpleNamespace(num_key_value_groups=shape[1] // shape[2], is_causal=True)
    inputs, mask = list(states(shape, queries)), None
    if queries == 1:
        unused = torch.arange(shape[3]) < torch.randint(0, 8, (shape[0], 1))  # some columns on the left
        mask = torch.zeros(unused.shape).masked_fill(unused, torch.finfo(torch.float32).min)[:, None, None]

    def run(ours: bool) -> Tensor:
        if not ours:  # outside of the context it is transformers' own
            return cpu_attention(layer, *inputs, mask)[0]
        with own_attention():
            return cpu_attention(layer, *inputs, mask)[0]

    return run, inputs


def measure(shape: tuple[int, ...], queries: int, rounds: int, repeats: int) -> dict[str, list[float]]:
    """Return milliseconds of each round, by program and direction.

    Args:
        shape: see ``SHAPES``.
        queries: 1 for decoding without gradients; otherwise as many as tokens.
        rounds: measurements of each program.
        repeats: calls of each measurement.
    """
    run, inputs = programs(shape, queries)
    learns = queries > 1
    for each in inputs:
        each.requires_grad_(learns)
    upstream = torch.randn_like(run(False))
    torch.testing.assert_close(run(True), run(False), atol=1e-5, rtol=1e-4)
    if learns:
        found, expected = (torch.autograd.grad(run(ours), inputs, upstream) for ours in (True, False))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    measured: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for name, ours in (("torch", False), ("opdlab", True)):
            forward = backward = 0.0
            for _ in range(repeats):
                began = time.perf_counter()
                made = run(ours)
                between = time.perf_counter()
                if learns:
                    torch.autograd.grad(made, inputs, upstream)
                forward += between - began
                backward += time.perf_counter() - between
            for direction, seconds in (("forward", forward), ("backward", backward)):
                measured.setdefault(f"{name} {direction}", []).append(1e3 * seconds / repeats)
    return {name: values[1:] for name, values in measured.items()}  # the first round warms up


def report(results: list[dict[str, Any]]) -> None:
    """Print a table."""
    columns = ("rows, heads, of keys, tokens, size", "torch, ms", "opdlab, ms", "ratio", "kept, MB")
    table = Table(*columns, title="forward + backward; for one query forward alone: median [range]")
    for each in results:
        rows, heads, _, width, size = each["shape"]
        sums = {
            name: [
                sum(pair)
                for pair in zip(*(each["ms"][f"{name} {way}"] for way in ("forward", "backward")), strict=True)
            ]
            for name in ("torch", "opdlab")
        }
        parts = (
            f"{median(sums[name]):.2f} ({median(each['ms'][f'{name} forward']):.2f} + "
            f"{median(each['ms'][f'{name} backward']):.2f})"
            for name in ("torch", "opdlab")
        )
        kept = 4e-6 * rows * heads * kept_probabilities(width, size) if each["queries"] > 1 else 0.0
        what = f"{', '.join(map(str, each['shape']))}{' (one query)' if each['queries'] == 1 else ''}"
        table.add_row(what, *parts, spread(pairwise_ratios(sums["opdlab"], sums["torch"])), f"{kept:.1f}")
    Console(width=120).print(table)


def main() -> int:
    """Measure every shape and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=10, help="calls of each measurement")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # glibc gives freed memory back to the system above a bound, which the largest freed block raises. In a run the
    # activations of a model have raised it; without that, each call would wait for new pages.
    torch.empty(24 << 20, dtype=torch.uint8)
    results = []
    for shape, queries in [*((shape, shape[3]) for shape in SHAPES), *((shape, 1) for shape in CACHED)]:
        print(f"{shape}, {queries} queries", file=sys.stderr)
        found = measure(shape, queries, arguments.rounds, arguments.repeats)
        results.append({"shape": shape, "queries": queries, "ms": found})
    report(results)
    if arguments.json:
        facts = {
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "versions": versions("torch", "transformers"),
        }
        arguments.json.write_text(json.dumps({**facts, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
