"""Metrics over problems, each with a standard error clustered by problem."""

from opdlab.metrics.problem_mean import MajorityVote, PassAtK, ProblemMean

__all__ = ["MajorityVote", "PassAtK", "ProblemMean"]
