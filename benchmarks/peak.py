"""Share of this machine's matrix-product peak that an update of a model reaches: backbone, head and optimizer apart.

The peak is measured, not looked up: ``torch.mm`` of the same shapes, into memory that exists, in the same rounds. A
linear layer needs three products, one forward and two backward; the head the same three, without those that scoring in
bounded memory does twice. Attention's products, norms and activations, softmax and clipping count as time and not as
work, so the share of a whole update says what all of this costs.

``python benchmarks/peak.py --model models/smollm2/teacher``; ``make_smollm2_pair.py`` makes that model.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine, versions
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from opdlab.policies import LanguageModel
from opdlab.scoring import token_statistics
from opdlab.types import Rollouts


def main() -> int:
    """Measure each part, round by round, and print seconds, seconds of the products alone, and shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--rows", type=int, default=8, help="rollouts of an update")
    parser.add_argument("--prompt", type=int, default=30, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=64, help="tokens of a response")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, default=True, help="AdamW in one kernel")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    update = Update(arguments)
    update.run()  # warms up: memory, the optimizer's state
    rounds = [{**update.run(), **update.products()} for _ in range(arguments.rounds)]
    seconds = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    Console(width=110).print(table(seconds, update))
    if arguments.json:
        result = {"machine": machine(), "versions": versions("torch", "transformers"), "rounds": rounds}
        arguments.json.write_text(json.dumps({**result, "options": vars(arguments)}, indent=1, default=str))
    return 0


class Update:
    """One update of a model on random rollouts, in parts.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.model = LanguageModel(arguments.model).train()
        self.model.accumulate_head_grad = True
        sizes = (arguments.rows, arguments.prompt), (arguments.rows, arguments.response)
        prompts, tokens = (torch.randint(100, self.model.vocab_size, size) for size in sizes)
        masks = [torch.ones_like(each, dtype=torch.bool) for each in (prompts, tokens)]
        zeros = torch.zeros(arguments.rows, dtype=torch.long)
        self.rollouts = Rollouts(prompts, masks[0], tokens, masks[1], torch.zeros(tokens.shape), *5 * (zeros,))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=arguments.fused)
        network = self.model.model
        linear = [layer for layer in network.base_model.modules() if isinstance(layer, nn.Linear)]
        self.backbone: Counter[tuple[int, ...]] = Counter()
        self.model.score(self.rollouts)  # a first one checks the model
        hooks = [layer.register_forward_pre_hook(self._count) for layer in linear]
        self.model.score(self.rollouts)
        for hook in hooks:
            hook.remove()
        self.head = (tokens.numel(), *network.get_output_embeddings().weight.shape)

    def _count(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        self.backbone[inputs[0].shape[:-1].numel(), *layer.weight.shape] += 1

    def run(self) -> dict[str, float]:
        """Return the seconds of each part of an update, and of the whole one."""
        clock = Clock()
        scored = self.model.score(self.rollouts)
        clock.lap("backbone forward")
        hidden = scored.hidden.detach().requires_grad_()
        loss = -token_statistics(hidden, scored.head, scored.tokens).logprobs.mean()
        clock.lap("head forward")
        loss.backward()  # type: ignore[no-untyped-call]
        clock.lap("head backward")
        assert hidden.grad is not None
        scored.hidden.backward(hidden.grad)  # type: ignore[no-untyped-call]
        clock.lap("backbone backward")
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        clock.lap("clip")
        self.optimizer.step()
        clock.lap("optimizer")
        self.optimizer.zero_grad(set_to_none=False)
        return {**clock.seconds, "whole": sum(clock.seconds.values())}

    def products(self) -> dict[str, float]:
        """Return the seconds of the products alone, of backbone and head."""
        return {
            "mm of backbone": sum(count * _products(*shape) for shape, count in self.backbone.items()),
            "mm of head": _products(*self.head),
        }


class Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note the seconds since the last lap."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def _products(positions: int, out_size: int, in_size: int, repeats: int = 3) -> float:
    """Return the seconds of a linear layer's three products, each the median of some repetitions."""
    states, weight = torch.randn(positions, in_size), torch.randn(out_size, in_size)
    upstream, gradient, back = torch.empty(positions, out_size), torch.empty_like(weight), torch.empty_like(states)

    def once(product: Callable[[], Tensor]) -> float:
        product()
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            product()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    return (
        once(lambda: torch.mm(states, weight.T, out=upstream))
        + once(lambda: torch.mm(upstream, weight, out=back))
        + once(lambda: torch.mm(upstream.T, states, out=gradient))
    )


def table(seconds: dict[str, float], update: Update) -> Table:
    """Return the printed table."""
    shown = Table(title=f"{update.model.path}: {tuple(update.rollouts.tokens.shape)} responses")
    for name in ("part", "seconds", "torch.mm alone", "share of the peak"):
        shown.add_column(name, justify="left" if name == "part" else "right")
    backbone, head = (seconds[f"mm of {name}"] for name in ("backbone", "head"))
    work: dict[str, Any] = {
        "backbone": (seconds["backbone forward"] + seconds["backbone backward"], backbone),
        "head": (seconds["head forward"] + seconds["head backward"], head),
        "clip": (seconds["clip"], None),
        "optimizer": (seconds["optimizer"], None),
        "whole": (seconds["whole"], backbone + head),
    }
    for name, (took, alone) in work.items():
        share = ("", "") if alone is None else (f"{alone:.3f}", f"{alone / took:.2f}")
        shown.add_row(name, f"{took:.3f}", *share)
    return shown


if __name__ == "__main__":
    raise SystemExit(main())
