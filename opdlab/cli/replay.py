"""``opdlab replay RUN``: replay recorded steps of a run under every gate, without retraining."""

import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.pytorch import seed_everything
from rich.console import Console

from opdlab.cli.building import build
from opdlab.cli.commands import COMMANDS, PlainParser
from opdlab.cli.estimate import refuse_oversized
from opdlab.cli.parsing import fit_parser, parse_fit
from opdlab.errors import UsageError, require
from opdlab.registry import suggestion
from opdlab.replay.charts import cosines_by_age, sample_sizes, save
from opdlab.replay.gate_summary import (
    GateSummary,
    console_table,
    markdown,
    objective_table,
    step_table,
    summarise,
    write_rows,
)
from opdlab.replay.objectives import objective_class
from opdlab.replay.record import FOLDER, RecordedStep, read_record, record_folders
from opdlab.replay.steps import ReplayConfig, ReplayedStep, Replayer
from opdlab.replay.variants import NORMALIZATIONS, STATISTICS, Grid, gate_class
from opdlab.types import Prompt

CONFIG = "config.yaml"
_PASSED_ON = ("--model.", "--data.", "--trainer.")
_LISTS = ("gates", "objectives", "statistics", "normalizations", "taus", "steps")


def parser() -> PlainParser:
    """Return the parser of ``opdlab replay``.

    Arguments that begin with ``--model.``, ``--data.`` or ``--trainer.`` override the run's configuration.
    """
    made = PlainParser(
        prog="opdlab replay",
        description=f"{COMMANDS['replay'].summary} The run is one of fit --save_pools true. "
        "Lists are separated by spaces or commas. --model.…, --data.… and --trainer.… override the run's own "
        "configuration, for a teacher that has moved, say.",
        allow_abbrev=False,
    )
    made.add_argument("run", type=Path, metavar="RUN", help="the run's folder, which holds config.yaml and pools/")
    made.add_argument("--gates", nargs="+", help="registered names or class paths; all by default")
    made.add_argument("--objectives", nargs="+", help="registered names or class paths, besides the run's own")
    made.add_argument("--statistics", nargs="+", default=list(STATISTICS), help=", ".join(STATISTICS))
    made.add_argument("--normalizations", nargs="+", default=list(NORMALIZATIONS), help=", ".join(NORMALIZATIONS))
    made.add_argument("--taus", nargs="+", default=["1", "5", "20"], help="per nat; 1, 5 and 20 by default")
    made.add_argument("--steps", nargs="+", help="recorded steps to replay, counted from 1; all by default")
    made.add_argument("--draws", type=int, default=4, help="independent batches of fresh rollouts a step; 4")
    made.add_argument("--seed", type=int, default=0, help="of the fresh rollouts; 0")
    made.add_argument("--other_prompts", action="store_true", help="compare with fresh rollouts of other prompts too")
    made.add_argument(
        "--tolerance", type=float, default=0.01, help="error at which gates share backward passes; 0.01; 0 is exact"
    )
    made.add_argument("--out", type=Path, metavar="DIR", help="where results go; RUN/replay by default")
    return made


def replay(arguments: Sequence[str]) -> int:
    """Run ``opdlab replay``: replay a run, write the results, and return the exit code.

    Args:
        arguments: arguments after ``replay``.

    Raises:
        UsageError: an argument, the run or its configuration is invalid.
    """
    require(bool(arguments), "give a run's folder, such as runs/quickstart/version_0; see opdlab replay --help")
    options, overrides = _parsed(arguments)
    config = ReplayConfig(options.draws, options.seed, options.other_prompts, options.tolerance)
    grid = Grid(options.gates, options.statistics, options.normalizations, options.taus)
    folders = chosen_folders(options.run, options.steps)
    out = options.out or options.run / "replay"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out '{out}' cannot be made ({error.strerror}): give another folder") from error
    records = [read_record(folder) for folder in folders.values()]
    for name in grid.gates or ():
        gate_class(name)  # fail before models are loaded
    for name in options.objectives or ():
        objective_class(name)
    started = time.perf_counter()
    replayer = _replayer(options.run, overrides, grid, config, options.objectives or ())
    steps: list[ReplayedStep] = []
    console = Console()
    with console.status("replaying") as status:
        for record in records:
            status.update(f"replaying step {record.number} ({len(steps) + 1} of {len(records)})")
            steps.append(replayer.replay(record))
    about = [
        f"{len(steps)} step{'s' * (len(steps) != 1)} under {max(len(step.rows) for step in steps)} gates in "
        f"{time.perf_counter() - started:.0f} s, with {sum(step.num_backward for step in steps)} backward passes; "
        f"fresh gradients: {config.draws} a step",
        *(f"left out: {name}, which {reason}" for name, reason in replayer.skipped.items()),
        reproduction(steps, records),
    ]
    summaries = summarise(steps)
    write_results(out, steps, summaries, about, sorted(grid.taus)[len(grid.taus) // 2])
    if summaries:
        console.print(console_table(summaries))
    print(*about, f"results: {out}", sep="\n")
    return 0


def _parsed(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Return the options, with lists split at commas, and the arguments that override the run's configuration."""
    known = parser()
    options, overrides = known.parse_known_args(arguments)
    for flag in overrides:
        key = flag.partition("=")[0]
        hint = suggestion(key, [f"--{name}" for name in vars(options)]) or ";"
        require(
            not key.startswith("-") or key.startswith(_PASSED_ON) or key.lstrip("-")[:1].isdigit(),
            f"unknown option '{key}'{hint} see {known.prog} --help",
        )
    if overrides and not overrides[0].startswith("-"):
        raise UsageError(f"'{overrides[0]}' is one argument too many: give one run's folder")
    for name in _LISTS:
        if (values := getattr(options, name)) is not None:
            setattr(options, name, list(dict.fromkeys(part for value in values for part in value.split(",") if part)))
    try:
        options.taus = [float(text) for text in options.taus]
    except ValueError as error:
        raise UsageError(f"--taus is {' '.join(options.taus)}, but must be numbers, such as 1 5 ({error})") from error
    return options, overrides


def _replayer(
    run: Path, overrides: Sequence[str], grid: Grid, config: ReplayConfig, objectives: Sequence[str]
) -> Replayer:
    settings = parse_fit(["-c", str(run / CONFIG), "--ckpt_path", "null", *overrides])
    if settings.check_memory:
        refuse_oversized(settings)
    seed_everything(settings.seed_everything, workers=True)  # adapters are initialised at random
    built = build(fit_parser(), settings)
    module, data = built.model, built.data
    # The replay uses one device, even if the run used more.
    fabric = Fabric(accelerator=settings.trainer.accelerator, devices=1, precision=settings.trainer.precision)
    module.to(fabric.device)
    prompts: list[Prompt] = []
    if config.other_prompts:
        data.prepare(module.student.tokenizer, training=True)
        prompts = list(data.train_prompts.prompts)
    return Replayer(module, grid, config, fabric.autocast, prompts, objectives)


def chosen_folders(run: Path, steps: Sequence[str] | None) -> dict[int, Path]:
    """Return the folders of the records to replay, by step number.

    Args:
        run: the run's folder.
        steps: step numbers, or None for all.

    Raises:
        UsageError: the folder is not a run, has no records, or lacks one of the steps.
    """
    require(run.is_dir(), f"'{run}' is not a folder: give a run's folder, such as runs/quickstart/version_0")
    inside = sorted(run.glob(f"version_*/{CONFIG}"), key=lambda path: path.stat().st_mtime_ns)
    hint = f"; did you mean {inside[-1].parent}?" if inside else ": give a folder such as runs/quickstart/version_0"
    require((run / CONFIG).is_file(), f"'{run}' is not a run's folder, since it has no {CONFIG}{hint}")
    found = record_folders(run)
    require(
        bool(found),
        f"'{run}' has no recorded steps in {FOLDER}/: train with --save_pools true (and --pool_recorder.every_n_steps)",
    )
    if steps is None:
        return found
    chosen = {}
    for step in steps:
        require(
            step.isdigit() and int(step) in found,
            f"--steps has '{step}', which was not recorded; there are {', '.join(map(str, found))}",
        )
        chosen[int(step)] = found[int(step)]
    return dict(sorted(chosen.items()))


def reproduction(steps: Sequence[ReplayedStep], records: Sequence[RecordedStep]) -> str:
    """Return a line that compares the losses replayed under the run's own gate with the recorded ones.

    Args:
        steps: the replayed steps.
        records: the records of the same steps.
    """
    equal = sum(step.recorded_loss == step.replayed_loss for step in steps)
    line = "under the run's own gate the recorded losses come out to the bit"
    if equal == len(steps):
        return f"{line}, at all of them"
    off = max(abs(step.replayed_loss - step.recorded_loss) / max(abs(step.recorded_loss), 1e-12) for step in steps)
    facts = records[0].facts
    return (
        f"{line} at {equal} of {len(steps)} steps; the largest relative difference is {off:.1e}. The run had "
        f"{facts.num_threads} threads on {facts.device}, precision {facts.precision}, torch {facts.torch_version}; "
        f"this replay has {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def write_results(
    out: Path, steps: Sequence[ReplayedStep], summaries: Sequence[GateSummary], about: Sequence[str], tau: float
) -> None:
    """Write ``replay.csv``, ``replay.md`` and pictures.

    Args:
        out: an existing folder.
        steps: the replayed steps.
        summaries: of the gates over the steps.
        about: lines about the replay.
        tau: of the gates in the picture by age, per nat.
    """
    write_rows(out / "replay.csv", steps)
    text = [
        "# Replay",
        "\n".join(f"- {line}" for line in about),
        "Gradients are those before clipping. Cosines with a fresh gradient are means over the draws; the ceiling is "
        "the mean cosine between two fresh gradients of the same student.",
        "## Steps",
        step_table(steps),
        "## Gates",
        f"Means over the {summaries[0].num_steps if summaries else 0} steps whose rollouts are stale. Change: cosine "
        "with fresh less that of the ungated gradient, paired by step, ± its standard error over the steps. So many "
        f"gates ({len(summaries)}) are compared that the best of them looks better than it is: confirm it on steps of "
        "another run.",
        markdown(summaries) if summaries else "No recorded step is stale.",
    ]
    if any(step.others for step in steps):
        text += [
            "## Objectives",
            "Means over all recorded steps, for gates of the paper's form. Each objective is compared with fresh "
            "gradients of its own. Losses of different objectives have different units and zeros.",
            objective_table(steps),
        ]
    (out / "replay.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    for reference in steps[0].ceilings:
        save(cosines_by_age(steps, tau, reference), out, f"cosine-{reference}")
    save(sample_sizes(steps), out, "sample-size")
