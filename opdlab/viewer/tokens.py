"""The text that each token of a response contributes."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from transformers import PreTrainedTokenizerBase

# Tokens decoded together, and how many more on either side. What a token becomes depends on its neighbours only: the
# rest of a character's bytes, the space that a decoder strips at the beginning.
_CHUNK = _CONTEXT = 32


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    r"""Cut the decoded response, special tokens included, into its tokens' texts.

    A token that is only a piece of a character has no text, and the one that completes it has the character: the text
    up to a token is what the decoded tokens up to there have in common with the decoded response. Joined, the texts are
    the decoded response exactly, whatever the tokenizer's decoder does.

    Args:
        tokenizer: of any kind.
        ids: T token ids of one response.

    Returns:
        T texts.

    Example:
        >>> from opdlab.toy import chain_tokenizer
        >>> tokenizer = chain_tokenizer()
        >>> token_texts(tokenizer, tokenizer("7\n\\boxed{25}<eos>")["input_ids"])
        ['7', '\n', '\\boxed{', '2', '5', '}', '<eos>']
    """
    if not ids:
        return []
    texts: list[str] = []
    for start in range(0, len(ids), _CHUNK):
        texts += _chunk_texts(tokenizer, ids, start)
    return _repaired(texts, _decoded(tokenizer, [ids])[0])


def _decoded(tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[int]]) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(sequences, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return texts


def _chunk_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int) -> list[str]:
    """Texts of the tokens from ``start``, by decoding them with growing windows."""
    first, end = max(start - _CONTEXT, 0), min(start + _CHUNK, len(ids))
    # From the first token of the context on: in the middle of a character, a decoder may take back what it had made of
    # the bytes before, and what was reached earlier counts.
    growing = [ids[first:stop] for stop in range(first, end + 1)]
    *prefixes, window = _decoded(tokenizer, [*growing, ids[first : end + _CONTEXT]])
    reached = list(accumulate((_common(prefix, window) for prefix in prefixes), max))
    return [window[one:other] for one, other in pairwise(reached[start - first :])]


def _common(one: str, other: str) -> int:
    """Length of the common beginning."""
    if other.startswith(one):
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (ours, theirs) in pairs if ours != theirs), min(len(one), len(other)))


def _repaired(texts: list[str], whole: str) -> list[str]:
    """Make the texts join to the whole where windows were too short for it.

    That takes more broken bytes in a row than a window has, in a decoder that gives up on all of them together. What
    lies between the common beginning and the common end then goes to one token.
    """
    joined = "".join(texts)
    if joined == whole:
        return texts
    before = _common(joined, whole)
    after = _common(joined[before:][::-1], whole[before:][::-1])
    repaired, position = [""] * len(texts), 0
    middle = None  # the first token that reaches into the part that differs
    for index, text in enumerate(texts):
        start, position = position, position + len(text)
        kept = text[: max(before - start, 0)]
        tail = text[max(len(joined) - after - start, len(kept)) :]
        repaired[index] = kept + tail
        if middle is None and position > before:
            middle = (index, len(kept))
    index, cut = middle or (len(texts) - 1, len(repaired[-1]))
    repaired[index] = repaired[index][:cut] + whole[before : len(whole) - after] + repaired[index][cut:]
    return repaired
