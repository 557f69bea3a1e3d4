"""What ``opdlab estimate`` counts under the strategy ``model_parallel``, which shards weights over the processes."""

from collections.abc import Mapping

from opdlab.cli.memory_table import Estimate
from opdlab.estimate import FLOAT, ModelSize

STUDENT, GRADIENTS, OPTIMIZER = "student weights", "gradients", "optimizer state"
SNAPSHOT, TEACHER = "behavior snapshot", "teacher weights"


def add_sharding(
    result: Estimate,
    models: Mapping[str, ModelSize],
    processes: int,
    *,
    teacher: bool,
    evaluated: bool,
    compared: bool,
) -> None:
    """Divide an estimate's weights, gradients and optimizer state by the processes, and add what is gathered.

    Args:
        result: the estimate of a process that has all weights; changed in place.
        models: sizes of the student and of a local teacher.
        processes: P.
        teacher: True if the teacher's weights are sharded too.
        evaluated: True if evaluations sample from the teacher too.
        compared: True if evaluations compare with the teacher.
    """
    student, shared = models["student"], [STUDENT, GRADIENTS, OPTIMIZER, SNAPSHOT]
    if student.has_adapter:  # below the adapter, the shards of the snapshot are its own
        result.parts[SNAPSHOT] = student.bytes, "weights and adapter"
    snapshot = result.parts[SNAPSHOT][0]
    if teacher and TEACHER in result.parts:
        shared.append(TEACHER)
    for part in shared:
        size, remark = result.parts[part]
        result.parts[part] = -(-size // processes), f"{remark}, shared by {processes} processes"
    layers = "embeddings, head, two layers, and a buffer"
    _add(result, ("sampling", "behavior scoring"), "gathered snapshot", snapshot, "all weights")
    answering = [student, *([models["teacher"]] if evaluated and TEACHER in shared else [])]
    _add(result, ("evaluation",), "gathered model", max(model.bytes for model in answering), "the one that answers")
    _add(result, ("update",), "gathered weights", gathered_weights(student), layers)
    _add(result, ("update",), "gathered gradients", gathered_gradients(student), "embeddings, a layer, and a buffer")
    if TEACHER in shared:
        phases = ("evaluation",) * compared + ("the teacher's evaluation",)
        _add(result, ("teacher scoring",), "gathered layers of teacher", gathered_weights(models["teacher"]), layers)
        _add(result, phases, "gathered teacher", models["teacher"].bytes, "all weights")


def checkpoint_bytes(result: Estimate, student: ModelSize) -> int:
    """Return the host memory in which the first process gathers weights and optimizer state for a checkpoint.

    Args:
        result: the estimate of a process that has all weights.
        student: its size; of an adapter, a checkpoint holds the adapter alone.
    """
    snapshot = student.trainable * student.trained_width if student.has_adapter else result.parts[SNAPSHOT][0]
    return student.trainable * student.trained_width + snapshot + result.parts[OPTIMIZER][0]


def _add(result: Estimate, phases: tuple[str, ...], part: str, size: int, remark: str) -> None:
    for phase in phases:
        if phase in result.phases:
            result.parts[part] = size, remark
            result.phases[phase].append(part)


def gathered_weights(model: ModelSize) -> int:
    """Return the bytes of the weights that a pass gathers at a time.

    These are the weights outside the layers, two layers (one in use, one on its way), and the buffer of a gathering.
    """
    numbers = model.outside + 2 * model.layer + max(model.outside, model.layer)
    return numbers * model.widths.weights


def gathered_gradients(model: ModelSize) -> int:
    """Return the bytes of the gradients that the backward pass holds before they are shared.

    These are those outside the layers, of one layer, and the buffer of the exchange, without the gradient of the head,
    which :func:`opdlab.estimate.head_bytes` counts. With an adapter only that has gradients.
    """
    if model.has_adapter:
        return 2 * model.trainable * model.trained_width
    numbers = model.outside + model.layer + max(model.outside, model.layer)
    return max(0, numbers * model.trained_width - FLOAT * model.shape.vocab * model.shape.hidden)
