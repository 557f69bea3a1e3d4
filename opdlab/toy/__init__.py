"""The toy world: a reasoning task for models of 281k parameters, with a trained teacher and student."""

from opdlab.toy.chain import ChainProblem, chain_problems, chain_tokenizer
from opdlab.toy.problems import ChainProblems

__all__ = ["ChainProblem", "ChainProblems", "chain_problems", "chain_tokenizer"]
