"""Cost of ``GateMonitor`` and ``SampleLogger`` with each gate, as a share of a training step on the toy pair.

Each gate trains the quickstart in a process of its own, and the clock of that run gives the time of each part:

- **hooks**: the monitor's hooks: at every step sums by age, at every tenth step metrics, histograms and scalars;
- **norms**: ``hidden_gradient_norms``, which the training step computes at every tenth step on the callback's request;
- **pages**: ``SampleLogger``'s hooks; it writes a page at every tenth step here, and its share is given for its default
  of a page every 100 steps;
- **step**: from the end of one optimizer step to the end of the next, sampling and the teacher's scoring included, and
  all callbacks; evaluations and checkpoints are off.

Numerator and denominator are sums over the same steps of the same run, so a slow phase of the machine affects both. The
first ten steps are left out: in them modules are imported and allocators grow. The limit holds for the sum of both
shares. The plots at the end of training are drawn once, not at a step, and are given in seconds.

``OMP_NUM_THREADS=1 python benchmarks/gates.py --json gates.json`` ends with 1 if a share is above ``--limit``.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from common import REPOSITORY, Stopwatch, machine, run_child, versions

GATES = ("none", "token", "sequence", "block32", "block64", "block128", "span")
WARM_UP = 10  # steps
EVERY = 10  # steps
PAGES_EVERY = 100  # steps, the default of SampleLogger
PACKAGES = ("torch", "lightning", "tensorboard", "matplotlib")


def child(gate: str, steps: int) -> None:
    """Train with one gate, and print the measurements as one line of JSON."""
    sys.path.insert(0, str(REPOSITORY))
    import torch
    from lightning.pytorch import Callback, Trainer, seed_everything
    from lightning.pytorch.loggers import TensorBoardLogger

    import opdlab.training.module
    from opdlab.callbacks import BehaviorRefresh, GateMonitor, SampleLogger
    from opdlab.data import PromptDataModule, ReuseConfig
    from opdlab.gating import build_gate
    from opdlab.module import OPDModule
    from opdlab.objectives import TeacherTopK
    from opdlab.policies import LanguageModel, LocalTeacher, SamplingConfig
    from opdlab.toy import ChainProblems

    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    seed_everything(0, verbose=False)
    watch = Stopwatch()

    class Clock(Callback):
        """Times the steps: as the last callback, it includes all others."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == WARM_UP:
                watch.on, self.began = True, time.perf_counter()
            if trainer.global_step == steps:
                watch.on = False
                watch.seconds["steps"] = time.perf_counter() - self.began

    monitor = GateMonitor(every_n_steps=EVERY)
    drawing = monitor.on_train_end
    for hook in ("on_train_batch_start", "on_train_batch_end"):
        setattr(monitor, hook, watch.around("hooks", getattr(monitor, hook)))
    samples = SampleLogger(every_n_steps=EVERY)
    for hook in ("on_train_batch_start", "on_train_batch_end"):
        setattr(samples, hook, watch.around("pages", getattr(samples, hook)))
    training = opdlab.training.module
    training.hidden_gradient_norms = watch.around("norms", training.hidden_gradient_norms)
    toy = "package://opdlab.toy/models"
    module = OPDModule(  # as in configs/quickstart.yaml
        LanguageModel(f"{toy}/student"),
        LocalTeacher(f"{toy}/teacher"),
        TeacherTopK(32),
        build_gate(gate, tau=1.0),
        SamplingConfig(num_samples=2, max_new_tokens=176, batch_size=64),
        optimizer=lambda p: torch.optim.AdamW(p, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.01),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=10),
    )
    data = PromptDataModule(ChainProblems(2048), reuse=ReuseConfig(32, 4, 32), max_prompt_tokens=64)

    def draw(*arguments: Any) -> None:
        began = time.perf_counter()
        drawing(*arguments)
        watch.seconds["pictures"] = time.perf_counter() - began

    monitor.on_train_end = draw  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            log_every_n_steps=1,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=TensorBoardLogger(folder),
            callbacks=[BehaviorRefresh(every_n_steps=8), monitor, samples, Clock()],
        )
        trainer.fit(module, data)
    print(json.dumps({"gate": gate, **watch.seconds, "versions": versions(*PACKAGES)}))


def measure(gates: list[str], steps: int, threads: int) -> list[dict[str, Any]]:
    """Return one run for each gate."""
    rows = []
    for gate in gates:
        row = run_child(Path(__file__), ["--child", gate, "--steps", str(steps)], threads=threads)
        row["share"] = (row["hooks"] + row["norms"]) / row["steps"]
        row["page_share"] = row["pages"] / row["steps"] * EVERY / PAGES_EVERY
        print(f"{gate}: {row['share']:.2%} + {row['page_share']:.2%}", file=sys.stderr)
        rows.append(row)
    return rows


def report(rows: list[dict[str, Any]], steps: int) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    counted = steps - WARM_UP
    table = Table(
        *("gate", "ms a step", "hooks, ms a step", "norms, ms a step", "share of the step"),
        *("a page, ms", "share, a page every 100", "pictures at the end, s"),
        title=f"GateMonitor(every_n_steps={EVERY}), {counted} steps after {WARM_UP}",
    )
    for row in rows:
        parts = [f"{1000 * row[name] / counted:.2f}" for name in ("steps", "hooks", "norms")]
        page = f"{1000 * row['pages'] / (counted // EVERY):.1f}"
        table.add_row(
            row["gate"], *parts, f"{row['share']:.2%}", page, f"{row['page_share']:.2%}", f"{row['pictures']:.2f}"
        )
    Console(width=120).print(table)


def main() -> int:
    """Measure, print, write; return 1 if the cost is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES), help="all by default")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=0.01, help="largest share (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--child", choices=GATES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps <= WARM_UP:
        parser.error(f"--steps is {given.steps}, but must be above {WARM_UP}, which are left out")
    if given.child:
        child(given.child, given.steps)
        return 0
    before = machine()
    rows = measure(given.gates, given.steps, given.threads)
    report(rows, given.steps)
    if given.json:
        found = [row.pop("versions") for row in rows]  # equal in all runs
        options = {"steps": given.steps, "warm_up": WARM_UP, "every_n_steps": EVERY, "threads": given.threads}
        result = {"machine": before, "versions": found[0], "options": options, "gates": rows}
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["share"] + row["page_share"] > given.limit for row in rows))


if __name__ == "__main__":
    sys.exit(main())
