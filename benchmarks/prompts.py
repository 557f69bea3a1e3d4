"""Memory and time of the first pass over training problems, against holding all prompts.

The problems are rows of a JSON Lines file: random chains of the toy, of which one in ten repeats an earlier row. Each
way runs in a process of its own: ``on demand`` is :meth:`PromptDataModule.prepare`; ``held`` makes a list of the same
prompts, as a run needs that reads a file at once.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from common import PeakMemory, machine, run_child, versions

WAYS = ("on demand", "held")
_LETTERS = "abcdefghijklmnop"


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """Write problems of the toy's alphabet, with ids and answers."""
    rng = random.Random(seed)
    rows: list[tuple[str, str]] = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            if rows and rng.random() < 0.1:
                problem, answer = rows[rng.randrange(len(rows))]
            else:
                steps = " ".join(f"{letter}{rng.choice('+-*')}{rng.randrange(10)}" for letter in _LETTERS[:11])
                problem, answer = f"{rng.randrange(100)} {steps}\n", str(rng.randrange(100))
                if len(rows) < 10_000:
                    rows.append((problem, answer))
            file.write(json.dumps({"id": f"row-{number}", "problem": problem, "answer": answer}) + "\n")


def measure(path: str, way: str) -> dict[str, Any]:
    """Return bytes and seconds for the problems of a file."""
    from opdlab.data import JsonlProblems, PromptDataModule
    from opdlab.toy import chain_tokenizer

    data, tokenizer = PromptDataModule(JsonlProblems(path)), chain_tokenizer()
    few = PromptDataModule(JsonlProblems(path, limit=1000))  # what is loaded on first use
    few.prepare(tokenizer, training=True)
    memory, started = PeakMemory(), time.perf_counter()
    data.prepare(tokenizer, training=True)
    assert data.train_prompts is not None
    assert data.cleaning_report is not None
    prompts = data.train_prompts.prompts
    if way == "held":
        prompts = list(prompts)
    seconds = time.perf_counter() - started
    peak, left = memory.extra_bytes(), memory.now_bytes()
    started = time.perf_counter()
    buffer = [prompts[index] for index in random.Random(0).sample(range(len(prompts)), min(512, len(prompts)))]
    each = (time.perf_counter() - started) / len(buffer)
    report = data.cleaning_report
    return {
        "rows": report.read,
        "kept": report.kept,
        "seconds": seconds,
        "peak_bytes": peak,
        "bytes": left,
        "seconds_per_prompt": each,
    }


def main() -> None:
    """Print a table, one line a way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, options.rows)
        size = path.stat().st_size
        found = {way: run_child(Path(__file__), ["--child", str(path), way], threads=1) for way in WAYS}
    print(f"{options.rows:,} rows, {size / options.rows:.0f} bytes a row in the file")
    print(f"{'':10} {'bytes a row':>12} {'at the peak':>12} {'seconds':>8} {'a prompt, ms':>13}")
    for way, row in found.items():
        each, peak = row["bytes"] / row["rows"], row["peak_bytes"] / row["rows"]
        print(f"{way:10} {each:12.0f} {peak:12.0f} {row['seconds']:8.1f} {1e3 * row['seconds_per_prompt']:13.3f}")
    if options.json:
        facts = {"machine": machine(), "versions": versions("torch", "transformers"), "results": found}
        options.json.write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
