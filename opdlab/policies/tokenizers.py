"""Checks of tokenizers: tokens with rows, same vocabulary, same stop tokens, and token ids by text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from opdlab.errors import UsageError, require


@dataclass(frozen=True)
class StopTokens:
    """The tokens that end an answer, by source.

    Args:
        of_tokenizer: the tokenizer's ``eos_token``.
        configured: the stop tokens of the model's generation config; may be empty.
    """

    of_tokenizer: frozenset[int]
    configured: frozenset[int]

    @property
    def ids(self) -> frozenset[int]:
        """Return the stop tokens of both sources; sampling stops at each of them."""
        return self.of_tokenizer | self.configured


def vocabulary_size(
    tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int], num_rows: int, owner: str, warn: bool = True
) -> int:
    """Return the number of tokens that have a row: their ids are below it, those of rows without a token are not.

    Args:
        tokenizer: the tokenizer.
        stop_ids: the stop tokens.
        num_rows: rows of the embedding and of the output layer.
        owner: name of the model in messages.
        warn: name the tokens without a row in a warning.

    Raises:
        UsageError: a stop, padding or BOS token has no row, or no stop token is one of the tokens.

    Example:
        >>> from opdlab.toy import chain_tokenizer
        >>> vocabulary_size(chain_tokenizer(), [1], num_rows=64, owner="the model")
        38
    """
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    missing = sorted(index for index in texts if index >= num_rows)
    special = {"stop": stop_ids, "padding": [tokenizer.pad_token_id], "BOS": [tokenizer.bos_token_id]}
    for role, ids in special.items():
        for index in ids:
            text = f" {texts[index]!r}" if index in texts else ""
            require(
                index is None or index < num_rows,
                f"{owner} has {num_rows} rows, and none for the {role} token{text} (id {index}): give the tokenizer "
                "that belongs to the model, or add rows with resize_token_embeddings",
            )
    size: int = min(num_rows, 1 + max(texts))
    require(
        any(index < size for index in stop_ids),
        f"{owner}: its stop tokens (ids {sorted(stop_ids)}) are not in the tokenizer, so no response could ever end: "
        "set the tokenizer's eos_token",
    )
    if missing and warn:
        rank_zero_warn(
            f"{owner} has {num_rows} rows, but its tokenizer has {len(missing)} tokens beyond them: "
            f"{', '.join(repr(texts[index]) for index in missing[:5])}{', …' if missing[5:] else ''}; they are never "
            "sampled, and prompts with them are refused"
        )
    return size


def warn_of_stop_tokens(
    tokenizer: PreTrainedTokenizerBase, student: StopTokens, teacher: StopTokens | None = None
) -> None:
    """Warn if student, teacher or their generation configs have different stop tokens.

    If the teacher ends answers with a token at which the student does not stop, the student learns to continue after
    the end, and responses become very long. Base and instruct versions of one model often differ in this way.

    Args:
        tokenizer: the student's, for the tokens' texts.
        student: the stop tokens of sampling.
        teacher: the teacher's stop tokens, if known.
    """

    def texts(ids: frozenset[int]) -> str:
        return " and ".join(repr(str(tokenizer.convert_ids_to_tokens(index))) for index in sorted(ids))

    findings = []
    if teacher is not None and teacher.ids != student.ids:
        findings.append(f"the student's answers end with {texts(student.ids)}, the teacher's with {texts(teacher.ids)}")
    for name, stops in (("student", student), ("teacher", teacher)):
        if stops is not None and stops.configured and not stops.of_tokenizer <= stops.configured:
            findings.append(
                f"the {name}'s tokenizer ends with {texts(stops.of_tokenizer)}, its generation config with "
                f"{texts(stops.configured)}"
            )
    if findings:
        rank_zero_warn(
            f"Models disagree on the end of an answer: {'; '.join(findings)}. Answers may run on to max_new_tokens; "
            "set eos_token_id in generation_config.json of the one that is wrong"
        )


def single_token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], key: str) -> list[int]:
    """Return the ids of tokens given by their text.

    Args:
        tokenizer: the student's tokenizer.
        texts: each a token of the vocabulary, or text that is encoded as one token.
        key: the configuration key, for the message.

    Raises:
        UsageError: a text is not a single token; the message lists the tokens of the text.

    Example:
        >>> from opdlab.toy import chain_tokenizer
        >>> single_token_ids(chain_tokenizer(), ["<eos>"], "mask_first")
        [1]
    """
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    for text in texts:
        pieces = [vocabulary[text]] if text in vocabulary else tokenizer.encode(text, add_special_tokens=False)
        unknown = tokenizer.unk_token_id in pieces and text != tokenizer.unk_token
        names = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(pieces))
        require(
            len(pieces) == 1 and not unknown,
            f"{key} has {text!r}, which is no single token of the student's vocabulary: it would split into "
            f"{names or 'nothing'}; give single tokens",
        )
        ids += pieces
    return ids


def check_same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise a UsageError if the teacher's vocabulary differs from the student's.

    Ids without a token below the highest token must be the same for both: such an id has a row in both models, and is
    sampled and scored like others. Embeddings may be padded differently.

    Raises:
        UsageError: a token differs; the message names the first one.
    """
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    if ours == theirs:
        return
    first = min(index for index in ours.keys() | theirs.keys() if ours.get(index) != theirs.get(index))
    ours_first, theirs_first = (repr(each[first]) if first in each else "missing" for each in (ours, theirs))
    raise UsageError(
        f"model.teacher and model.student have different vocabularies: token {first} is {theirs_first} to the "
        f"teacher ({len(theirs)} tokens) and {ours_first} to the student ({len(ours)} tokens); "
        "choose a teacher with the student's tokenizer"
    )
