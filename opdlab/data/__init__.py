"""Problems, prompts and the data module that hands them out."""

from opdlab.data.benchmarks import Benchmark, DapoMath17k
from opdlab.data.cleaning import CleaningAccount, CleaningConfig
from opdlab.data.datamodule import EvaluationBatch, PromptDataModule
from opdlab.data.jsonl import JsonlProblems
from opdlab.data.prompts import Problem, ProblemSource, Prompt, PromptSet, prompt_set
from opdlab.data.reuse import ReuseConfig
from opdlab.data.table_problems import TableProblems
from opdlab.data.templates import ChatTemplate, RawTemplate, Template

__all__ = [
    "Benchmark",
    "ChatTemplate",
    "CleaningAccount",
    "CleaningConfig",
    "DapoMath17k",
    "EvaluationBatch",
    "JsonlProblems",
    "Problem",
    "ProblemSource",
    "Prompt",
    "PromptDataModule",
    "PromptSet",
    "RawTemplate",
    "ReuseConfig",
    "TableProblems",
    "Template",
    "prompt_set",
]
