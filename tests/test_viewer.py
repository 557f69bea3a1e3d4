"""Pages of rollouts: the choice of rollouts, the written files, and escaped text. In a browser: tests/browser."""

import codecs
import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opdlab.diagnostics import StepTrace
from opdlab.gating import GateInputs, build_gate
from opdlab.rollouts import Rollouts
from opdlab.types import Problem
from opdlab.viewer import (
    RolloutText,
    choose_rollouts,
    color_scale,
    markdown_literal,
    quantities,
    render_page,
    token_texts,
    visible,
    write_page,
)
from tests.viewer_pages import HOSTILE, Tags, page_data, plain_text, shown

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # a dependency of TensorBoard
    from tensorboard.plugin_util import markdown_to_safe_html

# -- texts of tokens ------------------------------------------------------------------------------------------------

SAMPLE = "Größe: 漢字 🙂👩‍👩‍👧 naïve e\u0301, don't  stop .\n"


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"])
    tokenizer.train_from_iterator(["Größe: the cat, the hat. don't stop"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As of Llama and Gemma: pieces of words, and bytes, which decode to nothing good if one of a run is broken."""
    pieces = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz.,:'\n"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def word_piece() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[SEP]", "the", "cat", "##s", ".", "don", "'", "t", "##n"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")


TOKENIZERS = {make.__name__: make() for make in (byte_level, byte_fallback, word_piece)}


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    text: str = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    return text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_join_to_the_decoded_response(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(SAMPLE * 20)["input_ids"] + [tokenizer.eos_token_id]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == decoded(tokenizer, ids)
    assert texts[-1].strip() == tokenizer.eos_token


def token_bytes(name: str, token: str) -> bytes:
    """What a token of the two byte-wise vocabularies stands for."""
    if name == "byte_fallback":
        return bytes.fromhex(token[3:5]) if token.startswith("<0x") else token.replace("▁", " ").encode()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes these as they are, others from 256
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return token.encode() if token == "<eos>" else bytes(alphabet[char] for char in token)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_each_text_is_what_its_bytes_complete(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(SAMPLE * 20)["input_ids"]
    decoder = codecs.getincrementaldecoder("utf-8")()
    expected = [decoder.decode(token_bytes(name, token)) for token in tokenizer.convert_ids_to_tokens(ids)]
    if name == "byte_fallback":
        expected[0] = expected[0].removeprefix(" ")  # its decoder strips it
    assert token_texts(tokenizer, ids) == expected


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(TOKENIZERS)), st.lists(st.integers(0, 9999), max_size=150))
def test_texts_join_whatever_was_sampled(name: str, numbers: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    ids = [number % len(tokenizer) for number in numbers]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == decoded(tokenizer, ids)


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer("a漢b")["input_ids"]
    assert len(ids) == 5  # three bytes
    assert token_texts(tokenizer, ids) == ["a", "", "", "漢", "b"]
    broken = [*ids[:3], *ids[4:]]
    assert token_texts(tokenizer, broken)[-1] == "b"  # a broken character does not remove its neighbour


def test_a_long_run_of_broken_bytes_is_exact_too() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    byte = tokenizer.convert_tokens_to_ids
    good = [byte("<0xC3>"), byte("<0xA9>")]
    ids = [byte("a"), byte("a"), *(good * 60), byte("<0xC3>"), byte("b")]  # one byte at the end breaks the whole run
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == decoded(tokenizer, ids) == "aa" + "\ufffd" * 121 + "b"
    assert (len(texts), texts[0], texts[-1]) == (len(ids), "a", "b")


# -- the choice -----------------------------------------------------------------------------------------------------


def trace(drifts: list[Any], length: int, first_id: int, lengths: list[int] | None = None) -> StepTrace:
    """A micro-batch in which rollout i has drift ``drifts[i]`` at each of its positions, or that of a list."""
    rows = len(drifts)
    counts = torch.tensor(lengths or [length] * rows)
    mask = torch.arange(length) < counts[:, None]
    behavior = torch.full((rows, length), -1.0)
    drift = torch.stack([torch.tensor(value).expand(length) for value in drifts])
    current = torch.where(mask, behavior + drift, behavior)
    inputs = GateInputs(torch.arange(length).expand(rows, -1), mask, behavior, current, behavior - 1, behavior.abs())
    ids = torch.arange(first_id, first_id + rows)
    prompts = torch.arange(4).expand(rows, -1)
    rollouts = Rollouts(
        prompt_tokens=prompts,
        prompt_mask=prompts >= 1,
        tokens=inputs.tokens,
        mask=mask,
        behavior_logprobs=behavior,
        stop_reasons=torch.zeros(rows).long(),
        rollout_ids=ids,
        prompt_ids=ids // 2,
        sampled_at_step=torch.full((rows,), 6),
        snapshot_step=torch.full((rows,), 5),
        correct=torch.tensor([index % 3 - 1 for index in range(rows)], dtype=torch.int8),
    )
    gates = build_gate("block32", tau=3.0)(inputs)
    return StepTrace(rollouts, 1, 9, inputs, gates, mask / mask.sum(), {"entropy": torch.rand(rows, length)})


def test_chosen_are_spread_over_the_ranks_of_drift() -> None:
    cancelling = [0.2, -0.2] * 3
    traces = [
        trace([9.0, -0.5, cancelling, 0.0], 6, 99, lengths=[0, 6, 6, 6]),
        trace([0.3, -0.1, 0.05], 9, 103, lengths=[9, 4, 9]),
    ]
    by_rank = [100, 103, 101, 104, 105, 102]  # 99 has no token
    for number, ranks in {1: [0], 2: [0, 5], 3: [0, 2, 5], 6: [*range(6)], 20: [*range(6)]}.items():
        chosen = choose_rollouts(traces, number)
        assert [rollout.rollout_id for rollout in chosen] == [by_rank[rank] for rank in ranks]
        assert [(rollout.rank, rollout.num_ranked) for rollout in chosen] == [(rank, 6) for rank in ranks]


def test_a_chosen_rollout_is_what_the_trace_has() -> None:
    traces = [trace([0.1], 6, 100), trace([0.3, 9.0, -0.2], 9, 2**30, lengths=[9, 3, 4])]
    first, last = choose_rollouts(traces, 10)[1], choose_rollouts(traces, 10)[-1]
    assert (first.rollout_id, first.prompt_id, first.age, first.reuse_epoch) == (2**30, 2**29, 4, 1)
    assert (first.correct, last.correct) == (None, None)
    assert [rollout.correct for rollout in choose_rollouts(traces[1:], 3)] == [False, None, True]
    assert first.mean_drift == pytest.approx(0.3)
    assert first.prompt_tokens.tolist() == [1, 2, 3]
    assert torch.equal(first.tokens, traces[1].inputs.tokens[0])
    assert torch.equal(first.values["weight"], traces[1].gates.weights[0])
    assert torch.equal(first.values["entropy"], traces[1].values["entropy"][0])
    assert last.values["drift"].tolist() == traces[0].inputs.drift[0].tolist()


def test_equal_drift_is_ordered_by_age_in_the_batch_and_no_token_shows_nothing() -> None:
    assert [rollout.rollout_id for rollout in choose_rollouts([trace([0.0] * 5, 4, 7)], 2)] == [7, 11]
    assert choose_rollouts([trace([0.0] * 2, 4, 7, lengths=[0, 0])], 2) == []


# -- colours --------------------------------------------------------------------------------------------------------


def test_scales_are_centred_and_robust() -> None:
    drift = torch.cat([torch.linspace(-0.1, 0.1, 999), torch.tensor([20.0])])
    scale = color_scale(drift, 0.0)
    assert scale.high == -scale.low == pytest.approx(0.099, abs=2e-3)
    assert (scale.below, scale.above) == (True, True)
    weights = color_scale(torch.tensor([0.5, 1.0, 1.2]), 1.0)
    assert (weights.low, weights.neutral, weights.high) == (0.5, 1.0, 1.5)
    logprobs = color_scale(torch.tensor([-3.0, -1.0, 0.0]), 0.0)
    assert (logprobs.low, logprobs.neutral, logprobs.high) == (-3.0, 0.0, 0.0)


def test_scales_of_odd_values() -> None:
    assert color_scale(torch.zeros(5), 0.0).high == 0.0
    sparse = color_scale(torch.cat([torch.zeros(999), torch.ones(1)]), 0.0)
    assert (sparse.low, sparse.high) == (0.0, 1.0)  # a rare event is visible
    odd = color_scale(torch.tensor([math.nan, math.inf, -math.inf, 1.0, -2.0]), 0.0)
    assert (odd.low, odd.high, odd.below, odd.above) == (-2.0, 2.0, True, True)
    assert color_scale(torch.tensor([math.nan]), 1.0).neutral == 1.0
    assert color_scale(torch.tensor([3.0, 5.0]), None).neutral == 3.0
    assert color_scale(torch.tensor([-5.0, -3.0]), None).neutral == -3.0
    mass = color_scale(torch.tensor([0.4, 1.0, 1.0000001]), 1.0)
    assert (mass.high, mass.above) == (1.0, False)  # rounding does not count as a second side


def test_known_quantities_come_first_and_none_is_lost() -> None:
    names = ["zeta", "entropy", "weight", "drift", "alpha"]
    assert [quantity.name for quantity in quantities(names)] == ["drift", "weight", "entropy", "alpha", "zeta"]


# -- the page -------------------------------------------------------------------------------------------------------


def test_the_page_holds_the_values_exactly() -> None:
    rollouts = [shown(50), shown(11, seed=1, block=1, correct=None)]
    rollouts[0].values["position_loss"][:3] = torch.tensor([math.nan, math.inf, -math.inf])
    rollouts[0].mask[7], rollouts[0].segment_ids[7] = False, -1
    texts = [plain_text([f"t{index}" for index in range(50)]), plain_text(["x"] * 11)]
    data = page_data(render_page(3, rollouts, texts))
    for rollout, text, read in zip(rollouts, texts, data["rollouts"], strict=True):
        assert read["texts"] == text.tokens
        assert read["ids"] == rollout.tokens.tolist()
        assert read["segments"] == rollout.segment_ids.tolist()
        for name, values in rollout.values.items():
            torch.testing.assert_close(torch.tensor(read["values"][name]), values, rtol=0, atol=0, equal_nan=True)
    assert [read["correct"] for read in data["rollouts"]] == [True, None]


def test_hostile_text_opens_no_tag_and_comes_back_unchanged() -> None:
    text = RolloutText("".join(HOSTILE), HOSTILE, [False] * len(HOSTILE), Problem("1", "p", "".join(HOSTILE)))
    facts = {"gate": "".join(HOSTILE[:-3]).replace("\ud800", "")}
    page = render_page(3, [shown(len(HOSTILE))], [text], facts)
    page.encode()  # no lone surrogate
    plain = Tags(render_page(3, [shown(len(HOSTILE))], [plain_text(["x"] * len(HOSTILE))], {"gate": "x"}))
    tags = Tags(page)
    assert [tag for tag, _ in tags.tags] == [tag for tag, _ in plain.tags]
    assert [names for _, a in tags.tags if (names := list(a))] == [names for _, a in plain.tags if (names := list(a))]
    (summary,) = [a["content"] for _, a in tags.tags if a.get("name") == "opdlab-summary"]
    assert json.loads(str(summary))["facts"] == facts
    assert len(tags.scripts) == 2
    read = page_data(page)["rollouts"][0]
    assert (read["texts"], read["prompt"], read["gold"]) == (HOSTILE, text.prompt, text.prompt)
    assert not any(char in tags.scripts[0] for char in "<>&\u2028\u2029\u202e\x00")


def test_the_policy_of_the_page_allows_nothing_from_outside() -> None:
    tags = Tags(render_page(3, [shown(2)], [plain_text(["a", "b"])]))
    policy = next(a["content"] for tag, a in tags.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert [tag for tag, a in tags.tags if "src" in a or any(name.startswith("on") for name in a)] == []


def test_pages_know_their_neighbours_and_the_index_lists_them(tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"

    def links(step: int) -> dict[str | None, str | None]:
        tags = Tags((folder / f"step-{step:06d}.html").read_text()).tags
        return {a["rel"]: a["href"] for tag, a in tags if tag == "link"}

    for step in (10, 30, 20, 30):  # a resumed run writes some steps again
        write_page(folder, step, render_page(step, [shown(2)], [plain_text(["<!--steps-->", "b"])]))
    assert links(10) == {"next": "step-000020.html"}
    assert links(20) == {"prev": "step-000010.html", "next": "step-000030.html"}
    assert links(30) == {"prev": "step-000020.html"}
    index = Tags((folder / "index.html").read_text()).tags
    assert [a["href"] for tag, a in index if tag == "a"] == [f"step-0000{step}.html" for step in (10, 20, 30)]
    assert sorted(path.suffix for path in folder.iterdir()) == [".html"] * 4  # no partial file is left


def test_the_index_has_each_pages_figures_also_after_a_resume(tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    rollouts = [shown(9, rank=0, age=1), shown(9, seed=1, rank=7, age=3, correct=False)]
    rollouts[0].values["drift"] = torch.full((9,), -0.5)
    rollouts[1].values["drift"] = torch.full((9,), 0.125)
    facts = {"gate": "it's <b>漢 -->", "objective": "LSM"}
    write_page(folder, 10, render_page(10, rollouts, [plain_text(["x"] * 9)] * 2, facts))
    (folder / "step-000020.html").write_text("<title>of an earlier version</title>")
    (folder / "step-000030.html").write_text("<meta name=\"opdlab-summary\" content='[broken'>")
    write_page(folder, 40, render_page(40, [shown(9, correct=None)], [plain_text(["x"] * 9)]))
    index = _Text((folder / "index.html").read_text())
    cells = Cells((folder / "index.html").read_text()).rows
    assert cells[0] == ["page", "rollouts shown", "correct", "mean abs(drift), nats", "age, steps"]
    assert cells[1] == ["step 10", "2 of 8", "1 of 2", "0.125 to 0.5", "1 to 3"]
    assert cells[2][1:] == cells[3][1:] == ["\u2013"] * 4
    assert (cells[4][1:3], cells[4][4]) == (["1 of 8", "unchecked"], "3")
    assert "it's <b>漢 -->" in index.text
    assert "LSM" in index.text


def test_a_long_run_keeps_pages_that_are_spread_over_its_steps(tmp_path: Path) -> None:
    page = render_page(1, [shown(2)], [plain_text(["a", "b"])])
    for step in range(10, 1010, 10):
        write_page(tmp_path, step, page, max_pages=9)
    names = sorted(path.name for path in tmp_path.glob("step-*.html"))
    steps = [int(name[5:11]) for name in names]
    assert len(steps) == 9
    assert (steps[0], steps[-1]) == (10, 1000)
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    assert max(gaps) <= 4 * min(gaps[:-1])
    for before, name, after in zip([None, *names], names, [*names[1:], None], strict=False):
        text = (tmp_path / name).read_text()
        assert re.findall(r'rel="prev" href="([^"]*)"', text) == [before] * (before is not None)
        assert re.findall(r'rel="next" href="([^"]*)"', text) == [after] * (after is not None)
    assert re.findall(r'href="(step[^"]*)"', (tmp_path / "index.html").read_text()) == names
    write_page(tmp_path, 500, page, max_pages=9)  # of a run that resumes
    assert (tmp_path / "step-000500.html").is_file()
    assert len(list(tmp_path.glob("step-*.html"))) == 9


def test_a_page_that_cannot_be_finished_leaves_the_earlier_one(tmp_path: Path) -> None:
    page: Callable[[str], str] = lambda text: render_page(10, [shown(1)], [plain_text([text])])  # noqa: E731
    path = write_page(tmp_path, 10, page("first"))
    (tmp_path / f"{path.name}.partial").mkdir()  # stands for any error of the file system
    with pytest.raises(IsADirectoryError):
        write_page(tmp_path, 10, page("second"))
    assert page_data(path)["rollouts"][0]["texts"] == ["first"]


# -- text -----------------------------------------------------------------------------------------------------------


class Cells(Tags):
    """The cells of a page's table."""

    def __init__(self, page: str) -> None:
        self.rows: list[list[str]] = []
        super().__init__(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


class _Text(Tags):
    """The text of a page."""

    text = ""

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_tensorboard_shows_hostile_text_as_text(text: str) -> None:
    html = _Text(markdown_to_safe_html(f"**head**\n\n{markdown_literal(f'before {text} after')}\n\n**end**"))
    assert {tag for tag, _ in html.tags} <= {"p", "strong", "pre", "code"}
    expected = "\n".join(line.rstrip() for line in visible(f"before {text} after").replace("\t", " " * 4).split("\n"))
    assert expected in "\n".join(line.rstrip() for line in html.text.split("\n"))


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("<>&`~#*_[]()!|\\-=+:.'\"\n\r\t \x00\x02\x03\u2028{}/ascript1"), max_size=60))
def test_no_text_leaves_its_code_block(text: str) -> None:
    html = _Text(markdown_to_safe_html(f"**head**\n\n{markdown_literal(f'before{text}after')}\n\n**end**"))
    assert [tag for tag, _ in html.tags] == ["p", "strong", "pre", "code", "p", "strong"]


def test_invisible_characters_are_named() -> None:
    assert visible("a\u202eb\u200d\x1b[0m\x7f\u00ad\ufeff") == "a⟨U+202E⟩b⟨U+200D⟩⟨U+001B⟩[0m⟨U+007F⟩⟨U+00AD⟩⟨U+FEFF⟩"


def test_masks_inside_a_response_are_kept() -> None:
    one = trace([0.2], 6, 0)
    mask = one.inputs.mask.clone()
    mask[0, 2] = False
    inputs = replace(one.inputs, mask=mask)
    changed = replace(
        one, inputs=inputs, rollouts=replace(one.rollouts, mask=mask), gates=build_gate("block32")(inputs)
    )
    (rollout,) = choose_rollouts([changed], 1)
    assert rollout.mask.tolist() == [True, True, False, True, True, True]
    assert rollout.segment_ids.tolist() == [0, 0, -1, 0, 0, 0]
