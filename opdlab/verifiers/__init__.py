"""Verifiers decide if an answer is right; they depend on neither data nor training."""

from opdlab.verifiers.functions import FunctionVerifier, JsonSchemaVerifier, RegexVerifier
from opdlab.verifiers.math.math_verifier import MathVerifier
from opdlab.verifiers.plain import ExactMatchVerifier, NumericVerifier
from opdlab.verifiers.verifier import BoxedVerifier, Verdict, Verifier
from opdlab.verifiers.worker_verifier import WorkerVerifier

__all__ = [
    "BoxedVerifier",
    "ExactMatchVerifier",
    "FunctionVerifier",
    "JsonSchemaVerifier",
    "MathVerifier",
    "NumericVerifier",
    "RegexVerifier",
    "Verdict",
    "Verifier",
    "WorkerVerifier",
]
