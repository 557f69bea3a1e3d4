"""Functions that ``scoring.py`` and ``gpu.py`` compare: one forward and backward pass of scoring, by each package.

A function ``PEER_TASK`` takes hidden states [N, H], the head's weight [V, H] and other inputs of the task, and returns
losses or log-probabilities; the backward pass starts from their sum. A peer that is not installed, or does not run on
the device, is skipped with the reason.

Shapes: N positions, V vocabulary, H hidden size, K support.
"""

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import REPOSITORY, PeakMemory

sys.path.insert(0, str(REPOSITORY))

TASKS = ("logprobs", "frozen", "bucket", "lsm", "reverse_kl", "jsd")
PEERS = ("plain", "opdlab", "sampled", "trl", "liger", "cce", "cce_torch")


class SkippedError(Exception):
    """A peer cannot be measured; the message has a short reason."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a measurement.

    Args:
        positions: N.
        vocabulary: V.
        hidden: H.
        k: K.
        dtype: name of the type of hidden states and head.
        device: of the measurement.
    """

    positions: int
    vocabulary: int
    hidden: int
    k: int = 32
    dtype: str = "float32"
    device: str = "cpu"


# -- one measurement ---------------------------------------------------------------------------------------------------


def has_task(peer: str, task: str) -> bool:
    """True if a peer has a function for the task."""
    return f"{peer}_{task}" in globals()


def measure(peer: str, task: str, sizes: Sizes) -> dict[str, Any]:
    """Return seconds, CPU seconds, extra bytes of one forward and backward pass; or ``skipped`` with the reason."""
    loss = globals().get(f"{peer}_{task}")
    try:
        if loss is None:
            raise SkippedError("has none")
        return _measure(loss, task, sizes)
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    except SkippedError as error:
        return {"skipped": str(error)}


def _measure(loss: Any, task: str, sizes: Sizes) -> dict[str, float]:
    torch.manual_seed(0)
    device, dtype = torch.device(sizes.device), getattr(torch, sizes.dtype)
    v, h = sizes.vocabulary, sizes.hidden

    def tensors(positions: int) -> dict[str, Any]:
        """Return the inputs: states like the output of a model's last norm, heads with a logit spread of about 2."""
        made = {"hidden": torch.randn(positions, h), "teacher": torch.randn(positions, h)}
        made = {name: tensor.to(device, dtype) for name, tensor in made.items()}
        made["targets"] = torch.randint(0, v, (positions,), device=device)
        made["support"] = torch.randint(0, v, (positions, sizes.k), device=device)
        made["support_logits"] = torch.randn(positions, sizes.k, device=device)
        return made

    def head() -> Any:
        return torch.empty(v, h, device=device, dtype=dtype).normal_(std=2 / math.sqrt(h))

    weight, teacher = head(), head() if task in ("lsm", "reverse_kl", "jsd") else None
    if task != "frozen":
        weight.requires_grad_()
        weight.grad = torch.ones_like(weight)

    def step(inputs: dict[str, Any]) -> None:
        inputs["hidden"].requires_grad_()
        loss(weight=weight, teacher_weight=teacher, **inputs).sum().backward()

    # Warm up threads, kernels and first-call setup; GPU kernels are compiled for the size.
    step(tensors(8 if device.type == "cpu" else sizes.positions))
    inputs = tensors(sizes.positions)
    peak = PeakMemory(None if device.type == "cpu" else device)
    _synchronize(device)
    started, used = time.perf_counter(), time.process_time()
    step(inputs)
    _synchronize(device)
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    return {**seconds, "bytes": peak.extra_bytes()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _needs_gpu(tensor: Any) -> None:
    if tensor.device.type == "cpu":
        raise SkippedError("does not run on a CPU")


# -- what is measured --------------------------------------------------------------------------------------------------


def plain_logprobs(hidden: Any, weight: Any, targets: Any, **_: Any) -> Any:
    """Return log-probabilities from all logits at once."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])


def opdlab_logprobs(hidden: Any, weight: Any, targets: Any, **_: Any) -> Any:
    """Return log-probabilities as the training step computes them on a single device."""
    from opdlab.scoring import Head, token_statistics

    return token_statistics(hidden, Head(weight, accumulate_grad=weight.requires_grad), targets).logprobs


def trl_logprobs(hidden: Any, weight: Any, targets: Any, **_: Any) -> Any:
    """Return log-probabilities with the chunk size of TRL's trainers, and the same outputs as opdlab."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy", "is_top1")
    )[0]


plain_frozen, opdlab_frozen, trl_frozen = plain_logprobs, opdlab_logprobs, trl_logprobs


def plain_lsm(hidden: Any, weight: Any, teacher: Any, teacher_weight: Any, **_: Any) -> Any:
    """Return the reverse KL over the whole vocabulary."""
    with torch.no_grad():
        log_q = (teacher @ teacher_weight.T).float().log_softmax(-1)
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def opdlab_lsm(hidden: Any, weight: Any, targets: Any, support: Any, support_logits: Any, **_: Any) -> Any:
    """Return the loss, and log-probabilities for the drift."""
    from opdlab.objectives.functional import teacher_topk_loss
    from opdlab.scoring import Head, support_statistics

    logits, statistics = support_statistics(hidden, Head(weight, accumulate_grad=True), targets, support)
    assert not statistics.logprobs.requires_grad
    return teacher_topk_loss(logits, support_logits)


def plain_bucket(hidden: Any, weight: Any, support: Any, support_logits: Any, **_: Any) -> Any:
    """Return the reverse KL on a support and its tail from all logits at once."""
    logits = (hidden @ weight.T).float()
    log_tail = logits.scatter(1, support, -torch.inf).logsumexp(-1)
    return _bucket(logits.gather(1, support), log_tail, logits.logsumexp(-1), support_logits)


def opdlab_bucket(hidden: Any, weight: Any, targets: Any, support: Any, support_logits: Any, **_: Any) -> Any:
    """Return the reverse KL on a support and its tail; log-probabilities for the drift come with it."""
    from opdlab.scoring import Head, support_tail

    *_, logits, log_tail, statistics = support_tail(hidden, Head(weight, accumulate_grad=True), targets, support)
    return _bucket(logits, log_tail, statistics.log_normalizer, support_logits)


def _bucket(logits: Any, log_tail: Any, log_normalizer: Any, teacher_logits: Any) -> Any:
    from opdlab.objectives.functional import support_divergence

    return support_divergence(
        logits,
        teacher_logits.log_softmax(-1) - 0.1,  # the teacher gives the support a probability of 0.9
        divergence="reverse_kl",
        tail="bucket",
        student_log_normalizer=log_normalizer,
        student_log_tail=log_tail,
        teacher_log_normalizer=torch.zeros_like(log_tail),
        teacher_log_tail=torch.full_like(log_tail, math.log(-math.expm1(-0.1))),
    )


sampled_bucket = opdlab_logprobs


# -- divergences over the whole vocabulary: the same work by all, and the student's entropy by all but plain ----------


def plain_jsd(hidden: Any, weight: Any, teacher: Any, teacher_weight: Any, **_: Any) -> Any:
    """Return the Jensen-Shannon divergence from all logits at once."""
    with torch.no_grad():
        log_q = (teacher @ teacher_weight.T).float().log_softmax(-1)
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return ((log_q.exp() * (log_q - log_m) + log_p.exp() * (log_p - log_m)) / 2).sum(-1)


def _opdlab_divergence(
    divergence: str, hidden: Any, weight: Any, targets: Any, teacher: Any, teacher_weight: Any, **_: Any
) -> Any:
    from opdlab.scoring import Head, divergence_statistics

    heads = Head(weight, accumulate_grad=True), Head(teacher_weight)
    losses, statistics = divergence_statistics(hidden, heads[0], teacher, heads[1], targets, divergence=divergence)
    assert not statistics.entropy.requires_grad
    return losses


def _trl_divergence(beta: float, hidden: Any, weight: Any, teacher: Any, teacher_weight: Any, **_: Any) -> Any:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(hidden, weight, None, teacher, teacher_weight, None, beta)[0]


plain_reverse_kl = plain_lsm
trl_lsm = partial(_trl_divergence, 1.0)  # reverse KL over the whole vocabulary
opdlab_reverse_kl, opdlab_jsd = partial(_opdlab_divergence, "reverse_kl"), partial(_opdlab_divergence, "jsd")
trl_reverse_kl, trl_jsd = trl_lsm, partial(_trl_divergence, 0.5)


# -- Liger's and Apple's kernels ---------------------------------------------------------------------------------------


def liger_logprobs(hidden: Any, weight: Any, targets: Any, **_: Any) -> Any:
    """Return the fused linear cross-entropy; summed, because its fast path takes no gradient per position."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    _needs_gpu(hidden)
    names = ("bias", "ce_weight", "ignore_index", "lse_square_scale", "label_smoothing", "reduction")
    options = dict(zip(names, (None, None, -100, 0.0, 0.0, "sum"), strict=True))
    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, *options.values())[0]


def cce_logprobs(hidden: Any, weight: Any, targets: Any, **_: Any) -> Any:
    """Return the cut cross-entropy, which drops gradients below the rounding of bfloat16."""
    from cut_cross_entropy import linear_cross_entropy

    _needs_gpu(hidden)
    if hidden.dtype == torch.float32:
        raise SkippedError("takes 16 bits only")
    return linear_cross_entropy(hidden, weight, targets, reduction="none")


def cce_torch_logprobs(hidden: Any, weight: Any, targets: Any, **_: Any) -> Any:
    """Return its torch version: plain cross-entropy under ``torch.compile``, which needs a C++ compiler on a CPU."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, reduction="none", impl="torch_compile")


liger_frozen, cce_frozen, cce_torch_frozen = liger_logprobs, cce_logprobs, cce_torch_logprobs


def liger_lsm(hidden: Any, weight: Any, teacher: Any, teacher_weight: Any, targets: Any, **_: Any) -> Any:
    """Return the reverse KL over the whole vocabulary."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    _needs_gpu(hidden)
    return LigerFusedLinearJSDFunction.apply(hidden, weight, teacher, teacher_weight, targets, 1.0)
