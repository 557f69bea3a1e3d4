"""Verifiers of functions, regular expressions and JSON schemas, against re, json and jsonschema in this process."""

import json
import math
import re
import sys
import time
from decimal import Decimal
from functools import partial
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from opdlab.cli import EXIT_USAGE, main
from opdlab.cli.parsing import parse_fit
from opdlab.errors import UsageError
from opdlab.verifiers import FunctionVerifier, JsonSchemaVerifier, NumericVerifier, RegexVerifier, Verdict

CHECKS = """
def check(response, answer):
    if response == "hang":
        while True:
            pass
    if response == "fill":
        return len(" " * (64 << 30)) == 1
    if response == "half":
        return 0.5
    if response.startswith("numpy"):
        import numpy
        return numpy.int64(response[5:]) if response != "numpy" else numpy.bool_(True)
    return 1.0 if float(response) == float(answer) else False

def one(response):
    return True

class Check:
    pass
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_checks", raising=False)
    (tmp_path / "own_checks.py").write_text(CHECKS)
    (tmp_path / "broken_checks.py").write_text("import no_such_package_here\n")
    (tmp_path / "failing_checks.py").write_text("1 / 0\n")
    (tmp_path / "script_checks.py").write_text("import sys\nsys.exit(0)\ndef check(response, answer): return True\n")
    return tmp_path


def test_a_function_decides_and_what_it_cannot_judge_is_wrong_and_said_once() -> None:
    verifier = FunctionVerifier("own_checks.check", num_workers=1, time_limit=0.5)
    numbers = ["1", "2.50", "-0", "7"]
    golds = ["1.0", "2.5", "0", "8"]
    accepted = [verdict.correct for verdict in verifier.verify(numbers, golds)]
    assert accepted == [Decimal(number) == Decimal(gold) for number, gold in zip(numbers, golds, strict=True)]

    started = time.monotonic()
    with pytest.warns(UserWarning, match="did not judge an answer") as said:
        verdicts = verifier.verify(["hang", "1", "seven", "fill", "1"], ["1"] * 5)
    assert time.monotonic() - started < 30
    assert [verdict.correct for verdict in verdicts] == [False, True, False, False, True]
    assert verdicts[0] == Verdict(False, None, "time limit")
    assert verdicts[3] == Verdict(False, None, "memory limit")
    texts = sorted(str(warning.message) for warning in said)
    assert len(texts) == 3
    start = "the verifier own_checks.check did not judge an answer, which counts as wrong, as later ones will: it "
    assert texts[0] == f"{start}did not end within 0.5 s: raise verifier.time_limit, or change it"
    assert texts[1] == f"{start}needs more than 2048 MiB: raise verifier.memory_limit, or change it"
    assert re.fullmatch(f"{start}raises ValueError: could not convert .*own_checks.py.*line 13.*", texts[2])
    assert [each.correct for each in verifier.verify(["hang", "eight"], ["1", "1"])] == [False, False]  # not said again

    with pytest.raises(UsageError, match=r"verifier \S+ returned 0.5, but must return true or false, or 1 or 0"):
        verifier.verify(["half"], ["1"])
    found = verifier.verify(["numpy", "numpy1", "numpy0"], ["1"] * 3)
    assert [verdict.correct for verdict in found] == [True, True, False]


WRONG = [
    ("no_such_module_here.check", "there is no module 'no_such_module_here' in the current folder"),
    ("own_checks.chekc", "own_checks has no 'chekc'"),
    ("own_checks.one", "cannot be called as one(response, answer) (too many positional arguments): give it two"),
    ("own_checks.Check", "which is no function"),
    ("broken_checks.check", "importing broken_checks fails"),
    ("failing_checks.check", "importing failing_checks fails"),
    ("script_checks.check", "script_checks.py, line 2: SystemExit: 0; put what a script does below `if __name__ =="),
    ("check", "give the path of a function in a module, such as my_module.check"),
    (".own_checks.check", "function is '.own_checks.check': give the path of a function in a module"),
]


@pytest.mark.parametrize(("path", "words"), WRONG)
def test_a_wrong_function_is_refused(path: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        FunctionVerifier(path)
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("value", [partial(max, "a"), 3, str.startswith])
def test_what_is_no_function_of_a_module_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="which is no function of a module: give one at the top level of one"):
        FunctionVerifier(value)


@pytest.mark.parametrize("limits", [{"time_limit": 1e12}, {"time_limit": math.nan}, {"memory_limit": 1 << 60}])
def test_limits_that_the_system_cannot_keep_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="(time|memory)_limit is"):
        RegexVerifier("a", **limits)


def test_the_longest_time_limit_is_kept() -> None:
    assert RegexVerifier("(a)|(b)", num_workers=1, time_limit=86_400).verify(["b"], ["b"])[0].correct


def write_run(folder: Path, verifier: str) -> list[str]:
    rows = [{"id": str(n), "problem": f"{n} a+{n}", "answer": str(2 * n)} for n in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(
        "extends: quickstart\n"
        "trainer: {max_steps: 1, default_root_dir: run, enable_progress_bar: false, enable_model_summary: false}\n"
        "model: {sampling: {max_new_tokens: 8}, eval_sampling: {max_new_tokens: 8, num_samples: 1}, "
        "evaluation: {pass_at: [1], teacher: false}}\nexport: {enabled: false}\n"
        "data:\n  reuse: {prompts_per_pool: 4, batch_size: 8}\n"
        "  train: &source\n    class_path: opdlab.data.JsonlProblems\n"
        f"    init_args: {{path: rows.jsonl, verifier: {verifier}}}\n"
        "  benchmarks: {own: *source}\n  clean: {decontaminate: false}\n"
    )
    return ["fit", "-c", "run.yaml"]


def test_a_configuration_names_the_function(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own_checks.py").write_text("def check(response, answer):\n    return True\n\n\nother = check\n")
    command = write_run(folder, "own_checks.check")
    assert main(command) == 0
    assert "own/pass@1" in capsys.readouterr().out
    results = json.loads((folder / "run/version_0/results.json").read_text())
    assert results["after"]["own/pass@1"]["value"] == 1
    given = parse_fit([*command[1:], "--data.train.verifier", "own_checks.other"]).data.train.init_args.verifier
    assert (given.class_path, given.init_args.function) == ("opdlab.verifiers.FunctionVerifier", "own_checks.other")


CODE = {
    "own_checks.py": "from own_rules.words import known\n\n\ndef check(text, answer):\n    return known(text)\n",
    "own_class.py": (
        "from opdlab.verifiers import Verdict, Verifier\n\n\n"
        "class Own(Verifier):\n    def verify(self, responses, golds):\n        from own_rules.words import known\n\n"
        "        return [Verdict(known(each), '', '') for each in responses]\n"
    ),
    "own_rules/__init__.py": "",
    "own_rules/words.py": "from . import truth\n\n\ndef known(text):\n    return truth.IT_IS\n",
    "own_rules/truth.py": "IT_IS = False\n",
    "own_rules/unused.py": "",
}


@pytest.mark.parametrize("verifier", ["own_checks.check", "{class_path: own_class.Own}"])
def test_verdicts_of_other_code_are_not_taken_up(
    folder: Path, verifier: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "own_rules").mkdir()
    for name, source in CODE.items():
        (folder / name).write_text(source)
    command = ["validate", *write_run(folder, verifier)[1:], "--model.evaluation.samples", "samples-{settings}"]

    def rate() -> float:
        for name in {"own_checks", "own_class", "own_rules", *(f"own_rules.{each}" for each in ("words", "truth"))}:
            monkeypatch.delitem(sys.modules, name, raising=False)
        invalidate_caches()
        caplog.clear()
        assert main(command) == 0
        (results,) = [path for path in folder.glob("samples-*/results.json") if path not in before]
        before.add(results)
        return float(json.loads(results.read_text())["figures"]["own/pass@1"])

    before: set[Path] = set()
    assert rate() == 0
    (folder / "own_rules/truth.py").write_text("IT_IS = True  # now\n")
    assert rate() == 1
    assert "taken up" not in caplog.text
    (folder / "own_rules/unused.py").write_text("1 / 0\n")
    assert main(command) == 0
    assert "1 batch taken up" in caplog.text


def test_a_wrong_function_in_a_configuration_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(write_run(folder, "own_checks.one")) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "own_checks.one, which cannot be called as one(response, answer)" in error
    assert len([line for line in error.splitlines() if line.startswith("opdlab: error:")]) == 1
    assert "Traceback" not in error


@pytest.mark.parametrize("value", ["own_checks.Check", "{class_path: own_checks.Check}"])
def test_a_class_that_is_no_verifier_is_named(folder: Path, value: str) -> None:
    with pytest.raises(UsageError, match=r"data.train.verifier.* is own_checks.Check, but must be .* extends Verifier"):
        parse_fit([*write_run(folder, "own_checks.check")[1:], "--data.train.verifier", value])


RESPONSES = ["so x = 12\n#### 42", "#### 41\n#### 42 ", "#### 42\n#### 41", "42", "####  042"]


def test_a_regular_expression_against_re() -> None:
    pattern = r"####\s*(-?\d+)"
    verdicts = RegexVerifier(pattern, num_workers=1).verify(RESPONSES, ["42"] * 5)
    last = [(re.findall(pattern, response) or [None])[-1] for response in RESPONSES]
    assert [verdict.extracted for verdict in verdicts] == last
    assert [verdict.correct for verdict in verdicts] == [answer == "42" for answer in last]


def test_a_pattern_that_never_ends_is_wrong() -> None:
    verifier = RegexVerifier("(a+)+$", num_workers=1, time_limit=0.3)
    with pytest.warns(UserWarning, match="RegexVerifier did not judge an answer, which counts as wrong"):
        assert verifier.verify(["a" * 60 + "b"], ["a"]) == [Verdict(False, None, "time limit")]
    with pytest.raises(UsageError, match=r"pattern is '\(', which is no regular expression"):
        RegexVerifier("(")


SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 0}}}
DOCUMENTS = ['{"n": 3}', '{"n": -1}', '{"n": "3"}', "{}", '[{"n": 1}]', "not JSON", "[" * 100_000]


def valid(text: str, schema: object) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, RecursionError, jsonschema.ValidationError):
        return False
    return True


def test_a_json_schema_against_jsonschema(folder: Path) -> None:
    (folder / "schema.yaml").write_text(json.dumps(SCHEMA))
    expected = [valid(text, SCHEMA) for text in DOCUMENTS]
    of_file = JsonSchemaVerifier("schema.yaml", num_workers=1)
    assert [verdict.correct for verdict in of_file.verify(DOCUMENTS, ["-"] * len(DOCUMENTS))] == expected
    fenced = [f"Here it is:\n```json\n{text}\n```\nDone." for text in DOCUMENTS]
    of_gold = JsonSchemaVerifier(num_workers=1)
    assert [verdict.correct for verdict in of_gold.verify(fenced, [json.dumps(SCHEMA)] * len(fenced))] == expected
    (folder / "empty.yaml").write_text("# nothing yet\n")
    with pytest.raises(UsageError, match="schema is empty.yaml, but this file is empty: leave the option out"):
        JsonSchemaVerifier("empty.yaml")
    with pytest.warns(UserWarning, match="needs a JSON schema as the gold answer, but 'no schema' is none"):
        assert not of_gold.verify(["{}"], ["no schema"])[0].correct
    assert of_file.verify(["```JSON\r\n[]\r\n```"], ["-"])[0].reason == "invalid"
    numbers = JsonSchemaVerifier({"type": "number"}, num_workers=1)
    assert [verdict.correct for verdict in numbers.verify(["1e3", "NaN", "-Infinity"], ["-"] * 3)] == [
        True,
        False,
        False,
    ]
    with pytest.warns(UserWarning, match="needs a JSON schema whose references exist: .*; change the schema"):
        assert not JsonSchemaVerifier({"$ref": "#/$defs/nothing"}, num_workers=1).verify(["{}"], ["-"])[0].correct
    with pytest.raises(UsageError, match="schema is invalid, change it"):
        JsonSchemaVerifier({"type": "no such type"})


def test_without_jsonschema_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opdlab.packages.is_installed", lambda name: False)
    with pytest.raises(UsageError, match=r"JsonSchemaVerifier needs jsonschema.*pip install 'opdlab\[jsonschema\]'"):
        JsonSchemaVerifier()


def test_numbers_against_decimal() -> None:
    texts = ["3.50", "the total is 3.5", "-3.5", "1e3", "1,000"]
    golds = ["3.5", "3.50", "3.5", "1000", "1000.0"]
    read = [Decimal(re.findall(r"-?[\d.,e]+", text)[-1].replace(",", "")) for text in texts]
    verdicts = NumericVerifier().verify(texts, golds)
    assert [verdict.correct for verdict in verdicts] == [a == Decimal(b) for a, b in zip(read, golds, strict=True)]


def test_answers_that_differ_in_case_only_are_one_in_a_vote() -> None:
    verdicts = RegexVerifier(r"\w+$", ignore_case=True, num_workers=1).verify(
        ["an East", "in east", "a West"], ["EAST"] * 3
    )
    assert [(verdict.correct, verdict.extracted) for verdict in verdicts] == [
        (True, "east"),
        (True, "east"),
        (False, "west"),
    ]
