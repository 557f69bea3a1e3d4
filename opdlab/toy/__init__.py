"""The toy world: two reasoning tasks for tiny models, with trained pairs, and one of real text for real models."""

from opdlab.toy.capitals import CapitalProblems, CapitalVerifier
from opdlab.toy.chain import ChainProblem, ChainProblems, chain_problems, chain_tokenizer
from opdlab.toy.strings import StringProblem, StringProblems, string_problems, string_tokenizer
from opdlab.toy.task import ToyProblems

__all__ = [
    "CapitalProblems",
    "CapitalVerifier",
    "ChainProblem",
    "ChainProblems",
    "StringProblem",
    "StringProblems",
    "ToyProblems",
    "chain_problems",
    "chain_tokenizer",
    "string_problems",
    "string_tokenizer",
]
