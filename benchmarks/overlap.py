"""How much of sampling ``data.reuse.overlap`` hides behind training, with the quickstart's sizes on the toy pair.

- ``local``: sampled in this process, by the processor that also trains;
- ``server``: the same, and the thread that samples sleeps after each chunk of tokens, as one that waits for a server.

Each measurement has a process of its own. The first buffer, which is always waited for, and the last, beside which
nothing is sampled, are not counted.

``python benchmarks/overlap.py --json overlap.json``
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import REPOSITORY, TOY_MODELS, machine, median, run_child, spread, versions
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(REPOSITORY))

SAMPLERS = ("local", "server")
STEPS_PER_BUFFER = 8
TIMEOUT = 600.0  # seconds


# -- the child: one run ------------------------------------------------------------------------------------------------


class Sleeping:
    """Progress display that sleeps after each chunk of tokens.

    Args:
        progress: is told of the progress.
        seconds: to sleep.
    """

    def __init__(self, progress: Any, seconds: float) -> None:
        self._progress, self._seconds = progress, seconds

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Any]:
        """Show a bar, see :class:`opdlab.progress.Progress`."""
        with self._progress.task(name, total) as advance:

            def slowly(count: int) -> None:
                time.sleep(self._seconds)
                advance(count)

            yield slowly


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return seconds of each counted buffer: all, its sampling, and the wait for it; and the losses."""
    import torch
    from lightning.pytorch import Callback, Trainer

    from opdlab.data import PromptDataModule, ReuseConfig
    from opdlab.gating import build_gate
    from opdlab.module import OPDModule
    from opdlab.objectives import TeacherTopK
    from opdlab.policies import LanguageModel, LocalTeacher, SamplingConfig, TransformersSampler
    from opdlab.toy import ChainProblems

    class Server(TransformersSampler):
        def sample(self, prompts: Any, streams: Any, config: Any, progress: Any) -> Any:
            return super().sample(prompts, streams, config, Sleeping(progress, arguments.sleep))

    class Clock(Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.metrics: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
            if trainer.global_step % STEPS_PER_BUFFER == 0:
                self.ends.append(time.perf_counter())
                self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    warnings.filterwarnings("ignore", message=r"Found .* module\(s\) in eval mode")
    torch.manual_seed(0)
    module = OPDModule(
        LanguageModel(str(TOY_MODELS / "student")),
        LocalTeacher(str(TOY_MODELS / "teacher")),
        TeacherTopK(32),
        build_gate("block64", tau=1.0),
        SamplingConfig(num_samples=2, max_new_tokens=arguments.max_new_tokens, batch_size=64),
        sampler=Server() if arguments.sampler == "server" else None,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-4),
    )
    reuse = ReuseConfig(prompts_per_pool=32, epochs=4, batch_size=32, overlap=arguments.overlap)
    data = PromptDataModule(ChainProblems(2048, "train"), reuse=reuse, max_prompt_tokens=256, seed=arguments.seed)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            max_steps=STEPS_PER_BUFFER * (arguments.buffers + 2),
            max_epochs=-1,
            log_every_n_steps=1,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
        ).fit(module, datamodule=data)
    counted = clock.metrics[1:-1]
    sampling = [metrics["time/sample_seconds"] for metrics in counted]
    return {
        "seconds": [after - before for before, after in zip(clock.ends[:-2], clock.ends[1:-1], strict=True)],
        "sampling": sampling,
        "waited": [metrics.get("time/sample_wait_seconds", metrics["time/sample_seconds"]) for metrics in counted],
        "hidden": [metrics.get("rollout/hidden_share", 0.0) for metrics in counted],
    }


# -- the parent --------------------------------------------------------------------------------------------------------


def main() -> int:
    """Measure with and without overlap, round by round, and print the share of sampling that is hidden."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--buffers", type=int, default=6, help="counted buffers of a run")
    parser.add_argument("--max-new-tokens", type=int, default=176)
    parser.add_argument("--sleep", type=float, default=0.003, metavar="SECONDS", help="of the server, after each chunk")
    parser.add_argument("--threads", type=int, default=1, help="of each of the two, training and sampling")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--sampler", choices=SAMPLERS, help=argparse.SUPPRESS)  # this is a child
    parser.add_argument("--overlap", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sampler:
        print(json.dumps(measure(arguments)))
        return 0
    runs: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {sampler: [] for sampler in SAMPLERS}
    for seed in range(arguments.rounds):
        for sampler, measured in runs.items():
            without, ahead = (_child(arguments, sampler, overlap, seed) for overlap in (0, 1))
            measured.append((without, ahead))
    _print(runs)
    if arguments.json:
        options = {name: value for name, value in vars(arguments).items() if name not in ("json", "sampler", "overlap")}
        result = {"machine": machine(), "versions": versions("torch", "transformers"), "options": options, "runs": runs}
        arguments.json.write_text(json.dumps(result, indent=1, default=str))
    return 0


def _child(arguments: argparse.Namespace, sampler: str, overlap: int, seed: int) -> dict[str, Any]:
    options = ("buffers", "max_new_tokens", "sleep")
    flags = [part for name in options for part in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    flags += ["--sampler", sampler, "--overlap", str(overlap), "--seed", str(seed)]
    return run_child(Path(__file__), flags, threads=arguments.threads, timeout=TIMEOUT)


def _print(runs: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]) -> None:
    """Print medians over buffers, of each round; ``saved`` relates to the sampling time without overlap."""
    table = Table("", "seconds a buffer, without", "with", "ratio", "sampling, without", "with", "hidden", "saved")
    for sampler, measured in runs.items():
        columns: list[list[float]] = [[], [], [], [], [], [], []]
        for without, ahead in measured:
            before, after = median(without["seconds"]), median(ahead["seconds"])
            hidden = 1 - sum(ahead["waited"]) / sum(ahead["sampling"])
            alone = median(without["sampling"])
            values = (before, after, after / before, alone, median(ahead["sampling"]), hidden, (before - after) / alone)
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        table.add_row(sampler, *(spread(column) for column in columns))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
