"""Starts the command line: ``opdlab``, or ``python -m opdlab``."""

import sys

from opdlab.processes import hold_lifeline


def start() -> None:
    """Entry point of the ``opdlab`` command. Loading the libraries takes seconds, in which Ctrl-C is heard too."""
    hold_lifeline()
    try:
        from opdlab.cli import console
    except KeyboardInterrupt:
        print("opdlab: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except ImportError as error:
        from opdlab.packages import package_trouble  # here, because it may be what is missing

        if (trouble := package_trouble(error)) is None:
            raise
        print(f"opdlab: error: opdlab {trouble}", file=sys.stderr)
        raise SystemExit(2) from None
    console()


if __name__ == "__main__":
    sys.argv[0] = "opdlab"  # what messages on usage call it
    start()
