"""``opdlab estimate``: the memory of a run by part and by phase, compared with the device."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import instantiate_class
from rich.console import Console
from rich.table import Table

from opdlab.cli.checks import num_processes
from opdlab.cli.parsing import parse_fit
from opdlab.errors import UsageError, require
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
    model_size,
    optimizer_bytes_per_parameter,
)
from opdlab.types import TeacherRequest

_GIB = 1 << 30
_CASTS = "weights cast by autocast"
_SNAPSHOT = "behavior snapshot"
_TEACHER = "teacher weights"
_BUFFER = "rollout buffer"
_EXCHANGED = "rows that are exchanged"
_GATHERED = "gathered buffer"


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a device, bytes.

    Args:
        name: name of the device.
        total: total memory.
        free: unused memory.
        is_host: it is the host's memory, which also holds the rollout buffer and offloaded parts.
    """

    name: str
    total: int
    free: int
    is_host: bool = False


@dataclass
class Estimate:
    """Bytes of each part, and the parts that are alive in each phase; phases do not overlap.

    Args:
        parts: bytes and a remark, by part.
        phases: names of the parts that are alive, by phase.
        host: parts that are in the host's memory on any device.
        resident: names of the parts that are on the device in all phases.
    """

    parts: dict[str, tuple[int, str]] = field(default_factory=dict)
    phases: dict[str, list[str]] = field(default_factory=dict)
    host: dict[str, tuple[int, str]] = field(default_factory=dict)
    resident: list[str] = field(default_factory=list)

    def add_phase(self, phase: str, *used: str, new: Mapping[str, tuple[int, str]]) -> None:
        """Add a phase that uses the parts that are always on the device, ``used``, and ``new`` parts.

        Args:
            phase: its name.
            used: names of further parts; offloaded ones are on the device in this phase.
            new: bytes and a remark of parts that are added.
        """
        self.parts |= new
        self.phases[phase] = list(dict.fromkeys([*self.resident, *used, *new]))

    def peak(self, phase: str) -> int:
        """Return the bytes alive in a phase."""
        return sum(self.parts[name][0] for name in self.phases[phase])

    def table(self) -> Table:
        """Return the table of parts and phases."""
        table = Table("part", "GiB", "of", title="memory by part")
        for name, (size, remark) in self.parts.items():
            table.add_row(name, _gib(size), remark)
        for name, (size, remark) in self.host.items():
            table.add_row(f"{name}, on the host", _gib(size), remark)
        table.add_section()
        always = set.intersection(*map(set, self.phases.values()))
        for phase, parts in self.phases.items():
            more = [name for name in parts if name not in always]
            table.add_row(f"peak of {phase}", _gib(self.peak(phase)), " + ".join(["parts of all phases", *more]))
        return table

    def verdict(self, device: DeviceMemory) -> str:
        """Return a sentence that says if the largest peak fits, and if not, names its largest part.

        Args:
            device: device to compare with. For host memory, every phase also counts the parts in ``host``.
        """
        beside = {name: size for name, (size, _) in self.host.items() if device.is_host}
        phase = max(self.phases, key=self.peak)
        peak = self.peak(phase) + sum(beside.values())
        size = f"{_gib(peak)} GiB" + (f" with the {' and the '.join(beside)}" if beside else "")
        line = f"{device.name} has {_gib(device.free)} GiB free of {_gib(device.total)}: "
        if peak <= device.free:
            return line + f"the largest peak, {size} in {phase}, fits"
        largest = max(self.phases[phase], key=lambda name: self.parts[name][0])
        return line + f"the peak of {phase}, {size}, does not fit; its largest part is {largest}"


def estimate_command(arguments: Sequence[str]) -> int:
    """Run ``opdlab estimate``: print the table, compare it with the device of ``opdlab fit``, return the exit code.

    Raises:
        UsageError: an argument is invalid, or a model's configuration cannot be read.
    """
    config = parse_fit(arguments, "estimate")
    models = dict(_models(config))
    result = estimate(config, models)
    Console().print(result.table())
    print("left out: the device's own context, fragmentation, short-lived results; model parallelism is not looked at")
    accelerator = config.trainer.accelerator
    if (device := device_memory(accelerator)) is None:
        return 0
    if device.is_host:
        if options := list(_offloaded(config, models)):
            line = f"{' and '.join(options)} {'have' if len(options) > 1 else 'has'} no effect on a CPU"
            if accelerator != "cpu":
                line += (
                    ": the table is for a GPU; this machine has none, so in what follows the weights are there in "
                    "every phase, as in the table with --trainer.accelerator cpu"
                )
            print(line)
        result = estimate(config, models, on_cpu=True)
    print(result.verdict(device))
    return 0


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
    models = dict(_models(config)) if models is None else models
    on_cpu = config.trainer.accelerator == "cpu" if on_cpu is None else on_cpu
    init = {"class_path": config.model.objective.class_path, "init_args": _options(config.model.objective)}
    request: TeacherRequest = instantiate_class((), init).request
    result, student = Estimate(), models["student"]
    _add_resident(result, config, models, {} if on_cpu else _offloaded(config, models), request)
    processes = _num_processes(config)
    num_rollouts = -(-config.data.reuse.prompts_per_pool // processes) * config.model.sampling.num_samples
    cache = _cache(student, config, config.model.sampling, num_rollouts)
    result.add_phase("sampling", _SNAPSHOT, new={"KV cache": cache})
    _add_scoring(result, config, models, num_rollouts)
    _add_update(result, config, student, models.get("teacher") if request.hidden else None, processes)
    if config.data.benchmarks:
        _add_evaluation(result, config, models)
    size, largest = _add_buffer(result, config, request, models.get("teacher"), num_rollouts)
    if processes > 1:
        of_first = f"of the first of {processes} processes, in a checkpoint inside a buffer"
        parts = {
            "an exchange": {_EXCHANGED: (exchanged_bytes(largest), "one tensor at a time, before each pass")},
            "a checkpoint": {_GATHERED: (gathered_bytes(processes * size, processes), of_first)},
        }
        for phase, new in parts.items():
            if on_cpu:
                result.add_phase(phase, new=new)
            else:
                result.host |= new
    return result


def refuse_oversized(config: Any) -> None:
    """Raise :class:`UsageError` if the weights cannot fit the device; an uncertain case passes.

    Raises:
        UsageError: a model's weights alone are larger than the device's memory.
    """
    device = device_memory(config.trainer.accelerator)
    if device is None or not str(config.trainer.strategy).startswith(("auto", "ddp", "single_device")):
        return
    try:
        models = dict(_models(config))
    except UsageError as error:
        if isinstance(error.__cause__, OSError):
            raise  # loading would wait for the hub again, and fail too
        return
    for role, model in models.items():
        require(
            model.bytes <= device.total,
            f"model.{role} '{model.path}' has {_gib(model.bytes)} GiB of weights, and {device.name} has only "
            f"{_gib(device.total)} GiB: choose a smaller model or a narrower dtype; `opdlab estimate` shows all parts, "
            "and --check_memory false tries anyway",
        )


def device_memory(accelerator: str) -> DeviceMemory | None:
    """Return the memory of the device selected by ``trainer.accelerator``; None if unknown."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return DeviceMemory(torch.cuda.get_device_name(), total, free)
    if accelerator not in ("auto", "cpu") or torch.backends.mps.is_available():
        return None
    meminfo = Path("/proc/meminfo")  # Linux only
    sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", meminfo.read_text(), re.MULTILINE)) if meminfo.is_file() else {}
    if not {"MemTotal", "MemAvailable"} <= sizes.keys():
        return None
    return DeviceMemory("this machine", int(sizes["MemTotal"]) << 10, int(sizes["MemAvailable"]) << 10, True)


def _num_processes(config: Any) -> int:
    """Return the number of processes of a run; ``auto`` and -1 are one on a CPU, and otherwise this machine's GPUs."""
    if (given := num_processes(config)) is not None:
        return given
    on_gpu = config.trainer.accelerator in ("auto", "gpu", "cuda")
    return (max(1, torch.cuda.device_count()) if on_gpu else 1) * int(config.trainer.num_nodes)


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}" if size >= _GIB / 100 else f"{size / _GIB:.5f}"


def _options(plugin: Any) -> dict[str, Any]:
    options: dict[str, Any] = plugin.init_args.as_dict() if plugin.get("init_args") else {}
    return options


def _models(config: Any) -> Iterator[tuple[str, ModelSize]]:
    yield "student", model_size(_options(config.model.student), config.trainer.precision)
    teacher = _options(_teacher(config))
    if "path" in teacher and "dtype" in teacher:  # a local teacher; the trainer does not cast it
        yield "teacher", model_size(teacher, None)
    elif _is_own(config):
        yield "teacher", model_size(_options(config.model.student), config.trainer.precision)
    elif routed := _routed(config):
        yield "teacher", max(routed.values(), key=lambda size: size.bytes)


def _teacher(config: Any) -> Any:
    """Return the section of the teacher, without a TargetCache around it."""
    section = config.model.teacher
    return section.init_args.teacher if str(section.class_path).endswith(".TargetCache") else section


def _is_own(config: Any) -> bool:
    """True if the teacher is the student itself."""
    return str(_teacher(config).class_path).endswith(".SelfTeacher")


def _routed(config: Any) -> dict[str, ModelSize]:
    """Return the sizes of the teachers of a RoutedTeacher that are local models, by name."""
    options = _options(_teacher(config))
    teachers, sizes = options.pop("teachers", None), {}
    for name, given in (teachers or {}).items():
        own = {"path": given, **options} if isinstance(given, str) else dict(given.get("init_args") or {})
        if "path" in own:
            sizes[name] = model_size({"dtype": "float32", **own}, None)
    return sizes


def _teacher_weights(config: Any, models: Mapping[str, ModelSize]) -> tuple[int, str] | None:
    """Return the bytes of the teacher's weights and what they are; None if they are not the plain model's."""
    if _is_own(config):
        return _own_weights(config, models["student"])
    if routed := _routed(config):
        kept = _options(_teacher(config)).get("keep_loaded", True)
        size = sum(each.bytes for each in routed.values()) if kept else models["teacher"].bytes
        return size, f"{len(routed)} teachers" + ("" if kept else ", the largest, one after another")
    return None


def _own_weights(config: Any, student: ModelSize) -> tuple[int, str]:
    """Return the bytes of a SelfTeacher's weights beside the student's, and what they are."""
    width, averaged = student.trained_width, _options(_teacher(config)).get("decay") is not None
    more = FLOAT if averaged and width < FLOAT else 0
    shared = "the adapter alone" if student.has_adapter else f"{student.trainable:,} x {width} bytes"
    return student.trainable * (width + more), shared + (f", its average x {more}" if more else "")


def _length(config: Any, *, of_teacher: bool = False) -> int:
    prompt = (_teacher_prompt(config) if of_teacher else 0) or config.data.max_prompt_tokens
    return int(prompt + config.model.sampling.max_new_tokens)


def _teacher_prompt(config: Any) -> int:
    """Return the tokens of a prompt that only the teacher sees; 0 if it sees the student's."""
    train = _options(config.data.train)
    has_own = any(train.get(key) is not None for key in ("teacher_text", "teacher_template"))
    return int(config.data.max_teacher_prompt_tokens) if has_own else 0


def _offloaded(config: Any, models: Mapping[str, ModelSize]) -> dict[str, str]:
    """Return the parts that are offloaded, by the option that asks for it."""
    teacher = "teacher" in models and _options(_teacher(config)).get("offload")
    wanted = {"model.behavior.offload": config.model.behavior.get("offload"), "model.teacher.offload": teacher}
    parts = {"model.behavior.offload": _SNAPSHOT, "model.teacher.offload": _TEACHER}
    return {name: parts[name] for name, on in wanted.items() if on}


def _add_resident(
    result: Estimate,
    config: Any,
    models: Mapping[str, ModelSize],
    offloaded: Mapping[str, str],
    request: TeacherRequest,
) -> None:
    """Add the parts alive in all phases, with gradients: Lightning clears them only before the next backward pass."""
    student, optimizer = models["student"], config.model.optimizer
    width, own = student.trained_width, config.model.behavior.dtype
    each = optimizer_bytes_per_parameter({"class_path": optimizer.class_path, "init_args": _options(optimizer)}, width)
    snapshot = getattr(torch, own).itemsize if own else student.widths.weights
    weights = {
        role: (model.bytes, f"{model.parameters:,} x {model.packed or model.widths.weights} bytes")
        for role, model in models.items()
    }
    result.parts = {
        "student weights": weights["student"],
        "gradients": (student.trainable * width, f"{student.trainable:,} x {width} bytes"),
        "optimizer state": (
            int(student.trainable * each),
            f"{optimizer.class_path.rpartition('.')[2]}: {each:.3g} bytes each",
        ),
        _SNAPSHOT: (
            (student.trainable * width, "the adapter alone")  # the base weights are shared
            if student.has_adapter
            else (student.parameters * snapshot, f"{snapshot} bytes each")
        ),
    }
    pinned = {_SNAPSHOT: student.rounded * snapshot}
    if (teacher := models.get("teacher")) is not None:
        result.parts[_TEACHER] = _teacher_weights(config, models) or weights["teacher"]
        pinned[_TEACHER] = teacher.rounded * teacher.widths.weights
    result.host = {part: (pinned[part], "offloaded: pinned in powers of two") for part in offloaded.values()}
    if request.hidden and teacher is not None and _TEACHER in result.host:
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


def _add_evaluation(result: Estimate, config: Any, models: Mapping[str, ModelSize]) -> None:
    sampling, options = config.model.eval_sampling, config.model.evaluation
    wanted = config.data.eval_batch_size * sampling.num_samples
    own, teachers = "KV cache of evaluation", "KV cache of the teacher's evaluation"
    caches = {own: _cache(models["student"], config, sampling, wanted)}
    if "teacher" in models and options.teacher:
        caches[teachers] = _cache(models["teacher"], config, sampling, wanted)
    casts = [_CASTS] if _CASTS in result.parts else []  # autocast caches copies of all trainable weights
    if _TEACHER not in result.host:
        result.add_phase("evaluation", *casts, new={own: max(caches.values())})
        return
    measured = [_TEACHER] if options.reverse_kl else []  # the teacher scores each batch of answers
    result.add_phase("evaluation", *measured, *casts, new={own: caches.pop(own)})
    if caches:
        result.add_phase("the teacher's evaluation", _TEACHER, *casts, new=caches)


def _add_scoring(result: Estimate, config: Any, models: Mapping[str, ModelSize], num_rollouts: int) -> None:
    for role, model in models.items():
        phase, weights, batch = (
            ("behavior scoring", _SNAPSHOT, config.model.behavior.score_batch_size)
            if role == "student"
            else ("teacher scoring", _TEACHER, _options(_teacher(config)).get("batch_size"))
        )
        tokens = min(batch or 1, num_rollouts) * _length(config, of_teacher=role == "teacher")
        at_once = _tokens_of_pass(config, tokens) if role == "student" else tokens
        size = inference_bytes(model.shape, at_once, model.widths) + head_bytes(model.shape, tokens, training=False)
        if at_once < tokens:  # hidden states of the previous passes
            size += tokens * model.shape.hidden * model.widths.weights
        said = f"{tokens:,} tokens" if at_once == tokens else f"{at_once:,} of {tokens:,} tokens at a time"
        result.add_phase(phase, weights, new={f"forward pass of {phase}": (size, said)})


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
    prompts = config.data.max_prompt_tokens + _teacher_prompt(config)
    size = int(num_rollouts * (length * per_token + prompts * (8 + 1)))
    result.host[_BUFFER] = (size, f"{num_rollouts} rollouts x {length:,} tokens x {per_token:,} bytes, {said}")
    return size, num_rollouts * length * largest


def _add_update(result: Estimate, config: Any, student: ModelSize, teacher: ModelSize | None, processes: int) -> None:
    """Add the update; ``teacher`` is given if the objective evaluates the teacher's head."""
    parts = config.trainer.accumulate_grad_batches * processes
    tokens = -(-config.data.reuse.batch_size // parts) * _length(config)
    at_once = _tokens_of_pass(config, tokens)
    checkpointing = bool(_options(config.model.student).get("gradient_checkpointing"))
    new = {
        "activations": (
            activation_bytes(student.shape, at_once, student.widths, checkpointing=checkpointing),
            f"{at_once:,} tokens, gradient checkpointing {'on' if checkpointing else 'off'}",
        ),
        "head": (head_bytes(student.shape, tokens, training=not student.has_adapter), "logits in tiles; its gradient"),
    }
    if teacher is not None:
        states = tokens * teacher.shape.hidden * teacher.widths.weights
        both = head_bytes(student.shape, tokens, training=not student.has_adapter, tiles=DIVERGENCE_TILES)
        new["head"] = both, "logits of student and teacher in tiles; its gradient"
        new["teacher's hidden states"] = states, f"{tokens:,} tokens"
    if at_once < tokens:
        size = 2 * tokens * student.shape.hidden * student.widths.weights
        new["hidden states of all passes"] = (size, f"{tokens:,} tokens, and their gradient")
    if student.widths.autocast:  # autocast keeps a cast copy of the weights
        width = student.widths.compute
        new[_CASTS] = (student.parameters * width, f"{width} bytes each")
    result.add_phase("update", new=new)
