r"""Answers that break careless verifiers: slow, deep, long, or not even text.

A verifier must judge each of them as wrong within its time limit and then judge the next answer correctly. None of them
equals 1, so tests use 1 as the gold answer.
"""


def _nested(opening: str, inner: str, closing: str, depth: int) -> str:
    return opening * depth + inner + closing * depth


def _boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


#: Responses by name.
HOSTILE_ANSWERS: dict[str, str] = {
    "tower of tens": _boxed("10^{10^{10}}"),
    "tower without braces": _boxed("10^10^10"),
    "tower of nines": _boxed("9^{9^{9^{9^{9}}}}"),
    "tower of slashes": _boxed("9**9**9**9"),
    "tower over a tower": _boxed(r"\frac{9^{9^{9^{9}}}}{7^{7^{7^{7}}}}"),
    "huge exponent of a sum": _boxed("(x+y+z)^{99999}"),
    "huge scientific exponent": _boxed("1e999999999"),
    "huge power of ten": _boxed(r"1.5 \times 10^{9999999999}"),
    "nested factorials": _boxed(_nested("(", "9", ")!", 6)),
    "factorial of a tower": _boxed("(9^{9^{9}})!"),
    "huge binomial": _boxed(r"\binom{10^{12}}{5 \cdot 10^{11}}"),
    "parentheses": _boxed(_nested("(", "2", ")", 2000)),
    "open parentheses": _boxed("(" * 2000 + "2"),
    "open lefts": _boxed("\\left(" * 700 + "2"),
    "nested fractions": _boxed(_nested("\\frac{1}{", "2", "}", 400)),
    "nested roots": _boxed(_nested("\\sqrt{", "2", "}", 500)),
    "nested matrices": _boxed(_nested("\\begin{pmatrix} 2 & ", "3", " \\end{pmatrix}", 60)),
    "nested powers": _boxed(_nested("{2^", "3", "}", 500)),
    "nested boxes": _nested("\\boxed{", "2", "}", 3000),
    "long sum of roots": _boxed("+".join(f"\\sqrt{{{n}}}" for n in range(2, 300))),
    "endless sum": _boxed(r"\sum_{n=1}^{10^{10}} \sin(n^2) \cos(n)"),
    "hard integral": _boxed(r"\int_0^1 \int_0^1 x^{x^{y^{y}}} \sin(e^{xy}) dx dy"),
    "high-degree equation": _boxed("x^{97} + x^{53} - 3x^{11} + 7 = 0"),
    "long number": _boxed("7" * 200_000),
    "number of 5,000 digits": _boxed("7" * 5000),
    "no box": "2+" * 100_000,
    "no box, open math": "$" * 200_000,
    "open braces": "{" * 200_000,
    "open boxes": "\\boxed{" * 30_000,
    "backslashes": _boxed("\\" * 4000),
    "minus signs": _boxed("-" * 4001 + "1"),
    "equations": _boxed("=".join("x" * 1000)),
    "spaces": _boxed("2" + " " * 4000 + "3"),
    "commas": _boxed("2," * 2000 + "1"),
    "null bytes": _boxed("\x00\x00"),
    "lone surrogates": _boxed("\ud800\udfff\ud800"),
    "combining marks": _boxed("2" + "\u0301" * 4000),
    "code": _boxed("__import__('os')._exit(1)"),
    "code in a command": _boxed(r"\input{/etc/passwd}"),
}
