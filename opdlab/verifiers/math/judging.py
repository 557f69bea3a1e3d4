r"""What runs in the processes that judge mathematical answers: equality, the canonical form, and the loop around them.

An answer is untrusted text that can keep a computer algebra system busy for ever, take all memory, or overflow its
stack. So the process that the parent started only forks: a child judges, and the kernel ends the child when an answer's
time is up, even inside C code. Forking takes a millisecond where a new interpreter with SymPy takes half a second.

This module is imported in those processes and must stay light: no torch.
"""

import functools
import gc
import json
import logging
import mmap
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from opdlab.verifiers.math.notation import (
    NUMBERS_SIDE_BY_SIDE,
    chain,
    differ,
    plain_text,
    same_text,
    time_of_day,
    with_base,
    without_lead_in,
    words_differ,
)
from opdlab.verifiers.quantities import Quantity, parse_quantity, same_quantity, tidy, without_assignment
from opdlab.verifiers.verifier import bounded_form

# A child that has grown by more than this is replaced: SymPy's caches keep what it has seen.
_MAX_GROWTH = 256 << 20

_IDLE, _BUSY, _DIFFERENT, _EQUAL = range(4)
_EXIT_PARENT_GONE, _EXIT_GROWN, _EXIT_FAILED = range(3)


class Judgement(NamedTuple):
    """What a process says of an answer; the fields of :class:`~opdlab.verifiers.Verdict`."""

    correct: bool
    extracted: str | None
    reason: str


# -- equality --------------------------------------------------------------------------------------------------------


def judge(answer: str, gold: str, boxed: bool, decided: Callable[[bool], None] | None = None) -> Judgement:
    r"""Compare an answer with the gold one. Runs for as long as it likes: call it only where it can be killed.

    Where both are plain numbers, :func:`~opdlab.verifiers.quantities.same_quantity` decides; otherwise math-verify
    does, on the text as it stands and then without punctuation and spacing. Vetoes keep math-verify from calling
    different things equal: :func:`~opdlab.verifiers.math.notation.differ`, and a side of ``a=b=c`` that is another
    number than the gold.

    Args:
        answer: what stands in the box, or the end of a response without a box.
        gold: the gold answer.
        boxed: whether ``answer`` comes from a box.
        decided: called with the outcome before the canonical form is made.
    """
    found = None
    if not boxed:
        found = _parse(answer)
        if not found:
            return Judgement(False, None, "no answer")
        answer = str(found[-1])
    if not answer.strip():
        return Judgement(False, None, "no answer")
    answer = without_lead_in(answer)
    if "=" not in gold:
        answer = without_assignment(answer)
    quantities = parse_quantity(gold), parse_quantity(answer)
    equal = _equal(answer, gold, *quantities, found)
    if decided is not None:
        decided(equal)
    if equal:
        return Judgement(True, _form(gold, quantities[0]), "equal")
    if None in quantities and words_differ(answer, gold):  # the canonical form knows no apples
        return Judgement(False, bounded_form(plain_text(answer)), "different")
    return Judgement(False, _form(answer, quantities[1], quantities[0]), "different")


def _equal(answer: str, gold: str, wanted: Quantity | None, quantity: Quantity | None, found: Any) -> bool:
    if wanted is not None and quantity is not None:
        return same_quantity(wanted, quantity)
    if same_text(answer, gold):
        return True
    if differ(answer, gold) or not _chain_holds(answer, gold):
        return False
    if _verify(_boxed(gold), found or _boxed(answer)):
        return True
    tidied = tidy(answer), tidy(gold)
    return tidied != (answer, gold) and bool(tidied[0]) and _verify(_boxed(tidied[1]), _boxed(tidied[0]))


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    # The kernel keeps the time limit; math-verify's own is a Python signal handler, which C code does not let run.
    found: list[Any] = parse(text, parsing_timeout=None)
    return found


def _boxed(text: str) -> list[Any]:
    text = _NUMBER_BEFORE_PARENTHESIS.sub(r"\1 \\cdot ", text)
    return _parse(f"\\boxed{{{text}}}")


def _verify(gold: list[Any], found: list[Any]) -> bool:
    from math_verify import verify

    if not gold or not found:
        return False
    if verify(gold, found, timeout_seconds=None):
        return True
    # It compares an interval with a gold inequality, but not an inequality with a gold interval.
    return _is_interval(gold[0]) and _is_inequality(found[0]) and bool(verify(found, gold, timeout_seconds=None))


def _is_interval(expression: Any) -> bool:
    import sympy

    return isinstance(expression, sympy.Interval | sympy.Union)


def _is_inequality(expression: Any) -> bool:
    import sympy

    inequality = sympy.core.relational._Inequality
    parts = expression.args if isinstance(expression, sympy.And | sympy.Or) else [expression]
    return all(isinstance(part, inequality) for part in parts)


def _chain_holds(answer: str, gold: str) -> bool:
    """Whether each number in ``a=b=c`` equals the gold answer; true for all that is no chain of equations."""
    sides = chain(answer)
    gold = without_assignment(gold)
    if "=" in gold or len(sides) < 2:
        return True
    numbers = [side for side in sides if _is_number(side)]
    if len(sides) == 2 and len(numbers) < 2:
        return True
    return all(_equal(side, gold, parse_quantity(gold), parse_quantity(side), None) for side in numbers)


def _is_number(text: str) -> bool:
    if parse_quantity(text) is not None:
        return True
    found = _boxed(text)
    return bool(found) and getattr(found[0], "free_symbols", None) == set()


# latex2sympy reads a number before a number in parentheses as a mixed number: 2(3) as 5.
_NUMBER_BEFORE_PARENTHESIS = re.compile(r"(?<![\w^.])([0-9]+(?:\.[0-9]+)?)\s*(?=(?:\\left\s*)?\()")


# -- the canonical form ----------------------------------------------------------------------------------------------


def _form(text: str, quantity: Quantity | None, gold: Quantity | None = None) -> str:
    """The canonical form, or where it cannot be made, as that of a number with too many digits, the text."""
    try:
        return canonical(text, quantity, gold)
    except Exception:  # of SymPy, whatever it is: equality is decided already
        return bounded_form(tidy(text))


@functools.lru_cache(maxsize=1024)
def canonical(text: str, quantity: Quantity | None, gold: Quantity | None = None) -> str:
    r"""One string for the many ways to write an answer: ``\frac{2}{4}``, ``0.5`` and ``1/2`` are ``1/2``.

    Numbers become integers or fractions, sets are sorted, expressions are evaluated by SymPy, words lose ``\text`` and
    case. A unit is kept only where the gold answer has another one. At most 200 characters.
    """
    if quantity is not None:
        dropped = gold is None or gold.unit in (None, quantity.unit)
        return bounded_form(str(quantity.value if dropped else quantity))
    words = plain_text(text)
    if re.fullmatch(r"[a-zA-Z][a-zA-Z ]+", words):
        return bounded_form(words.lower())
    notation = with_base(text) or time_of_day(text)
    if notation or NUMBERS_SIDE_BY_SIDE.fullmatch(words):
        return bounded_form(notation or words)
    found = _boxed(tidy(text))
    return bounded_form(_evaluated(found[0]) if found and not isinstance(found[0], str) else words)


def _evaluated(expression: Any) -> str:
    import sympy

    if isinstance(expression, sympy.FiniteSet):
        return "{" + ", ".join(sorted(_evaluated(item) for item in expression.args)) + "}"
    if isinstance(expression, sympy.Tuple):
        return "(" + ", ".join(_evaluated(item) for item in expression.args) + ")"
    if isinstance(expression, sympy.Eq) and isinstance(expression.lhs, sympy.Symbol):
        return _evaluated(expression.rhs)
    try:
        expression = expression.doit()
        if expression.has(sympy.Float):
            expression = sympy.nsimplify(expression, rational=True)
        if _is_small_polynomial(expression):
            expression = sympy.expand(expression)
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        pass  # as it stands, then
    return str(expression)


def _is_small_polynomial(expression: Any) -> bool:
    """Whether multiplying it out is cheap."""
    import sympy

    powers = expression.atoms(sympy.Pow)
    return len(list(sympy.preorder_traversal(expression))) < 60 and all(
        power.exp.is_Rational and abs(power.exp) <= 8 for power in powers
    )


# -- the process -----------------------------------------------------------------------------------------------------


# Loads SymPy and what the grammar caches as it meets new notations, before any answer's clock runs: each fork has it.
_WARM_UP = (
    (r"\frac{x}{2} + \sqrt{3}", r"\sqrt{3} + 0.5x"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, -\frac{\pi}{2})"),
    (r"\{1, 2\}", "1, 3"),
    ("x^2 - 2x + 1 = 0", "y = 2x + 3"),
    (r"\sin(x) + \log_2 5", r"\cos^2 x - 5!"),
)


def serve(channel: Connection, time_limit: float, memory_limit: int) -> None:
    """Judge what comes through the channel until it closes.

    Args:
        channel: receives ``[answer, gold, boxed]`` as JSON, one at a time, and sends back the :class:`Judgement`.
        time_limit: seconds for one answer.
        memory_limit: MiB of address space.
    """
    _limit_memory(memory_limit << 20)
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    for answer, gold in _WARM_UP:
        judge(answer, gold, boxed=True)
    gc.freeze()  # leave the pages shared with the children alone
    state = mmap.mmap(-1, 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # until here it told the parent why this failed
    channel.send_bytes(b"ready")
    while True:
        state[0] = _IDLE
        child = os.fork()
        if child == 0:
            _serve_in_child(channel, state, time_limit)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if state[0] != _IDLE:
            channel.send_bytes(json.dumps(_of_the_killed(state[0], status)).encode())
        elif status in (_EXIT_PARENT_GONE, _EXIT_FAILED):
            return


def _limit_memory(limit: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _of_the_killed(state: int, status: int) -> Judgement:
    if state in (_EQUAL, _DIFFERENT):  # only the canonical form took too long
        return Judgement(state == _EQUAL, None, "equal" if state == _EQUAL else "different")
    return Judgement(False, None, "time limit" if status == -signal.SIGALRM else "worker died")


def _serve_in_child(channel: Connection, state: mmap.mmap, time_limit: float) -> None:
    code = _EXIT_FAILED
    try:
        largest = _peak_memory() + _MAX_GROWTH
        while _peak_memory() < largest:
            request = channel.recv_bytes()
            state[0] = _BUSY
            signal.setitimer(signal.ITIMER_REAL, time_limit)
            answer = _judge_safely(request, state)
            signal.setitimer(signal.ITIMER_REAL, 0)
            state[0] = _IDLE
            channel.send_bytes(answer)
        code = _EXIT_GROWN
    except (EOFError, OSError):
        code = _EXIT_PARENT_GONE
    finally:
        os._exit(code)


def _judge_safely(request: bytes, state: mmap.mmap) -> bytes:
    def decided(equal: bool) -> None:
        state[0] = _EQUAL if equal else _DIFFERENT

    try:
        answer, gold, boxed = json.loads(request)
        judgement = judge(answer, gold, boxed, decided)
    except MemoryError:
        judgement = Judgement(False, None, "memory limit")
    except Exception as error:  # whatever a hostile answer makes math-verify raise is that answer's fault
        judgement = Judgement(False, None, f"not understood ({type(error).__name__})")
    if judgement.reason not in ("equal", "different") and state[0] in (_EQUAL, _DIFFERENT):
        judgement = _of_the_killed(state[0], 0)
    return json.dumps(judgement).encode()


def _peak_memory() -> int:
    """Bytes; the system call counts in KiB, except on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
