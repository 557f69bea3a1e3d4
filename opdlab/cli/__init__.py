"""The command line, ``opdlab COMMAND …``; :data:`opdlab.cli.commands.COMMANDS` lists the commands."""

from opdlab.cli.commands import EXIT_USAGE, console, main

__all__ = ["EXIT_USAGE", "console", "main"]
