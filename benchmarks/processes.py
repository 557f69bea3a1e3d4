"""One experiment on one process and on several: the first losses of the paper's six variants on the toy pair.

Each variant trains with the quickstart's settings, on one process, on two with ``ddp`` and on two with
``model_parallel``, which shards the weights with FSDP2. The table has the largest relative difference from one
process's losses, as long as the same tokens are trained on: a random number may lie so near to the boundary between two
tokens that rounding chooses. All run on the CPU, each process on one thread; two processes need two cores.

``python benchmarks/processes.py --steps 20 --json processes.json``
"""

import argparse
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

from common import ChildError, machine, run_child, run_ranks, versions
from rich.console import Console
from rich.table import Table

SETUPS = {"one process": (1, "auto"), "DDP, 2": (2, "ddp"), "FSDP2, 2": (2, "model_parallel")}
VARIANTS = {
    f"{objective} + {gate}": (objective, gate) for objective in ("OPD", "LSM") for gate in ("none", "block64", "span")
}
LIMIT = 900.0  # seconds of a setup


Steps = list[tuple[float, int]]
"""The loss of each step, and a checksum of the tokens that are trained on."""


def train(objective: str, gate: str, rate: float, steps: int, devices: int, strategy: str, folder: str) -> Steps:
    """Return the first steps of a variant; this is the child."""
    import torch
    from lightning.pytorch import Callback, Trainer, seed_everything

    from opdlab.callbacks import BehaviorRefresh
    from opdlab.data import PromptDataModule, ReuseConfig
    from opdlab.gating import build_gate
    from opdlab.module import OPDModule
    from opdlab.objectives import SampledTokenOPD, TeacherTopK
    from opdlab.policies import LanguageModel, LocalTeacher, SamplingConfig
    from opdlab.toy import ChainProblems

    found: Steps = []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            rollouts = batch.rollouts
            places = torch.arange(1, rollouts.tokens.shape[1] + 1) * (1 + rollouts.rollout_ids[:, None])
            own = (rollouts.tokens * places * rollouts.mask).sum()
            total = trainer.strategy.reduce(own, reduce_op="sum")
            found.append((float(trainer.callback_metrics["train/loss"]), int(total)))

    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    module = OPDModule(
        LanguageModel("package://opdlab.toy/models/student"),
        LocalTeacher("package://opdlab.toy/models/teacher"),
        SampledTokenOPD() if objective == "OPD" else TeacherTopK(k=32),
        build_gate(gate) if gate == "none" else build_gate(gate, tau=1.0),
        SamplingConfig(num_samples=2, max_new_tokens=176, batch_size=64),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10),
    )
    data = PromptDataModule(ChainProblems(2048), reuse=ReuseConfig(32, 4, 32), max_prompt_tokens=64, seed=0)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BehaviorRefresh(every_n_steps=8), Recorder()],
    )
    trainer.fit(module, datamodule=data)
    return found


def child(setup: str, variants: list[str], rate: float, steps: int) -> None:
    """Train variants, and print the losses as JSON from the first process."""
    devices, strategy = SETUPS[setup]
    kept = dict(os.environ)
    found = {}
    for name in variants:
        objective, gate = VARIANTS[name]
        os.environ |= kept  # Lightning removes some when a trainer has finished
        with tempfile.TemporaryDirectory() as folder:
            found[name] = train(objective, gate, rate, steps, devices, strategy, folder)
    if kept.get("RANK", "0") == "0":
        print(json.dumps(found))


def run(setup: str, variants: list[str], rate: float, steps: int) -> dict[str, Steps]:
    """Return the steps of variants; the processes of the setup end with this call."""
    options = ["--child", setup, "--only", *variants, "--lr", str(rate), "--steps", str(steps)]
    found: dict[str, Steps]
    try:
        if (count := SETUPS[setup][0]) == 1:
            found = run_child(Path(__file__), options, threads=1, timeout=LIMIT)
        else:
            found = run_ranks(Path(__file__), options, count=count, threads=1, timeout=LIMIT)
    except ChildError as error:
        raise SystemExit(f"{setup}: {error}") from None
    return found


def compare(ours: Steps, theirs: Steps) -> tuple[float, int]:
    """Return the largest relative difference of the losses on the same tokens, and the number of these steps."""
    same = 0
    while same < len(ours) and ours[same][1] == theirs[same][1]:
        same += 1
    return max(abs(a[0] - b[0]) / abs(b[0]) for a, b in zip(ours[:same], theirs[:same], strict=True)), same


def main() -> int:
    """Train on every setup, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--json", type=Path, help="write all losses to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.only, arguments.lr, arguments.steps)
        return 0
    found = {setup: run(setup, arguments.only, arguments.lr, arguments.steps) for setup in SETUPS}
    alone, *others = SETUPS
    table = Table("variant", "first and last loss", *others, title=f"{arguments.steps} losses, largest difference")
    largest = 0.0
    for name, steps in found[alone].items():
        row = [f"{steps[0][0]:.5f}, {steps[-1][0]:.5f}"]
        for setup in others:
            difference, same = compare(found[setup][name], steps)
            largest = max(largest, difference)
            row.append(
                f"{difference:.1e}" + ("" if same == len(steps) else f", then other tokens from step {same + 1}")
            )
        table.add_row(name, *row)
    Console().print(table)
    print(f"largest relative difference from one process: {largest:.1e}")
    if arguments.json is not None:
        facts = {"steps": found, "machine": machine(), "versions": versions("torch", "lightning", "transformers")}
        arguments.json.write_text(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
