"""``opdlab screen``: what will go right and wrong when a pair is distilled, before training."""

import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import rich.progress
from rich.console import Console

from opdlab.cli.commands import COMMANDS, PlainParser
from opdlab.cli.overrides import check_overrides
from opdlab.cli.screened_pair import VERIFIERS, Screened, pair_of_config, pair_of_paths
from opdlab.errors import NoMemoryError, require
from opdlab.files import output_folder
from opdlab.out_of_memory import out_of_memory
from opdlab.policies.loading import DType
from opdlab.progress import StoppableProgress
from opdlab.screening.outcome import screen
from opdlab.screening.report import JSON, PAGE, console_table, write_results

_OF_PATHS = ("student", "teacher", "prompts", "problem_field", "answer_field", "verifier", "chat", "dtype")


def parser() -> PlainParser:
    """Return the parser of ``opdlab screen``.

    Arguments that begin with ``--model.``, ``--data.`` or ``--trainer.`` override the configuration.
    """
    made = PlainParser(
        prog="opdlab screen",
        description=f"{COMMANDS['screen'].summary} Give two models and prompts, or the configuration of a run with -c; "
        "--model.…, --data.… and --trainer.… override the configuration. The exit code is 0 whatever the verdicts are.",
        allow_abbrev=False,
    )
    made.add_argument("-c", "--config", action="append", metavar="CONFIG", help="as for fit; later ones win")
    made.add_argument("--student", metavar="PATH", help="a folder, a hub id, or package://some.package/folder")
    made.add_argument("--teacher", metavar="PATH", help="the same, or the address of a served teacher, http://…")
    made.add_argument("--prompts", metavar="FILE", help="JSON Lines; gold answers are used if they are there")
    made.add_argument("--problem_field", default="problem", help="of the prompts: text or messages; problem")
    made.add_argument("--answer_field", help="of the prompts; answer, if they have it")
    made.add_argument("--verifier", choices=list(VERIFIERS), default="math", help="of the answers; math")
    made.add_argument("--chat", action="store_true", help="put prompts that are text into the student's chat template")
    made.add_argument("--dtype", choices=get_args(DType), default="float32", help="of both models; float32")
    made.add_argument("--num_prompts", type=int, default=32, help="of each set of problems; 32")
    made.add_argument("--num_samples", type=int, default=4, help="answers of each model to a prompt; 4")
    made.add_argument("--max_new_tokens", type=int, help="of an answer; the configuration's, or 256")
    made.add_argument("--temperature", type=float, help="the configuration's, or 1")
    made.add_argument("--top_p", type=float, help="the configuration's, or 1")
    made.add_argument("--k", type=int, default=64, help="largest support that is looked at; 64")
    made.add_argument("--batch_size", type=int, default=64, help="answers sampled or scored at a time; 64")
    made.add_argument("--seed", type=int, default=0, help="of the chosen prompts and the answers; 0")
    made.add_argument(
        "--out", type=Path, default=Path("runs/screen"), metavar="FOLDER", help="of the results; runs/screen"
    )
    return made


def screen_command(arguments: Sequence[str]) -> int:
    """Run ``opdlab screen``: print the checks, write the page and the JSON file, and return the exit code 0.

    Args:
        arguments: arguments after ``screen``.

    Raises:
        UsageError: an argument is invalid, models or prompts cannot be read, or the vocabularies differ.
    """
    options, overrides = _parsed(arguments)
    out = output_folder(options.out, "--out", (PAGE, JSON))
    with _naming_options(options), warnings.catch_warnings():
        # A check says it, and what follows from it.
        warnings.filterwarnings("ignore", message="Models disagree on the end of an answer")
        made = pair_of_config(options, overrides) if options.config else pair_of_paths(options)
    started = time.perf_counter()
    with _naming_options(options), _shown() as progress, made.autocast():
        result = screen(made.pair, made.config, StoppableProgress(progress))
    facts = _facts(options, overrides, made)
    write_results(out, result, facts)
    Console().print(console_table(result))
    print(f"{result.summary}, in {time.perf_counter() - started:.0f} s; {out / PAGE}, {out / JSON}")
    return 0


@contextmanager
def _naming_options(options: Namespace) -> Iterator[None]:
    """Raise lack of memory as an error that names the options of a screening."""
    models = "set --dtype to bfloat16"
    if options.config:
        models = "set model.student.dtype or model.teacher.dtype to bfloat16"
    try:
        yield
    except Exception as error:
        line = out_of_memory(error, f"lower --batch_size or --max_new_tokens, {models}, or give smaller models")
        if line is None:
            raise
        raise NoMemoryError(line) from error


def _facts(options: Namespace, overrides: Sequence[str], made: Screened) -> dict[str, Any]:
    facts: dict[str, Any] = {"student": made.pair.student.path, "teacher": made.teacher}
    if options.config:
        facts |= {"config": " ".join([*options.config, *overrides])}
    else:
        facts |= {"prompts": options.prompts}
    return facts | vars(made.config)


def _parsed(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Return the options, and the arguments that override the configuration."""
    known = parser()
    options, overrides = known.parse_known_args(arguments)
    check_overrides(overrides, vars(options), known.prog)
    paths = [name for name in ("student", "teacher", "prompts") if getattr(options, name) is not None]
    given = {word.partition("=")[0] for word in arguments}
    if options.config:
        other = next((name for name in _OF_PATHS if f"--{name}" in given), None)
        require(other is None, f"--{other} and -c are given: give one of them; --model.… and --data.… override -c")
        return options, overrides
    require(
        bool(paths),
        "give -c with a configuration such as quickstart, or --student, --teacher and --prompts; see "
        f"{known.prog} --help",
    )
    lacking = [f"--{name}" for name in ("student", "teacher", "prompts") if name not in paths]
    require(not lacking, f"{' and '.join(lacking)} missing: give student, teacher and prompts, or -c CONFIG")
    require(not overrides, f"{overrides[0] if overrides else ''} overrides a configuration, and there is none: give -c")
    return options, overrides


class _Bars:
    """Bars on a terminal; elsewhere a line for each task."""

    def __init__(self, bars: rich.progress.Progress) -> None:
        self._bars = bars

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """See :class:`opdlab.progress.Progress`."""
        if not self._bars.console.is_terminal:
            self._bars.console.print(name, markup=False, highlight=False)
        number = self._bars.add_task(name, total=total)
        yield lambda count: self._bars.advance(number, count)
        self._bars.update(number, completed=total)


@contextmanager
def _shown() -> Iterator[_Bars]:
    console = Console(stderr=True)
    with rich.progress.Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        yield _Bars(bars)
