"""What ``opdlab estimate`` counts: the bytes of each part of a run, and the phases in which it is alive."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.cli import instantiate_class

from opdlab.cli.configured_models import (
    configured_models,
    configured_teacher,
    plugin_options,
    shards_teacher,
    teacher_prompt,
    teacher_weights,
)
from opdlab.cli.memory_engine import add_engine
from opdlab.cli.memory_table import Estimate
from opdlab.cli.sharded_parts import GRADIENTS, OPTIMIZER, SNAPSHOT, STUDENT, TEACHER, add_sharding, checkpoint_bytes
from opdlab.cli.sharding_checks import copies_gradients, num_processes, shards_weights
from opdlab.estimate import (
    DIVERGENCE_TILES,
    FLOAT,
    ModelSize,
    activation_bytes,
    exchanged_bytes,
    gathered_bytes,
    head_bytes,
    inference_bytes,
    kv_cache_bytes,
    optimizer_bytes_per_parameter,
)
from opdlab.types import TeacherRequest

_CASTS = "weights cast by autocast"
_COPY = "copy of the snapshot"
_BUCKETS = "copy of the gradients"
_CACHE, _BEHAVIOR_PASS = "KV cache", "forward pass of behavior scoring"
_BUFFER = "rollout buffer"
_AHEAD = "rollouts sampled ahead"
_EXCHANGED = "rows that are exchanged"
_GATHERED = "gathered buffer"


def estimate(config: Any, models: Mapping[str, ModelSize] | None = None, *, on_cpu: bool | None = None) -> Estimate:
    """Return the estimate for a process of a run, from the parsed configuration of ``opdlab fit``.

    Args:
        config: parsed configuration.
        models: sizes of the student and of a local teacher; counted by default.
        on_cpu: the run uses a CPU, where nothing can be offloaded, and where exchanging and gathering the rows of
            several processes are phases of their own; by default True only if ``trainer.accelerator`` names the CPU,
            so that any machine shows the needs of a GPU.

    Raises:
        UsageError: a model's configuration cannot be read.
    """
    models = dict(configured_models(config)) if models is None else models
    on_cpu = config.trainer.accelerator == "cpu" if on_cpu is None else on_cpu
    init = {"class_path": config.model.objective.class_path, "init_args": plugin_options(config.model.objective)}
    request: TeacherRequest = instantiate_class((), init).request
    student, processes = models["student"], _num_processes(config)
    result = Estimate(processes=max(1, processes // int(config.trainer.num_nodes)))
    _add_resident(result, config, models, {} if on_cpu else offloaded(config, models), request, processes)
    num_rollouts = -(-config.data.reuse.prompts_per_pool // processes) * config.model.sampling.num_samples
    engine = add_engine(result, config, student, on_cpu)
    cache = {} if engine is not None else {_CACHE: _cache(student, config, config.model.sampling, num_rollouts)}
    result.add_phase("sampling", SNAPSHOT, *(engine or ()), new=cache)
    _add_scoring(result, config, models, num_rollouts)
    _add_update(result, config, student, models.get("teacher") if request.hidden else None, processes, on_cpu)
    if config.data.benchmarks:
        _add_evaluation(result, config, models, engine)
    sharded = 0  # bytes of weights and optimizer state that are gathered for a checkpoint
    if processes > 1 and shards_weights(config):
        sharded, options = checkpoint_bytes(result, student), config.model.evaluation
        asked = {"evaluated": bool(options.teacher), "compared": bool(options.reverse_kl)}
        add_sharding(result, models, processes, teacher=shards_teacher(config), **asked)
    size, largest = _add_buffer(result, config, request, models.get("teacher"), num_rollouts)
    if processes > 1:
        of_first = f"of the first of {processes} processes, in a checkpoint inside a buffer"
        parts = {
            "an exchange": {_EXCHANGED: (exchanged_bytes(largest), "one tensor at a time, before each pass")},
            "a checkpoint": {_GATHERED: (gathered_bytes(processes * size, processes), of_first)},
        }
        if sharded:
            said = f"of the first of {processes} processes, in a checkpoint"
            parts["a checkpoint"]["gathered weights and optimizer state"] = sharded, said
        result.of_first |= parts["a checkpoint"].keys()
        for phase, new in parts.items():
            if on_cpu:
                result.add_phase(phase, new=new)
            else:
                result.host |= new
    if config.data.reuse.overlap:
        _add_ahead(result, config, request, num_rollouts, [_CACHE] if engine is None else engine)
    return result


def _num_processes(config: Any) -> int:
    """Return the number of processes of a run; ``auto`` and -1 are one on a CPU, and otherwise this machine's GPUs."""
    if (given := num_processes(config)) is not None:
        return given
    on_gpu = config.trainer.accelerator in ("auto", "gpu", "cuda")
    return (max(1, torch.cuda.device_count()) if on_gpu else 1) * int(config.trainer.num_nodes)


def _length(config: Any, *, of_teacher: bool = False) -> int:
    prompt = (teacher_prompt(config) if of_teacher else 0) or config.data.max_prompt_tokens
    return int(prompt + config.model.sampling.max_new_tokens)


def offloaded(config: Any, models: Mapping[str, ModelSize]) -> dict[str, str]:
    """Return the parts that are offloaded, by the option that asks for it."""
    teacher = "teacher" in models and plugin_options(configured_teacher(config)).get("offload")
    wanted = {"model.behavior.offload": config.model.behavior.get("offload"), "model.teacher.offload": teacher}
    parts = {"model.behavior.offload": SNAPSHOT, "model.teacher.offload": TEACHER}
    return {name: parts[name] for name, on in wanted.items() if on}


def _add_resident(
    result: Estimate,
    config: Any,
    models: Mapping[str, ModelSize],
    offloaded: Mapping[str, str],
    request: TeacherRequest,
    processes: int,
) -> None:
    """Add the parts alive in all phases, with gradients: Lightning clears them only before the next backward pass."""
    student, optimizer = models["student"], config.model.optimizer
    width, own = student.trained_width, config.model.behavior.dtype
    each = optimizer_bytes_per_parameter(
        {"class_path": optimizer.class_path, "init_args": plugin_options(optimizer)}, width
    )
    snapshot = getattr(torch, own).itemsize if own else student.widths.weights
    weights = {
        role: (model.bytes, f"{model.parameters:,} x {model.packed or model.widths.weights} bytes")
        for role, model in models.items()
    }
    result.parts = {
        STUDENT: weights["student"],
        GRADIENTS: (student.trainable * width, f"{student.trainable:,} x {width} bytes"),
        OPTIMIZER: (
            int(student.trainable * each),
            f"{optimizer.class_path.rpartition('.')[2]}: {each:.3g} bytes each",
        ),
        SNAPSHOT: (
            (student.trainable * width, "the adapter alone")  # the base weights are shared
            if student.has_adapter
            else (student.parameters * snapshot, f"{snapshot} bytes each")
        ),
    }
    if processes > 1 and copies_gradients(config):
        result.parts[_BUCKETS] = result.parts[GRADIENTS][0], f"in the buckets that {processes} processes average"
    pinned = {SNAPSHOT: student.rounded * snapshot}
    hosted = list(offloaded.values())
    if config.data.reuse.overlap:
        result.parts[_COPY] = result.parts[SNAPSHOT][0], "samples the next buffer"
        pinned[_COPY] = pinned[SNAPSHOT]
        hosted += [_COPY] if SNAPSHOT in hosted else []
    if (teacher := models.get("teacher")) is not None:
        result.parts[TEACHER] = teacher_weights(config, models) or weights["teacher"]
        pinned[TEACHER] = teacher.rounded * teacher.widths.weights
    result.host = {part: (pinned[part], "offloaded: pinned in powers of two") for part in hosted}
    if request.hidden and teacher is not None and TEACHER in result.host:
        size = teacher.shape.vocab * teacher.shape.hidden * teacher.widths.weights
        result.parts["teacher's head"] = size, "a copy on the device, since the teacher is offloaded"
    result.resident = [part for part in result.parts if part not in result.host]


def _cache(model: ModelSize, config: Any, sampling: Any, wanted: int) -> tuple[int, str]:
    batch, prompt = min(sampling.batch_size, wanted), config.data.max_prompt_tokens
    length = prompt + sampling.max_new_tokens
    # Top-p holds logits, sorted logits, their indices (8 bytes), probabilities and their cumulative sum.
    logits = batch * model.shape.vocab * (4 * FLOAT + 8)
    # Each prompt is prefilled once, possibly while the cache of the previous responses still exists.
    read = -(-batch // sampling.num_samples) * prompt
    cache = kv_cache_bytes(model.shape, batch * length + read, model.widths)
    reading = inference_bytes(model.shape, read, model.widths)
    return cache + reading + logits, f"{batch} responses x {length:,} tokens"


def _add_evaluation(result: Estimate, config: Any, models: Mapping[str, ModelSize], engine: list[str] | None) -> None:
    sampling, options = config.model.eval_sampling, config.model.evaluation
    wanted = config.data.eval_batch_size * sampling.num_samples
    own, teachers = "KV cache of evaluation", "KV cache of the teacher's evaluation"
    caches = {} if engine is not None else {own: _cache(models["student"], config, sampling, wanted)}
    if "teacher" in models and options.teacher:
        caches[teachers] = _cache(models["teacher"], config, sampling, wanted)
    casts = [_CASTS] if _CASTS in result.parts else []  # autocast caches copies of all trainable weights
    offloaded = [TEACHER] if TEACHER in result.host else []
    if engine is None and not offloaded:
        result.add_phase("evaluation", *casts, new={own: max(caches.values())})
        return
    measured = offloaded if options.reverse_kl else []  # the teacher scores each batch of answers
    new = {own: caches.pop(own)} if own in caches else {}
    result.add_phase("evaluation", *measured, *casts, *(engine or ()), new=new)
    if caches:
        result.add_phase("the teacher's evaluation", *offloaded, *casts, new=caches)


def _add_scoring(result: Estimate, config: Any, models: Mapping[str, ModelSize], num_rollouts: int) -> None:
    for role, model in models.items():
        phase, weights, batch = (
            ("behavior scoring", SNAPSHOT, config.model.behavior.score_batch_size)
            if role == "student"
            else ("teacher scoring", TEACHER, plugin_options(configured_teacher(config)).get("batch_size"))
        )
        tokens = min(batch or 1, num_rollouts) * _length(config, of_teacher=role == "teacher")
        at_once = _tokens_of_pass(config, tokens) if role == "student" else tokens
        size = inference_bytes(model.shape, at_once, model.widths) + head_bytes(model.shape, tokens, training=False)
        if at_once < tokens:  # hidden states of the previous passes
            size += tokens * model.shape.hidden * model.widths.weights
        said = f"{tokens:,} tokens" if at_once == tokens else f"{at_once:,} of {tokens:,} tokens at a time"
        result.add_phase(phase, weights, new={f"forward pass of {phase}": (size, said)})


def _add_ahead(result: Estimate, config: Any, request: TeacherRequest, num_rollouts: int, sampling: list[str]) -> None:
    """Add what samples the next buffer to the phases beside which it runs: not those of the first buffer's sampling.

    The copy samples and then scores, when the memory for sampling is free again: the larger of both counts, and a share
    of the device, whose size is not known here, counts as the larger one.
    """
    beside = [part for part in sampling if part not in result.resident]
    needed = sum(result.parts[part][0] for part in beside if part not in result.shares)
    if result.shares.keys().isdisjoint(beside) and needed < result.parts[_BEHAVIOR_PASS][0]:
        beside = [_BEHAVIOR_PASS]
    for phase, parts in result.phases.items():
        if phase not in ("sampling", "behavior scoring") and "evaluation" not in phase:  # which waits for it
            parts += [_COPY] * (_COPY in result.host) + beside
    per_token, prompt = 8 + 1 + FLOAT + 4 * request.behavior_top_k, config.data.max_prompt_tokens * (8 + 1)
    size = num_rollouts * (config.model.sampling.max_new_tokens * per_token + prompt)
    result.host[_AHEAD] = int(size), f"{num_rollouts} rollouts without targets"


def _tokens_of_pass(config: Any, tokens: int) -> int:
    """Return the tokens per forward pass of the student; a row longer than the bound is a pass of its own."""
    bound = config.model.max_tokens_per_pass
    return tokens if bound is None else min(tokens, max(bound, _length(config)))


def _add_buffer(
    result: Estimate, config: Any, request: TeacherRequest, teacher: ModelSize | None, num_rollouts: int
) -> tuple[int, int]:
    """Add a process's share of the rollout buffer, and return its bytes and those of its largest tensor."""
    length = config.model.sampling.max_new_tokens
    k = request.top_k + request.behavior_top_k
    # Tokens (8) and mask (1); log-probabilities of snapshot and teacher, and mass; ids and logits of the support.
    per_token, said = 8 + 1 + 3 * FLOAT + k * (4 + FLOAT), f"top {k}"
    # The snapshot's tokens; the teacher's log-normalizer and tail; which ids of a union count.
    per_token += 4 * request.behavior_top_k + 2 * FLOAT * request.tail
    per_token += k if request.top_k and request.behavior_top_k else 0
    largest = max(8, k * FLOAT)
    if request.hidden and teacher is not None:
        per_token += (largest := teacher.shape.hidden * teacher.widths.weights)
        said = f"{teacher.shape.hidden:,} hidden states"
    prompts = config.data.max_prompt_tokens + teacher_prompt(config)
    size = int(num_rollouts * (length * per_token + prompts * (8 + 1)))
    result.host[_BUFFER] = (size, f"{num_rollouts} rollouts x {length:,} tokens x {per_token:,} bytes, {said}")
    return size, num_rollouts * length * largest


def _add_update(
    result: Estimate, config: Any, student: ModelSize, teacher: ModelSize | None, processes: int, on_cpu: bool
) -> None:
    """Add the update; ``teacher`` is given if the objective evaluates the teacher's head."""
    parts = config.trainer.accumulate_grad_batches * processes
    tokens = -(-config.data.reuse.batch_size // parts) * _length(config)
    at_once = _tokens_of_pass(config, tokens)
    checkpointing = bool(plugin_options(config.model.student).get("gradient_checkpointing"))
    of_head = {"training": not student.has_adapter, "narrow": student.widths.compute < FLOAT}
    new = {
        "activations": (
            activation_bytes(
                *(student.shape, at_once, student.widths),
                checkpointing=checkpointing,
                on_cpu=_length(config) if on_cpu else None,
            ),
            f"{at_once:,} tokens, gradient checkpointing {'on' if checkpointing else 'off'}",
        ),
        "head": (head_bytes(student.shape, tokens, **of_head), "logits in tiles; its gradient"),
    }
    if teacher is not None:
        states = tokens * teacher.shape.hidden * teacher.widths.weights
        both = head_bytes(student.shape, tokens, **of_head, tiles=DIVERGENCE_TILES)
        new["head"] = both, "logits of student and teacher in tiles; its gradient"
        new["teacher's hidden states"] = states, f"{tokens:,} tokens"
    if at_once < tokens:
        size = 2 * tokens * student.shape.hidden * student.widths.weights
        new["hidden states of all passes"] = (size, f"{tokens:,} tokens, and their gradient")
    if student.widths.autocast:  # autocast keeps a cast copy of the weights
        width = student.widths.compute
        new[_CASTS] = (student.parameters * width, f"{width} bytes each")
    result.add_phase("update", new=new)
