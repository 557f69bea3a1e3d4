"""Messages for lack of memory: what ran out of it, and the keys that lower the use."""

import errno
import re
from traceback import walk_tb

from opdlab.errors import NoMemoryError, first_line

# Parts of messages of torch's allocators and libraries, which raise a RuntimeError.
_SIGNS = ("out of memory", "allocate memory", "not enough memory", "_status_alloc_failed", "bad_alloc")
# By the module whose function was running, in this order: what it does, and how it needs less memory.
_PHASES = (
    (
        "opdlab.policies.loading",
        "loading a model",
        "set model.student.dtype or model.teacher.dtype to bfloat16, or give smaller models",
    ),
    (
        "opdlab.policies.teacher",
        "scoring with the teacher",
        "lower model.teacher.batch_size, or set model.teacher.offload to true",
    ),
    (
        "opdlab.evaluation.evaluator",
        "sampling answers of an evaluation",
        "lower model.eval_sampling.batch_size or model.eval_sampling.max_new_tokens",
    ),
    (
        "opdlab.policies.sampler",
        "sampling rollouts",
        "lower model.sampling.batch_size or model.sampling.max_new_tokens",
    ),
    (
        "opdlab.policies.behavior",
        "scoring with the behavior snapshot",
        "lower model.behavior.score_batch_size or model.max_tokens_per_pass",
    ),
    ("opdlab.data", "reading problems", "set data.train.limit or data.benchmarks.NAME.limit"),
    (
        "lightning.pytorch.loops",
        "training",
        "lower model.max_tokens_per_pass or data.reuse.batch_size, raise trainer.accumulate_grad_batches, or set "
        "model.student.gradient_checkpointing to true",
    ),
)
_ELSEWHERE = "", "give a smaller model or smaller batches"


def out_of_memory(error: BaseException, mend: str | None = None) -> str | None:
    """Return a line for an error for lack of memory, with the keys that lower the use; None for other errors.

    Args:
        error: an exception, with its traceback; ``torch.OutOfMemoryError``, a RuntimeError of torch's allocator on the
            host or of a library on the device, ``MemoryError``, or an OSError of the system.
        mend: what lowers the use, of a command without the keys of a run and without checkpoints.

    Example:
        >>> out_of_memory(MemoryError("Unable to allocate 8 TiB"))
        'out of memory on the host (8 TiB asked for): give a smaller model or smaller batches; ...'
        >>> out_of_memory(RuntimeError("no such file")) is None
        True
    """
    if isinstance(error, NoMemoryError):
        return str(error)
    message = first_line(error)
    named = type(error).__name__ == "OutOfMemoryError"  # of torch, which need not be imported
    of_torch = isinstance(error, RuntimeError) and (named or any(sign in message.lower() for sign in _SIGNS))
    of_system = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not of_torch and not of_system:
        return None
    device = of_torch and not any(name in message for name in ("CPU", "alloc_cpu"))
    running = {str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)}
    doing, keys = next(
        ((f" while {doing}", keys) for part, doing, keys in _PHASES if any(name.startswith(part) for name in running)),
        _ELSEWHERE,
    )
    amount = re.search(r"(?:ried|Unable) to allocate ([\d.]+ \w+)", message)
    reason = f"{amount[1]} asked for" if amount else message[:100]
    keys += "; the last checkpoint is kept, and opdlab estimate says what a configuration needs"
    return f"out of memory on the {'device' if device else 'host'}{doing} ({reason}): {mend or keys}"
