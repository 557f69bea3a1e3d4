"""Resuming: what a checkpoint keeps of a run's settings, which of them may change, and Lightning's counters."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Trainer

from opdlab.checkpoints import CHECKPOINT_KEY
from opdlab.data import PromptDataModule
from opdlab.errors import require
from opdlab.evaluation.settings import benchmark_settings
from opdlab.objectives import Objective
from opdlab.policies import SamplingConfig
from opdlab.policies.fingerprints import weights_digest
from opdlab.records import digest
from opdlab.rollouts import RolloutLoader
from opdlab.rollouts.loader import check_batch_size
from opdlab.seeds import FOLLOWING_SEEDS
from opdlab.types import Rollouts

_SNAPSHOTS_TOKENS = "model.objective (tokens of the snapshot in its support)"
MAY_CHANGE = (
    "trainer.max_steps, trainer.accumulate_grad_batches, trainer.devices, trainer.num_nodes, data.reuse.epochs, "
    "data.reuse.overlap, data.reuse.batch_size if it divides what is left of the pass, model.gate, model.reduction, "
    "and what concerns evaluation and logging"
)
"""What may change at any checkpoint, for messages; docs/guide/resume.md has the whole table."""


def run_settings(module: Any, data: PromptDataModule | None) -> dict[str, dict[str, Any]]:
    """Return the settings of a run that may not change at every checkpoint, as plain values by key.

    Args:
        module: an :class:`OPDModule`, before any step.
        data: attached to its trainer, with its problems; without it, its settings are left out.

    Returns:
        Under ``run`` those that hold for the whole run, under ``buffer`` those that may change where a buffer ends.
    """
    student, teacher, optimizers = module.student, module.teacher, module.configure_optimizers()
    optimizer, scheduler = optimizers, None
    if isinstance(optimizers, dict):
        optimizer, scheduler = optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]
    settings = plain_settings(module.sampling, module.mask_first, module.objective, optimizer, scheduler)
    run, buffer = settings["run"], settings["buffer"]
    run |= {
        "model.student (its tokenizer)": digest(sorted(student.tokenizer.get_vocab().items()))[:8],
        # Weights below an adapter are not in the state dict.
        "model.student (its frozen weights)": weights_digest(student, frozen=True),
    }
    buffer |= {
        "model.objective.k": module.request.top_k,  # 0 without a teacher
        _SNAPSHOTS_TOKENS: module.request.behavior_top_k,
        "model.gate, model.objective (one needs the teacher's entropy)": module.request.entropy,
        "model.gate, model.objective (one needs the teacher's log-normalizer)": module.request.tail,
        "model.teacher": _name(teacher),
        "model.teacher (its weights)": teacher.weights_digest(),
    }
    if data is not None and data.train_prompts is not None:
        train, loader = benchmark_settings(data.train_prompts), data.train_dataloader()
        run["data.seed"] = loader.seed
        run["data.max_prompt_tokens"] = data.max_prompt_tokens
        run["data.train"] = f"{train['num_problems']} prompts with digest {train['prompts'][:8]}"
        buffer["data.train.verifier"] = train["verifier"]
        facts, share = data.train_prompts.facts, data.demonstrations.share
        buffer["data.demonstrations.share"] = share
        buffer["data.demonstrations (their tokens)"] = facts.demonstrations_digest[:8] if share else None
        buffer["data.train (the teacher's prompts)"] = facts.teacher_digest[:8] if facts.teachers_see_others else None
        buffer["data.reuse.prompts_per_pool"] = loader.reuse.prompts_per_pool
    return settings


def plain_settings(
    sampling: SamplingConfig,
    mask_first: Sequence[str],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scheduler: Any | None,
) -> dict[str, dict[str, Any]]:
    """Return those settings of :func:`run_settings` that are known before models and problems are loaded.

    Args:
        sampling: of rollouts.
        mask_first: see :class:`OPDModule`.
        objective: of the run.
        optimizer: with its options; of any parameters.
        scheduler: of that optimizer, before any step; or None.
    """
    sampled = {f"model.sampling.{name}": value for name, value in asdict(sampling).items() if name != "batch_size"}
    run: dict[str, Any] = {
        **_options("model.optimizer", optimizer, optimizer.defaults),
        **_options("model.lr_scheduler", scheduler, scheduler.state_dict() if scheduler is not None else {}),
    }
    buffer: dict[str, Any] = {
        **sampled,
        "model.mask_first": list(mask_first),
        "model.objective": _name(objective),
        "model.objective.k": objective.request.top_k,
        _SNAPSHOTS_TOKENS: objective.request.behavior_top_k,
    }
    return {"run": run, "buffer": buffer}


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _options(key: str, value: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an optimizer or a scheduler that a checkpoint would set back to its own, by key."""
    if value is None:
        return {key: None}
    plain: dict[str, Any] = json.loads(json.dumps(dict(options), default=_name))
    known = inspect.signature(type(value)).parameters
    return {key: _name(value), **{f"{key}.{name}": option for name, option in plain.items() if name in known}}


def _check_settings(saved: Mapping[str, Any], now: Mapping[str, Any], *, inside: bool) -> None:
    """Raise a UsageError in one line if a setting differs that may not change at a checkpoint.

    Args:
        saved: :func:`run_settings` of the run that wrote the checkpoint.
        now: of the run that goes on from it.
        inside: True if the checkpoint is inside a rollout buffer.
    """
    rules = {"run": "this may not change in a run; set it back, or start a new run from the student"}
    if inside:
        rules["buffer"] = "this may change only where a rollout buffer ends, and ckpt_path is inside one; set it back"
    for part, rule in rules.items():
        keys = [key for key in now[part] if key in saved[part] and saved[part][key] != now[part][key]]
        names = {key: f"{key} (seed_everything, if it is null)" for key in FOLLOWING_SEEDS}
        changed = [f"{names.get(key, key)} is {now[part][key]}, but {saved[part][key]} in ckpt_path" for key in keys]
        require(not changed, f"{', '.join(changed)}: {rule}. At any checkpoint may change: {MAY_CHANGE}")


def check_before_models(
    checkpoint: Mapping[str, Any], settings: Mapping[str, Any], batch_size: int, limits: tuple[int, int | None]
) -> None:
    """Raise a UsageError if a run may not go on from a checkpoint, as far as no model is needed to know it.

    Args:
        checkpoint: sound, see :func:`opdlab.checkpoints.check_checkpoint`; it is only compared.
        settings: :func:`plain_settings` of the run, and others of :func:`run_settings` that are known.
        batch_size: ``data.reuse.batch_size`` of the run.
        limits: ``max_steps`` and ``max_epochs`` of its trainer.
    """
    saved, states = _kept(checkpoint)
    _check_limits(*limits, checkpoint["global_step"], checkpoint["epoch"])
    inside = "pool" in states[0]
    _check_settings(saved, settings, inside=inside)
    if inside:
        rollouts = Rollouts.from_state_dict(states[0]["pool"]["rollouts"])
        check_batch_size(batch_size, states[0]["rows"], len(rollouts))


def _kept(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the settings and the states of the loader in a checkpoint; refuse those of another version."""
    saved = checkpoint[CHECKPOINT_KEY].get("settings")
    loops = checkpoint["loops"]["fit_loop"]
    states = loops["state_dict"].get("combined_loader", []) if isinstance(loops.get("state_dict"), dict) else []
    try:
        json.dumps(saved)
        plain = isinstance(saved, dict) and all(isinstance(saved.get(part), dict) for part in ("run", "buffer"))
    except (TypeError, ValueError):  # a tensor
        plain = False
    require(
        plain
        and isinstance(states, list)
        and len(states) == 1
        and isinstance(states[0], dict)
        and "pools" not in states[0],
        "ckpt_path was written by another version of opdlab, so a run cannot go on from it: evaluate it with opdlab "
        "validate, or start a new run from its student",
    )
    return saved, states


def _check_limits(max_steps: int, max_epochs: int | None, step: int, epoch: int) -> None:
    """Raise a UsageError if a run ends before its checkpoint: after fewer steps or passes over the prompts."""
    for key, limit, done in (("max_steps", max_steps, step), ("max_epochs", max_epochs, epoch)):
        require(
            limit is None or limit < 0 or limit >= done,
            f"trainer.{key} is {limit}, but ckpt_path has done {done}: give at least {done}, or an earlier checkpoint",
        )


def go_on_from(
    checkpoint: dict[str, Any], trainer: Trainer, settings: Mapping[str, Any], loader: RolloutLoader | None
) -> None:
    """Check that a run may go on from a checkpoint, and change the checkpoint to the counters of its trainer.

    Args:
        checkpoint: of opdlab; its ``loops`` are changed in place.
        trainer: of the run that goes on.
        settings: its :func:`run_settings`.
        loader: a new loader of rollouts, or None if no data module makes it; its state is restored.

    Raises:
        UsageError: a setting differs that may not change there, or the run ends before the checkpoint.
    """
    own, step = checkpoint[CHECKPOINT_KEY], checkpoint["global_step"]
    loops = checkpoint["loops"]["fit_loop"]
    saved, states = _kept(checkpoint)
    _check_limits(trainer.max_steps, trainer.max_epochs, step, checkpoint["epoch"])
    _check_settings(saved, settings, inside="pool" in states[0])
    if loader is not None:
        loader.load_state_dict(states[0])
        _rewind(loops, loader, trainer, step, own["micro_batches"])
        return
    micro_batches, ready = own["micro_batches"], loops["epoch_loop.batch_progress"]["current"]["ready"]
    require(
        micro_batches == trainer.accumulate_grad_batches and ready % micro_batches == 0,
        f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, but {micro_batches} in ckpt_path, or "
        "ckpt_path is inside an optimizer batch: a run goes on from it only with a PromptDataModule",
    )


def _rewind(loops: dict[str, Any], loader: RolloutLoader, trainer: Trainer, step: int, micro_batches: int) -> None:
    """Change the counters of a checkpoint to the loader's position, and ask for an evaluation that it lacks.

    Lightning counts micro-batches. A run may resume with others, and a checkpoint inside an optimizer batch repeats it
    from its start, since its gradients are not saved. Lightning also takes an evaluation that was due at the step
    of the checkpoint for done, although checkpoints are written before it.

    Args:
        loops: ``checkpoint["loops"]["fit_loop"]``; changed in place.
        loader: at the checkpoint's position.
        trainer: of the run that goes on.
        step: optimizer steps taken.
        micro_batches: ``accumulate_grad_batches`` of the run that wrote the checkpoint.
    """
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]["total"]
    if epochs["processed"] + 1 != epochs["started"]:  # between two passes over the prompts
        return
    total, current = batches["total"], batches["current"]
    # Inside an optimizer batch, the evaluation of the last whole one was earlier.
    evaluated = total["completed"] == total["processed"] or current["ready"] % micro_batches != 0
    # At position 0 after an optimizer batch, the pass over the prompts has just ended.
    yielded = 0 if current["ready"] < micro_batches else loader.num_yielded or len(loader)
    # The state in which the callbacks of a step's end find Lightning.
    for counts, value in ((total, step * trainer.accumulate_grad_batches), (current, yielded)):
        counts.update(ready=value, started=value, processed=value, completed=value - 1)
    batches["is_last_batch"] = yielded == len(loader)
    behind = 0 if step == trainer.max_steps else 1  # Lightning moves its step of the log when it goes on
    if behind and not evaluated and _evaluation_is_due(trainer, total["ready"], yielded, len(loader)):
        behind = 2  # once more after the evaluation
        # An evaluation that stopped before its first batch.
        evaluation = loops["epoch_loop.val_loop.batch_progress"]
        evaluation["total"].update(ready=1, started=1, processed=0, completed=0)
        evaluation["current"].update(ready=0, started=0, processed=0, completed=0)
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step - behind


def _evaluation_is_due(trainer: Trainer, total: int, current: int, length: int) -> bool:
    if not trainer.enable_validation:
        return False
    interval: Any = trainer.val_check_interval
    if isinstance(interval, float):
        interval = max(1, int(length * interval))
    every_epoch = trainer.check_val_every_n_epoch is not None
    return isinstance(interval, int) and (current if every_epoch else total) % interval == 0
