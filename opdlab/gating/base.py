"""Inputs and outputs of gates, and the base classes of all gates.

Shapes: B rollouts, T response tokens. Log-probabilities are in nats.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from opdlab.errors import UsageError
from opdlab.gating.normalization import Normalization, NormalizationName, check_choice
from opdlab.gating.segments import Statistic, dense_ids, segment_reduce, segment_statistic
from opdlab.tau import TauSchedule, check_tau

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    NormalizationOption = NormalizationName | Normalization
else:
    NormalizationOption = NormalizationName  # the command line takes names only; rho, low and high are separate keys


@dataclass(frozen=True)
class GateInputs:
    """Inputs of a gate. Tensors are [B, T]; a response starts in column 0.

    A field that may be None is set if the gate lists it in :attr:`GateStrategy.needs`.

    Args:
        tokens: the sampled token ids, long.
        mask: 1 (or True) at valid response positions. Masked positions are ignored.
        behavior_logprobs: log-probability of ``tokens`` under the behavior policy, nats.
        current_logprobs: the same under the current student, nats.
        teacher_logprobs: the same under the teacher, nats, or None.
        position_losses: the objective's loss per position, detached, or None.
        entropy: of the current student's next-token distribution, nats, or None.
        teacher_entropy: of the teacher's, nats, or None.
        divergence: of the student from the teacher, nats, or None: the objective's own
            (:attr:`opdlab.objectives.PositionLosses.divergence`), else the estimate k3 from the sampled token.
        compatible_mass: the teacher's probability of the tokens that the behavior policy found most likely
            (:attr:`opdlab.types.Rollouts.behavior_support_ids`), 0 to 1, or None.
        correct: int8, the same for all positions of a response: 1 if the verifier accepts its answer, 0 if it does
            not, -1 if the answer was not checked; or None.
        age: float32, the same for all positions of a response: optimizer steps since the last refresh of the snapshot
            that sampled it; or None.
        step: optimizer steps taken so far.

    Example:
        >>> inputs = GateInputs(
        ...     tokens=torch.tensor([[7, 8, 0]]),
        ...     mask=torch.tensor([[1, 1, 0]]),
        ...     behavior_logprobs=torch.tensor([[-1.0, -2.0, 0.0]]),
        ...     current_logprobs=torch.tensor([[-0.5, -2.0, 9.0]]),
        ...     teacher_logprobs=torch.tensor([[-0.5, -1.0, 9.0]]),
        ... )
        >>> inputs.drift, inputs.teacher_gap
        (tensor([[0.5000, 0.0000, 0.0000]]), tensor([[0., 1., 0.]]))
    """

    tokens: Tensor
    mask: Tensor
    behavior_logprobs: Tensor
    current_logprobs: Tensor
    teacher_logprobs: Tensor | None = None
    position_losses: Tensor | None = None
    entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    divergence: Tensor | None = None
    compatible_mass: Tensor | None = None
    correct: Tensor | None = None
    age: Tensor | None = None
    step: int = 0

    @property
    def drift(self) -> Tensor:
        """Return ``current_logprobs - behavior_logprobs``, [B, T] nats, detached, at least float32; 0 if masked."""
        wide = torch.promote_types(self.current_logprobs.dtype, torch.float32)
        difference = self.current_logprobs.detach().to(wide) - self.behavior_logprobs.detach().to(wide)
        return difference.masked_fill(~self.mask.bool(), 0.0)

    @property
    def teacher_gap(self) -> Tensor | None:
        """Return ``teacher_logprobs - current_logprobs``, as :attr:`drift`; None without ``teacher_logprobs``."""
        if self.teacher_logprobs is None:
            return None
        return 0.0 - replace(self, behavior_logprobs=self.teacher_logprobs).drift

    def cleaned(self) -> "GateInputs":
        """Return a detached copy with a boolean mask and zeros at masked positions."""
        invalid = ~self.mask.bool()
        cleaned: dict[str, Any] = {k: v.detach().masked_fill(invalid, 0) for k, v in self.tensors().items()}
        return replace(self, **cleaned | {"mask": ~invalid})

    def map(self, function: Callable[[Tensor], Tensor]) -> "GateInputs":
        """Return a copy with ``function`` applied to every tensor that is not None."""
        changed: dict[str, Any] = {name: function(value) for name, value in self.tensors().items()}
        return replace(self, **changed)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}


@dataclass(frozen=True)
class Gates:
    """Outputs of a gate. Tensors are [B, T] and carry no gradient.

    Args:
        weights: float32, 0 at masked positions, mean 1 over valid positions (unless the normalization is ``none``).
        segment_ids: long, the position's segment within its row, counted from 0; -1 at masked positions.
        segment_drift: the signed mean drift of the position's segment, nats; 0 at masked positions.
        tau: the value that a schedule has chosen, a scalar tensor; None without a schedule.
    """

    weights: Tensor
    segment_ids: Tensor
    segment_drift: Tensor
    tau: Tensor | None = None


class GateStrategy(ABC):
    """Base of all gates: masks, detaches, checks shapes and normalises raw weights.

    Most gates extend :class:`DriftGate` (segments that share a weight) or :class:`RuleGate` (another rule). If neither
    fits, extend this class and override :meth:`log_weight`.

    Args:
        normalization: rule that turns raw weights into weights; a name, or a :class:`opdlab.gating.Normalization`,
            which replaces ``rho``, ``low`` and ``high``. ``mean`` divides by the mean, which gives w (the paper);
            ``residual`` is ``(1 - rho) + rho * w``; ``clipped`` clips w to [low, high] and divides by the mean again;
            ``none`` keeps raw weights, so raw weights below 1 make the step smaller.
        rho: share of w in ``residual``, 0 to 1.
        low: lower bound of ``clipped``.
        high: upper bound of ``clipped``.

    A subclass passes these on as ``**options: Any``; the command line then reads their defaults from this signature.

    Raises:
        UsageError: an option is out of range.

    Example:
        >>> class LikelyGate(GateStrategy):  # raw weight: the student's probability of the token
        ...     def log_weight(self, inputs, segments):
        ...         return inputs.current_logprobs
        >>> current = torch.tensor([[0.75, 0.25]]).log()
        >>> LikelyGate()(GateInputs(torch.zeros(1, 2).long(), torch.ones(1, 2), current, current)).weights
        tensor([[1.5000, 0.5000]])
    """

    needs: tuple[str, ...] = ()
    """Fields of :class:`GateInputs` that the gate requires, of those that may be None."""

    def __init__(
        self, normalization: NormalizationOption = "mean", rho: float = 0.5, low: float = 0.5, high: float = 2.0
    ) -> None:
        if not isinstance(normalization, Normalization):
            normalization = Normalization(normalization, rho, low, high)
        self.normalization: Normalization = normalization

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "segment_ids" in vars(cls) and getattr(cls.log_weight, "__isabstractmethod__", False):
            raise UsageError(
                f"{cls.__name__} extends GateStrategy and defines segment_ids: extend opdlab.gating.DriftGate instead"
            )

    @property
    def uniform(self) -> bool:
        """True if every weight is 1 for all inputs, so other micro-batches need not be scored first."""
        return False

    @property
    def max_gate(self) -> float:
        """Return the largest possible raw weight, the upper bound of weights under ``normalization="none"``."""
        return 1.0

    @property
    def unused_options(self) -> set[str]:
        """Return the options that have no effect; repr and logged hyperparameters omit them."""
        return self.normalization.unused

    def setup(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Prepare the gate with the student's tokenizer, once before training; for gates that use token texts."""
        del tokenizer

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        """Return a label per position, [B, T] integers; positions of a row that share a label form a segment.

        Labels may have any order and size; masked positions are ignored. By default every position is its own segment.
        """
        return torch.arange(inputs.mask.shape[1], device=inputs.mask.device).expand(inputs.mask.shape)

    @abstractmethod
    def log_weight(self, inputs: GateInputs, segments: Tensor) -> Tensor:
        """Return the logarithm of the raw weight, [B, T]; ``-inf`` stands for a weight of 0.

        Logarithms keep the ratio of raw weights that are too small for a float.

        Args:
            inputs: detached, with a boolean mask and zeros at masked positions.
            segments: [B, T] long, the segment of each position, numbered from 0 in each row; -1 at masked positions.
        """

    @torch.no_grad()
    def __call__(self, inputs: GateInputs) -> Gates:
        """Return the weights of a batch.

        Args:
            inputs: see :class:`GateInputs`.

        Returns:
            See :class:`Gates`.

        Raises:
            UsageError: an input that the gate needs is None, or shapes differ.
        """
        missing = [name for name in self.needs if getattr(inputs, name) is None]
        if missing:
            name = type(self).__name__
            raise UsageError(f"{name} needs {', '.join(missing)}, which its inputs do not have: give it")
        for name, value in inputs.tensors().items():
            self._check_shape(f"got {name}", value, inputs.tokens)
        inputs = inputs.cleaned()
        labels = self.segment_ids(inputs)
        self._check_shape("returned segment_ids", labels, inputs.tokens)
        if labels.is_floating_point():
            name = type(self).__name__
            raise UsageError(f"{name} returned segment_ids of {labels.dtype}, but must return integers")
        segments = dense_ids(labels, inputs.mask)
        gate, tau = self._scheduled(inputs, segments)
        log_weight = gate.log_weight(inputs, segments)
        self._check_shape("returned weights", log_weight, inputs.tokens)
        return Gates(
            weights=self.normalization(log_weight, inputs.mask).float(),
            segment_ids=segments,
            segment_drift=segment_reduce(inputs.drift, segments, inputs.mask, "mean"),
            tau=tau,
        )

    def _scheduled(self, inputs: GateInputs, segments: Tensor) -> tuple["GateStrategy", Tensor | None]:
        """Return the gate to apply to these inputs, and the tau that a schedule has chosen."""
        return self, None

    def _check_shape(self, what: str, value: Tensor, tokens: Tensor) -> None:
        if value.shape != tokens.shape or tokens.dim() != 2:
            raise UsageError(
                f"{type(self).__name__} {what} of shape {list(value.shape)} for tokens of shape {list(tokens.shape)}: "
                "both must be [rollouts, response tokens]"
            )

    def __repr__(self) -> str:
        options = {**vars(self), **self.normalization.options}
        shown = [name for name in options if name[0] != "_" and name not in self.unused_options]
        return f"{type(self).__name__}({', '.join(f'{name}={options[name]!r}' for name in shown)})"


class DriftGate(GateStrategy):
    """Base of gates on drift: positions of a segment share the raw weight ``exp(-tau * s)``, with s from their drift.

    Override :meth:`segment_ids`.

    Args:
        tau: strength of the gate, per nat: a number or a schedule. 0 makes every weight 1.
        statistic: reduction of a segment's drifts to s: ``signed_mean`` is the absolute value of their mean (the
            paper; opposite drifts cancel), ``abs_mean``, ``rms`` and ``max`` (of the absolute drift) do not cancel.
        options: see :class:`GateStrategy`.

    Raises:
        UsageError: an option is out of range.

    Example:
        >>> class HalvesGate(DriftGate):
        ...     def segment_ids(self, inputs):
        ...         # Halves of the response, and not of the columns: padding must not move a weight.
        ...         return 2 * inputs.mask.cumsum(1) > inputs.mask.sum(1, keepdim=True)
        >>> behavior = torch.zeros(1, 4)
        >>> current = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        >>> gates = HalvesGate()(GateInputs(torch.zeros(1, 4).long(), torch.ones(1, 4), behavior, current))
        >>> gates.weights
        tensor([[1.4621, 1.4621, 0.5379, 0.5379]])
    """

    def __init__(self, tau: float | TauSchedule = 1.0, statistic: Statistic = "signed_mean", **options: Any) -> None:
        if not isinstance(tau, TauSchedule):
            check_tau("tau", tau)
        check_choice("statistic", statistic, get_args(Statistic))
        self.tau: float | TauSchedule | Tensor = tau
        self.statistic = statistic
        super().__init__(**options)

    @property
    def uniform(self) -> bool:
        """True if tau is 0."""
        return bool(self.tau == 0)

    @abstractmethod
    def segment_ids(self, inputs: GateInputs) -> Tensor:
        """Return a label per position; see :meth:`GateStrategy.segment_ids`."""

    def log_weight(self, inputs: GateInputs, segments: Tensor) -> Tensor:
        """Return ``-tau * s``, [B, T]; with a schedule, ``tau`` is its value for these inputs."""
        assert not isinstance(self.tau, TauSchedule)
        return -self.tau * segment_statistic(inputs.drift, segments, inputs.mask, self.statistic)

    def _scheduled(self, inputs: GateInputs, segments: Tensor) -> tuple[GateStrategy, Tensor | None]:
        if not isinstance(self.tau, TauSchedule):
            return self, None
        # Copy the gate with the schedule's value, because log_weight needs a number for tau.
        statistic = segment_statistic(inputs.drift, segments, inputs.mask, self.statistic)
        chosen = self.tau(inputs.step, statistic, inputs.mask)
        fixed = copy.copy(self)
        fixed.tau = tau = torch.as_tensor(chosen, dtype=statistic.dtype, device=statistic.device)
        return fixed, tau


class RuleGate(GateStrategy):
    """Base of gates whose raw weight follows a rule other than ``exp(-tau * s)``, without tau and statistic.

    Override :meth:`weight`, and :attr:`needs` and :attr:`max_gate` if they differ.

    Args:
        normalization: see :class:`GateStrategy`; None selects the class's :attr:`own_normalization`.
        options: see :class:`GateStrategy`.

    Example:
        >>> class ConfidentGate(RuleGate):
        ...     needs = ("entropy",)
        ...     def weight(self, inputs):
        ...         return (-inputs.entropy).exp()
        >>> zeros = torch.zeros(1, 2)
        >>> ConfidentGate()(GateInputs(zeros.long(), torch.ones(1, 2), zeros, zeros)).weights
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: ConfidentGate needs entropy, which its inputs do not have: give it
    """

    own_normalization: NormalizationName = "none"

    def __init__(self, normalization: NormalizationOption | None = None, **options: Any) -> None:
        super().__init__(normalization or self.own_normalization, **options)

    @abstractmethod
    def weight(self, inputs: GateInputs) -> Tensor:
        """Return the raw weight, [B, T], at least 0."""

    def log_weight(self, inputs: GateInputs, segments: Tensor) -> Tensor:
        """Return the logarithm of :meth:`weight`, ``-inf`` for 0."""
        weight = self.weight(inputs)
        return weight.to(torch.promote_types(weight.dtype, torch.float32)).log()
