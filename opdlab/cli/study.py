"""``opdlab study``: run the variants of a study, and report the results."""

import importlib.resources
import json
import re
import shlex
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from opdlab.cli.checks import check_files, check_model_folders
from opdlab.cli.commands import COMMANDS, listing
from opdlab.cli.parsing import parse_fit
from opdlab.cli.report import write_report
from opdlab.cli.shipped import config_path, shipped_configs
from opdlab.errors import UsageError, require
from opdlab.locks import locked
from opdlab.parser_messages import Explainer
from opdlab.registry import suggestion
from opdlab.studies.launch import Cluster, Launcher, default_jobs
from opdlab.studies.plan import Plan, Resolve, make_plan, take_over
from opdlab.studies.schema import FAILED, FINISHED, STUDY
from opdlab.studies.study import Study, read_study
from opdlab.studies.table import StudyTable

_ROOT = Path("runs/studies")
_COMMANDS = ("run", "report", "list")
# Hints for missing arguments.
_WANTED = {
    "run.study": "give a study: a file, or a name that `opdlab study list` shows",
    "report.folder": "give the folder of a study, such as runs/studies/paper-toy-mild",
}


def study_command(arguments: Sequence[str]) -> int:
    """Run ``opdlab study ARGUMENTS`` and return the exit code: 1 if a run has failed, 128 + n after signal n.

    Args:
        arguments: arguments after the name of the command.

    Raises:
        UsageError: an argument, the study or its folder is invalid.
    """
    require(bool(arguments), "opdlab study does nothing by itself: give run, report or list")
    try:
        config = parser().parse_args(list(arguments))
    except ArgumentError as error:
        raise UsageError(_explain(error, arguments[0])) from error
    if config.subcommand == "list":
        return _list()
    if config.subcommand == "report":
        return write_report([Path(config.report.folder)])
    return _run(config.run)


def plain_config(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the checked configuration of ``opdlab fit`` with ``arguments``, as plain values."""
    config: dict[str, Any] = json.loads(json.dumps(parse_fit(arguments).as_dict(), default=str))
    return config


def _explain(error: ArgumentError, command: str) -> str:
    text = str(error)
    for key, wanted in _WANTED.items():
        if text.endswith(f"required: {key}"):
            return wanted
    if "invalid choice" in text:
        return f"opdlab study has no '{command}'{suggestion(command, _COMMANDS) or ';'} give run, report or list"
    listing = f"opdlab study {command} --help" if command in _COMMANDS else "opdlab study --help"
    if match := re.search(r"unrecognized arguments: ([^-].*)$", text):
        return f"'{match[1]}' is one argument too many; `{listing}` lists what there is"
    keys = _run_parser().get_defaults().keys() if command == "run" else ()
    return Explainer(keys, listing)(error)


def parser() -> ArgumentParser:
    """Return the parser of ``opdlab study``."""
    made = ArgumentParser(prog="opdlab study", description=COMMANDS["study"].summary, exit_on_error=False)
    report = ArgumentParser(exit_on_error=False)
    report.add_argument("folder", type=str, help="Of the study, such as runs/studies/paper-toy-mild.")
    commands = made.add_subcommands()
    commands.add_subcommand("run", _run_parser(), help="Run what has not finished.")
    commands.add_subcommand("report", report, help="Compare what has.")
    commands.add_subcommand("list", ArgumentParser(exit_on_error=False), help="The shipped studies.")
    return made


def _run_parser() -> ArgumentParser:
    run = ArgumentParser(exit_on_error=False)
    run.add_argument("study", type=str, help="Its file, or the name of a shipped one; `opdlab study list` has them.")
    run.add_argument("--folder", type=str | None, default=None, help="Where to; runs/studies/NAME by default.")
    run.add_argument(
        "--jobs",
        type=int | None,
        default=None,
        help="Runs at a time; by default a GPU or a core for each process.",
    )
    run.add_argument(
        "--threads", type=int | None, default=None, help="CPU threads of each process, instead of the study's."
    )
    run.add_argument(
        "--share",
        type=str,
        nargs="+",
        action="extend",  # the option may be repeated
        default=[],
        metavar="DIR",
        help="Other studies, whose equal runs are taken over.",
    )
    run.add_argument("--cluster", type=str, default="local", help="local, slurm or debug: submitit's executors.")
    run.add_argument(
        "--parameters", type=dict[str, Any], default={}, help="Of the executor: --parameters.slurm_partition gpu"
    )
    return run


def shipped_studies() -> dict[str, Path]:
    """Return the path of each study shipped with opdlab, by name.

    Example:
        >>> "paper-toy-mild" in shipped_studies()
        True
    """
    root = Path(str(importlib.resources.files("opdlab.configs"))) / "studies"
    return {path.stem: path for path in sorted(root.glob("*.yaml"))}


def find_study(name: str) -> Path:
    """Return the file of a study, given its path or a shipped name.

    Raises:
        UsageError: the study does not exist.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_studies()
    key = name.removeprefix("configs/").removeprefix("studies/").removesuffix(".yaml")
    require(
        key in shipped,
        f"there is no study '{name}'{suggestion(key, shipped) or ';'} shipped: {', '.join(shipped)}",
    )
    return shipped[key]


def _list() -> int:
    first_lines = {
        name: path.read_text(encoding="utf-8").partition("\n")[0] for name, path in shipped_studies().items()
    }
    print(listing({name: line.removeprefix("# ") for name, line in first_lines.items()}))
    return 0


def _run(options: Namespace) -> int:
    file = find_study(options.study)
    study = read_study(file)
    if options.threads is not None:
        study = replace(study, threads=options.threads)
    folder = Path(options.folder or _ROOT / study.name)
    require(options.jobs is None or options.jobs >= 1, f"--jobs is {options.jobs}: give at least 1")
    shared = [Path(other) for other in options.share]
    for other in shared:
        require((other / STUDY).is_file(), f"--share has '{other}', which has no {STUDY}: give a study's folder")
    with _naming(file):
        plan = plan_study(study, folder, plain_config)
    cluster = Cluster(options.cluster, options.parameters)
    # Before the study has a folder.
    cluster.check(plan.runs())
    if cluster.name != "slurm" and not shared:  # SLURM's machines may have other files, and shared runs need none
        for name in dict.fromkeys(spec.variant for spec in plan.runs() if not spec.finished):
            with _naming(f"{file}: variants: '{name}'"):
                check_files(plan.configs[name])
                check_model_folders(plan.configs[name])
    with ExitStack() as stack:
        try:
            mine = stack.enter_context(locked(folder))  # two launchers would start the same runs twice
        except OSError as error:
            fault = f"--folder is '{folder}', which cannot be written ({error.strerror}): give another"
            raise UsageError(fault) from error
        require(mine, f"{folder} is in use by another `opdlab study run`: wait for it, or give another --folder")
        plan.settle()
        if number := take_over(plan.runs(), shared):
            print(f"{number} runs taken over from {', '.join(options.share)}")
        return _launch(plan, cluster, options.jobs)


@contextmanager
def _naming(place: Path | str) -> Iterator[None]:
    """Put the part of a study in which a mistake stands before its message."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from error


def plan_study(study: Study, folder: Path, resolve: Resolve) -> Plan:
    """Return the plan of a study, with its base names resolved and every variant checked; see :func:`make_plan`."""
    shipped = {file.resolve(): name for name, file in shipped_configs().items()}
    with _naming("base"):
        paths = [Path(config_path(name)).resolve() for name in study.base]
    return make_plan(replace(study, base=[shipped.get(path, str(path)) for path in paths]), folder, resolve)


def _launch(plan: Plan, cluster: Cluster, jobs: int | None) -> int:
    specs = plan.runs()
    bounds = cluster.parameters if cluster.name == "local" else {}
    launcher = Launcher(specs, cluster, jobs or default_jobs(specs, bounds))
    table = StudyTable(launcher, Console())
    steps = ", ".join(map(str, plan.study.evaluated_at))
    print(
        f"{plan.study.name}: {len(plan.study.variants)} variants x {len(plan.study.seeds)} seeds, "
        f"{launcher.count()[FINISHED]} of {len(specs)} runs finished; evaluated after {steps} steps; {plan.folder}"
    )
    with table.shown():
        for run in launcher.run():
            table.update(run)
    for run in launcher.runs:
        if run.state == FAILED:
            text = f"{run.spec.variant} seed {run.spec.seed} failed; {run.spec.path} has its log, which ends:"
            print(text, *(f"    {line}" for line in run.last_lines), sep="\n", file=sys.stderr)
    if launcher.signals:
        print(f"opdlab: stopped, {table.summary()}; to go on, run the same command", file=sys.stderr)
        return 128 + launcher.signals[0]
    if launcher.count()[FAILED]:
        print("opdlab: the same command tries failed runs again", file=sys.stderr)
        return 1
    compared = f"; compare them: opdlab study report {shlex.quote(str(plan.folder))}"
    print(f"all runs are in {plan.folder}{compared if len(plan.study.variants) > 1 else ''}")
    return 0
