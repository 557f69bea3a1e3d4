"""Texts of the tokens of a response."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from transformers import PreTrainedTokenizerBase

# Tokens decoded together, and tokens of context on either side. A token's text depends only on its neighbours: on the
# other bytes of a character, and on the space that a decoder strips at the beginning.
_CHUNK = _CONTEXT = 32


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    r"""Return the decoded response, special tokens included, cut into its tokens' texts.

    A token that is only a part of a character has an empty text; the token that completes the character has all of it:
    the text up to a token is the common prefix of the tokens decoded up to there and the decoded response. Joined, the
    texts equal the decoded response for every tokenizer.

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
    """Return the texts of the tokens from ``start``, by decoding them with growing windows."""
    first, end = max(start - _CONTEXT, 0), min(start + _CHUNK, len(ids))
    # Decode from the first token of the context: inside a character a decoder may retract text that it has made of the
    # bytes before, so the longest prefix reached so far counts.
    growing = [ids[first:stop] for stop in range(first, end + 1)]
    *prefixes, window = _decoded(tokenizer, [*growing, ids[first : end + _CONTEXT]])
    reached = list(accumulate((_common(prefix, window) for prefix in prefixes), max))
    return [window[one:other] for one, other in pairwise(reached[start - first :])]


def _common(one: str, other: str) -> int:
    """Return the length of the common prefix."""
    if other.startswith(one):
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (ours, theirs) in pairs if ours != theirs), min(len(one), len(other)))


def _repaired(texts: list[str], whole: str) -> list[str]:
    """Return texts that join to the whole, where the windows were too short for it.

    This needs more invalid bytes in a row than a window has, and a decoder that replaces all of them together. The text
    between the common prefix and the common suffix then goes to one token.
    """
    joined = "".join(texts)
    if joined == whole:
        return texts
    before = _common(joined, whole)
    after = _common(joined[before:][::-1], whole[before:][::-1])
    repaired, position = [""] * len(texts), 0
    middle = None  # the first token that overlaps the differing part
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
