r"""One spelling for equivalent Unicode and LaTeX, without evaluating anything.

Everything here takes time linear in the text, or quadratic with a small constant for the arguments of commands, so that
untrusted text is cheap.
"""

import re
import unicodedata

_GREEK = {"lamda": "lambda", "final sigma": "sigma"}
_SYMBOLS = {
    **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011\u207b", "-"),
    **dict.fromkeys("\u00b7\u22c5\u2219", "\\cdot "),
    **dict.fromkeys("\u00b0\u02da\u00ba", "^\\circ "),
    **dict.fromkeys("\u2264\u2a7d\u2266", "\\le "),
    **dict.fromkeys("\u2265\u2a7e\u2267", "\\ge "),
    **dict.fromkeys("\u2205\u2300\u00d8", "\\emptyset "),
    **dict.fromkeys("\u201c\u201d\u2018", ""),
    **dict.fromkeys("\u2044\u2215", "/"),
    **dict.fromkeys("\u3001\uff0c\uff1b", ", "),
    **dict.fromkeys("\u3002\uff0e", "."),
    **{"\u221e": "\\infty ", "\u2260": "\\ne ", "\u00d7": "\\times ", "\u00f7": "\\div ", "\u00b1": "\\pm "},
    **{"\u2208": "\\in ", "\u222a": "\\cup ", "\u2229": "\\cap ", "\u2216": "\\setminus ", "\u2026": "\\ldots "},
    **{"\u2227": "\\land ", "\u2228": "\\lor ", "\u2248": "\\approx ", "\u2261": "\\equiv ", "\u2220": "\\angle "},
    **{"\u211d": "\\mathbb{R}", "\u2124": "\\mathbb{Z}", "\u211a": "\\mathbb{Q}", "\u2115": "\\mathbb{N}"},
    **{"\uff5b": "\\{", "\uff5d": "\\}", "\u230a": "\\lfloor ", "\u230b": "\\rfloor ", "\u2308": "\\lceil "},
    **{"\u2309": "\\rceil ", "\u2032": "'", "\u2019": "'", "\u2223": "|", "\u221b": "\\sqrt[3]", "\u221a": "\\sqrt"},
}
_RAISED = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f", "0123456789+-n"
)
_LOWERED = str.maketrans("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089", "0123456789")
_UNICODE = (
    (re.compile("[\u00b9\u00b2\u00b3\u2070-\u207f]+"), lambda found: f"^{{{found[0].translate(_RAISED)}}}"),
    (re.compile("[\u2080-\u2089]+"), lambda found: f"_{{{found[0].translate(_LOWERED)}}}"),
    (
        re.compile("[\u00bc-\u00be\u2150-\u215e]"),
        lambda found: " \\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", found[0]).split("\u2044")),
    ),
    # A root sign covers the whole number after it, \sqrt only one digit.
    (re.compile("([\u221a\u221b]) ?([0-9]+)"), r"\1{\2}"),
    (re.compile("[" + "".join(map(re.escape, _SYMBOLS)) + "]"), lambda found: _SYMBOLS[found[0]]),
)
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\)\\[()\[\]]|\\!|\\(?:display|text|script)style(?![a-zA-Z])", ""),
        (r"\\(?:left|right|[bB]igg?[lr]?|limits|nolimits)(?![a-zA-Z])\.?", ""),
        (r"\\[hv]?phantom *(?:\{[^{}]*\}|.)", ""),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|\\[hv]space *\{[^{}]*\}|~|\s", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:mbox|hbox|text(?:rm|bf|it|sf|tt|normal)|math(?:rm|bf|it|sf|tt|normal))(?![a-zA-Z])", r"\\text"),
        (r"\{ *\\(?:rm|bf|it|sf) +([^{}]*)\}", r"\\text{\1}"),
        (r"\\text *(?=\{)", r"\\text"),
        (r"\\text\{ *\}", " "),
        (r"\\text\{ *([-+]?[0-9][0-9.,/]*) *\}", r" \1 "),
        (r"\\text\{ *([0-9A-Z]+|[0-9a-f]+) *\}(?= *_)", r"\1"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\lbrack(?![a-zA-Z])", "["),
        (r"\\rbrack(?![a-zA-Z])", "]"),
        (r"\\[lr]?vert(?![a-zA-Z])", "|"),
        (r"\\(?:leq?(?:slant|q)?)(?![a-zA-Z])|<=", r"\\le "),
        (r"\\(?:geq?(?:slant|q)?)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\neq?(?![a-zA-Z])|!=", r"\\ne "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\varnothing(?![a-zA-Z])|\\\{ *\\\}", r"\\emptyset "),
        (r"\\(?:vee|lor)(?![a-zA-Z])", r" or "),
        (r"\\(?:wedge|land)(?![a-zA-Z])", r" and "),
        (r"\\(?:backslash|smallsetminus)(?![a-zA-Z])", r"\\setminus "),
        (r"\\(?:[lc]?dots[cbmio]?|hdots)(?![a-zA-Z])|\.\.\.", r"\\ldots "),
        (r"\\colon(?![a-zA-Z])", ":"),
        (r"\\(begin|end) *\{ *[dr]cases\*? *\}", r"\\\1{cases}"),
        (
            r"\\\{ *\\begin *\{(array|aligned|gathered|split)\}(?: *\{[lcr| ]*\})?"
            r"((?:(?!\\(?:begin|end) *\{).)*)\\end *\{\1\}(?! *\\\})",
            r"\\begin{cases}\2\\end{cases}",
        ),
        ("[\u8d1f\u8ca0](?=[0-9])", "-"),  # "negative" in Chinese
        (r"(?:\^ *)?\{? *\\degree *\}?|\^ *\{ *\\circ *\}|\^ *\\circ(?![a-zA-Z])", r"^{\\circ}"),
        (r"\\var(epsilon|phi|theta|rho)(?![a-zA-Z])", r"\\\1"),
        (r"(?<=[0-9a-zA-Z)}])\*\*(?=[0-9a-zA-Z({-])", "^"),
        (r"(?<![\\a-zA-Z{])infinity(?![a-zA-Z])", r"\\infty "),
        (r"(?<![\\a-zA-Z{])(sqrt|pi|infty|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln)(?![a-zA-Z])", r"\\\1 "),
        (r"(\\sqrt(?:\[[0-9]+\])?) +(?=[({])", r"\1"),
    )
)
_BASES = {
    **{"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10},
    **{"eleven": 11, "twelve": 12, "sixteen": 16, "binary": 2, "octal": 8, "hexadecimal": 16, "hex": 16},
}
_NAME = rf"(?P<base>[0-9]{{1,2}}|{'|'.join(_BASES)})"
# A base in words at the end: 37_{\text{eight}}, 37_{\text{base }8}, 37 \text{ (base 8)}, 37 in octal.
_BASE_IN_WORDS = (
    re.compile(rf"(?<=[0-9a-fA-F)}}]) *_ *\{{? *(?:\\text\{{ *)?(?i:(?:base[ -]*\}}? *)?{_NAME}) *[}} ]*$"),
    re.compile(rf"(?<=[0-9A-F)}}]),? *(?:\\text\{{)? *\(?(?i:(?:in )? *base[ -]*\}}? *{_NAME}) *\)? *\}}?$"),
    re.compile(
        r"(?<=[0-9A-F)}]),? *(?:\\text\{)? *\(?(?i:(?:in )? *(?P<base>binary|octal|hexadecimal|hex)) *\)? *\}?$"
    ),
)
_WITH_ARGUMENTS = re.compile(r"\\(frac|binom|sqrt)(?![a-zA-Z])|[\^_]")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_SCRIPT = re.compile(r"[+-]?[0-9]+")


def normalized(text: str) -> str:
    r"""Return the text in one spelling of LaTeX, without math delimiters, spacing, sizes, and final punctuation.

    Arguments of ``\frac``, ``\sqrt``, ``^`` and ``_`` are in braces; commands for upright text are ``\text``.

    Example:
        >>> print(normalized(r"$\dfrac\pi4\,.$"), normalized("x\u00b2 + \u221a12"))
        \frac{\pi}{4} x^{2} + \sqrt{12}
    """
    if text.isdecimal() and text.isascii():  # most answers are plain integers
        return text
    text = without_unicode(text)
    dollars = text.replace("\\$", "").count("$")
    if dollars % 2 == 0:  # an odd one is a currency
        text = re.sub(r"(?<!\\)\$", "", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = re.sub(" +", " ", _without_ending(text))  # the patterns take long for a long row of spaces
    for pattern in _BASE_IN_WORDS:
        if match := pattern.search(text):
            text = f"{text[: match.start()]}_{{{_BASES.get(match['base'].lower(), match['base'])}}}"
    text = _without_ending(_with_braces(text))
    return re.sub(" +", " ", text).strip()


def without_unicode(text: str) -> str:
    r"""Return the text with LaTeX for mathematical symbols and without invisible characters.

    Example:
        >>> print(without_unicode("\uff11\u200b2 \u2264 \u03c0\u00b2"))
        12 \le  \pi ^{2}
    """
    if text.isascii():
        return text
    for pattern, replacement in _UNICODE:
        text = pattern.sub(replacement, text)
    text = unicodedata.normalize("NFKC", text)
    return "".join(_letter(letter) if ord(letter) > 127 else letter for letter in text)


def _letter(letter: str) -> str:
    """Return a letter or symbol beyond ASCII as LaTeX; nothing for an invisible one."""
    name = unicodedata.name(letter, "")
    if name.startswith("GREEK") and " LETTER " in name and " WITH " not in name:
        word = name.partition(" LETTER ")[2].lower()
        word = _GREEK.get(word, word)
        return f"\\{word.capitalize() if 'CAPITAL' in name else word} "
    if unicodedata.category(letter) == "Cf":
        return ""
    return _SYMBOLS.get(letter, letter)


def _without_ending(text: str) -> str:
    text = text.strip()
    if text.startswith("**") and text.endswith("**"):  # Markdown
        text = text.strip("*")
    end = len(text)
    while end and (text[end - 1] in ".,;: " or text.endswith("\\\\", 0, end)):
        end -= 1 if text[end - 1] in ".,;: " else 2
    return text[:end]


def _with_braces(text: str) -> str:
    """Return the text with braces around each argument, from the last command to the first."""
    for found in reversed(list(_WITH_ARGUMENTS.finditer(text))):
        position = found.end()
        if found[1] == "sqrt" and text[position : position + 1] == "[":
            position = text.find("]", position) + 1 or position
        for _ in range(2 if found[1] in ("frac", "binom") else 1):
            start = position + len(text[position:]) - len(text[position:].lstrip())
            end = _end_of_argument(text, start, script=found[1] is None)
            argument = text[start:end]
            if not argument:
                break
            if not argument.startswith("{"):
                inner = argument[1:-1] if argument[0] == "(" and argument[-1] == ")" else argument
                argument = "{" + inner + "}"
            text = text[:position] + argument + text[end:]
            position += len(argument)
    return text


def _end_of_argument(text: str, start: int, script: bool) -> int:
    """Return the end of a group, of a command with its groups, or of a character; for ``^`` and ``_`` of a number."""
    if text.startswith("{", start):
        return end_of_group(text, start) or len(text)
    if script and (number := _SCRIPT.match(text, start)):
        return number.end()
    if text.startswith("(", start):
        return _end_of_parenthesis(text, start)
    if command := _COMMAND.match(text, start):
        end = command.end()
        while text.startswith("{", end):
            end = end_of_group(text, end) or len(text)
        return end
    return min(start + 1, len(text))


def _end_of_parenthesis(text: str, start: int) -> int:
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position + 1
    return start + 1


def end_of_group(text: str, start: int, limit: int | None = None) -> int | None:
    r"""Return the end of the group whose brace is at ``start``, or None if it is not closed before ``limit``.

    Example:
        >>> end_of_group(r"{a\}{b}} c", 0), end_of_group("{a", 0)
        (8, None)
    """
    depth = 0
    for found in _BRACES.finditer(text, start, len(text) if limit is None else limit):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
    return None
