"""Accuracy of verdicts on real gold answers: spellings that are equal, and perturbations that are not.

Each gold answer gets spellings of the same value (Unicode, decimals, order, boxes, …) and perturbations of it (another
number, sign, variable, unit, base, bracket, order, …). ``MathVerifier`` and math-verify alone judge the same responses.
The pairs are made by rules, so a few of them may be equal by accident: ``--show`` prints every pair that a verifier
judged otherwise than its rule.

``python benchmarks/verdicts.py DATA --golds 2000`` needs a folder of JSONL files with the field ``answer``.
"""

import argparse
import collections
import json
import logging
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from common import REPOSITORY, machine, versions
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(REPOSITORY))

from opdlab.verifiers import MathVerifier

Pair = tuple[str, str, str, bool]  # kind, gold, response, correct

_NUMBER = re.compile(r"(?<![0-9.,])[0-9]+(?![0-9]*[.,]?[0-9])")
_PLAIN = re.compile(r"-?[0-9]+")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")
_LETTER = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z](?![a-zA-Z}])")
_ONE_NUMBER = re.compile(r"-?\\?\$?[ 0-9.,!\\{}]+(?:\\%|\^.*)?")
_TEXT = re.compile(r"\\(?:text|textnormal|mbox)\s*\{[^{}]*\}")
_SYMBOLS = {
    **{"\\pi": "\u03c0", "\\infty": "\u221e", "^2": "\u00b2", "^\\circ": "\u00b0", "\\cup": "\u222a", "-": "\u2212"},
    **{"\\le ": "\u2264", "\\ge ": "\u2265", "\\in ": "\u2208", "\\pm": "\u00b1"},
}
_UNITS = ("cm", "meters", "apples", "hours")


def main() -> None:
    """Make the pairs, judge them twice, and print mistakes by kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of JSONL files with the field answer")
    parser.add_argument("--golds", type=int, default=2000, help="gold answers, drawn without repeats")
    parser.add_argument("--seed", type=int, default=0, help="selects gold answers and pairs")
    parser.add_argument("--workers", type=int, default=2, help="processes of MathVerifier")
    parser.add_argument("--show", action="store_true", help="print the pairs that were judged otherwise")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    pairs = make_pairs(arguments.data, arguments.golds, random.Random(arguments.seed))
    verdicts, seconds = {}, {}
    for name, judged in (("opdlab", _opdlab(arguments.workers)), ("math-verify", math_verify_alone)):
        started = time.perf_counter()
        verdicts[name] = judged([pair[2] for pair in pairs], [pair[1] for pair in pairs])
        seconds[name] = time.perf_counter() - started
    console = Console()
    rows = []
    for correct, title in ((True, "right answers judged wrong"), (False, "wrong answers judged right")):
        kinds = collections.Counter(pair[0] for pair in pairs if pair[3] is correct)
        table = Table(title, "pairs", *verdicts)
        for kind in [*kinds, "all"]:
            chosen = [i for i, pair in enumerate(pairs) if pair[3] is correct and kind in (pair[0], "all")]
            mistakes = {name: sum(found[i] is not correct for i in chosen) for name, found in verdicts.items()}
            rows.append({"correct": correct, "kind": kind, "pairs": len(chosen), **mistakes})
            table.add_row(kind, str(len(chosen)), *map(str, mistakes.values()))
        console.print(table)
    console.print(f"{len(pairs)} pairs; seconds: {', '.join(f'{name} {value:.0f}' for name, value in seconds.items())}")
    if arguments.show:
        for name, found in verdicts.items():
            for (kind, gold, response, correct), verdict in zip(pairs, found, strict=True):
                if verdict is not correct:
                    print(f"{name}: {kind}: gold {gold!r}, response {response!r}, correct by rule: {correct}")
    if arguments.json:
        result = {"machine": machine(), "versions": versions("math-verify", "sympy"), "rows": rows, "seconds": seconds}
        arguments.json.write_text(json.dumps(result, indent=1))


def make_pairs(folder: Path, count: int, generator: random.Random) -> list[Pair]:
    """Return two spellings and two perturbations of each gold answer, as far as rules apply to it."""
    golds = sorted(
        {
            json.loads(line)["answer"]
            for path in folder.glob("*.jsonl")
            for line in path.read_text(encoding="utf-8").strip().split("\n")
        }
    )
    plain = [gold for gold in golds if _PLAIN.fullmatch(gold)]
    others = [gold for gold in golds if not _PLAIN.fullmatch(gold)]
    chosen = generator.sample(plain, min(count // 4, len(plain)))
    chosen += generator.sample(others, min(count - len(chosen), len(others)))
    pairs: list[Pair] = []
    for gold in chosen:
        for rules, correct in ((spellings, True), (perturbations, False)):
            made = [(kind, text) for kind, text in rules(gold, generator) if correct or text != gold]
            for kind, text in generator.sample(made, min(2, len(made))):
                response = text if "boxed" in text or "fbox" in text else f"\\boxed{{{text}}}"
                pairs.append((kind, gold, f"Adding up, we find ${response}$.", correct))
    return pairs


def spellings(gold: str, generator: random.Random) -> Iterator[tuple[str, str]]:
    """Yield texts with the same value as the gold answer."""
    yield "itself", gold
    yield "box", generator.choice([f"\\boxed {{{gold}}}", f"\\fbox{{{gold}}}", f"\\boxed{{\\text{{}}{gold} .}}"])
    yield "spacing", re.sub(r"(?<=[,+=])(?![!\\])", r"\\; ", re.sub(r"\\[dt]?frac", r"\\dfrac", gold))
    yield "fullwidth digits", re.sub("[0-9]", lambda digit: chr(ord(digit[0]) + 0xFEE0), gold)
    yield "zero-width space", re.sub("(?<=[0-9])(?=[0-9])", "\u200b", gold)
    unicode = re.sub(r"\\sqrt(?:\{([0-9]+)\}|([0-9])(?![0-9]))", lambda root: "\u221a" + (root[1] or root[2]), gold)
    for command, symbol in _SYMBOLS.items():
        unicode = unicode.replace(command, symbol)
    if unicode != gold and "begin" not in gold:
        yield "Unicode", unicode
    if _PLAIN.fullmatch(gold):
        yield "decimal", gold + ".0"
        yield "fraction", f"\\frac{{{2 * int(gold)}}}{{2}}"
        yield "unit", f"{gold}\\text{{ {generator.choice(_UNITS)}}}"
        yield "unit in Chinese", gold + generator.choice(["\u4e2a", "\u5398\u7c73", "\u5143"])
        yield "sentence in Chinese", f"\u7b54\u6848\u662f{gold}"
        yield "assignment", f"x = {gold}"
        yield "chain", f"x = {int(gold) + 1} - 1 = {gold}"
        yield "thousands", f"{int(gold):,}"
    if match := _FRACTION.fullmatch(gold):
        sign, upper, lower = match.groups()
        yield "slash", f"{sign}{upper}/{lower}"
        yield "expanded fraction", f"{sign}\\frac{{{3 * int(upper)}}}{{{3 * int(lower)}}}"
        if len(upper) == len(lower) == 1:
            yield "fraction without braces", f"{sign}\\frac{upper}{lower}"
    match = re.fullmatch(r"(.*[0-9].*\S)\s*\\(?:text|mbox)\s*\{[^{}.]*[a-z]{3}[^{}.]*\}(?:\^2|\^3)?", gold)
    if match and "\\text" not in match[1]:
        yield "without the unit", match[1]
    items = _items(gold)
    if len(items) > 1:
        yield "other order", ", ".join(reversed(items))
        yield "several boxes", " and ".join(f"\\boxed{{{item}}}" for item in items)
        yield "braces", "\\{" + ", ".join(items) + "\\}"
    if "\\cup" in gold and "," in gold:
        yield "other order", " \\cup ".join(reversed(gold.split("\\cup")))


def perturbations(gold: str, generator: random.Random) -> Iterator[tuple[str, str]]:
    """Yield texts with another value than the gold answer."""
    yield from _other_numbers(gold, generator)
    yield from _other_structure(gold)
    symbols = _TEXT.sub(lambda text: "{" * len(text[0]), gold)
    letters = [letter for letter in _LETTER.finditer(symbols) if letter[0] not in "dei"]
    if letters and "begin" not in gold and len(gold) > 1:
        letter = generator.choice(letters)
        other = generator.choice([other for other in "bkuvw" if other not in gold])
        yield "another variable", gold[: letter.start()] + other + gold[letter.end() :]
    if match := re.fullmatch(r"(.*[0-9}])(\s*\\(?:text|mbox)\s*\{)\s*([a-z]{2,})[^{}]*\}", gold):
        other = next(unit for unit in ("seconds", "kilograms") if unit[:3] != match[3][:3])
        yield "another unit", f"{match[1]}{match[2]} {other}}}"
    for old, new in (("+", "-"), (" - ", " + "), ("<", ">"), ("\\le", "\\ge"), ("\\sin", "\\cos"), ("\\cup", "\\cap")):
        if old in gold and "left" not in gold and "pm" not in gold:
            yield "another operator", gold.replace(old, new, 1)


def _other_numbers(gold: str, generator: random.Random) -> Iterator[tuple[str, str]]:
    numbers = [number for number in _NUMBER.finditer(gold) if not gold[: number.start()].endswith("phantom -")]
    if numbers:
        number = generator.choice(numbers)
        before, after = gold[: number.start()], gold[number.end() :]
        yield "another number", f"{before}{int(number[0]) + generator.choice([1, 2, 10])}{after}"
        if number[0] != number[0][::-1]:
            yield "digits reversed", f"{before}{number[0][::-1]}{after}"
        if not _ONE_NUMBER.fullmatch(gold) and not _TEXT.search(gold) and not re.search("=|mathbf", gold):
            yield "a number in it", number[0]
    if gold != "0" and (_FRACTION.fullmatch(gold) or re.fullmatch(r"-?[0-9]+|-?[0-9]*\\(?:sqrt|pi)[^,+-]*", gold)):
        yield "negative", gold[1:] if gold.startswith("-") else f"-{gold}"
        yield "variable after it", f"{gold}{generator.choice('txsm')}"
        yield "tiny difference", f"{gold} + 10^{{-20}}"
        yield "multiple", f"{gold} \\times 10^{{{generator.choice([-9, -1, 1, 9])}}}"
    if _PLAIN.fullmatch(gold):
        yield "base", f"{gold}_{{{generator.choice([8, 9])}}}" if set(gold) <= set("-01234567") else f"{gold}_{{11}}"
        yield "open box", f"\\boxed{{{gold}}} and \\boxed{{{gold}"
        yield "earlier box", f"\\boxed{{{gold}}}, but the sign is wrong: \\boxed{{{int(gold) + 3}}}"
    if match := re.fullmatch(r"([0-9]+_)\{?([0-9])\}?", gold):
        yield "another base", f"{match[1]}{int(match[2]) + 1}"
        yield "without the base", match[1][:-1]


def _other_structure(gold: str) -> Iterator[tuple[str, str]]:
    if match := re.search(r"(\\sqrt|\^)\{[^{}]*(\})([a-zA-Z0-9])", gold):
        yield "a brace moved", f"{gold[: match.start(2)]}{match[3]}}}{gold[match.end() :]}"
    items = _items(gold)
    if len(set(items)) > 1:
        yield "an item less", ", ".join(items[:-1])
        yield "an item more", ", ".join([*items, "12345"])
    if match := re.fullmatch(r"(?:\\left)?\s*([(\[])([^()\[\]]*?)(?:\\right)?\s*([)\]])", gold):
        parts = [part.strip() for part in match[2].split(",")]
        if match[1] + match[3] == "()" and parts != parts[::-1]:
            yield "other order", f"({', '.join(reversed(parts))})"
        if len(parts) == 2 and (match[1] == "[") != (match[3] == "]"):
            opening, closing = ("(", "]") if match[1] == "[" else ("[", ")")
            yield "other brackets", f"{opening}{match[2]}{closing}"


def _items(gold: str) -> list[str]:
    """Return the items of a plain list of single answers; empty for anything else."""
    if re.search(r"[()\[\]=<>]|\\text|\\mbox|begin|\\!|\{,\}|\\\{", gold) or re.search(r"[0-9],[0-9]{3}", gold):
        return []
    items = [re.sub(r"^\\,|\\,$", "", item.strip()).strip() for item in gold.split(",")]
    return items if len(items) > 1 and all(items) else []


def _opdlab(workers: int) -> Callable[[Sequence[str], Sequence[str]], list[bool]]:
    verifier = MathVerifier(num_workers=workers, time_limit=10.0)
    verifier.verify([r"\boxed{x}"], ["y"])  # the start of the processes is not measured
    return lambda responses, golds: [verdict.correct for verdict in verifier.verify(responses, golds)]


def math_verify_alone(responses: Sequence[str], golds: Sequence[str]) -> list[bool]:
    """Return the verdicts of math-verify as its documentation uses it."""
    from math_verify import parse, verify

    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return [verify(parse(f"${gold}$"), parse(response)) for response, gold in zip(responses, golds, strict=True)]


if __name__ == "__main__":
    main()
