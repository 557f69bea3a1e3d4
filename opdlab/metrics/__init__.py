"""Metrics over problems, each with a standard error clustered by problem."""

from opdlab.metrics.majority_vote import MajorityVote
from opdlab.metrics.pass_at_k import PassAtK
from opdlab.metrics.problem_mean import ProblemMean

__all__ = ["MajorityVote", "PassAtK", "ProblemMean"]
