"""Problems, prompts, and the data module that serves them."""

from opdlab.data.benchmarks import Benchmark, DapoMath17k
from opdlab.data.cleaning import CleaningConfig, CleaningReport
from opdlab.data.datamodule import PromptDataModule
from opdlab.data.jsonl import JsonlProblems
from opdlab.data.prompts import ProblemSource, PromptSet, prompt_set
from opdlab.data.stores import ProblemStore
from opdlab.data.table_problems import TableProblems
from opdlab.data.templates import ChatTemplate, RawTemplate, Template
from opdlab.rollouts import DemonstrationConfig, ReuseConfig
from opdlab.types import EvaluationBatch, Problem, Prompt

__all__ = [
    "Benchmark",
    "ChatTemplate",
    "CleaningReport",
    "CleaningConfig",
    "DapoMath17k",
    "DemonstrationConfig",
    "EvaluationBatch",
    "JsonlProblems",
    "Problem",
    "ProblemSource",
    "ProblemStore",
    "Prompt",
    "PromptDataModule",
    "PromptSet",
    "RawTemplate",
    "ReuseConfig",
    "TableProblems",
    "Template",
    "prompt_set",
]
