"""Arguments of a command that override keys of a configuration."""

from collections.abc import Iterable, Sequence

from opdlab.errors import require
from opdlab.registry import suggestion

_PASSED_ON = ("--model.", "--data.", "--trainer.")


def check_overrides(arguments: Sequence[str], options: Iterable[str], prog: str) -> None:
    """Raise a UsageError if an argument is neither an override nor a value of one.

    Args:
        arguments: those that are no option of the command.
        options: names of the command's options.
        prog: name of the command, for the message.
    """
    known = [f"--{name}" for name in options]
    for flag in arguments:
        key = flag.partition("=")[0]
        require(
            not key.startswith("-") or key.startswith(_PASSED_ON) or key.lstrip("-")[:1].isdigit(),
            f"unknown option '{key}'{suggestion(key, known) or ';'} see {prog} --help",
        )
