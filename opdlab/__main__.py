"""Run the command line: ``python -m opdlab`` is ``opdlab``."""

from opdlab.cli import console

if __name__ == "__main__":
    console()
