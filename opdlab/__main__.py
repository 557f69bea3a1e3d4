"""Run the command line: ``opdlab``, or ``python -m opdlab``."""

from opdlab.cli import console as start

if __name__ == "__main__":
    start()
