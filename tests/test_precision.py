"""bfloat16 arithmetic (``precision: bf16-mixed``) trains as float32 does; `benchmarks/precision.py` takes 200 steps.

Rollouts are sampled, so after some dozen steps rounding alone leads to other samples, and two precisions differ as two
seeds do: only the beginning can be compared. A curve of losses shows only gross errors. Errors of rounding (sums over
the vocabulary in bfloat16) do not show in it, so the log-probabilities are compared with float64 as well.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opdlab.data import PromptDataModule, ReuseConfig
from opdlab.module import OPDModule
from opdlab.objectives import TeacherTopK
from opdlab.policies import BehaviorPolicy
from opdlab.scoring import Head, support_statistics, token_statistics
from opdlab.scoring.head import LogitTiles
from opdlab.toy import ChainProblems
from tests.toy_run import Run

STEPS = 20
STEPS_PER_POOL = 4
WINDOW = 5  # steps that a loss is averaged over
FRESH = range(1, STEPS + 1, STEPS_PER_POOL)  # steps on a freshly sampled buffer of a freshly refreshed snapshot


def run(folder: Path, precision: Any, seed: int = 0, steps: int = STEPS) -> Run:
    objective = TeacherTopK(k=8)
    sizes = {"refresh": STEPS_PER_POOL, "max_new_tokens": 48, "num_problems": 64}
    made = Run(folder, tau=1.0, objective=objective, lr=5e-4, **sizes)  # type: ignore[arg-type]
    made.data = PromptDataModule(ChainProblems(64), reuse=ReuseConfig(8, 2, 8), seed=seed)
    made.fit(steps, precision=precision, logger=False)
    return made


def smoothed(made: Run) -> Tensor:
    return torch.tensor(made.recorder.losses).view(-1, WINDOW).mean(1)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def fresh_drift(made: Run) -> list[float]:
    return [metrics["train/drift/max"] for step, metrics in made.recorder.steps.items() if step in FRESH]


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return [smoothed(run(tmp_path_factory.mktemp("float32"), "32-true", seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("bfloat16"), "bf16-mixed")


def test_losses_differ_less_than_between_seeds(float32: list[Tensor], bfloat16: Run) -> None:
    spread = min(distance(float32[i], float32[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    found = distance(smoothed(bfloat16), float32[0])
    assert 0 < found < 0.5 * spread  # 0 would mean that both runs were float32


def test_fresh_rollouts_have_not_drifted(bfloat16: Run) -> None:
    drift = fresh_drift(bfloat16)
    assert len(drift) == len(FRESH)
    assert max(drift) < 1e-5
    assert max(metrics["train/drift/max"] for metrics in bfloat16.recorder.steps.values()) > 1e-2  # stale rollouts have


def test_a_snapshot_scored_in_another_precision_is_seen_as_drift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = OPDModule.collect

    def in_float32(self: OPDModule, *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(self.trainer.precision_plugin, "forward_context", nullcontext)
            return collect(self, *arguments, **options)

    # A mistake of opdlab's own, which only a patch can make.
    monkeypatch.setattr(OPDModule, "collect", in_float32)
    # Otherwise the first step's pass replaces the snapshot's.
    monkeypatch.setattr(BehaviorPolicy, "equals", lambda self, student: False)
    assert fresh_drift(run(tmp_path, "bf16-mixed", steps=1))[0] > 1e-2


def error_of_logprobs(statistics: Callable[[Tensor, Head, Tensor], Tensor]) -> float:
    """Greatest error of log-probabilities under autocast, against float64 on the same rounded operands, in nats."""
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(64, 96), 0.3 * torch.randn(380, 96), torch.randint(380, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        found = statistics(hidden, Head(weight), tokens)
    logits = hidden.bfloat16().double() @ weight.bfloat16().double().T
    expected = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    return float((found - expected).abs().max())


def of_tokens(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
    return token_statistics(hidden, head, tokens).logprobs


def of_support(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
    return support_statistics(hidden, head, tokens, torch.zeros(len(tokens), 2, dtype=torch.long))[1].logprobs


@pytest.mark.parametrize("statistics", [of_tokens, of_support])
def test_only_the_operands_of_the_head_are_rounded(
    statistics: Callable[[Tensor, Head, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert error_of_logprobs(statistics) < 1e-4
    # The bound is sharp: with logits rounded to bfloat16, which only a patch can do, the error is a hundred times as
    # large.
    tile = LogitTiles.tile
    monkeypatch.setattr(LogitTiles, "tile", lambda *arguments: tile(*arguments).bfloat16().float())
    assert error_of_logprobs(statistics) > 1e-2
