r"""Answers to multiple-choice questions: a letter, with or without the text of the option.

Texts are in the spelling of :func:`opdlab.verifiers.spelling.normalized`.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    r"""A letter, as in ``B``, ``(B)``, ``\text{(B)} 12``.

    Args:
        letter: a capital letter.
        content: the text of the option; may be empty.
        certain: the text cannot be a product, as ``(B) 12`` can.
    """

    letter: str
    content: str
    certain: bool = True


def choice(text: str) -> Choice | None:
    r"""Return the letter of an option and its text; None for anything else, several options included.

    Example:
        >>> for text in (r"\text{(B)} 12", "B) 12", "(B) 12", "(B)", "B(12)", "(A) or (B)"):
        ...     print(choice(text))
        Choice(letter='B', content='12', certain=True)
        Choice(letter='B', content='12', certain=True)
        Choice(letter='B', content='12', certain=False)
        Choice(letter='B', content='', certain=True)
        None
        None
    """
    if match := _LETTER.fullmatch(" ".join(re.sub(r"\\text(?![a-zA-Z])|[{}]", " ", text).split())):
        return Choice(match[1], "")
    whole = _ALL_TEXT.fullmatch(text)
    text = whole[1].strip() if whole else text
    for pattern, certain in ((_MARK, True), (_IN_PARENTHESES, False)):
        if (match := pattern.match(text)) and match.end() < len(text) and not _OTHERS.search(text, match.end()):
            letter = next(group for group in match.groups() if group)
            return Choice(letter, text[match.end() :].strip(), certain or whole is not None)
    return None


def compared_parts(gold: str, answer: str) -> tuple[str, str]:
    r"""Return the parts of two answers that are compared: the letters, the texts of the options, or all.

    Letter and text of an option must both be equal if both answers have both. A letter that the gold answer lacks is
    ignored, unless it may be a factor.

    Example:
        >>> compared_parts("(B)", "B) 12"), compared_parts("12", "B) 12"), compared_parts("12", "(B) 12")
        (('B', 'B'), ('12', '12'), ('12', '(B) 12'))
    """
    wanted, found = choice(gold), choice(answer)
    if wanted and found:
        both = wanted.letter == found.letter and wanted.content and found.content
        return (wanted.content, found.content) if both else (wanted.letter, found.letter)
    if wanted and wanted.content and wanted.certain:
        return wanted.content, answer
    if found and found.content and found.certain:
        return gold, found.content
    return gold, answer


_LETTER = re.compile(r"(?:(?i:option|choice|answer) *)?\(? ?([A-Z]) ?\)?[.:]?")
_ALL_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_MARK = re.compile(
    r"\\text\{ *(?:(?i:option|choice) *)?\(?([A-Z])[).:] *[.:]? *\}[.:]? *|([A-Z])\) *|([A-Z])[.:] +"
    r"|(?i:option|choice) *\(?([A-Z])[).:]+ *"
)
_IN_PARENTHESES = re.compile(r"\(([A-Z])\) +(?=[0-9a-zA-Z$]|\\(?:frac|sqrt|text|pi|infty|emptyset)(?![a-zA-Z]))")
_OTHERS = re.compile(
    r"(?<![a-zA-Z])\(?[A-Z][).:](?![a-zA-Z0-9])|(?<![a-zA-Z])(?:and|or|not|but|wrong|incorrect|except)(?![a-zA-Z])"
)
