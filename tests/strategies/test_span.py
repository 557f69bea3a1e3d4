"""Newline spans by hand. In the texts ``n`` is a newline token, ``x`` any other, ``.`` padding."""

import pickle

import pytest
import torch

from opdlab.errors import UsageError
from opdlab.gating import GateInputs, Gates
from opdlab.strategies import SpanGate
from opdlab.toy import chain_tokenizer

# Padding has newlines, which must not count. Id 0, because the base class writes it at masked positions.
NEWLINE = 0
TOKENS = {"x": 5, "n": NEWLINE, ".": NEWLINE}


def gates_of(gate: SpanGate, *texts: str) -> Gates:
    tokens = torch.tensor([[TOKENS[letter] for letter in text] for text in texts])
    mask = torch.tensor([[letter != "." for letter in text] for text in texts])
    zeros = torch.zeros(tokens.shape)
    return gate(GateInputs(tokens, mask, zeros, zeros))


def numbered(gate: SpanGate, text: str) -> str:
    """The segment of each token, as a digit; ``.`` where there is none."""
    (row,) = gates_of(gate, text).segment_ids.tolist()
    return "".join("." if index < 0 else str(index) for index in row)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("xxnxxxn", "0001111", id="a newline closes its span and belongs to it"),
        pytest.param("xnxxxn", "000000", id="a short span merges with the one after it"),
        pytest.param("xxnxnxxxn", "000111111", id="a short span in the middle merges forward"),
        pytest.param("nnnnnnn", "0001111", id="short spans cascade until they are long enough"),
        pytest.param("nxnxxn", "000111", id="a merged span that is long enough stops merging"),
        pytest.param("xxnxx", "00000", id="a short last span merges with the one before it"),
        pytest.param("xxnxn", "00000", id="also when a newline closes it"),
        pytest.param("xxnxxxnxn", "000111111", id="only with the last one before it"),
        pytest.param("xxnxxx", "000111", id="a last span without a newline stays if long enough"),
        pytest.param("xxxxxxxxxnxxn", "0000000111222", id="a long span is cut, the last piece may be short"),
        pytest.param("xxxxxxn", "0000000", id="the longest span is not cut"),
        pytest.param("xxxxxxxn", "00000001", id="one more is"),
        pytest.param("xxnxxxxxnx", "0001111111", id="merged first, to the longest"),
        pytest.param("xxnxxxxxnxx", "00011111112", id="cut after merging"),
        pytest.param("xxxxxxxx", "00001111", id="no newline: fallback chunks"),
        pytest.param("xxxxxx", "000011", id="no newline: the last chunk may be short"),
        pytest.param("xx", "00", id="no newline: one short chunk"),
        pytest.param("xxxxx...", "00001...", id="newlines in the padding do not count"),
        pytest.param("xxnxxxn....", "0001111....", id="padding belongs to no span"),
        pytest.param("xxnxx...", "00000...", id="padding does not lengthen the last span"),
        pytest.param("x", "0", id="one token"),
        pytest.param("n", "0", id="one newline"),
        pytest.param("n..", "0..", id="one newline, padded"),
        pytest.param("...", "...", id="nothing"),
    ],
)
def test_spans_of_three_to_seven_tokens(text: str, expected: str) -> None:
    gate = SpanGate(newline_token_ids=[NEWLINE], min_tokens=3, max_tokens=7, fallback_tokens=4)
    assert numbered(gate, text) == expected
    assert numbered(gate, text + "...") == expected + "..."


@pytest.mark.parametrize(("text", "expected"), [("nnxnx", "01223"), ("xxxxx", "00112"), ("xxxn", "0011"), ("xn", "00")])
def test_one_token_may_be_a_span(text: str, expected: str) -> None:
    assert numbered(SpanGate([NEWLINE], min_tokens=1, max_tokens=2, fallback_tokens=2), text) == expected


def test_spans_of_exactly_one_token_are_tokens() -> None:
    assert numbered(SpanGate([NEWLINE], min_tokens=1, max_tokens=1, fallback_tokens=1), "xnxxn.") == "01234."


def test_the_defaults() -> None:
    line = "x" * 199 + "n"
    ids = gates_of(SpanGate([NEWLINE]), line + "x" * 7, "x" * 207, "x" * 6 + "n" + "x" * 200).segment_ids
    assert ids[0].bincount().tolist() == [128, 79]
    assert ids[1].bincount().tolist() == [64, 64, 64, 15]
    assert ids[2].bincount().tolist() == [128, 79]


def test_rows_do_not_touch() -> None:
    gate = SpanGate([NEWLINE], min_tokens=3, max_tokens=7, fallback_tokens=4)
    texts = ["xxnxxxn..", "xxxxxxxxx", ".........", "nnnnnnnnn", "x........"]
    together = gates_of(gate, *texts).segment_ids.tolist()
    assert together == [gates_of(gate, text).segment_ids.tolist()[0] for text in texts]


def test_several_tokens_hold_a_newline() -> None:
    tokens = torch.tensor([[5, 8, 5, 9, 5, 8]])
    zeros = torch.zeros(1, 6)
    ids = SpanGate([8, 9], min_tokens=1)(GateInputs(tokens, torch.ones(1, 6), zeros, zeros)).segment_ids
    assert ids.tolist() == [[0, 0, 1, 1, 2, 2]]


def test_no_token_holds_a_newline() -> None:
    assert numbered(SpanGate([], fallback_tokens=2), "xnx") == "001"


def test_setup_finds_the_newlines() -> None:
    tokenizer = chain_tokenizer()
    gate = SpanGate()
    gate.setup(tokenizer)
    expected = [index for token, index in tokenizer.get_vocab().items() if "\n" in token]
    assert gate.newline_token_ids == expected
    assert len(expected) == 1
    ids = tokenizer("12345678\n12345678\n")["input_ids"]
    zeros = torch.zeros(1, len(ids))
    segment_ids = gate(GateInputs(torch.tensor([ids]), torch.ones_like(zeros), zeros, zeros)).segment_ids
    assert segment_ids.tolist() == [[0] * 9 + [1] * 9]
    assert pickle.loads(pickle.dumps(gate)).newline_token_ids == expected


def test_setup_leaves_given_newlines_alone() -> None:
    gate = SpanGate(newline_token_ids=(7,))
    gate.setup(chain_tokenizer())
    assert gate.newline_token_ids == [7]


def test_without_setup_the_newlines_are_not_known() -> None:
    with pytest.raises(UsageError, match=r"gate\.newline_token_ids is not known yet.*gate\.setup\(tokenizer\)"):
        gates_of(SpanGate(), "xxn")
