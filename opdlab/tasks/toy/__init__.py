"""The toy world: a reasoning task that a 281k-parameter model can learn, with a trained teacher and student."""

from opdlab.tasks.toy.chain import ChainProblem, chain_problems, chain_tokenizer

__all__ = ["ChainProblem", "chain_problems", "chain_tokenizer"]
