"""Mathematical equality of answers, judged by math-verify in processes that can be killed."""

from collections.abc import Callable, Sequence

from opdlab.verifiers.verifier import Verdict, bounded_form, boxes
from opdlab.verifiers.worker_verifier import WorkerVerifier

# Without a box only this many characters at the end are searched, because more text only costs time.
_TAIL_CHARACTERS = 400
# Real answers are shorter; parsing longer text only costs time.
_MAX_CHARACTERS = 5000


class MathVerifier(WorkerVerifier):
    r"""Verifier that accepts an answer mathematically equal to the gold answer.

    The answer is the text in the last ``\boxed{…}`` or ``\fbox{…}``. Boxes that stand together are one list, or one
    tuple, if the gold answer is one. A last box that is not closed is no answer. Without a box the answer is what
    follows ``the answer is``, the last formula, or the last number.

    Numbers are compared exactly, with their units (see :mod:`opdlab.verifiers.quantities`), lists, intervals and
    relations by their structure (:mod:`opdlab.verifiers.math.equality`), and expressions, which math-verify's parser
    reads, at random points (:mod:`opdlab.verifiers.math.values`). What cannot be read equals only the same text.

    ``extracted`` is the canonical form from SymPy, of the gold answer for a right answer and of the answer itself for a
    wrong one. ``\frac{2}{4}`` and ``0.5`` are both ``1/2``, so that a majority vote counts equal answers together.
    Without a form in time, ``extracted`` is the text. Wrong answers are not compared with each other, so equal ones may
    have different forms.

    Answers are untrusted and never parsed in this process. An answer that exceeds the time or memory limit is wrong,
    and its process is replaced. Processes start with the first answers and end with the verifier.

    Args:
        num_workers: number of processes, at least 1.
        time_limit: seconds per answer, above 0, without the start of a process and the wait for a free one.
        memory_limit: MiB of address space per process, at least 512.

    Raises:
        UsageError: a value is out of range.

    Example:
        >>> verdict = MathVerifier(num_workers=1).verify([r"so it is \boxed{\frac{2}{4}}"], ["0.5"])[0]
        >>> verdict
        Verdict(correct=True, extracted='1/2', reason='equal')
    """

    task = "opdlab.verifiers.math.judging:prepare"
    is_changeable = False

    def __init__(self, num_workers: int = 2, time_limit: float = 5.0, memory_limit: int = 1024) -> None:
        super().__init__(num_workers, time_limit, memory_limit)

    def submit(self, responses: Sequence[str], golds: Sequence[str]) -> Callable[[], list[Verdict]]:
        """See :meth:`Verifier.submit`; repeated answers are judged once."""
        pool = self.started_pool()
        keys = []
        for response, gold in zip(responses, golds, strict=True):
            found = boxes(response)
            unboxed = () if found is None else (response[-_TAIL_CHARACTERS:],)  # an open box is no answer
            keys.append((tuple(box.text for box in found) if found else unboxed, gold, bool(found)))
        futures = {
            key: pool.submit(*key) for key in dict.fromkeys(keys) if key[0] and sum(map(len, key[0])) <= _MAX_CHARACTERS
        }

        def wait() -> list[Verdict]:
            verdicts = []
            for key in keys:
                answers, gold, boxed = key
                if key in futures:
                    verdict = futures[key].result()
                else:
                    verdict = Verdict(False, None, "too long" if answers else "no answer")
                if verdict.extracted is None and verdict.reason != "no answer" and (verdict.correct or boxed):
                    # Without a canonical form the text counts in a majority vote.
                    text = bounded_form(" ".join((gold if verdict.correct else answers[-1])[:_MAX_CHARACTERS].split()))
                    verdict = Verdict(verdict.correct, text or None, verdict.reason)
                verdicts.append(verdict)
            self.report(verdicts)  # the closure keeps the verifier and its processes alive
            return verdicts

        return wait
