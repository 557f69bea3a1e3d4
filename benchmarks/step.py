"""What a training step costs, and how long training takes to a given accuracy, on the toy pair.

Three programs do the same distillation, each in a process of its own, one after the other, round by round:

- ``opdlab``: Lightning's Trainer with the module, data, callbacks and logger that the command line sets up.
- ``bare``: a plain torch loop that does the same work on as many tokens, without Lightning and without a log.
- ``trl``: TRL's ``DistillationTrainer``: full-vocabulary reverse KL on fresh rollouts at each step, the same batch.

``python benchmarks/step.py --trl-python PYTHON --json step.json``
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import (
    TOY_MODELS,
    ToyEvaluation,
    machine,
    median,
    pairwise_ratios,
    run_child,
    spread,
    toy_problems,
    versions,
)

# The quickstart's settings.
NUM_PROMPTS = 2048
PROMPTS_PER_POOL = 32
SAMPLES_PER_PROMPT = 2
REUSE_EPOCHS = 4
BATCH_SIZE = 32
MAX_NEW_TOKENS = 176
SUPPORT = 32
BLOCK = 64
TAU = 1.0
LEARNING_RATE = 2e-4
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01
WARM_UP_STEPS = 10
WARM_UP_FROM = 0.1
CLIP_NORM = 1.0
STEPS_PER_POOL = REUSE_EPOCHS * PROMPTS_PER_POOL * SAMPLES_PER_PROMPT // BATCH_SIZE

PROGRAMS = ("opdlab", "bare", "trl")
EVALUATE_EVERY = 5
LOG_EVERY = 10  # steps; the default of TRL, whose log of figures is the only other one
PACKAGES = ("torch", "lightning", "transformers", "trl", "accelerate")


# -- in a child ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a child is to do.

    Args:
        steps: optimizer steps, at most.
        seed: decides prompts, order and samples.
        target: stop at this pass@1, evaluating on the way; None trains for ``steps`` without evaluating.
        models: folder that holds the folders ``student`` and ``teacher``.
    """

    steps: int
    seed: int
    target: float | None
    models: Path = TOY_MODELS

    @property
    def student(self) -> str:
        """Folder of the student."""
        return str(self.models / "student")

    @property
    def teacher(self) -> str:
        """Folder of the teacher."""
        return str(self.models / "teacher")


class Clock:
    """Wall and processor seconds, paused while evaluating."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0
        self._since: tuple[float, float] | None = None

    def start(self) -> None:
        """Go on."""
        self._since = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Pause."""
        assert self._since is not None
        self.wall += time.perf_counter() - self._since[0]
        self.processor += time.process_time() - self._since[1]
        self._since = None


@dataclass
class Run:
    """A training run under the clock.

    Args:
        task: what to do.
        clock: runs while the program trains.
        history: step, seconds of training so far and pass@1 of each evaluation.
        reached: whether the target was reached.
    """

    task: Task
    clock: Clock = field(default_factory=Clock)
    history: list[tuple[int, float, float]] = field(default_factory=list)
    reached: bool = False

    def __post_init__(self) -> None:
        self._evaluate = ToyEvaluation(max_new_tokens=MAX_NEW_TOKENS)

    def after_step(self, step: int, model: Any, tokenizer: Any) -> bool:
        """Evaluate where it is time, with the clock stopped; returns whether to stop training."""
        if self.task.target is None or (step % EVALUATE_EVERY and step != self.task.steps):
            return False
        self.clock.stop()
        accuracy = self._evaluate(model, tokenizer)
        self.history.append((step, self.clock.wall, accuracy))
        self.reached = accuracy >= self.task.target
        self.clock.start()
        return self.reached

    def result(self, *, steps: int, trained_tokens: float, **figures: float) -> dict[str, Any]:
        """What the child answers."""
        return {
            "steps": steps,
            "seconds": self.clock.wall,
            "seconds_per_step": self.clock.wall / steps,
            "processor_seconds_per_step": self.clock.processor / steps,
            "trained_tokens": trained_tokens,
            "trained_tokens_per_second": trained_tokens / self.clock.wall,
            "milliseconds_per_1000_tokens": 1e6 * self.clock.wall / trained_tokens,
            **figures,
            "history": self.history,
            "reached": self.reached,
        }


def train_opdlab(run: Run) -> dict[str, Any]:
    """Train with opdlab as the command line sets it up, without validation."""
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from opdlab.callbacks import BehaviorRefresh, GateMonitor
    from opdlab.data import PromptDataModule, ReuseConfig
    from opdlab.gating import build_gate
    from opdlab.module import OPDModule
    from opdlab.objectives import TeacherTopK
    from opdlab.policies import LanguageModel, LocalTeacher, SamplingConfig
    from opdlab.tasks.toy.problems import ChainProblems

    class Observer(Callback):
        """Counts tokens, and evaluates."""

        trained_tokens = 0
        startup_seconds = 0.0

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.startup_seconds = time.perf_counter() - started

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.trained_tokens += batch.num_tokens
            if run.after_step(trainer.global_step, module.student.model, module.student.tokenizer):
                trainer.should_stop = True

    # As the command line does.
    warnings.filterwarnings("ignore", message=r"Found .* module\(s\) in eval mode")
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    seed_everything(run.task.seed, verbose=False)
    module = OPDModule(
        LanguageModel(run.task.student),
        LocalTeacher(run.task.teacher),
        TeacherTopK(SUPPORT),
        build_gate(f"block{BLOCK}", tau=TAU),
        SamplingConfig(num_samples=SAMPLES_PER_PROMPT, max_new_tokens=MAX_NEW_TOKENS, batch_size=64),
        optimizer=lambda parameters: torch.optim.AdamW(
            parameters, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY
        ),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=WARM_UP_FROM, total_iters=WARM_UP_STEPS
        ),
    )
    data = PromptDataModule(
        ChainProblems(NUM_PROMPTS, "train"),
        reuse=ReuseConfig(PROMPTS_PER_POOL, REUSE_EPOCHS, BATCH_SIZE),
        max_prompt_tokens=64,
        seed=run.task.seed,
    )
    observer = Observer()
    with tempfile.TemporaryDirectory() as folder:
        logger = TensorBoardLogger(folder)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=run.task.steps,
            max_epochs=-1,
            log_every_n_steps=LOG_EVERY,
            gradient_clip_val=CLIP_NORM,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            logger=logger,
            callbacks=[BehaviorRefresh(every_n_steps=STEPS_PER_POOL), GateMonitor(), observer],
        )
        # Imports and the data set are made before the clock starts, as they are for TRL.
        data.train_source.problems()
        _ = logger.experiment
        started = time.perf_counter()
        run.clock.start()
        trainer.fit(module, data)
        run.clock.stop()
        events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0})
        events.Reload()
        logged = {
            part: statistics.mean([event.value for event in events.Scalars(f"time/{part}_seconds")] or [0.0])
            for part in ("sample", "teacher", "update")
        }
    steps = trainer.global_step
    num_pools = -(-steps // STEPS_PER_POOL)
    return run.result(
        steps=steps,
        trained_tokens=observer.trained_tokens,
        startup_seconds=observer.startup_seconds,
        sample_seconds=logged["sample"] * num_pools,
        teacher_seconds=logged["teacher"] * num_pools,
        update_seconds=logged["update"] * steps,
    )


def train_bare(run: Run) -> dict[str, Any]:
    """Train with a plain loop: what a good engineer writes who needs this run and nothing else.

    A pool is used up just when the behavior snapshot would be refreshed, so the student itself samples.
    """
    import torch
    from torch import Tensor
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    torch.manual_seed(run.task.seed)
    student = AutoModelForCausalLM.from_pretrained(run.task.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(run.task.teacher, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(run.task.student, padding_side="left")
    prompts = [prompt for prompt, _ in toy_problems("train", NUM_PROMPTS)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=WARM_UP_FROM, total_iters=WARM_UP_STEPS)
    generation = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    def response_logits(model: Any, tokens: Tensor, attention: Tensor, length: int) -> Tensor:
        """[B, P + T] -> [B, T, V]: the logits that predict the response."""
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        output = model(
            tokens, attention_mask=attention, position_ids=positions, use_cache=False, logits_to_keep=length + 1
        )
        logits: Tensor = output.logits[:, :-1]
        return logits

    def sampled_logprobs(logits: Tensor, response: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1)

    def block_weights(drift: Tensor, mask: Tensor) -> Tensor:
        """[B, T] drift -> [B, T] weights, mean 1 over the valid positions."""
        rows, length = drift.shape
        padding = -length % BLOCK
        blocks = torch.nn.functional.pad(drift * mask, (0, padding)).view(rows, -1, BLOCK)
        counts = torch.nn.functional.pad(mask, (0, padding)).view(rows, -1, BLOCK).sum(-1)
        gates = (-TAU * (blocks.sum(-1) / counts.clamp(min=1)).abs()).exp()
        gates = gates.repeat_interleave(BLOCK, 1)[:, :length] * mask
        return gates * mask.sum() / gates.sum()

    step = trained_tokens = 0
    seconds = dict.fromkeys(("sample", "teacher", "update"), 0.0)
    stop = False
    run.clock.start()
    tokenized = tokenizer(prompts)["input_ids"]
    order: Iterator[int] = iter(())
    while step < run.task.steps and not stop:
        started = time.perf_counter()
        chosen: list[list[int]] = []
        for _ in range(PROMPTS_PER_POOL):
            if (index := next(order, None)) is None:
                order = iter(torch.randperm(len(tokenized)).tolist())
                index = next(order)
            chosen += [tokenized[index]] * SAMPLES_PER_PROMPT
        batch = tokenizer.pad({"input_ids": chosen}, return_tensors="pt")
        width = batch["input_ids"].shape[1]
        with torch.no_grad():
            tokens = student.generate(**batch, generation_config=generation)
            response = tokens[:, width:]
            stops = (response == tokenizer.eos_token_id).long()
            valid = (stops.cumsum(1) - stops) == 0
            length, mask = response.shape[1], valid.float()
            attention = torch.cat([batch["attention_mask"], valid.long()], 1)
            parts = torch.split(torch.arange(len(tokens)), BATCH_SIZE)
            behavior = torch.cat(
                [
                    sampled_logprobs(response_logits(student, tokens[rows], attention[rows], length), response[rows])
                    for rows in parts
                ]
            )
            sampled = time.perf_counter()
            tops = [
                response_logits(teacher, tokens[rows], attention[rows], length).topk(SUPPORT, dim=-1) for rows in parts
            ]
            support = torch.cat([top.indices for top in tops])
            teacher_logprobs = torch.cat([top.values for top in tops]).log_softmax(-1)
        scored = time.perf_counter()
        seconds["sample"] += sampled - started
        seconds["teacher"] += scored - sampled
        for _ in range(REUSE_EPOCHS):
            for rows in torch.split(torch.randperm(len(tokens)), BATCH_SIZE):
                if step == run.task.steps or stop:
                    break
                began = time.perf_counter()
                logits = response_logits(student, tokens[rows], attention[rows], length)
                with torch.no_grad():
                    drift = sampled_logprobs(logits, response[rows]) - behavior[rows]
                    weights = block_weights(drift, mask[rows])
                logp = logits.gather(-1, support[rows]).log_softmax(-1)
                losses = (logp.exp() * (logp - teacher_logprobs[rows])).sum(-1)
                loss = (weights * losses * mask[rows]).sum() / mask[rows].sum()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP_NORM)
                optimizer.step()
                schedule.step()
                step += 1
                trained_tokens += int(mask[rows].sum())
                seconds["update"] += time.perf_counter() - began
                stop = run.after_step(step, student, tokenizer)
    run.clock.stop()
    return run.result(
        steps=step, trained_tokens=trained_tokens, **{f"{part}_seconds": value for part, value in seconds.items()}
    )


def train_trl(run: Run) -> dict[str, Any]:
    """Train with TRL: as many steps of as many rollouts, all of them fresh."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer  # type: ignore[import-not-found]

    class Observer(TrainerCallback):  # type: ignore[misc]
        """Evaluates."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if run.after_step(state.global_step, student, tokenizer):
                control.should_training_stop = True

    student = AutoModelForCausalLM.from_pretrained(run.task.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(run.task.teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run.task.student, padding_side="left")
    prompts = [prompt for prompt, _ in toy_problems("train", NUM_PROMPTS)]
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            max_steps=run.task.steps,
            per_device_train_batch_size=BATCH_SIZE,
            gradient_accumulation_steps=1,
            max_completion_length=MAX_NEW_TOKENS,
            temperature=1.0,
            beta=1.0,  # reverse KL
            learning_rate=LEARNING_RATE,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP_NORM,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=WARM_UP_STEPS,
            # Its defaults are for large models on GPUs; these make it faster here.
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            logging_steps=min(LOG_EVERY, run.task.steps),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=run.task.seed,
        )
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[Observer()],
        )
        run.clock.start()
        trainer.train()
        run.clock.stop()
    steps = trainer.state.global_step
    logged = [
        entry["completions/mean_length"] for entry in trainer.state.log_history if "completions/mean_length" in entry
    ]
    return run.result(steps=steps, trained_tokens=steps * BATCH_SIZE * sum(logged) / len(logged))


def child(program: str, task: Task, threads: int) -> None:
    """Run one program and print what was measured as one line of JSON; everything else goes to standard error."""
    programs: dict[str, Callable[[Run], dict[str, Any]]] = {
        "opdlab": train_opdlab,
        "bare": train_bare,
        "trl": train_trl,
    }
    with contextlib.redirect_stdout(sys.stderr):
        import torch

        torch.set_num_threads(threads)
        random.seed(task.seed)
        load = os.getloadavg()[0]
        answer = programs[program](Run(task))
    print(json.dumps({"program": program, "load_average": load, **answer, "versions": versions(*PACKAGES)}))


# -- in the parent ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How the parent measures.

    Args:
        steps: optimizer steps of a run.
        rounds: runs of each program.
        threads: for each program.
        trl_python: interpreter that has TRL, or None.
        target: pass@1 to be reached.
        max_steps: steps after which a run that has not reached it gives up.
        models: folder that holds the folders ``student`` and ``teacher``.
    """

    steps: int
    rounds: int
    threads: int
    trl_python: str | None
    target: float
    max_steps: int
    models: Path

    def run(self, program: str, task: Task) -> dict[str, Any]:
        """Run one child and tell how it went."""
        python = self.trl_python if program == "trl" and self.trl_python else sys.executable
        target = [] if task.target is None else ["--target", str(task.target)]
        arguments = [
            "--child",
            program,
            "--steps",
            str(task.steps),
            "--seed",
            str(task.seed),
            "--models",
            str(task.models),
            *target,
        ]
        answer = run_child(
            Path(__file__), [*arguments, "--threads", str(self.threads)], threads=self.threads, python=python
        )
        reached = f", pass@1 {answer['history'][-1][2]:.3f} after {answer['steps']} steps" if answer["history"] else ""
        print(
            f"{program:7} {answer['seconds']:7.2f} s, {answer['seconds_per_step']:.3f} s a step"
            f"{reached} (load {answer['load_average']:.1f})",
            file=sys.stderr,
        )
        return answer


def measure_steps(programs: list[str], options: Options) -> dict[str, Any]:
    """Alternate the programs and compare their steps."""
    runs: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
    for number in range(options.rounds):
        for program in programs:
            runs[program].append(options.run(program, Task(options.steps, number, None, options.models)))
    figures = ("seconds_per_step", "processor_seconds_per_step", "milliseconds_per_1000_tokens")
    ratios = {
        f"opdlab/{other}": {
            figure: pairwise_ratios([r[figure] for r in runs["opdlab"]], [r[figure] for r in runs[other]])
            for figure in figures
        }
        for other in programs
        if other != "opdlab" and "opdlab" in programs
    }
    return {"runs": runs, "ratios": ratios, "medians": {name: _medians(rows) for name, rows in runs.items()}}


def measure_target(programs: list[str], options: Options) -> dict[str, Any]:
    """Alternate the programs and compare how long they train to the target."""
    runs: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
    for number in range(options.rounds):
        for program in programs:
            runs[program].append(options.run(program, Task(options.max_steps, number, options.target, options.models)))
    ratios = {}
    for other in programs:
        pairs = list(zip(runs.get("opdlab", []), runs[other], strict=False)) if other != "opdlab" else []
        if both := [(a, b) for a, b in pairs if a["reached"] and b["reached"]]:
            ratios[f"opdlab/{other}"] = {"seconds": [_time_to(a) / _time_to(b) for a, b in both]}
    return {"runs": runs, "ratios": ratios}


def _time_to(run: dict[str, Any]) -> float:
    seconds: float = run["history"][-1][1]
    return seconds


def _medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    names = [name for name, value in rows[0].items() if isinstance(value, int | float) and not isinstance(value, bool)]
    return {name: median([row[name] for row in rows]) for name in names}


def _trl_python(given: str | None) -> str | None:
    """The interpreter that has TRL: the one given, or this one."""
    python = given or sys.executable
    check = [python, "-c", "import importlib.metadata as m; print(m.version('trl'))"]
    try:
        done = subprocess.run(check, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return python if done.returncode == 0 else None


def _step_rows(steps: dict[str, Any]) -> Iterator[list[str]]:
    for program, rows in steps["runs"].items():
        middle = steps["medians"][program]
        shares = [
            f"{100 * middle[name] / middle['seconds']:.0f}%" if name in middle else "-"
            for name in ("sample_seconds", "teacher_seconds", "update_seconds")
        ]
        yield [
            program,
            spread([row["seconds_per_step"] for row in rows], 3),
            f"{middle['processor_seconds_per_step']:.3f}",
            f"{middle['trained_tokens']:.0f}",
            f"{middle['trained_tokens_per_second']:.0f}",
            f"{middle['milliseconds_per_1000_tokens']:.1f}",
            " / ".join(shares),
        ]


def report(results: dict[str, Any]) -> None:
    """Print tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)  # the same in a terminal, a log and a document
    if steps := results.get("step"):
        headings = (
            "s a step",
            "CPU s a step",
            "trained tokens",
            "tokens/s",
            "ms per 1000 tokens",
            "sample/teacher/update",
        )
        table = Table("program", *headings, title=f"{results['options']['steps']} optimizer steps: median [range]")
        for row in _step_rows(steps):
            table.add_row(*row)
        console.print(table)
        table = Table("ratio, pair by pair", "s a step", "CPU s a step", "time per token")
        for name, figures in steps["ratios"].items():
            table.add_row(name, *(spread(values) for values in figures.values()))
        console.print(table)
    if target := results.get("target"):
        goal = f"pass@1 {results['options']['target']}"
        table = Table("program", "steps", "seconds of training", "reached", title=f"training to {goal}: median [range]")
        for program, rows in target["runs"].items():
            done = [row for row in rows if row["reached"]]
            seconds = spread([_time_to(row) for row in done])
            table.add_row(program, spread([row["steps"] for row in done], 0), seconds, f"{len(done)} of {len(rows)}")
        console.print(table)
        for name, figures in target["ratios"].items():
            console.print(f"{name}, seconds to {goal}, pair by pair: {spread(figures['seconds'])}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each program (default: %(default)s)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*PROGRAMS, "step", "target"],
        default=[],
        help="some of the programs, or one of the two measurements; all by default",
    )
    parser.add_argument("--trl-python", help="interpreter of an environment that has TRL; this one by default")
    parser.add_argument("--target", type=float, help="pass@1 to train to (default: 0.8)")
    parser.add_argument("--max-steps", type=int, default=120, help="give up on it after so many (default: %(default)s)")
    parser.add_argument(
        "--models", type=Path, default=TOY_MODELS, help="folder with another student and teacher of the toy world"
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--child", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    given = _arguments()
    if given.child:
        child(given.child, Task(given.steps, given.seed, given.target, given.models), given.threads)
        return
    programs = [program for program in PROGRAMS if program in given.only] or list(PROGRAMS)
    trl_python = _trl_python(given.trl_python) if "trl" in programs else None
    if "trl" in programs and trl_python is None:
        programs.remove("trl")
        print("TRL skipped: it is not installed here; give --trl-python an interpreter that has it", file=sys.stderr)
    measurements = [name for name in ("step", "target") if name in given.only] or ["step", "target"]
    target = 0.8 if given.target is None else given.target
    options = Options(given.steps, given.rounds, given.threads, trl_python, target, given.max_steps, given.models)
    results: dict[str, Any] = {
        "machine": machine(),
        "options": {
            "steps": options.steps,
            "rounds": options.rounds,
            "threads": options.threads,
            "target": options.target,
            "max_steps": options.max_steps,
        },
    }
    if "step" in measurements:
        results["step"] = measure_steps(programs, options)
    if "target" in measurements:
        results["target"] = measure_target([program for program in programs if program != "bare"], options)
    runs = [run for name in measurements for rows in results[name]["runs"].values() for run in rows]
    results["versions"] = {run["program"]: run.pop("versions") for run in runs}
    report(results)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
