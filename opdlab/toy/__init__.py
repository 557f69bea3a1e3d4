"""The toy world: a reasoning task that a 281k-parameter model can learn, with a trained teacher and student."""

from opdlab.toy.chain import ChainProblem, chain_problems, chain_tokenizer
from opdlab.toy.problems import ChainProblems

__all__ = ["ChainProblem", "ChainProblems", "chain_problems", "chain_tokenizer"]
