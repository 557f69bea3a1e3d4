"""``opdlab replay``: replay recorded steps under every gate, without retraining, or pack them into one file."""

import shlex
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from rich.console import Console

from opdlab.cli.choices import chosen_gates, chosen_objectives, split_words
from opdlab.cli.commands import COMMANDS, PlainParser
from opdlab.cli.overrides import check_overrides
from opdlab.cli.replay_sources import PackSource, RunSource, Source
from opdlab.errors import UsageError, require
from opdlab.files import output_folder
from opdlab.objectives import Objective
from opdlab.replay import objectives as named
from opdlab.replay.comparison import ReplayedStep
from opdlab.replay.fresh import Draws, sampled_draws
from opdlab.replay.gate_summary import console_table, summarise, undefined
from opdlab.replay.pack import write_pack
from opdlab.replay.plugins import Named
from opdlab.replay.record import RecordedStep
from opdlab.replay.report import FILES, reproduction, write_results
from opdlab.replay.steps import ReplayConfig, Replayer, prepare
from opdlab.replay.targets import unserved
from opdlab.replay.unpack import Pack
from opdlab.replay.variants import NORMALIZATIONS, STATISTICS, Grid, gate_name

_LISTS = ("statistics", "normalizations", "taus", "steps")
# Arguments that have no effect on a pack.
_OF_REPLAYS = ("gates", "objectives", "statistics", "normalizations", "taus", "tolerance", "parts", "out")
_MIB = 1 << 20


def parser() -> PlainParser:
    """Return the parser of ``opdlab replay``.

    Arguments that begin with ``--model.``, ``--data.`` or ``--trainer.`` override the run's configuration.
    """
    made = PlainParser(
        prog="opdlab replay",
        description=f"{COMMANDS['replay'].summary} The run is one of fit --save_pools true. "
        "Lists are separated by spaces or commas. Options of a gate or objective follow its name: "
        "support_divergence:tail=drop,k=8. --model.…, --data.… and --trainer.… override the run's own configuration, "
        "for a teacher that has moved, say.",
        allow_abbrev=False,
    )
    made.add_argument("run", type=Path, metavar="RUN", help="the run's folder with config.yaml and pools/, or a pack")
    plugins = "names or class paths, with options, or YAML"
    made.add_argument("--gates", nargs="+", help=f"{plugins}; all by default")
    made.add_argument("--objectives", nargs="+", help=f"{plugins}, besides the run's own")
    made.add_argument("--statistics", nargs="+", default=list(STATISTICS), help=", ".join(STATISTICS))
    made.add_argument("--normalizations", nargs="+", default=list(NORMALIZATIONS), help=", ".join(NORMALIZATIONS))
    made.add_argument("--taus", nargs="+", default=["1", "5", "20"], help="per nat; 1, 5 and 20 by default")
    made.add_argument("--steps", nargs="+", help="recorded steps to replay, counted from 1; all by default")
    made.add_argument("--draws", type=int, help="independent batches of fresh rollouts a step; 4, or a pack's")
    made.add_argument("--seed", type=int, help="of the fresh rollouts; 0, or a pack's")
    made.add_argument("--other_prompts", action="store_true", help="compare with fresh rollouts of other prompts too")
    made.add_argument(
        "--tolerance", type=float, default=0.01, help="error at which gates share backward passes; 0.01; 0 is exact"
    )
    made.add_argument(
        "--parts", action="store_true", help="also weights and gradients by position and kind of token (parts.csv)"
    )
    made.add_argument("--out", type=Path, metavar="DIR", help="where results go; RUN/replay, or PACK-replay")
    made.add_argument(
        "--pack",
        type=Path,
        metavar="FILE",
        help="write a pack: the steps with fresh rollouts, replayed without teacher",
    )
    return made


def replay(arguments: Sequence[str]) -> int:
    """Run ``opdlab replay``: replay a run or a pack and write the results, or write a pack. Return the exit code.

    Args:
        arguments: arguments after ``replay``.

    Raises:
        UsageError: an argument, the run or its configuration is invalid.
    """
    require(bool(arguments), "give a run's folder, such as runs/quickstart/version_0; see opdlab replay --help")
    options, overrides = _parsed(arguments)
    if options.pack is not None:
        given = {word.partition("=")[0] for word in arguments}
        for name in _OF_REPLAYS:
            require(f"--{name}" not in given, f"--{name} has no effect with --pack: give it when the pack is replayed")
        return _pack(options, overrides)
    gates = None if options.gates is None else chosen_gates(options.gates)
    grid = Grid(gates, options.statistics, options.normalizations, options.taus)
    objectives = chosen_objectives(options.objectives or ())
    # A folder's message also serves for what does not exist.
    source: Source
    source = PackSource(options.run, overrides) if options.run.is_file() else RunSource(options.run, overrides)
    steps = source.chosen(options.steps)
    sampling = source.sampling(options.draws, options.seed, options.other_prompts)
    config = ReplayConfig(**vars(sampling), tolerance=options.tolerance, parts=options.parts)
    out = output_folder(options.out or source.out, "--out", FILES)
    records = source.records(steps)
    judged = _check_objectives(source, objectives, records)
    started = time.perf_counter()
    built = source.build(sampling, judged)
    parts = (built.autocast, built.prompts, objectives, built.draws, built.verifier)
    replayer = Replayer(built.module, grid, config, *parts)
    found: list[ReplayedStep] = []
    console = Console()
    stopped: BaseException | None = None
    with console.status("replaying") as status:
        for record in records:
            status.update(f"replaying step {record.number} ({len(found) + 1} of {len(records)})")
            try:
                found.append(replayer.replay(record))
            except BaseException as error:  # also a signal: what was replayed is written
                if not found:
                    raise
                stopped = error
                break
    passes = sum(step.num_backward for step in found)
    about = [
        f"{len(found)} step{'s' * (len(found) != 1)} under {max(len(step.rows) for step in found)} gates in "
        f"{time.perf_counter() - started:.0f} s, with {passes} backward pass{'es' * (passes != 1)}; "
        f"fresh gradients: {config.draws} a step",
        *(f"left out: {name}, which {reason}" for name, reason in replayer.skipped.items()),
        *(
            f"left out: {name}, whose cosine with a fresh gradient is undefined at {steps}"
            for name, steps in undefined(found).items()
        ),
        reproduction(found, records),
    ]
    if stopped is not None:
        left = ", ".join(str(record.number) for record in records[len(found) :])
        about.insert(0, f"not replayed: step{'s' * (len(records) - len(found) > 1)} {left}")
    asked = None if gates is None else {gate_name(each) for each in gates}
    summaries = summarise(found, asked)
    write_results(out, found, summaries, about, sorted(grid.taus)[len(grid.taus) // 2], asked)
    if summaries:
        console.print(console_table(summaries, console.width))
    print(*about, f"results: {out}", sep="\n")
    if stopped is not None:
        raise stopped
    return 0


def _pack(options: Namespace, overrides: Sequence[str]) -> int:
    """Write a pack of a run, and print its size."""
    path: Path = options.pack
    require(not options.run.is_file(), f"'{options.run}' is a file: give --pack with a run's folder")
    require(not path.is_dir(), f"--pack '{path}' is a folder: give the name of a file, such as {path / 'run.pack'}")
    source = RunSource(options.run, overrides)
    sampling = source.sampling(options.draws, options.seed, options.other_prompts)
    records = source.records(source.chosen(options.steps))
    settings = source.pack_settings(sampling)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path.parent).close()  # fail before models are loaded
    except OSError as error:
        raise UsageError(f"--pack '{path}' cannot be made ({error.strerror}): give another name") from error
    built = source.build(sampling, bool(source.objective().needs))
    module = built.module
    prepare(module)
    with Console().status("packing") as status:

        def draws(record: RecordedStep) -> Draws:
            status.update(f"packing step {record.number} of {', '.join(str(each.number) for each in records)}")
            return sampled_draws(module, record, sampling, built.prompts, built.autocast, built.verifier)

        sizes = write_pack(path, module, settings, records, draws)
    parts = [
        f"{name} {sizes[name] / _MIB:.2f}" for name in ("weights", "steps", "draws", "student", "head") if name in sizes
    ]
    pack = Pack(path)
    print(
        f"{path}: {path.stat().st_size / _MIB:.2f} MiB ({', '.join(parts)}), steps {', '.join(map(str, pack.steps))}, "
        f"{sampling.draws} draws each, digest {pack.digest[:16]}",
        f"opdlab replay {shlex.quote(str(path))} needs no teacher, no folder of the run and no data",
        sep="\n",
    )
    return 0


def _check_objectives(
    source: Source, chosen: Sequence[str | Named[Objective]], records: Sequence[RecordedStep]
) -> bool:
    """Return whether an objective reads verdicts of the verifier.

    Raises:
        UsageError: one needs targets that no record has and no teacher can compute.
    """
    own, *others = named.chosen_objectives(chosen, source.objective())
    for each in others:
        for record in records:
            reason = unserved(record.batches[0], each.plugin.request, source.teacher)
            mend = "lower its k" if "most likely" in (reason or "").partition(", but")[0] else "leave it out"
            mend += ", or replay the run's folder, where the teacher computes what is missing" if source.teacher else ""
            mend += ", or record a run whose objective has them"
            require(reason is None, f"--objectives has '{each.name}', which {reason}: {mend}")
    return any(each.plugin.needs for each in (own, *others))


def _parsed(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Return the options, with lists split at commas, and the arguments that override the run's configuration."""
    known = parser()
    options, overrides = known.parse_known_args(arguments)
    check_overrides(overrides, vars(options), known.prog)
    if overrides and not overrides[0].startswith("-"):
        raise UsageError(f"'{overrides[0]}' is one argument too many: give one run's folder")
    for name in _LISTS:
        if (values := getattr(options, name)) is not None:
            setattr(options, name, list(dict.fromkeys(part for value in values for part in value.split(",") if part)))
    for name in ("gates", "objectives"):
        if (values := getattr(options, name)) is not None:
            setattr(options, name, list(dict.fromkeys(split_words(f"--{name}", values))))
    for name in ("gates", "objectives", "steps"):
        require(getattr(options, name) != [], f"--{name} is empty: give at least one, or leave the option out")
    try:
        options.taus = [float(text) for text in options.taus]
    except ValueError as error:
        raise UsageError(f"--taus is {' '.join(options.taus)}, but must be numbers, such as 1 5 ({error})") from error
    return options, overrides
