"""Effect of bfloat16 arithmetic on training: loss curves of the toy under ``bf16-mixed`` and ``32-true``.

The quickstart with a quarter of its batch, 200 steps, several seeds in either precision. A seed decides prompts, order
and samples, and the noise is measured: it is the distance between the float32 curves of two seeds. A distance is the
root mean square over the run of the difference between logarithms (base 10) of the loss, averaged over windows of 20
steps; the table shows those averages. The median distance between the two precisions of a seed must not be above the
largest between two seeds of float32.

For some dozen steps both precisions train on the same rollouts; then rounding leads to other samples, and they differ
as two seeds do. So a curve shows only gross errors: rounding the logits to bfloat16 does not show in it.
``tests/test_precision.py`` compares log-probabilities with float64 for that.

``python benchmarks/precision.py --json precision.json`` ends with 1 if it is, or if fresh rollouts have drifted.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import TOY_MODELS, machine, median, run_child, versions
from rich.console import Console
from rich.table import Table
from step_common import CASES, CLIP_NORM, Case, Run, Task

# Largest drift of a fresh rollout, nats, that counts as rounding: a buffer is scored in other groups than a minibatch,
# so the order of summation differs. Scored in another precision it would be 0.1.
MAX_FRESH_DRIFT = {"32-true": 1e-5, "bf16-mixed": 1e-2}
PRECISIONS = tuple(MAX_FRESH_DRIFT)
WINDOW = 20  # steps


@dataclass(frozen=True)
class SmallTask(Task):
    """The toy task with a smaller batch."""

    @property
    def sizes(self) -> Case:
        """Return a buffer of 8 x 2 rollouts, 8 per step, for 8 steps per buffer, as in the quickstart."""
        return replace(CASES["toy"], prompts_per_pool=8, batch_size=8)


def child(precision: Any, seed: int, steps: int) -> dict[str, Any]:
    """Train, and return the losses and the largest drift of fresh rollouts."""
    import warnings

    from lightning.pytorch import Callback, Trainer, seed_everything
    from step_opdlab import make_module

    from opdlab.callbacks import BehaviorRefresh
    from opdlab.data import PromptDataModule, ReuseConfig
    from opdlab.toy import ChainProblems

    warnings.filterwarnings("ignore")
    task = SmallTask("toy", TOY_MODELS, steps, seed)
    case, losses, drifts = task.sizes, [], []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))
            if (trainer.global_step - 1) % case.steps_per_pool == 0:
                drifts.append(float(outputs["trace"].inputs.drift.abs().max()))

    seed_everything(seed, verbose=False)
    module = make_module(Run(task))
    reuse = ReuseConfig(case.prompts_per_pool, case.reuse_epochs, case.batch_size)
    data = PromptDataModule(ChainProblems(case.num_prompts), reuse=reuse, max_prompt_tokens=64, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            accelerator="cpu",
            devices=1,
            precision=precision,
            max_steps=steps,
            max_epochs=-1,
            gradient_clip_val=CLIP_NORM,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            default_root_dir=folder,
            callbacks=[BehaviorRefresh(every_n_steps=case.steps_per_pool), Recorder()],
        ).fit(module, data)
    return {"losses": losses, "fresh_drift": max(drifts), "versions": versions("torch", "lightning")}


def averages(losses: list[float]) -> list[float]:
    """Return the mean loss of each window; a shorter last one counts too."""
    parts = [losses[start : start + WINDOW] for start in range(0, len(losses), WINDOW)]
    return [sum(part) / len(part) for part in parts]


def distance(a: list[float], b: list[float]) -> float:
    """Return the root mean square difference of the logarithms of the windows' losses, base 10."""
    squares = [math.log10(x / y) ** 2 for x, y in zip(averages(a), averages(b), strict=True)]
    return math.sqrt(sum(squares) / len(squares))


def compare(curves: dict[str, list[list[float]]]) -> dict[str, list[float]]:
    """Return distances between the seeds of float32, and of each seed's bfloat16 curve from its float32 curve."""
    single, half = (curves[precision] for precision in PRECISIONS)
    return {
        "between seeds": [distance(a, b) for a, b in itertools.combinations(single, 2)],
        "between precisions": [distance(a, b) for a, b in zip(single, half, strict=True)],
    }


def report(curves: dict[str, list[list[float]]], distances: dict[str, list[float]]) -> None:
    """Print a table."""
    windows = len(averages(curves[PRECISIONS[0]][0]))
    ends = [f"to {min((n + 1) * WINDOW, len(curves[PRECISIONS[0]][0]))}" for n in range(windows)]
    table = Table("mean loss x 1000, steps", *ends)
    for seed, pair in enumerate(zip(*curves.values(), strict=True)):
        for precision, losses in zip(curves, pair, strict=True):
            table.add_row(f"seed {seed}, {precision}", *(f"{1000 * value:.2f}" for value in averages(losses)))
    console = Console(width=130)
    console.print(table)
    for name, values in distances.items():
        console.print(f"distance {name}: median {median(values):.3f}, all {[round(value, 3) for value in values]}")


def main() -> int:
    """Measure, print, write; return 1 if bfloat16 is further from float32 than seeds are from each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=4, help="runs in either precision (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--child", choices=PRECISIONS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child, given.seed, given.steps)))
        return 0
    if given.seeds < 2:
        parser.error(f"--seeds is {given.seeds}, but noise needs at least 2")
    runs: dict[str, list[dict[str, Any]]] = {precision: [] for precision in PRECISIONS}
    for seed, precision in itertools.product(range(given.seeds), PRECISIONS):
        flags = ["--child", precision, "--seed", str(seed), "--steps", str(given.steps)]
        runs[precision].append(run_child(Path(__file__), flags, threads=given.threads))
        print(
            f"{precision}, seed {seed}: drift of fresh rollouts {runs[precision][-1]['fresh_drift']:.1e}",
            file=sys.stderr,
        )
    curves = {precision: [row["losses"] for row in rows] for precision, rows in runs.items()}
    distances = compare(curves)
    report(curves, distances)
    if given.json:
        options = {"steps": given.steps, "seeds": given.seeds, "window": WINDOW}
        result = {"machine": machine(), "options": options, "runs": runs, "distances": distances}
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    drifted = any(row["fresh_drift"] > MAX_FRESH_DRIFT[name] for name, rows in runs.items() for row in rows)
    return int(drifted or median(distances["between precisions"]) > max(distances["between seeds"]))


if __name__ == "__main__":
    sys.exit(main())
