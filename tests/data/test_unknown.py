"""Characters that the tokenizer does not know are said once, with a count and an example of each kind of text."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from opdlab.data import DemonstrationConfig, JsonlProblems, PromptDataModule, RawTemplate
from opdlab.toy import chain_tokenizer

KNOWN = {"problem": "1 a+1", "answer": "2", "hint": "2", "solution": "2"}


def without_unknown_token() -> PreTrainedTokenizerBase:
    """Return a tokenizer of letters and digits that leaves out what it does not know."""
    letters = {each: index for index, each in enumerate(["<eos>", *"0123456789abcdefghij+ "])}
    tokenizer = Tokenizer(models.BPE(letters, []))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def of_bytes() -> PreTrainedTokenizerBase:
    """Return a tokenizer that knows every byte, and names the token that ends a text as unknown, like GPT-2."""
    letters = {each: index for index, each in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<eos>", bos_token="<eos>", eos_token="<eos>", pad_token="<eos>"
    )


def said(folder: Path, tokenizer: PreTrainedTokenizerBase, *rows: dict[str, Any], share: float = 0.5) -> list[str]:
    """Return the warnings about rows that are training problems, with a hint for the teacher, and a benchmark."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({**KNOWN, "id": str(n), **row}) + "\n" for n, row in enumerate(rows)))
    data = PromptDataModule(
        JsonlProblems(str(path), teacher_text="{problem} {hint}"),
        {"same": JsonlProblems(str(path))},
        demonstrations=DemonstrationConfig(share, "solution"),
    )
    data.clean = type(data.clean)(deduplicate=False, drop_conflicting=False, decontaminate=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.prepare(tokenizer, training=True)
        data.prepare(tokenizer, training=True)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("make", [chain_tokenizer, without_unknown_token])
def test_each_kind_is_counted_with_its_first_row(tmp_path: Path, make: Any) -> None:
    rows: list[dict[str, Any]] = [{}, {"hint": "\u00e9"}, {"problem": "1 \u2212 1"}, {"problem": "1 \u2212 2"}]
    rows += [{"solution": "2\U0001f600"}, {"solution": [{"content": "1"}, {"content": "2\u00e9", "loss": False}]}]
    of_benchmark, of_training = said(tmp_path, make(), *rows)
    place = f"{tmp_path}/rows.jsonl has characters that the student's tokenizer does not know"
    assert of_benchmark.startswith(f"data.benchmarks.same: {place}, and replaces or leaves out, in 2 of 6 prompts (")
    assert of_training == (
        f"data.train: {place}, and replaces or leaves out, in 3 of 6 prompts that the teacher sees (the first: "
        "'\u00e9' in line 2, id '1') and in 2 of 6 prompts (the first: '\u2212' in line 3, id '2', field 'problem') "
        "and in 2 of 6 demonstrations (the first: '\U0001f600' in line 5, id '4', field 'solution'): change these "
        "texts, or leave these rows out"
    )
    assert len(said(tmp_path, make(), {}, {"solution": "\u00e9"}, share=0.0)) == 0


def test_what_is_known_is_not_said(tmp_path: Path) -> None:
    odd = {"problem": "<eos>\u00e9 \u2212\n\t", "solution": "\U0001f600<eos>"}
    assert said(tmp_path, of_bytes(), {}, odd) == []
    assert said(tmp_path, chain_tokenizer(), {}, {"problem": "<unk> a+1", "solution": "<unk>"}) == []
    assert said(tmp_path, without_unknown_token(), {"problem": "1\n\t\u200b1"}) == []  # no visible characters


def test_a_template_may_be_unknown(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(KNOWN) + "\n")
    data = PromptDataModule(JsonlProblems(str(path), template=RawTemplate(prefix="\u00e9")))
    with pytest.warns(UserWarning, match=r"in 1 of 1 prompts \(the first: one of its template in line 1, "):
        data.prepare(chain_tokenizer(), training=True)
