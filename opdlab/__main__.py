"""Run the command line: ``opdlab``, or ``python -m opdlab``."""

import sys


def start() -> None:
    """Import the command line, run it and exit; Ctrl-C during the import is one line too."""
    try:
        from opdlab.cli import console  # here, because Ctrl-C may come while it is imported

        console()
    except KeyboardInterrupt:
        print("opdlab: stopped", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    start()
