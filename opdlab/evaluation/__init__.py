"""Evaluation: sample answers to problems, check and store them, and compute metrics."""

from opdlab.evaluation.benchmark_metrics import BenchmarkMetrics
from opdlab.evaluation.config import EvaluationConfig
from opdlab.evaluation.evaluation_module import EvaluationModule
from opdlab.evaluation.evaluator import Evaluator
from opdlab.evaluation.samples import Sample, SampleFolder
from opdlab.policies import NoTeacher

__all__ = [
    "BenchmarkMetrics",
    "EvaluationConfig",
    "EvaluationModule",
    "Evaluator",
    "NoTeacher",
    "Sample",
    "SampleFolder",
]
