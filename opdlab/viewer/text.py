"""Text of models and data, made harmless for the places where it is shown."""

import unicodedata

# Besides what Unicode calls control, format, surrogate or private: the separators that some programs break lines at.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def visible(text: str) -> str:
    r"""Write characters that cannot be seen, or that change the order of others, as their code points.

    Newlines stay; spaces and tabs too.

    Example:
        >>> visible("a\u202eb\x00\ud800\n")
        'a⟨U+202E⟩b⟨U+0000⟩⟨U+D800⟩\n'
    """
    return "".join(
        f"⟨U+{ord(char):04X}⟩" if char not in "\n\t" and unicodedata.category(char) in _HIDDEN else char
        for char in text
    )


def markdown_literal(text: str) -> str:
    r"""Put text into Markdown as it is: as a code block by indentation, inside which there is no markup.

    A fence of backticks could be closed by the text itself; a line that begins with four spaces cannot be left.

    Example:
        >>> markdown_literal("# no title\n```")
        '    # no title\n    ```'
    """
    lines = visible(text).replace("\t", "    ").split("\n")
    return "\n".join(f"    {line}" for line in lines)
