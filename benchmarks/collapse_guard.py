"""How ``CollapseGuard`` judges healthy and wrong training of the toy pair.

Healthy: the paper's six variants under mild reuse (``configs/studies/paper-toy-mild.yaml``), several seeds of each;
runs are cut to ``--steps`` optimizer steps, 4 to a buffer, without evaluations. Wrong: a learning rate of 1000,
a temperature of 1e-6, tau = 1e6 without normalization, and a student of zeros, each under LSM + Block64 and under
OPD + Block64.

For every healthy variant the script prints how close its runs came to each limit, which is the extreme of all seeds and
logged steps, and the guard's share of the time, sampling and scoring included. It ends with 1 if a healthy run has a
message or a wrong one has none.

    OMP_NUM_THREADS=1 python benchmarks/collapse_guard.py --seeds 16 --steps 16 --json collapse.json
"""

import argparse
import json
import logging
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import Any

from common import REPOSITORY, machine, versions
from rich.console import Console
from rich.table import Table

STUDY = REPOSITORY / "configs" / "studies" / "paper-toy-mild.yaml"
WARM_UP = 4  # steps that the guard's share of the time leaves out
PACKAGES = ("torch", "lightning", "transformers")
WRONG = {
    "lr 1000": ["--model.optimizer.init_args.lr=1000"],
    "temperature 1e-6": ["--model.sampling.temperature=1e-6"],
    "tau 1e6, no normalization": ["--model.gate.tau=1e6", "--model.gate.normalization=none"],
    "student of zeros": ["--model.student.init_args.path={zeros}"],
}
# What the limits are for: the value of a run that comes closest to each.
SIGNS = (
    "entropy ratio, least",
    "entropy, least",
    "repeated, most",
    "truncated, most",
    "length factor",
    "reverse KL rise",
)


def run(
    overrides: Sequence[str], seed: int, steps: int, folder: Path
) -> tuple[list[str], dict[str, list[float]], float]:
    """Train, and return the guard's messages, every logged metric, and the guard's share of the time."""
    from lightning.pytorch.callbacks import Checkpoint
    from lightning.pytorch.loggers.logger import DummyLogger

    from opdlab.callbacks import CollapseGuard, RunFiles
    from opdlab.cli.app import OPDCLI
    from opdlab.errors import UsageError

    class Keeper(DummyLogger):
        """Keeps what is logged."""

        def __init__(self) -> None:
            super().__init__()
            self.metrics: dict[str, list[float]] = {}

        def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:  # type: ignore[override]
            for name, value in metrics.items():
                self.metrics.setdefault(name, []).append(float(value))

    short = [f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    short += [f"--trainer.default_root_dir={folder}", "--trainer.enable_model_summary=false"]
    short += ["--export.enabled=false", "--sample_logger.every_n_steps=1000000", "--gate_monitor.every_n_steps=1000000"]
    short += [f"--seed_everything={seed}", f"--data.seed={seed}"]
    cli = OPDCLI("fit", ["-c", "quickstart", *overrides, *short], ExitStack())
    keeper = Keeper()
    cli.trainer.loggers = [keeper]
    unneeded = (Checkpoint, RunFiles)
    cli.trainer.callbacks = [each for each in cli.trainer.callbacks if not isinstance(each, unneeded)]
    (guard,) = (each for each in cli.trainer.callbacks if isinstance(each, CollapseGuard))
    look, spans = guard.on_train_batch_end, []

    def timed(*arguments: Any) -> None:
        began = time.perf_counter()
        look(*arguments)
        spans.append((began, time.perf_counter()))

    guard.on_train_batch_end = timed  # type: ignore[method-assign]
    with suppress(UsageError):  # a learning rate of 1000 ends in a loss that is not finite
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    counted = spans[WARM_UP:]
    share = sum(end - began for began, end in counted) / (spans[-1][1] - spans[WARM_UP - 1][1])
    return guard.messages, keeper.metrics, share


def extremes(metrics: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return what came closest to each limit in one run, in the order of ``SIGNS``."""
    student, teacher = metrics["train/entropy"], metrics["train/teacher_entropy"]
    length, divergence = metrics["rollout/length"], metrics["rollout/reverse_kl"]
    best, rise = math.inf, -math.inf
    for value in divergence:
        rise, best = max(rise, value - best), min(best, value)
    values = (
        min(one / max(other, 1e-12) for one, other in zip(student, teacher, strict=True)),
        min(student),
        max(metrics["rollout/repeated_share"]),
        max(metrics["rollout/truncated_share"]),
        max(max(value / length[0], length[0] / value) for value in length),
        rise,
    )
    return dict(zip(SIGNS, values, strict=True))


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16, help="of each healthy variant (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="of them (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument("--healthy-only", action="store_true", help="leave out the wrong runs")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    given = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    import yaml

    from opdlab.policies import LanguageModel

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    study = yaml.safe_load(STUDY.read_text())
    began, console = time.perf_counter(), Console(width=140)
    result: dict[str, Any] = {"machine": machine(), "versions": versions(*PACKAGES), "steps": given.steps}
    result |= {"healthy": {}, "wrong": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        student = LanguageModel("package://opdlab.toy/models/student")
        for parameter in student.parameters():
            parameter.data.zero_()
        student.save(folder / "zeros")
        for variant in study["variants"]:
            runs = result["healthy"][variant["name"]] = []
            for seed in range(given.first_seed, given.first_seed + given.seeds):
                overrides = ["-c", "toy_study", *study["overrides"], *variant["overrides"]]
                messages, metrics, share = run(overrides, seed, given.steps, folder / "runs")
                runs.append({"messages": messages, "share of the time": share, **extremes(metrics)})
        for name, changes in WRONG.items() if not given.healthy_only else ():
            for objective in ("teacher_topk", "sampled_token"):
                overrides = [f"--model.objective={objective}", "--model.gate=block64"]
                overrides += [change.format(zeros=folder / "zeros") for change in changes]
                result["wrong"][f"{name}, {objective}"] = run(overrides, 0, given.steps, folder / "runs")[0]
    result["seconds"] = time.perf_counter() - began
    table = Table("healthy", "runs", "with a message", *SIGNS, "share of the time, median")
    for name, runs in result["healthy"].items():
        closest = [f"{(min if 'least' in sign else max)(each[sign] for each in runs):.3g}" for sign in SIGNS]
        alarms = sum(bool(each["messages"]) for each in runs)
        share = median(each["share of the time"] for each in runs)
        table.add_row(name, str(len(runs)), str(alarms), *closest, f"{share:.2%}")
    console.print(table)
    for name, messages in result["wrong"].items():
        console.print(f"{name}: {messages[0] if messages else 'no message'}")
    console.print(f"{given.steps} optimizer steps a run, {result['seconds']:.0f} s together")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))
    false_alarms = [each for runs in result["healthy"].values() for each in runs if each["messages"]]
    sys.exit(bool(false_alarms) or not all(result["wrong"].values()))


if __name__ == "__main__":
    main()
