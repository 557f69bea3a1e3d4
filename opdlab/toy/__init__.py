"""The toy world: two reasoning tasks for tiny models, and a trained teacher and student of the first."""

from opdlab.toy.chain import ChainProblem, ChainProblems, chain_problems, chain_tokenizer
from opdlab.toy.strings import StringProblem, StringProblems, string_problems, string_tokenizer
from opdlab.toy.task import ToyProblems

__all__ = [
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
