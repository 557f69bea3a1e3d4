"""Tasks: how answers are verified, and the toy world.

Problem sources of a task live beside it (:mod:`opdlab.tasks.toy.problems`); verifiers know nothing of data.
"""

from opdlab.tasks.math_verifier import MathVerifier
from opdlab.tasks.plain_verifiers import ExactMatchVerifier, NumericVerifier
from opdlab.tasks.verifier import BoxedVerifier, Verdict, Verifier

__all__ = ["BoxedVerifier", "ExactMatchVerifier", "MathVerifier", "NumericVerifier", "Verdict", "Verifier"]
