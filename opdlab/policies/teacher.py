"""Teachers, which score the student's rollouts.

Shapes: B rollouts, T response tokens, K support, N valid positions, G the teacher's hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opdlab.errors import UsageError, require
from opdlab.policies.context import ContextLength
from opdlab.policies.fingerprints import fingerprint, weights_digest
from opdlab.policies.language_model import LanguageModel, Scored
from opdlab.policies.loading import Quantization
from opdlab.policies.offload import on_device
from opdlab.policies.tokenizers import StopTokens, check_same_vocabulary, vocabulary_size, warn_of_stop_tokens
from opdlab.progress import Progress, SilentProgress
from opdlab.records import digest
from opdlab.scoring import Head, divergence_statistics, support_overlap, topk_with_statistics, topk_with_tail
from opdlab.types import Rollouts, Targets, TeacherRequest, assign_rows, id_dtype

_MEASURED_POSITIONS = 256  # for the error of rounded hidden states


class Teacher(ABC):
    """Base of all teachers: models that score rollouts at their sampling temperature."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    """Number of tokens: the teacher has a row for every id below it."""
    stop_tokens: StopTokens | None = None
    """The teacher's stop tokens, if known: a warning reports a student with other stop tokens."""
    offload: bool = False
    """True if the weights are on the device only while they are used."""
    names: Sequence[str] = ()
    """Names by which a problem chooses its teacher; empty if there is one teacher for all."""
    follows_student: bool = False
    """True if the weights change while the student is trained."""

    @abstractmethod
    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
        """Return the targets of ``rollouts``, in host memory, without gradient.

        A teacher scores :meth:`Rollouts.as_teacher_sees`: the responses after the prompts that it sees itself.
        """

    def score_in_parts(
        self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None
    ) -> Iterator[tuple[Tensor, Targets]]:
        """Yield rows, [b] long, and their targets, as they are computed; all at once by default.

        A part may have fewer columns than the rollouts, but has all valid positions of its rows.
        """
        yield torch.arange(len(rollouts)), self.score(rollouts, request, progress)

    def check_request(self, request: TeacherRequest, temperature: float) -> None:
        """Raise a UsageError if the teacher cannot compute a request; called after :meth:`bind`, before training.

        Args:
            request: what objective, gate or evaluation require.
            temperature: of the rollouts.
        """
        del request, temperature

    def head(self, temperature: float = 1.0) -> Head:
        """Return the frozen head that computes logits from :attr:`Targets.hidden`, on the device of :meth:`to`.

        Raises:
            UsageError: the teacher has no head in this process, as here by default.
        """
        del temperature
        raise UsageError(
            f"model.teacher is {type(self).__name__}, which gives no hidden states and no head to compute logits from "
            "them, but the objective compares the whole vocabulary: take a LocalTeacher, or an objective on a support "
            "such as support_divergence"
        )

    def bind(self, student: LanguageModel) -> None:
        """Receive the student, before any other call; does nothing by default."""
        del student

    def to(self, device: torch.device) -> None:
        """Move the teacher's tensors to a device; does nothing by default."""
        del device

    def after_step(self, student: LanguageModel) -> None:
        """Receive the student after each optimizer step; does nothing by default."""
        del student

    def metrics(self) -> dict[str, float]:
        """Return metrics of the last :meth:`score`, by log name; none by default."""
        return {}

    def models(self) -> Iterator[tuple[str, LanguageModel]]:
        """Yield the models that an evaluation of the teacher samples from, by name; none by default.

        The name is empty if there is one. A model need not stay in memory when the next one is asked for.
        """
        return iter(())

    def local_models(self) -> Sequence[LanguageModel]:
        """Return the models in this process whose weights a strategy may shard; none by default."""
        return ()

    def contexts(self) -> dict[str, ContextLength]:
        """Return the context length of each teacher, by its name in ``names``; empty if there is one for all.

        Teachers whose models are elsewhere, or have no known length, are left out.
        """
        known = [model.context for model in self.local_models() if model.context is not None]
        return {"": min(known, key=lambda context: context.tokens)} if known else {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold of the teacher; nothing by default, because it is frozen."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a :meth:`state_dict`; one of another teacher is ignored by default."""
        del state

    def weights_digest(self) -> str | None:
        """Return a digest of a few values of each weight, by which a resumed run knows the teacher; None if unknown."""
        return None

    def fingerprint(self) -> str:
        """Return a digest of all that determines the targets of given rollouts and a given request.

        Raises:
            UsageError: there is none, because the teacher changes or its weights are unknown.
        """
        raise UsageError(
            f"model.teacher is {type(self).__name__}, whose targets cannot be kept, because its weights are unknown: "
            "define its method fingerprint, or take it without a TargetCache"
        )


def share_vocabulary(student: LanguageModel, teacher: Teacher) -> None:
    """Restrict the student to the tokens that the teacher has too; their distributions are compared over these.

    This sets :attr:`LanguageModel.vocab_size` of the student; requests to the teacher name the same number.

    Raises:
        UsageError: the tokenizers differ, or the teacher has no row for a stop, padding or BOS token.
    """
    check_same_vocabulary(student.tokenizer, teacher.tokenizer)
    if teacher.vocab_size < student.vocab_size:
        warn = not isinstance(teacher, LocalTeacher)  # which has warned when its model was loaded
        student.vocab_size = vocabulary_size(
            student.tokenizer, student.stop_ids, teacher.vocab_size, "model.teacher", warn
        )
    warn_of_stop_tokens(student.tokenizer, student.stop_tokens, teacher.stop_tokens)


def check_targets(teacher: Teacher, request: TeacherRequest, targets: Targets) -> None:
    """Raise a UsageError if a teacher has not returned what was requested, as one that ignores parts of a request.

    Args:
        teacher: named in the message.
        request: what was requested.
        targets: what the teacher returned.
    """
    k = request.top_k + request.behavior_top_k
    needed = {
        "support_ids": k,
        "support_logits": k,
        # A teacher that knows probabilities only relative to each other returns the logits without the mass.
        "support_mass": k and (request.logprobs or targets.support_logits is None),
        "support_valid": request.top_k and request.behavior_top_k,
        "entropy": request.entropy,
        "log_normalizer": request.tail,
        "log_tail": request.tail and k,
        "hidden": request.hidden,
    }
    missing = [name for name, wanted in needed.items() if wanted and getattr(targets, name) is None]
    said = f"no {', '.join(missing)}"
    if not missing and targets.support_ids is not None and k and targets.support_ids.shape[-1] != k:
        missing, said = ["support_ids"], f"a support of {targets.support_ids.shape[-1]} tokens instead of {k}"
    require(
        not missing,
        f"model.teacher is {type(teacher).__name__}, which returned {said}, but model.objective or model.gate needs "
        "that: take a teacher that delivers it, such as LocalTeacher, or another objective",
    )


class NoTeacher(Teacher):
    """A placeholder where no teacher is needed, as for a model that is only evaluated; no model is loaded."""

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
        """Raise a UsageError."""
        raise UsageError("model.teacher is NoTeacher, which scores nothing: give a teacher")


@dataclass(frozen=True)
class TeacherHolder:
    """A wrapper that keeps a teacher from becoming a submodule of the module that holds it.

    A teacher may itself be a ``torch.nn.Module``. It is frozen, must not enter checkpoints, and must not be wrapped by
    the trainer's strategy.
    """

    teacher: Teacher


class LocalTeacher(Teacher):
    """A frozen language model in this process. It is never trained and never written to a checkpoint.

    Args:
        path: see :class:`LanguageModel`.
        batch_size: rollouts scored at a time.
        quantization: keep the weights in ``4bit`` (NF4) or ``8bit`` and compute in ``dtype``. Needs the extra
            ``bitsandbytes`` and a GPU.
        offload: keep the weights in host memory, with a copy on the device only during scoring. Not with
            ``quantization``, because packed weights have further tensors outside the parameters.
        **options: ``dtype``, ``revision``, ``trust_remote_code``, ``attn_implementation``, ``gguf_file`` and
            ``stop_tokens`` of :class:`LanguageModel`.

    Raises:
        UsageError: see :class:`LanguageModel`; or ``batch_size`` is below 1; or both ``offload`` and
            ``quantization`` are set.
    """

    def __init__(
        self,
        path: str,
        *,
        batch_size: int = 32,
        quantization: Quantization | None = None,
        offload: bool = False,
        **options: Any,
    ) -> None:
        require(
            not (offload and quantization),
            f"offload is true and quantization '{quantization}', but packed weights cannot leave the "
            "device: set offload to false, or leave quantization out",
        )
        # Options for training only are set here, because the parser offers every other option of LanguageModel.
        model = LanguageModel(
            path, quantization=quantization, gradient_checkpointing=False, adapter=None, compile=False, **options
        )
        self._hold(model.requires_grad_(False).eval(), batch_size, offload)

    def _hold(self, model: LanguageModel, batch_size: int, offload: bool = False) -> None:
        require(batch_size >= 1, f"batch_size is {batch_size}, but must be at least 1")
        self.model = model
        self.tokenizer = model.tokenizer
        self.vocab_size = model.vocab_size
        self.stop_tokens = model.stop_tokens
        self._batch_size, self.offload, self._device = batch_size, offload, model.device
        self._head: tuple[torch.device, Head] | None = None  # of an offloaded teacher, with its device
        self._has_told_rounding = False

    def to(self, device: torch.device) -> None:
        """Move the weights; if offloaded, set the device on which they are used."""
        self._device = device
        if not self.offload and self.model.sharding is None:
            self.model.to(device)

    def models(self) -> Iterator[tuple[str, LanguageModel]]:
        """Yield the model."""
        yield "", self.model

    def local_models(self) -> Sequence[LanguageModel]:
        """Return the model."""
        return (self.model,)

    def weights_digest(self) -> str | None:
        """Return a digest of the model's weights; see :meth:`Teacher.weights_digest`."""
        return weights_digest(self.model)

    def fingerprint(self) -> str:
        """Return a digest of the model, its dtype and its head; see :meth:`Teacher.fingerprint`."""
        return digest([fingerprint(self.model), self.model.quantization, self.vocab_size])

    def head(self, temperature: float = 1.0) -> Head:
        """Return the frozen head, see :meth:`Teacher.head`; an offloaded teacher keeps a copy on the device."""
        head = self.model.head(temperature).detached()
        if not self.offload or head.weight.device == self._device:
            return head
        if self._head is None or self._head[0] != self._device:
            self._head = self._device, head.on(self._device)
        return replace(self._head[1], temperature=temperature)

    @torch.no_grad()
    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
        """Return the targets of ``rollouts``; see :meth:`Teacher.score`."""
        rollouts = rollouts.as_teacher_sees()
        require(
            not request.behavior_top_k or rollouts.behavior_support_ids is not None,
            "the request has behavior_top_k, but the rollouts have no behavior_support_ids: sample them with top_k",
        )
        vocab_size = min(self.vocab_size, request.vocab_size or self.vocab_size)
        place = on_device(self.model, self._device) if self.offload else nullcontext()
        with place, (progress or SilentProgress()).task("scoring (teacher)", len(rollouts)) as advance:

            def chunks() -> Iterator[tuple[Tensor, Scored]]:
                for rows, scored in self.model.score_in_chunks(rollouts, self._batch_size):
                    if request.hidden:
                        self._tell_rounding(scored)
                    yield rows, scored
                    advance(len(rows))

            targets = targets_of(chunks(), rollouts, request, vocab_size)
        if request.hidden and targets.hidden is None:  # there are no rollouts
            return replace(targets, hidden=torch.zeros(*rollouts.tokens.shape, self.model.head().weight.shape[1]))
        return targets

    def _tell_rounding(self, scored: Scored) -> None:
        """Say once how much the rounding of hidden states to a narrow dtype changes the teacher's distribution."""
        name, states = str(scored.hidden.dtype).removeprefix("torch."), scored.hidden[:_MEASURED_POSITIONS]
        if self._has_told_rounding or states.dtype.itemsize >= 4 or not len(states):
            return
        self._has_told_rounding = True
        rank_zero_info(
            f"the teacher's hidden states are kept in {name}, as it computes them; their rounding changes its "
            f"distribution by about {rounding_divergence(states, scored.head):.1g} nats a token (KL)"
        )


@torch.no_grad()
def targets_of(
    chunks: Iterable[tuple[Tensor, Scored]], rollouts: Rollouts, request: TeacherRequest, vocab_size: int
) -> Targets:
    """Return the targets of rollouts from a teacher's hidden states, in host memory.

    Args:
        chunks: rows of the rollouts with their scores; every row once.
        rollouts: B rollouts of T tokens.
        request: the required outputs.
        vocab_size: number of tokens over which the teacher's distribution is taken.
    """
    shape = rollouts.tokens.shape
    targets = blank_targets(shape, request, vocab_size)
    hidden: Tensor | None = None
    for rows, of_model in chunks:
        scored = replace(of_model, head=replace(of_model.head, vocab_size=vocab_size))
        for name, values in _token_targets(scored, rollouts.rows(rows), request).items():
            if (into := getattr(targets, name)) is not None:
                assign_rows(into, rows, scored.padded(values).cpu())
        if request.hidden:
            states = scored.padded(scored.hidden).cpu()  # in the dtype in which the teacher computes
            hidden = states.new_zeros(*shape, states.shape[-1]) if hidden is None else hidden
            hidden[rows, : states.shape[1]] = states
    return replace(targets, hidden=hidden)


def blank_targets(shape: Sequence[int], request: TeacherRequest, vocab_size: int) -> Targets:
    """Return targets that are 0 everywhere, with all that is requested but the hidden states.

    Args:
        shape: [B, T].
        request: what they consist of.
        vocab_size: number of tokens.

    Example:
        >>> blank_targets((1, 2), TeacherRequest(top_k=3), 38).support_ids.shape
        torch.Size([1, 2, 3])
    """
    k, union = request.top_k + request.behavior_top_k, bool(request.top_k and request.behavior_top_k)
    return Targets(
        logprobs=torch.zeros(*shape),
        support_ids=torch.zeros(*shape, k, dtype=id_dtype(vocab_size)) if k else None,
        support_logits=torch.zeros(*shape, k) if k else None,
        support_mass=torch.zeros(*shape) if k else None,
        entropy=torch.zeros(*shape) if request.entropy else None,
        support_valid=torch.zeros(*shape, k, dtype=torch.bool) if union else None,
        log_normalizer=torch.zeros(*shape) if request.tail else None,
        log_tail=torch.zeros(*shape) if request.tail and k else None,
        support_overlap=torch.zeros(*shape) if request.behavior_top_k and not request.top_k else None,
    )


def _token_targets(scored: Scored, rollouts: Rollouts, request: TeacherRequest) -> dict[str, Tensor]:
    """Return the targets of the N valid positions of rollouts by name, [N, …], from one pass over the head.

    Without a tail and without ids that are given, the support's numbers are those of :func:`topk_with_statistics`.
    """
    inputs, given = (scored.hidden, scored.head, scored.tokens), None
    if request.behavior_top_k:
        assert rollouts.behavior_support_ids is not None
        given = scored.picked(rollouts.behavior_support_ids.to(scored.mask.device).long())
    found: dict[str, Tensor] = {}
    if not request.top_k + request.behavior_top_k:
        statistics = scored.statistics()
    elif request.tail or given is not None:
        ids, valid, logits, log_tail, statistics = topk_with_tail(*inputs, request.top_k, given)
        found = {"support_ids": ids, "support_valid": valid, "support_logits": logits, "log_tail": log_tail}
    else:
        (ids, logits), statistics = topk_with_statistics(*inputs, request.top_k)
        found, valid = {"support_ids": ids, "support_logits": logits}, torch.ones_like(ids, dtype=torch.bool)
    if found:
        inside = found["support_logits"].masked_fill(~valid, -torch.inf).logsumexp(-1)
        found["support_mass"] = (inside - statistics.log_normalizer).exp()
        found["support_ids"] = found["support_ids"].int()
    if given is not None and not request.top_k:  # a union has the overlap
        found["support_overlap"] = _overlap(scored, given)
    of_tokens = {"logprobs": statistics.logprobs, "entropy": statistics.entropy}
    return {**found, **of_tokens, "log_normalizer": statistics.log_normalizer}


def _overlap(scored: Scored, support: Tensor) -> Tensor:
    """Return the overlap of a support with the teacher's most likely tokens at two positions of each rollout.

    The positions depend on the rollout alone, not on those that it is scored with.

    Args:
        scored: of N valid positions.
        support: [N, K] long, token ids.

    Returns:
        [N] float32, -1 at the other positions.
    """
    rank, length = scored.mask.cumsum(1) - 1, scored.mask.sum(1, keepdim=True)
    measured = scored.picked((rank == length // 4) | (rank == 3 * length // 4))
    overlap = torch.full((len(support),), -1.0, device=support.device)
    if bool(measured.any()):
        most = int(measured.sum())
        overlap[measured] = support_overlap(scored.hidden[measured], scored.head, support[measured], most)
    return overlap


class BaseTeacher(LocalTeacher):
    """A teacher that is the base model of the student's adapter; it shares the student's frozen weights.

    Args:
        batch_size: rollouts scored at a time.

    Raises:
        UsageError: the student has no adapter.
    """

    def __init__(self, batch_size: int = 32) -> None:
        require(batch_size >= 1, f"batch_size is {batch_size}, but must be at least 1")
        self._batch_size = batch_size

    def bind(self, student: LanguageModel) -> None:
        """Use the student's weights without the adapter."""
        require(
            student.has_adapter,
            "model.teacher is a BaseTeacher, which scores with the weights below the student's adapter, but "
            "model.student has none: give model.student.init_args.adapter, or take a LocalTeacher",
        )
        self._hold(student.without_adapter(), self._batch_size)


@torch.no_grad()
def rounding_divergence(hidden: Tensor, head: Head) -> float:
    """Return the mean KL divergence that the rounding of hidden states to their dtype causes, nats; an estimate.

    The numbers before the rounding are not known. They were anywhere within half a unit in the last place, so the
    states are compared with others that are drawn there, with a fixed seed.

    Args:
        hidden: [N, G], rounded.
        head: computes the logits.

    Example:
        >>> states = torch.ones(4, 8, dtype=torch.bfloat16)
        >>> 0 < rounding_divergence(states, Head(torch.eye(8, dtype=torch.bfloat16))) < 1e-4
        True
    """
    wide = hidden.float()
    unit = torch.finfo(hidden.dtype).eps * torch.exp2(torch.frexp(wide).exponent.float() - 1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(wide.shape, generator=generator).to(wide.device) - 0.5
    targets = torch.zeros(len(wide), dtype=torch.long, device=wide.device)
    values, _ = divergence_statistics(wide + noise * unit, head, wide, head, targets, divergence="reverse_kl")
    return float(values.mean())
