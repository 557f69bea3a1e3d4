"""The pair that ``opdlab screen`` looks at, from a configuration or from paths."""

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_warn

from opdlab.cli.building import build
from opdlab.cli.configured_models import configured_models, configured_teacher
from opdlab.cli.estimate import device_memory, refuse_oversized
from opdlab.cli.memory_parts import estimate
from opdlab.cli.parsing import fit_parser, parse_fit
from opdlab.cli.replay_sources import on_device
from opdlab.data import ChatTemplate, JsonlProblems, PromptSet, prompt_set
from opdlab.errors import UsageError, require
from opdlab.policies import (
    LanguageModel,
    LocalTeacher,
    NoTeacher,
    ServedTeacher,
    TargetCache,
    Teacher,
    share_vocabulary,
)
from opdlab.screening.pair import MIN_PROMPTS, ConfiguredRun, Pair, ScreenConfig
from opdlab.types import Problem
from opdlab.verifiers import BoxedVerifier, ExactMatchVerifier, MathVerifier, NumericVerifier, Verifier

VERIFIERS: dict[str, Callable[[], Verifier]] = {
    "math": MathVerifier,
    "boxed": BoxedVerifier,
    "exact": ExactMatchVerifier,
    "numeric": NumericVerifier,
}
TRAINING = "training"
"""Name of the set with the training prompts."""
_MAX_PROMPT_TOKENS = 4096


@dataclass(frozen=True)
class Screened:
    """A pair on its device.

    Args:
        pair: the pair.
        config: options of the screening.
        teacher: what the teacher is, for the head of the page.
        autocast: context of the passes.
    """

    pair: Pair
    config: ScreenConfig
    teacher: str
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext


def _config(options: Namespace, **defaults: Any) -> ScreenConfig:
    names = ScreenConfig.__dataclass_fields__
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return ScreenConfig(**defaults | given)


def pair_of_paths(options: Namespace) -> Screened:
    """Return the pair of ``--student``, ``--teacher`` and ``--prompts``.

    Raises:
        UsageError: see the classes of models and problems.
    """
    config = _config(options)
    source, problems = _source(options)
    student = LanguageModel(options.student, dtype=options.dtype).requires_grad_(False).eval()
    require(
        not options.chat or bool(student.tokenizer.chat_template),
        f"--chat is given, but the tokenizer of --student '{options.student}' has no chat template: leave --chat out",
    )
    teacher: Teacher
    if re.match(r"https?://", options.teacher):
        teacher = ServedTeacher(options.teacher)
    else:
        teacher = LocalTeacher(options.teacher, dtype=options.dtype, batch_size=options.batch_size)
    teacher.bind(student)
    share_vocabulary(student, teacher)
    found = _prompts(options.prompts, source, problems, student)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student.to(device)
    teacher.to(device)
    pair = Pair(student, teacher, {Path(options.prompts).stem: found}, source.template)
    return Screened(pair, config, options.teacher)


def _source(options: Namespace) -> tuple[JsonlProblems, list[Problem]]:
    """Return the source, with a verifier if there are gold answers, and its problems without repeated ones.

    All rows are read before models are loaded.
    """
    fields: dict[str, Any] = {
        "problem_field": options.problem_field,
        "template": ChatTemplate() if options.chat else None,
    }
    plain = JsonlProblems(options.prompts, answer_field=None, **fields)
    num_rows = sum(1 for _ in plain.problems())
    require(num_rows > 0, f"--prompts '{options.prompts}' has no rows: give a JSON Lines file with problems")
    name = options.answer_field or "answer"
    has_answers = any(row.get(name.partition(".")[0]) is not None for _, row in plain.rows())
    judged = has_answers or options.answer_field is not None
    source = plain
    if judged:
        source = JsonlProblems(options.prompts, answer_field=name, verifier=VERIFIERS[options.verifier](), **fields)
    distinct: dict[object, Problem] = {}
    for problem in source.problems():
        require(
            not judged or bool((problem.answer or "").strip()),
            f"--prompts '{options.prompts}': the '{name}' of problem '{problem.id}' is empty: give each problem an "
            "answer, or none of them",
        )
        distinct.setdefault(problem.messages or problem.text, problem)
    if (count := num_rows - len(distinct)) > 0:
        rank_zero_warn(
            f"--prompts '{options.prompts}': left out, repeating an earlier one: {count} of {num_rows} problems"
        )
    _check_count(f"--prompts '{options.prompts}'", len(distinct))
    return source, list(distinct.values())


def _prompts(file: str, source: JsonlProblems, problems: Sequence[Problem], student: LanguageModel) -> PromptSet:
    """Return the prompts that are not too long, and say how many are."""
    where, bound = f"--prompts '{file}'", f"more than {_MAX_PROMPT_TOKENS} tokens"
    try:
        found = prompt_set(source, student.tokenizer, _MAX_PROMPT_TOKENS, problems)
    except UsageError as error:
        if not str(error).startswith("data.max_prompt_tokens"):  # a key that there is not with --prompts
            raise
        raise UsageError(f"{where}: every prompt has {bound}: give shorter ones") from error
    if found.num_too_long:
        rank_zero_warn(f"{where}: left out, having {bound}: {found.num_too_long} of {len(problems)} prompts")
    _check_count(where, len(found))
    return found


def _check_count(where: str, count: int) -> None:
    """Refuse a set with which no two models can be compared."""
    require(
        count >= MIN_PROMPTS,
        f"{where} has {count} problem to measure on, but a screening needs at least {MIN_PROMPTS}: give more",
    )


def pair_of_config(options: Namespace, overrides: Sequence[str]) -> Screened:
    """Return the pair of the configuration of ``opdlab fit``.

    Raises:
        UsageError: the configuration is invalid, or models or data cannot be read.
    """
    stacked = [part for each in options.config for part in ("-c", each)]
    settings = parse_fit([*stacked, *overrides])
    sampling = settings.model.sampling
    defaults = {name: getattr(sampling, name) for name in ("temperature", "top_p", "max_new_tokens")}
    config = _config(options, **defaults)
    if settings.check_memory:
        refuse_oversized(settings)
    seed_everything(settings.seed_everything, workers=True, verbose=False)
    built = build(fit_parser(), settings)
    module, data = built.model, built.data
    # A screening leaves no trace in a cache of targets.
    teacher = module.teacher.teacher if isinstance(module.teacher, TargetCache) else module.teacher
    name = type(teacher).__name__
    require(not isinstance(teacher, NoTeacher), f"model.teacher is {name}: give a teacher to compare with")
    data.prepare(module.student.tokenizer, training=True)
    data.check_tokens(module.student.tokenizer, module.student.vocab_size)
    data.check_teachers(teacher.names)
    _check_count(f"data.train ({data.train_source.name})", len(data.train_prompts))
    autocast = on_device(module, settings.trainer.accelerator, settings.trainer.precision)
    teacher.to(module.student.device)
    problems = {TRAINING: data.train_prompts, **data.benchmarks}
    run = _run(settings, module)
    student = module.student.requires_grad_(False).eval()
    pair = Pair(student, teacher, problems, data.train_source.template, run)
    described = configured_teacher(settings).get("init_args") or {}
    return Screened(pair, config, f"{name} {described.get('path') or described.get('url') or ''}".strip(), autocast)


def _run(settings: Any, module: Any) -> ConfiguredRun:
    """Return what the configuration says of its run."""
    reuse, device, memory = settings.data.reuse, device_memory(settings.trainer.accelerator), None
    if device is not None:
        result = estimate(settings, dict(configured_models(settings)), on_cpu=device.is_host)
        memory = (result.need(device)[1], device.free, result.verdict(device))
    return ConfiguredRun(
        objective=type(module.objective).__name__,
        k=getattr(module.objective, "k", None),
        rollouts=reuse.prompts_per_pool * settings.model.sampling.num_samples,
        epochs=reuse.epochs,
        batch_size=reuse.batch_size,
        num_steps=settings.trainer.max_steps if settings.trainer.max_steps > 0 else None,
        memory=memory,
    )
