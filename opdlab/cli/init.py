"""``opdlab init``: write a small project that runs on the toy pair."""

import importlib.resources
import json
import shlex
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from opdlab.cli.commands import COMMANDS, PlainParser
from opdlab.errors import UsageError, require

_NUM_PROBLEMS = {"train": 256, "held_out": 32}


def init(arguments: Sequence[str]) -> int:
    """Run ``opdlab init``, and return the exit code.

    Raises:
        UsageError: the folder is not empty or cannot be written.
    """
    parser = PlainParser(prog="opdlab init", description=COMMANDS["init"].summary)
    parser.add_argument("folder", metavar="FOLDER", help="made if it is missing; must be empty")
    given = parser.parse_args(arguments).folder
    require(bool(given), "FOLDER is empty: give the name of a new folder")
    folder = Path(given)
    from opdlab.toy.chain import chain_problems  # after the arguments are accepted: it imports transformers

    try:
        empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        require(empty, f"FOLDER is {folder}, which is there and not empty: give a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        for file in importlib.resources.files("opdlab.cli").joinpath("starter").iterdir():
            (folder / file.name.removesuffix(".txt")).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
        for split, count in _NUM_PROBLEMS.items():
            rows = (
                {"id": f"{split}-{number}", "problem": chain.prompt, "answer": chain.answer}
                for number, chain in enumerate(islice(chain_problems(split, 0), count))  # type: ignore[arg-type]
            )
            (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"FOLDER is {folder}, which cannot be written: {error.strerror}; give another one") from error
    print(f"wrote {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    print(f"run it with: cd {shlex.quote(str(folder))} && opdlab fit -c config.yaml; check it with: pytest")
    return 0
