"""The toy world: a reasoning task for models of 281k parameters, with a trained teacher and student."""

from opdlab.toy.chain import ChainProblem, ChainProblems, chain_problems, chain_tokenizer

__all__ = ["ChainProblem", "ChainProblems", "chain_problems", "chain_tokenizer"]
