"""A plain argument parser for commands that read no configuration."""

import argparse
from typing import NoReturn

from opdlab.errors import UsageError


class PlainParser(argparse.ArgumentParser):
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
