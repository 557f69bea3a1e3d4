"""Problems, prompts and the data module that hands them out."""

from opdlab.data.datamodule import EvaluationBatch, PromptDataModule
from opdlab.data.hub import HubProblems
from opdlab.data.jsonl import JsonlProblems
from opdlab.data.prompts import Problem, ProblemSource, Prompt, PromptSet, prompt_set
from opdlab.data.reuse import ReuseConfig
from opdlab.data.templates import ChatTemplate, RawTemplate, Template

__all__ = [
    "ChatTemplate",
    "EvaluationBatch",
    "HubProblems",
    "JsonlProblems",
    "Problem",
    "ProblemSource",
    "Prompt",
    "PromptDataModule",
    "PromptSet",
    "RawTemplate",
    "ReuseConfig",
    "Template",
    "prompt_set",
]
