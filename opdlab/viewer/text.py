"""Escaping of text from models and data for display."""

import unicodedata

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
