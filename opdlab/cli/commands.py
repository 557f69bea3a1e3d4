"""The table of commands. A command's module is imported only when the command runs, so ``opdlab --help`` is fast.

Every user error prints one line to standard error and exits with code 2, a full disk or lack of memory with code 1, and
a signal with 128 plus its number.
"""

import atexit
import logging
import os
import re
import shutil
import sys
import textwrap
import warnings
from argparse import ArgumentError, ArgumentParser
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from opdlab.cli.streams import usable_streams
from opdlab.errors import (
    FullDiskError,
    OtherProcessError,
    UsageError,
    first_line,
    not_text,
    printable,
    require,
    signal_name,
    stop_signal,
)
from opdlab.out_of_memory import out_of_memory
from opdlab.processes import STOP, bound_exit, report_error, tie_to_others
from opdlab.registry import suggestion
from opdlab.version import __version__

EXIT_FAILED, EXIT_USAGE = 1, 2
_LEAST_TEXT = 30  # characters of a text beside its name


class PlainParser(ArgumentParser):
    """``argparse.ArgumentParser`` whose errors are a :class:`~opdlab.errors.UsageError` that names its ``--help``.

    Example:
        >>> PlainParser(prog="opdlab gates").parse_args(["stray"])
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: unrecognized arguments: stray; see opdlab gates --help
    """

    def error(self, message: str) -> NoReturn:
        """Raise a :class:`~opdlab.errors.UsageError` instead of printing the usage."""
        raise UsageError(f"{message}; see {self.prog} --help")


def listing(texts: Mapping[str, str]) -> str:
    """Return names with a text each, for a console: lines are as wide as the terminal, or as COLUMNS says.

    Elsewhere, as in a pipe to ``grep``, each name has one line.

    Args:
        texts: by name.
    """
    width = shutil.get_terminal_size((sys.maxsize, 0)).columns
    beside = max(map(len, texts), default=0) + 2
    behind = " " * (beside if width - beside >= _LEAST_TEXT else 2)  # narrow: the text goes on below the name
    firsts = {name: f"{name}  ".ljust(len(behind)) for name in texts}
    return "\n".join(
        textwrap.fill(text, width, initial_indent=firsts[name], subsequent_indent=behind, break_on_hyphens=False)
        for name, text in texts.items()
    )


@dataclass(frozen=True)
class Command:
    """A command of ``opdlab``.

    Args:
        function: its function, as ``module:function``. It takes the arguments after the name of the command and returns
            the exit code.
        summary: one line for ``opdlab --help``.
        prints: nothing is left of its work but what it prints, so without a reader it has not done it.
    """

    function: str
    summary: str
    prints: bool = False

    def __call__(self, arguments: Sequence[str]) -> int:
        """Import the command, run it, and return its exit code."""
        module, _, name = self.function.partition(":")
        code: int = getattr(import_module(module), name)(arguments)
        return code


COMMANDS: dict[str, Command] = {
    "fit": Command("opdlab.cli.app:fit", "Train a student, and evaluate it before and after."),
    "validate": Command("opdlab.cli.app:validate", "Evaluate a student on the benchmarks."),
    "test": Command("opdlab.cli.app:test", "Evaluate as validate does, in Lightning's test loop."),
    "screen": Command("opdlab.cli.screen:screen_command", "Say what distilling a pair will meet, before training."),
    "estimate": Command(
        "opdlab.cli.estimate:estimate_command", "Print the memory that fit needs; load no model.", prints=True
    ),
    "gates": Command("opdlab.cli.plugins:list_gates", "List the registered gates.", prints=True),
    "objectives": Command("opdlab.cli.plugins:list_objectives", "List the registered objectives.", prints=True),
    "configs": Command(
        "opdlab.cli.configs:configs_command", "List the shipped configurations, or copy one.", prints=True
    ),
    "init": Command("opdlab.cli.init:init", "Write a project of your own that runs on the toy pair."),
    "serve-teacher": Command("opdlab.cli.serve_teacher:serve_teacher", "Serve a teacher over HTTP."),
    "export": Command("opdlab.cli.export:export", "Write a checkpoint's student as a Hugging Face folder."),
    "report": Command("opdlab.cli.report:report_command", "Write one page about runs or studies."),
    "study": Command("opdlab.cli.study:study_command", "Compare variants over seeds."),
    "replay": Command("opdlab.cli.replay:replay", "Replay recorded steps of a run under other gates."),
}


def _run(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        if sys.stderr.isatty() and STOP.forward_to is None:  # imports take seconds
            print(f"opdlab {arguments[0]}: loading libraries", file=sys.stderr, flush=True)
        return COMMANDS[arguments[0]](arguments[1:])
    parser = PlainParser(
        prog="opdlab",
        description="Gated on-policy distillation of language models.",
        epilog="`opdlab COMMAND --help` shows the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    listed = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        listed.add_parser(name, help=command.summary, add_help=False)
    if not arguments:
        raise UsageError(f"give a command: {', '.join(COMMANDS)}; see opdlab --help")
    if not arguments[0].startswith("-"):
        hint = suggestion(arguments[0], COMMANDS) or ";"
        raise UsageError(f"unknown command '{arguments[0]}'{hint} commands: {', '.join(COMMANDS)}")
    parser.parse_args(arguments)
    raise UsageError("give the command first, then its options; see opdlab --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: without the program's name; those of the process by default.
    """
    # Makes user gates in the current folder importable by class_path, as with `python -m`.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    arguments = sys.argv[1:] if arguments is None else arguments
    with STOP.listening():
        try:
            for argument in arguments:
                trouble = not_text(argument)
                require(trouble is None, f"the argument {argument!a} is not text: {trouble}")
            return _run(arguments)
        except BaseException as error:
            if (stopped := stop_signal(error)) is not None:
                print(f"opdlab: stopped by {signal_name(stopped)}; to go on, run the same command", file=sys.stderr)
                return 128 + stopped
            if not isinstance(error, Exception):
                raise
            wrong = _told(error)
            failed = str(error) if isinstance(error, FullDiskError | OtherProcessError) else out_of_memory(error)
            if wrong is None and failed is None:
                report_error(printable(f"{type(error).__name__}: {first_line(error)}"), EXIT_FAILED)
                raise
            code = EXIT_USAGE if wrong is not None else getattr(error, "code", EXIT_FAILED)
            message = printable(wrong or failed or "")
            if not report_error(message, code):
                print(f"opdlab: error: {message}", file=sys.stderr)
            return code


def console() -> None:
    """Run the command line and exit: entry point of the ``opdlab`` command and of ``python -m opdlab``."""
    output = usable_streams()  # before any file is opened
    ended: list[int] = []  # the exit code of a process of several
    atexit.register(_leave, ended)  # before all others, so that it is called after them
    tie_to_others()  # before the slow import of libraries
    # Suppress a known harmless warning: Lightning uses a name that torch has renamed. Also suppress Lightning's
    # advertisement of a logger, and its line that there is no TPU.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    advert = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advert.addFilter(lambda record: not re.search("litlogger|^TPU available: False", record.getMessage()))
    # Python's default format names a file and quotes one of its lines.
    warnings.formatwarning = lambda message, category, *_: (
        f"{category.__name__}: {' '.join(map(printable, str(message).splitlines()))}\n"
    )
    started = STOP.forward_to is not None  # by the first process of the run
    try:
        code = main()
        prints = any(COMMANDS[name].prints for name in sys.argv[1:2] if name in COMMANDS)
    except SystemExit as stop:  # of argparse, which has printed a help text
        if isinstance(stop.code, str):
            raise
        code, prints = stop.code or 0, True
    sys.stdout.flush()
    code = output.exit_code(code, prints)
    if code > 128 or started:
        bound_exit()
    distributed = sys.modules.get("torch.distributed")
    if started or (distributed is not None and distributed.is_available() and distributed.is_initialized()):
        ended.append(code)
    raise SystemExit(code)


def _leave(codes: Sequence[int]) -> None:
    """End this process now, with the code if there is one: called after everything else that is registered for the end.

    A process of several was seen to be aborted, "terminate called without an active exception", when its work was done:
    threads of torch's process group outlive the interpreter, which takes itself apart. The run would count as failed.
    """
    if codes:
        logging.shutdown()  # registered when it was imported, so it would come after this
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(codes[0])


def _told(error: Exception) -> str | None:
    """Return one line about an error that a user can cause and fix; None for any other."""
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, ImportError):
        from opdlab.packages import package_trouble  # here, because one of its imports may be the missing package

        trouble = package_trouble(error)
        return trouble and f"opdlab {trouble}"
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")  # imported by some commands only
    if isinstance(error, ArgumentError) or (lightning and isinstance(error, lightning.MisconfigurationException)):
        return " ".join(str(error).split())
    return None
