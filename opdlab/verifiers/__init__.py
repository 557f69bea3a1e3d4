"""Verifiers decide if an answer is right; they depend on neither data nor training."""

from opdlab.verifiers.math.math_verifier import MathVerifier
from opdlab.verifiers.plain import ExactMatchVerifier, NumericVerifier
from opdlab.verifiers.verifier import BoxedVerifier, Verdict, Verifier

__all__ = ["BoxedVerifier", "ExactMatchVerifier", "MathVerifier", "NumericVerifier", "Verdict", "Verifier"]
