"""Text of models and data for display: the texts of tokens, and escaping."""

import unicodedata
from collections.abc import Sequence
from itertools import accumulate, pairwise
from os.path import commonprefix
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Besides the Unicode categories control, format, surrogate and private: separators at which some programs break lines.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def visible(text: str) -> str:
    r"""Return text with invisible characters, and those that reorder text, written as their code points.

    Newlines, spaces and tabs are kept.

    Example:
        >>> visible("a\u202eb\x00\ud800\n")
        'a⟨U+202E⟩b⟨U+0000⟩⟨U+D800⟩\n'
    """
    return "".join(
        f"⟨U+{ord(char):04X}⟩" if char not in "\n\t" and unicodedata.category(char) in _HIDDEN else char
        for char in text
    )


def markdown_literal(text: str) -> str:
    r"""Return text as literal Markdown: an indented code block, in which there is no markup.

    Text can close a fence of backticks, but cannot end an indented block.

    Example:
        >>> markdown_literal("# no title\n```")
        '    # no title\n    ```'
    """
    lines = visible(text).replace("\t", "    ").split("\n")
    return "\n".join(f"    {line}" for line in lines)


# Tokens decoded together, and tokens of context on either side. A token's text depends only on its neighbours: on the
# other bytes of a character, and on the space that a decoder strips at the beginning.
_WINDOW = 32


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
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
    decoding = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    whole = tokenizer.batch_decode([ids], **decoding)[0]
    size, texts = _WINDOW, [""] * len(ids)
    # A window is too short for more invalid bytes in a row than it has, with a decoder that replaces all together.
    while "".join(texts) != whole:
        texts = []
        for start in range(0, len(ids), size):
            first, end = max(start - size, 0), min(start + size, len(ids))
            # Decode from the first token of the context: inside a character a decoder may retract text that it has made
            # of the bytes before, so the longest prefix reached so far counts.
            growing = [ids[first:stop] for stop in range(first, end + 1)]
            *prefixes, window = tokenizer.batch_decode([*growing, ids[first : end + size]], **decoding)
            common = (len(commonprefix([prefix, window])) for prefix in prefixes)  # noqa: RUF071 of characters
            reached = list(accumulate(common, max))
            texts += [window[one:other] for one, other in pairwise(reached[start - first :])]
        size *= 2
    return texts
