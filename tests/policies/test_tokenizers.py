"""Requirements on the tokenizers of student and teacher, and names of tokens."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from opdlab.errors import UsageError
from opdlab.policies import LocalTeacher, StopTokens, single_token_ids, warn_of_stop_tokens
from opdlab.toy import chain_tokenizer
from tests.policies.tiny_models import CONFIGS, save_random
from tests.toy_run import Run

MakeRun = Callable[..., Run]


def stops(tokenizer: int, *configured: int) -> StopTokens:
    return StopTokens(frozenset({tokenizer}), frozenset(configured))


def warning(student: StopTokens, teacher: StopTokens | None) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_stop_tokens(chain_tokenizer(), student, teacher)
    assert len(caught) <= 1
    return str(caught[0].message) if caught else ""


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (stops(1), stops(1)),
        (stops(1, 1), stops(1)),
        (stops(1, 1, 7), stops(7, 1, 7)),  # the tokenizer's is among several of the configuration
        (stops(1, 1), None),
    ],
)
def test_agreement_is_silent(student: StopTokens, teacher: StopTokens | None) -> None:
    assert warning(student, teacher) == ""


def test_disagreement_is_named() -> None:
    # "4" is token 7, "5" token 8.
    message = warning(stops(1), stops(7, 1, 7))
    assert "the student's answers end with '<eos>', the teacher's with '<eos>' and '4'" in message
    message = warning(stops(1, 8), stops(1, 8))
    assert "the student's tokenizer ends with '<eos>', its generation config with '5'" in message
    assert "the teacher's tokenizer ends with '<eos>', its generation config with '5'" in message
    message = warning(stops(1), stops(7))
    assert "the student's answers end with '<eos>', the teacher's with '4'" in message
    assert "set eos_token_id in generation_config.json" in message


def test_a_run_warns_once(make_run: MakeRun, tmp_path: Path) -> None:
    folder = save_random(tmp_path / "teacher", CONFIGS["qwen3"]())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    with pytest.warns(UserWarning, match="the student's answers end with '<eos>', the teacher's with '<eos>' and '4'"):
        make_run(teacher=LocalTeacher(str(folder)))


def test_single_tokens() -> None:
    tokenizer = chain_tokenizer()
    assert single_token_ids(tokenizer, ["<eos>", "4", "<unk>"], "mask_first") == [1, 7, 2]
    with pytest.raises(UsageError) as caught:
        single_token_ids(tokenizer, ["4", "45"], "mask_first")
    assert "mask_first has '45'" in str(caught.value)
    assert "it would split into '4', '5'; give single tokens" in str(caught.value)
    with pytest.raises(UsageError, match="is no single token"):
        single_token_ids(tokenizer, ["€"], "mask_first")
    with pytest.raises(UsageError, match="it would split into nothing"):
        single_token_ids(tokenizer, [""], "mask_first")
