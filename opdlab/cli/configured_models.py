"""The models that a configuration of ``opdlab fit`` names, and their sizes."""

from collections.abc import Iterator, Mapping
from typing import Any

from opdlab.estimate import FLOAT, ModelSize, model_size
from opdlab.policies import VLLMSampler, VLLMServerSampler
from opdlab.policies.engines.engine_sampler import EngineSampler
from opdlab.policies.loading import adapter_base


def plugin_options(plugin: Any) -> dict[str, Any]:
    """Return the options of a plug-in's section."""
    options: dict[str, Any] = plugin.init_args.as_dict() if plugin.get("init_args") else {}
    return options


def configured_models(config: Any) -> Iterator[tuple[str, ModelSize]]:
    """Yield the roles of the models in this process, ``student`` and ``teacher``, with their sizes."""
    yield "student", model_size(plugin_options(config.model.student), config.trainer.precision)
    teacher = plugin_options(configured_teacher(config))
    if "path" in teacher and "dtype" in teacher:  # a local teacher; the trainer does not cast it
        yield "teacher", model_size(teacher, None)
    elif is_own_teacher(config):
        yield "teacher", model_size(plugin_options(config.model.student), config.trainer.precision)
    elif routed := _routed(config):
        yield "teacher", max(routed.values(), key=lambda size: size.bytes)


def configured_engine(config: Any) -> type[EngineSampler] | None:
    """Return the class of a sampler with vLLM; None for another one."""
    path = str(config.model.sampler.class_path) if config.model.sampler else ""
    return next((each for each in (VLLMSampler, VLLMServerSampler) if path.endswith(f".{each.__name__}")), None)


def has_adapter(config: Any) -> bool:
    """True if the student has an adapter, of its own or in its folder."""
    options = plugin_options(config.model.student)
    return bool(options.get("adapter")) or adapter_base(str(options.get("path"))) is not None


def configured_teacher(config: Any) -> Any:
    """Return the section of the teacher, without a TargetCache around it."""
    section = config.model.teacher
    return section.init_args.teacher if str(section.class_path).endswith(".TargetCache") else section


def shards_teacher(config: Any) -> bool:
    """True if the teacher is one model, whose weights a strategy shards if it shards the student's."""
    return not _routed(config)


def is_own_teacher(config: Any) -> bool:
    """True if the teacher is the student itself."""
    return str(configured_teacher(config).class_path).endswith(".SelfTeacher")


def _routed(config: Any) -> dict[str, ModelSize]:
    """Return the sizes of the teachers of a RoutedTeacher that are models in this process, by name."""
    options = plugin_options(configured_teacher(config))
    teachers, sizes = options.pop("teachers", None), {}
    for name, given in (teachers or {}).items():
        own = {"path": given, **options} if isinstance(given, str) else dict(given.get("init_args") or {})
        if "path" in own:
            sizes[name] = model_size({"dtype": "float32", **own}, None)
        elif str(given.get("class_path")).endswith(".SelfTeacher"):
            sizes[name] = model_size(plugin_options(config.model.student), config.trainer.precision)
    return sizes


def teacher_weights(config: Any, models: Mapping[str, ModelSize]) -> tuple[int, str] | None:
    """Return the bytes of the teacher's weights and what they are; None if they are not the plain model's."""
    if is_own_teacher(config):
        return _own_weights(config, models["student"])
    if routed := _routed(config):
        kept = plugin_options(configured_teacher(config)).get("keep_loaded", True)
        size = sum(each.bytes for each in routed.values()) if kept else models["teacher"].bytes
        return size, f"{len(routed)} teachers" + ("" if kept else ", the largest, one after another")
    return None


def _own_weights(config: Any, student: ModelSize) -> tuple[int, str]:
    """Return the bytes of a SelfTeacher's weights beside the student's, and what they are."""
    width, averaged = student.trained_width, plugin_options(configured_teacher(config)).get("decay") is not None
    more = FLOAT if averaged and width < FLOAT else 0
    shared = "the adapter alone" if student.has_adapter else f"{student.trainable:,} x {width} bytes"
    return student.trainable * (width + more), shared + (f", its average x {more}" if more else "")


def teacher_prompt(config: Any) -> int:
    """Return the tokens of a prompt that only the teacher sees; 0 if it sees the student's."""
    train = plugin_options(config.data.train)
    has_own = any(train.get(key) is not None for key in ("teacher_text", "teacher_template"))
    return int(config.data.max_teacher_prompt_tokens) if has_own else 0
