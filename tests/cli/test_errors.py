"""Messages of the command line about values that the parser refuses."""

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from opdlab.cli import EXIT_USAGE, main
from opdlab.cli.building import build
from opdlab.errors import UsageError, require, user_code
from opdlab.gating import gate_registry
from opdlab.parser_messages import options_of

Said = Callable[..., str]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """What a command that is refused prints; it is one line, and the exit code is 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(arguments: str) -> str:
        assert main(arguments.split()) == EXIT_USAGE
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
        assert len(lines) == 1
        assert lines[0].startswith("opdlab: error: ")
        return lines[0].removeprefix("opdlab: error: ")

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("max_tokens_per_pass abc", "max_tokens_per_pass is abc, but must be an integer or null"),
        ("behavior.offload maybe", "behavior.offload is maybe, but must be true or false"),
        ("behavior.dtype f13", "behavior.dtype is f13, but must be one of float32, bfloat16, float16 or null"),
        ("objective.k x", "objective.k is x, but must be an integer"),
        ("mask_first 5", "mask_first is 5, but must be a list"),
        ("optimizer Adamm", "optimizer is Adamm, but must be the path of a class, such as package.module.Name"),
        ("optimizer.lr x", "optimizer.lr is x, but must be a number or the path of a class that extends Tensor"),
        ("gate fire_opd --model.gate.alpha x", "gate.alpha is x, but must be a number"),
        (
            "gate fire_opd --model.gate.normalization meen",
            "gate.normalization is meen, but must be one of mean, residual, clipped, none or null",
        ),
        (
            "gate.statistic meen",
            "gate.statistic is meen, but must be one of signed_mean, abs_mean, rms, max",
        ),
        ("gate.tau LinearTau --model.gate.tau.num_steps 1.5", "gate.tau.num_steps is 1.5, but must be an integer"),
    ],
)
def test_a_value_of_the_wrong_type(said: Said, arguments: str, words: str) -> None:
    assert said(f"fit -c quickstart --model.{arguments}") == f"model.{words}"


@pytest.mark.parametrize("value", ["abc", "CosineTau"])
def test_what_is_no_schedule_of_tau(said: Said, value: str) -> None:
    message = said(f"fit -c quickstart --model.gate.tau {value}")
    assert message.startswith(f"model.gate.tau is {value}, but must be a number or one of LinearTau, EffectiveSample")
    assert "(or a class path)" in message


def test_a_study_and_a_replay_are_asked_for(said: Said) -> None:
    assert said("study run") == "give a study: a file, or a name that `opdlab study list` shows"
    assert said("study report").startswith("give the folder of a study, such as runs/studies/")
    assert said("replay").startswith("give a run's folder, such as runs/quickstart/version_0")
    assert "no 'ru'; did you mean 'run'? give run, report or list" in said("study ru")
    assert "'b' is one argument too many" in said("study run a b")
    assert said("study run a --jbos 2") == "unknown key 'jbos'; did you mean 'jobs'?"
    assert said("study run a --foo 2") == "unknown key 'foo'; `opdlab study run --help` lists all keys"


def test_an_estimate_is_refused_what_a_run_is(said: Said) -> None:
    message = "model.max_tokens_per_pass is 0, but must be at least 1: use null for no bound"
    for command in ("estimate", "fit"):
        assert said(f"{command} -c quickstart --model.max_tokens_per_pass 0") == message
    assert said("estimate -c quickstart --data.eval_batch_size 0").startswith("data.eval_batch_size is 0")


@pytest.mark.parametrize("flag", ["model.gate.tau -1", "sample_logger.every_n_steps 0", "data.max_prompt_tokens 0"])
def test_nothing_is_loaded_for_values_that_are_refused(said: Said, flag: str) -> None:
    # The model does not exist, so loading it would fail first.
    key, value = flag.split()
    assert said(f"fit -c quickstart --model.student.path ./nowhere --{flag}").startswith(f"{key} is {value}")


def test_a_metric_that_no_evaluation_will_log(said: Said) -> None:
    monitor = "--checkpoint.mode max --checkpoint.monitor"
    for metric in ("val/mean/pas@1", "val/toys/pass@1", "val/mean/pass@3"):
        flags = f"{monitor} {metric} --model.student.path ./no-such-model"
        words = said(f"fit -c quickstart {flags}")
        assert words.startswith(f"checkpoint.monitor is '{metric}', which no evaluation logs")
        assert "one of val/mean/avg@8, " in words
        assert "val/toy/pass@1, " in words
    known = said(f"fit -c quickstart {monitor} val/mean/pass@8 --model.student.path ./no-such-model")
    assert "no-such-model" in known
    nothing = said(f"fit -c quickstart {monitor} val/mean/pass@1 --data.benchmarks null")
    assert nothing.endswith("which no evaluation logs; give data.benchmarks at least one")


def test_an_unknown_key_of_a_nested_class_is_told_with_its_place(said: Said) -> None:
    message = said("fit -c quickstart --model.gate.tau LinearTau --model.gate.tau.strat 1")
    assert message.startswith("model.gate.tau: unknown key 'strat' of opdlab.tau.LinearTau; did you mean 'start'?")


@pytest.mark.parametrize("name", gate_registry().names())
def test_the_keys_that_are_listed_are_those_that_are_taken(said: Said, name: str) -> None:
    cls: Callable[..., object] = gate_registry().get(name)
    message = said(f"fit -c quickstart --model.gate {name} --model.gate.quux 1")
    listed = message.rpartition("keys: ")[2].split(", ")
    for key in ("tau", "statistic", "normalization", "rho", "low", "high", "block_size", "gamma", "min_tokens"):
        try:
            cls(**{key: {"statistic": "rms", "normalization": "none"}.get(key, 1)})
        except TypeError:
            assert key not in listed
        else:
            assert key in listed


def test_the_keys_of_a_control_are_its_own() -> None:
    assert options_of("opdlab.strategies.prefix.PrefixGate") == ["gamma", "high", "low", "normalization", "rho"]


class Picky:
    """Refuses its field, by an error of its own or by opdlab's."""

    def __init__(self, size: int, ours: bool = True) -> None:
        require(size > 0 or not ours, f"size is {size}, but must be above 0")
        if size <= 0:
            raise ValueError("of somebody else")


class Holder:
    """Holds others."""

    def __init__(self, first: float | Picky, parts: list[Picky], by_name: dict[str, Picky]) -> None:
        self.parts = parts


@pytest.mark.parametrize(
    ("bad", "key"),
    [("first", "top.first"), ("parts", "top.parts.1"), ("by_name", "top.by_name.b")],
)
def test_a_refusal_names_the_key_wherever_the_class_stands(bad: str, key: str) -> None:
    def part(size: int) -> dict[str, object]:
        return {"class_path": f"{__name__}.Picky", "init_args": {"size": size}}

    size = {"first": 1, "parts": 1, "by_name": 1} | {bad: 0}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, "top")
    top = {
        "first": part(size["first"]),
        "parts": [part(2), part(size["parts"])],
        "by_name": {"b": part(size["by_name"])},
    }
    with pytest.raises(UsageError) as caught:
        build(parser, parser.parse_object({"top": top}))
    assert str(caught.value) == f"{key}.size is 0, but must be above 0"


class Untidy:
    """Its constructor fails with several lines, which the parser quotes among the errors of a union's types."""

    def __init__(self, project: str = "p", path: str = "here") -> None:
        raise RuntimeError(f"project {project} is unknown\n\n  ask for access")


class Room:
    def __init__(self, part: Untidy | list[Untidy] | bool | None = None) -> None:
        self.part = part


@pytest.mark.parametrize("inside_list", [False, True])
def test_an_error_of_several_lines_is_told_in_one(inside_list: bool) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Room, "room")
    part = {"class_path": f"{__name__}.Untidy", "init_args": {"project": "q"}}
    with pytest.raises(UsageError) as caught:
        build(parser, parser.parse_object({"room": {"part": [part] if inside_list else part}}))
    place = r".*test_errors\.py, line \d+: RuntimeError: project q is unknown$"
    key = r"room\.part\.0" if inside_list else r"room\.part"
    assert re.search(rf"^{key} cannot be built: Untidy fails, change its options or {place}", str(caught.value))


def test_an_exit_that_no_module_makes_at_its_import_stays_one() -> None:
    """As of ``--help``; the parser may stand where the user's own modules do."""
    with pytest.raises(SystemExit), user_code("importing a class"):
        sys.exit()


def test_an_error_in_a_class_of_the_users_has_file_and_line() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Picky, "picky")
    with pytest.raises(UsageError) as caught:
        build(parser, parser.parse_object({"picky": {"size": 0, "ours": False}}))
    place = r".*test_errors\.py, line \d+: ValueError: of somebody else$"
    assert re.search(rf"^picky cannot be built: Picky fails, change its options or {place}", str(caught.value))


@pytest.mark.parametrize("flags", [["--model.gate.help=iw_opd"], ["--model.gate.help", "iw_opd"]])
def test_help_of_a_registered_name(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit", "-c", "quickstart", *flags])
    assert not caught.value.code
    assert "--model.gate.gamma" in capsys.readouterr().out


def test_an_unknown_name_has_no_help(said: Said) -> None:
    assert "did you mean 'iw_opd'?" in said("fit --model.gate.help=iw_odp")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--pool_recorder.every_n_steps 2", "pool_recorder.every_n_steps is 2, but save_pools is false"),
        ("--pool_recorder.keep_last 2 --pool_recorder.steps [1]", "steps is [1] and pool_recorder.keep_last is 2, but"),
        ("--pool_recorder.every_n_steps 2 --save_pools true", ""),
        ("", ""),
    ],
)
def test_options_of_a_recorder_that_records_nothing(said: Said, flags: str, words: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said(f"fit -c quickstart --model.student.path ./nowhere {flags}")  # stops before a model is loaded
    messages = [str(warning.message) for warning in caught if "save_pools" in str(warning.message)]
    assert len(messages) == bool(words)
    assert all(words in message for message in messages)
