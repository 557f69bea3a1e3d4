r"""The judgement of an answer, and its canonical form.

An answer is untrusted text. It can make a computer algebra system run forever, exhaust memory, or overflow the stack.
Call these functions only in a process that can be killed, as :mod:`opdlab.verifiers.worker_process` does.

Those processes import this module, so it must not import torch.
"""

import functools
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from opdlab.verifiers.math.choices import compared_parts
from opdlab.verifiers.math.equality import same
from opdlab.verifiers.math.reading import ASIAN, Answer, Group, Relation, Single, plain_text, read
from opdlab.verifiers.math.values import expression
from opdlab.verifiers.spelling import normalized, without_unicode
from opdlab.verifiers.units import units_differ
from opdlab.verifiers.verifier import Verdict, bounded_form

# Judged without a time limit: this loads SymPy and fills the grammar's caches, which every fork inherits.
_WARM_UP = (
    (r"\frac{x}{2} + \sqrt{3}", r"\sqrt{3} + 0.5x"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, -\frac{\pi}{2})"),
    (r"\{1, 2\}", "1, 3"),
    ("x^2 - 2x + 1 = 0", "y = 2x + 3"),
    (r"\sin(x) + \log_2 5", r"\cos^2 x - 5!"),
)


def prepare() -> Callable[..., Verdict]:
    """Load SymPy and math-verify's grammar, and return :func:`judge`: the task of a worker process."""
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for answer, gold in _WARM_UP:
        judge([answer], gold, boxed=True)
    return judge


def judge(answers: Sequence[str], gold: str, boxed: bool, decided: Callable[[bool], None] | None = None) -> Verdict:
    r"""Return the verdict of an answer. There is no time limit: call it only in a process that can be killed.

    Several boxes are a list if the gold answer is a list or a set, and a tuple if it is a tuple; otherwise the last box
    counts. Equality is :func:`opdlab.verifiers.math.equality.same`.

    Args:
        answers: texts of the boxes that stand together, or one text: the end of a response without a box.
        gold: the gold answer.
        boxed: ``answers`` come from boxes.
        decided: called with the result before the canonical form is computed.
    """
    texts = [normalized(text) for text in (answers if boxed else _unboxed(answers[-1]))]
    if not texts or not texts[-1]:
        return Verdict(False, None, "no answer")
    gold, texts[-1] = compared_parts(normalized(gold), texts[-1])
    wanted = read(gold)
    letter = wanted.unit if isinstance(wanted, Single) and wanted.unit else ""
    repeated = isinstance(wanted, Group) and len(wanted.items) == len(texts)  # 75, 75
    found = [read(text, letter) for text in (texts if repeated else dict.fromkeys(texts))]
    answer = found[-1]
    if len(found) > 1 and isinstance(wanted, Group):
        bracketed = any(isinstance(one, Group) for one in found)
        brackets = "()" if wanted.brackets not in ("", "{}") and not bracketed else ""
        items = [item for one in found for item in _listed(one)]
        answer = Group(", ".join(texts), brackets, tuple(items))
    equal = same(wanted, answer)
    if decided is not None:
        decided(equal)
    unit = wanted.unit if isinstance(wanted, Single) else None
    return Verdict(equal, _form(wanted if equal else answer, unit), "equal" if equal else "different")


def _listed(answer: Answer) -> tuple[Answer, ...]:
    return answer.items if isinstance(answer, Group) and answer.brackets in ("", "{}") else (answer,)


def _unboxed(text: str) -> list[str]:
    """Return the answer at the end of a response: after "the answer is", the last formula, or the last number."""
    from math_verify import LatexExtractionConfig, parse
    from math_verify.parser import NormalizationConfig

    text = re.sub(rf"(?<=[{ASIAN}])(?=[0-9\\$-])|(?<=[0-9$}}])(?=[{ASIAN}])", " ", without_unicode(text))
    if anchors := list(_ANCHOR.finditer(text)):
        sentence = _SENTENCE_END.split(text[anchors[-1].end() :], maxsplit=1)[0].strip(" *")
        if sentence and not re.search(r"\$|\\[(\[]", sentence):
            found = _NUMBER.findall(sentence)
            prose = re.search("[a-zA-Z]{2,} ", sentence) and not _COMPARISON.search(sentence)
            return found if prose and len(found) == 1 else [sentence]
    plain = NormalizationConfig(basic_latex=False, units=False, malformed_operators=False, nits=False, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=plain)
    # The kernel enforces the time limit; math-verify's is a Python signal handler, which cannot interrupt C code.
    # Its last result is the text of the formula.
    formulas = parse(text, [config], parsing_timeout=None)
    return [str(found) for found in formulas[-1:] or _NUMBER.findall(text)[-1:]]


def _form(answer: Answer, unit: str | None) -> str:
    """Return the canonical form, or the text if there is none, as for a number with too many digits."""
    try:
        return canonical(answer, unit)
    except MemoryError:
        raise
    except Exception:  # SymPy raises many types; equality is already decided
        return bounded_form(answer.text)


@functools.lru_cache(maxsize=1024)
def canonical(answer: Answer, unit: str | None = None) -> str:
    r"""Return one string for equivalent notations of an answer: ``\frac{2}{4}``, ``0.5`` and ``1/2`` are ``1/2``.

    Numbers become integers or fractions, lists and sets are sorted, expressions are evaluated by SymPy, words lose
    ``\text`` and case. A unit is kept only if it differs from ``unit``, that of the gold answer. At most 200
    characters.
    """
    if isinstance(answer, Relation) and answer.assigns:
        return canonical(answer.sides[-1], unit)
    if isinstance(answer, Group) and len(answer.items) == 1:
        return canonical(answer.items[0], unit)
    if isinstance(answer, Group):
        items = [canonical(item) for item in answer.items]
        if answer.brackets in ("", "{}"):
            return bounded_form("{" + ", ".join(sorted(items)) + "}")
        return bounded_form(answer.brackets[0] + ", ".join(items) + answer.brackets[1])
    words = plain_text(answer.text)
    if not isinstance(answer, Single):
        return bounded_form(words)
    if answer.time:
        return answer.time
    kept = f" {answer.unit}" if units_differ(unit, answer.unit) else ""
    if answer.quantity:
        digits = re.sub("[{} ()]", "", answer.value)
        return bounded_form(digits if answer.quantity.base != 10 else f"{answer.quantity.value}{kept}")
    if re.fullmatch(r"[a-zA-Z][a-zA-Z ]+", words):
        return bounded_form(words.lower())
    found = expression(answer.value)
    return bounded_form(words if found is None else _evaluated(found) + kept)


def _evaluated(found: Any) -> str:
    """Return an expression as text, evaluated and, if it is a small polynomial, expanded."""
    import sympy

    try:
        found = found.doit()
        powers = found.atoms(sympy.Pow)
        if len(list(sympy.preorder_traversal(found))) < 60 and all(
            power.exp.is_Rational and abs(power.exp) <= 8 for power in powers
        ):
            found = sympy.expand(found)
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        pass  # as it stands, then
    return str(found)


_ANCHOR = re.compile(
    r"\banswer(?: +to [^.?!$]{0,60}?)?(?: +is|\** *:)\** *:?|\u7b54\u6848(?: *[\u662f\u4e3a\u70ba])? *:?", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n|\u3002| because | since ")
# A number that is no part of an expression, with the unit after it.
_NUMBER = re.compile(
    r"(?<![^\s(])(?<![-+*/^=<>] )[-+]?\$?[0-9]++(?:[.,/][0-9]+)*+%?(?=[\s.,;:!?)]|$)"
    r"(?! *[-+*/^=<>\\])(?: [a-zA-Z]{3,}(?=[\s.]|$))?"
)
_COMPARISON = re.compile(r"\b(?:not|never|least|most|than|less|more|between|from)\b", re.IGNORECASE)
