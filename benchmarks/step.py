"""Cost of a training step, and training time to a given accuracy.

Five programs do the same distillation, each in a process of its own, one after the other, round by round:

- ``opdlab`` (``step_opdlab.py``): Lightning's Trainer with the module, data, callbacks and logger that the command line
  sets up.
- ``opdlab_generate`` (``step_opdlab_generate.py``): the same, sampled by transformers' own loop instead of opdlab's.
- ``opdlab_compiled`` (``step_opdlab_compiled.py``): the same as the first, with ``model.student.compile``.
- ``bare`` (``step_bare.py``): a plain torch loop that does the same work on as many tokens, without Lightning and
  without a log.
- ``trl`` (``step_trl.py``): TRL's ``DistillationTrainer``: full-vocabulary reverse KL on fresh rollouts at each step,
  the same batch.

``python benchmarks/step.py --trl-python PYTHON --json step.json`` measures the toy pair, and with ``--case smollm2`` a
real one, on responses of equal length.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine, median, pairwise_ratios, run_child, spread, versions
from step_common import CASES, PARTS, Task, endless

PROGRAMS = ("opdlab", "opdlab_generate", "opdlab_compiled", "bare", "trl")
PACKAGES = ("torch", "lightning", "transformers", "trl", "accelerate")
FIGURES = {
    "seconds_per_step": "s a step",
    "processor_seconds_per_step": "CPU s a step",
    "milliseconds_per_1000_tokens": "time per token trained",
    "run_seconds_per_step": "whole run",  # includes one-time work: setup, the plots at the end
}

Runs = dict[str, list[dict[str, Any]]]  # of each program, round by round


# -- in a child ------------------------------------------------------------------------------------------------------


def child(program: str, task: Task, threads: int) -> None:
    """Run one program and print the measurements as one line of JSON; all other output goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        import torch
        from step_common import Run

        torch.set_num_threads(threads)
        random.seed(task.seed)
        load = os.getloadavg()[0]
        answer = importlib.import_module(f"step_{program}").train(Run(task))
    print(json.dumps({"program": program, "load_average": load, **answer, "versions": versions(*PACKAGES)}))


# -- in the parent ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Settings of the measurement.

    Args:
        rounds: runs of each program.
        threads: for each program.
        trl_python: interpreter with TRL, or None.
    """

    rounds: int
    threads: int
    trl_python: str | None

    def run(self, program: str, task: Task) -> dict[str, Any]:
        """Run one child and report its result."""
        python = self.trl_python if program == "trl" and self.trl_python else sys.executable
        flags = {"case": task.case, "models": task.models, "steps": task.steps, "seed": task.seed}
        if task.target is not None:
            flags["target"] = task.target
        arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        answer = run_child(
            Path(__file__),
            ["--child", program, *arguments, "--threads", str(self.threads)],
            threads=self.threads,
            python=python,
        )
        reached = f", pass@1 {answer['history'][-1][2]:.3f} after {answer['steps']} steps" if answer["history"] else ""
        print(
            f"{program:15} {answer['seconds']:7.2f} s, {answer['seconds_per_step']:.3f} s a step"
            f"{reached} (load {answer['load_average']:.1f})",
            file=sys.stderr,
        )
        return answer

    def rounds_of(self, programs: list[str], task: Callable[[int], Task]) -> Runs:
        """Return the runs of each program, alternating the programs; ``task`` makes the task of a round."""
        runs: Runs = {program: [] for program in programs}
        for number in range(self.rounds):
            for program in programs:
                runs[program].append(self.run(program, task(number)))
        return runs


def compare_steps(runs: Runs) -> dict[str, Any]:
    """Compare the cost of a step."""
    pairs = [("opdlab", other) for other in runs if other != "opdlab"] + [("opdlab_compiled", "bare")]
    ratios = {
        f"{program}/{other}": {
            figure: pairwise_ratios([r[figure] for r in runs[program]], [r[figure] for r in runs[other]])
            for figure in FIGURES
        }
        for program, other in pairs
        if program in runs and other in runs
    }
    return {"runs": runs, "ratios": ratios, "medians": {name: _medians(rows) for name, rows in runs.items()}}


def check_equal_tokens(runs: Runs, tokens: int) -> None:
    """Raise if a run did not train on the intended number of tokens."""
    for program, rows in runs.items():
        for row in rows:
            if round(row["trained_tokens"]) != tokens:
                raise SystemExit(f"{program} trained on {row['trained_tokens']} tokens instead of {tokens}")


def compare_targets(runs: Runs) -> dict[str, Any]:
    """Compare the training times to the target."""
    ratios = {}
    for other in runs:
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
    """Return the interpreter with TRL: the given one, or this one."""
    python = given or sys.executable
    check = [python, "-c", "import importlib.metadata as m; print(m.version('trl'))"]
    try:
        done = subprocess.run(check, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return python if done.returncode == 0 else None


def _no_compiler() -> str | None:
    """Return why torch.compile cannot be used here; None if it can."""
    from opdlab.errors import UsageError
    from opdlab.policies.compiling import require_compiler

    try:
        require_compiler("student")
    except UsageError as error:
        return str(error)
    return None


# -- tables ----------------------------------------------------------------------------------------------------------


def _step_rows(steps: dict[str, Any]) -> Iterator[list[str]]:
    for program, rows in steps["runs"].items():
        middle = steps["medians"][program]
        yield [
            program,
            spread([row["seconds_per_step"] for row in rows], 3),
            f"{middle['processor_seconds_per_step']:.3f}",
            f"{middle['sampled_tokens']:.0f}",
            f"{middle['trained_tokens']:.0f}",
            f"{middle['milliseconds_per_1000_tokens']:.1f}",
        ]


def _part_rows(medians: dict[str, dict[str, float]]) -> Iterator[list[str]]:
    for program, middle in medians.items():
        seconds = [middle[f"{part}_seconds"] for part in PARTS]
        steps = middle["steps"]
        rest = middle["seconds_per_step"] - sum(seconds) / steps
        parts = [f"{part:.3f}" for part in (*(second / steps for second in seconds), rest)]
        yield [program, *parts, f"{middle['seconds_outside_steps']:.2f} s"]


def report(results: dict[str, Any]) -> None:
    """Print tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120)  # the same in a terminal, a log and a document
    if steps := results.get("step"):
        table = Table(
            *("program", "s a step", "CPU s a step", "tokens sampled", "tokens trained", "ms per 1000 trained"),
            title=f"{results['options']['case']}, {results['options']['steps']} optimizer steps: median [range]",
        )
        for row in _step_rows(steps):
            table.add_row(*row)
        console.print(table)
        table = Table("s a step, medians", *PARTS, "rest", "once a run")
        for row in _part_rows(steps["medians"]):
            table.add_row(*row)
        console.print(table)
        table = Table("ratio, pair by pair", *FIGURES.values())
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


# -- the command line ------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="toy", help="what is distilled (default: %(default)s)")
    steps = ", ".join(f"{case.steps} for {name}" for name, case in CASES.items())
    parser.add_argument("--steps", type=int, help=f"optimizer steps of a run (default: {steps})")
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
    parser.add_argument("--target", type=float, help="pass@1 to train to, of the toy (default: 0.8)")
    parser.add_argument("--max-steps", type=int, default=120, help="give up on it after so many (default: %(default)s)")
    folders = ", ".join(f"{case.models.name} for {name}" for name, case in CASES.items() if case.fixed_length)
    parser.add_argument(
        "--models", type=Path, help=f"folder with another student and teacher (default: the shipped toy, {folders})"
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--child", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _measurements(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[str]:
    possible = ["step", "target"] if given.case == "toy" else ["step"]
    if given.case != "toy" and ("target" in given.only or given.target is not None):
        parser.error(f"--case {given.case} has no target: pass@1 is measured on the toy only")
    return [name for name in possible if name in given.only] or possible


def measure(given: argparse.Namespace, measurements: list[str], models: Path) -> dict[str, Any]:
    """Run all requested measurements."""
    case = CASES[given.case]
    programs = [program for program in PROGRAMS if program in given.only] or list(PROGRAMS)
    trl_python = _trl_python(given.trl_python) if "trl" in programs else None
    if "trl" in programs and trl_python is None:
        programs.remove("trl")
        print("TRL skipped: it is not installed here; give --trl-python an interpreter that has it", file=sys.stderr)
    if "opdlab_compiled" in programs and (reason := _no_compiler()) is not None:
        programs.remove("opdlab_compiled")
        print(f"opdlab_compiled skipped: {reason}", file=sys.stderr)
    options = Options(given.rounds, given.threads, trl_python)
    steps, target = given.steps or case.steps, 0.8 if given.target is None else given.target
    names = ("case", "rounds", "threads", "max_steps")
    results: dict[str, Any] = {
        "machine": machine(),
        "options": {**{name: getattr(given, name) for name in names}, "steps": steps, "target": target},
    }
    if "step" in measurements:
        runs = options.rounds_of(programs, lambda number: Task(given.case, models, steps, number))
        if case.fixed_length:
            check_equal_tokens(runs, steps * case.batch_size * case.max_new_tokens)
        results["step"] = compare_steps(runs)
    if "target" in measurements:
        compared = [program for program in programs if program in ("opdlab", "trl")]
        runs = options.rounds_of(compared, lambda number: Task(given.case, models, given.max_steps, number, target))
        results["target"] = compare_targets(runs)
    rows = [row for name in measurements for rows in results[name]["runs"].values() for row in rows]
    results["versions"] = {row["program"]: row.pop("versions") for row in rows}
    return results


def main() -> None:
    """Measure, print, write."""
    parser = _parser()
    given = parser.parse_args()
    models = given.models or CASES[given.case].models
    if given.child:
        child(given.child, Task(given.case, models, given.steps, given.seed, given.target), given.threads)
        return
    measurements = _measurements(parser, given)
    if not (models / "student").is_dir():
        parser.error(f"{models}/student is missing: `python benchmarks/make_smollm2_pair.py {models}` makes it")
    with endless(models) if CASES[given.case].fixed_length else contextlib.nullcontext(models) as folder:
        results = measure(given, measurements, folder)
    report(results)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
