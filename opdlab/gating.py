r"""The gate interface: how much each position of a reused rollout counts.

Drift is how far the student has moved from the policy that sampled the rollout, ``d = logpi - logpi_b``. A gate
groups the positions of a response into segments, reduces the drift over each segment to ``s >= 0``, and turns it
into a weight ``exp(-tau * s)`` that is normalised to mean 1 over the valid positions of the batch and carries no
gradient. A concrete gate only says which positions belong together; all else lives here, once.

Reference: Zheng & Jiang, "Blockwise Policy-Drift Gating for On-Policy Distillation", arXiv 2606.24084.

Shapes: B rollouts, T response tokens. Log-probabilities are in nats.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.registry import Registry, suggestion
from opdlab.tau import TauSchedule, check_tau

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Statistic = Literal["signed_mean", "abs_mean", "rms", "max"]
Normalization = Literal["mean", "residual", "clipped", "none"]


@dataclass(frozen=True)
class GateInputs:
    """What a gate may look at. Tensors are [B, T]; a response starts in column 0.

    What may be None is there where the gate declares it in :attr:`GateStrategy.needs`.

    Args:
        tokens: the sampled token ids, long.
        mask: 1 (or True) on valid response positions. Whatever stands where it is 0 has no influence.
        behavior_logprobs: log-probability of ``tokens`` under the policy that sampled them, nats.
        current_logprobs: the same under the current student, nats.
        teacher_logprobs: the same under the teacher, nats, or None.
        position_losses: the objective's loss per position, detached, or None.
        entropy: of the current student's next-token distribution, nats, or None.
        teacher_entropy: of the teacher's, nats, or None.
        correct: int8, the same for all positions of a response: 1 where the verifier accepts its answer, 0 where it
            does not, -1 where it was not asked; or None.
        step: optimizer steps taken.
    """

    tokens: Tensor
    mask: Tensor
    behavior_logprobs: Tensor
    current_logprobs: Tensor
    teacher_logprobs: Tensor | None = None
    position_losses: Tensor | None = None
    entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    correct: Tensor | None = None
    step: int = 0

    @property
    def drift(self) -> Tensor:
        """``current_logprobs - behavior_logprobs``, detached, float32 or wider, 0 where the mask is 0."""
        wide = torch.promote_types(self.current_logprobs.dtype, torch.float32)
        drift = self.current_logprobs.detach().to(wide) - self.behavior_logprobs.detach().to(wide)
        return drift.masked_fill(~self.mask.bool(), 0.0)

    def cleaned(self) -> "GateInputs":
        """Return a detached copy with a boolean mask and zeros wherever the mask is 0."""
        invalid = ~self.mask.bool()
        return replace(self.map(lambda value: value.detach().masked_fill(invalid, 0)), mask=~invalid)

    def map(self, function: Callable[[Tensor], Tensor]) -> "GateInputs":
        """Apply ``function`` to every tensor that is there."""
        changed: dict[str, Any] = {name: function(value) for name, value in self.tensors().items()}
        return replace(self, **changed)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}


@dataclass(frozen=True)
class Gates:
    """What a gate returns. Tensors are [B, T] and carry no gradient.

    Args:
        weights: float32, 0 where the mask is 0, mean 1 over valid positions (unless ``normalization="none"``).
        segment_ids: long, the position's segment within its row, counted from 0; -1 where the mask is 0.
        segment_drift: the signed mean drift of the position's segment, nats; 0 where the mask is 0.
        tau: that a schedule has chosen, a tensor of one number; None where tau is a number, or plays no part.
    """

    weights: Tensor
    segment_ids: Tensor
    segment_drift: Tensor
    tau: Tensor | None = None


class GateStrategy:
    """Base of all gates. Extend it with one method.

    Override :meth:`segment_ids` to group positions; drift, its reduction, ``exp(-tau * s)``, masking, detaching and
    normalisation are done here. Override :meth:`drift_gate` instead for another rule than ``exp(-tau * s)``, and
    declare what it :attr:`needs` besides drift.

    Args:
        tau: how hard drift bites, per nat: a segment with statistic s gets ``exp(-tau * s)``. 0 switches gating off.
            A schedule may stand for the number.
        statistic: how a segment's drifts reduce to s: ``signed_mean`` is the absolute value of their mean (the
            paper; opposite drifts cancel), ``abs_mean``, ``rms`` and ``max`` (of the absolute drift) do not cancel.
        normalization: how gates become weights. ``mean`` divides by the mean gate (the paper); ``residual`` mixes that
            with ungated, ``(1 - rho) + rho * w``; ``clipped`` clips w to [low, high] and divides by the mean again;
            ``none`` takes gates as they are: at most 1 where drift makes them, so that it also shrinks the step.
        rho: share of the gate in ``residual``, 0 to 1.
        low: lower bound of ``clipped``.
        high: upper bound of ``clipped``.

    A subclass hands these on as ``**options: Any``: the command line then finds their defaults in this signature.

    Raises:
        UsageError: an option is out of range.

    Example:
        >>> class HalvesGate(GateStrategy):
        ...     def segment_ids(self, inputs):
        ...         # Halves of the response, and not of the columns: padding must not move a weight.
        ...         return 2 * inputs.mask.cumsum(1) > inputs.mask.sum(1, keepdim=True)
        >>> behavior = torch.zeros(1, 4)
        >>> current = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        >>> gates = HalvesGate()(GateInputs(torch.zeros(1, 4).long(), torch.ones(1, 4), behavior, current))
        >>> gates.weights
        tensor([[1.4621, 1.4621, 0.5379, 0.5379]])
    """

    needs: tuple[str, ...] = ()
    """Fields of :class:`GateInputs` without which the gate cannot work, of those that may be None."""

    def __init__(
        self,
        tau: float | TauSchedule = 1.0,
        statistic: Statistic = "signed_mean",
        normalization: Normalization = "mean",
        rho: float = 0.5,
        low: float = 0.5,
        high: float = 2.0,
    ) -> None:
        _check_choice("statistic", statistic, get_args(Statistic))
        _check_choice("normalization", normalization, get_args(Normalization))
        if not isinstance(tau, TauSchedule):
            check_tau("tau", tau)
        require(0 <= rho <= 1, f"rho is {rho}, but must lie between 0 and 1")
        require(0 <= low <= 1 <= high, f"low is {low} and high is {high}, but 0 <= low <= 1 <= high must hold")
        self.tau = tau
        self.statistic = statistic
        self.normalization = normalization
        self.rho = rho
        self.low = low
        self.high = high

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.segment_ids is GateStrategy.segment_ids and cls.drift_gate is GateStrategy.drift_gate:
            raise TypeError(f"{cls.__name__} must override segment_ids(inputs) or drift_gate(inputs)")

    @property
    def uniform(self) -> bool:
        """Whether every weight is 1 whatever the drift, so that nothing needs to be computed ahead."""
        return self.tau == 0 and type(self).drift_gate is GateStrategy.drift_gate

    @property
    def max_gate(self) -> float:
        """The largest value of :meth:`drift_gate`, and so the largest weight under ``normalization="none"``."""
        return 1.0

    def setup(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Called once before training with the student's tokenizer; for gates that look at the text of tokens."""
        del tokenizer

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        """Return a label per position, [B, T] integers; positions of a row that share a label form a segment.

        Labels need no order and no bound, and what stands where the mask is 0 is ignored. Without an override every
        position is a segment of its own.
        """
        return torch.arange(inputs.mask.shape[1], device=inputs.mask.device).expand(inputs.mask.shape)

    def drift_gate(self, inputs: GateInputs) -> Tensor:
        """Return the gate before normalisation, [B, T], at least 0. Default: ``exp(-tau * s)`` of the segment."""
        return self._log_gate(inputs, segment_ids=self._dense_segment_ids(inputs))[0].exp()

    @torch.no_grad()
    def __call__(self, inputs: GateInputs) -> Gates:
        """Compute the weights of a batch.

        Args:
            inputs: see :class:`GateInputs`.

        Returns:
            See :class:`Gates`.

        Raises:
            UsageError: something that the gate needs is not there.
        """
        self._check_needs(inputs)
        inputs = inputs.cleaned()
        ids = self._dense_segment_ids(inputs)
        tau = None
        if type(self).drift_gate is GateStrategy.drift_gate:
            # In logarithms, so that gates too small for a float still have the right ratio to each other.
            log_gate, tau = self._log_gate(inputs, ids)
        else:
            gate = self.drift_gate(inputs)
            log_gate = gate.to(torch.promote_types(gate.dtype, torch.float32)).log()
        return Gates(
            weights=self._normalize(log_gate, inputs.mask).float(),
            segment_ids=ids,
            segment_drift=_segment_mean(inputs.drift, ids, inputs.mask),
            tau=tau,
        )

    def _check_needs(self, inputs: GateInputs) -> None:
        missing = [name for name in self.needs if getattr(inputs, name) is None]
        require(not missing, f"{type(self).__name__} needs {', '.join(missing)}, which its inputs do not have: give it")

    def _dense_segment_ids(self, inputs: GateInputs) -> Tensor:
        labels = self.segment_ids(inputs)
        require(
            labels.shape == inputs.mask.shape and not labels.is_floating_point(),
            f"{type(self).__name__}.segment_ids returned {labels.dtype} of shape {tuple(labels.shape)}, but must "
            f"return integers of shape {tuple(inputs.mask.shape)}",
        )
        return dense_ids(labels, inputs.mask.bool())

    def _log_gate(self, inputs: GateInputs, segment_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logarithm of the gate, and the tau that a schedule has chosen."""
        mask = inputs.mask.bool()
        statistic = segment_statistic(inputs.drift, segment_ids, mask, self.statistic)
        if not isinstance(self.tau, TauSchedule):
            return -self.tau * statistic, None
        tau = torch.as_tensor(self.tau(inputs.step, statistic, mask), dtype=statistic.dtype, device=statistic.device)
        return -tau * statistic, tau

    def _normalize(self, log_gate: Tensor, mask: Tensor) -> Tensor:
        if self.normalization == "none":
            return log_gate.exp().masked_fill(~mask, 0.0)
        # The largest gate is scaled to 1 before exp: the mean is then never 0. If all are 0 they are equal: weight 1.
        peak = log_gate.masked_fill(~mask, -torch.inf).amax() if log_gate.numel() else log_gate.sum()
        gate = torch.where(torch.isneginf(peak), torch.ones_like(log_gate), (log_gate - peak).exp())
        weights = _unit_mean(gate, mask)
        if self.normalization == "residual":
            return (1 - self.rho) * mask + self.rho * weights
        if self.normalization == "clipped":
            return _unit_mean(weights.clamp(self.low, self.high), mask)
        return weights

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if not key.startswith("_"))
        return f"{type(self).__name__}({options})"


class RuleGate(GateStrategy):
    """Base of gates that weigh positions by a rule of their own, with neither tau nor statistic.

    Override :meth:`drift_gate`, and :attr:`needs` and :attr:`max_gate` where they differ.

    Args:
        normalization: how gates become weights; None is :attr:`own_normalization`. See :class:`GateStrategy`.
        rho: share of the gate in ``residual``, 0 to 1.
        low: lower bound of ``clipped``.
        high: upper bound of ``clipped``.

    Example:
        >>> class ConfidentGate(RuleGate):
        ...     needs = ("entropy",)
        ...     def drift_gate(self, inputs):
        ...         return (-inputs.entropy).exp()
        >>> zeros = torch.zeros(1, 2)
        >>> ConfidentGate()(GateInputs(zeros.long(), torch.ones(1, 2), zeros, zeros)).weights
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: ConfidentGate needs entropy, which its inputs do not have: give it
    """

    own_normalization: Normalization = "none"

    def __init__(
        self, normalization: Normalization | None = None, rho: float = 0.5, low: float = 0.5, high: float = 2.0
    ) -> None:
        super().__init__(normalization=normalization or self.own_normalization, rho=rho, low=low, high=high)

    def drift_gate(self, inputs: GateInputs) -> Tensor:
        """The rule."""
        raise NotImplementedError(f"{type(self).__name__} must override drift_gate(inputs)")


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(
        value in choices,
        f"{key} is '{value}', but must be one of {', '.join(choices)}{suggestion(str(value), choices)}",
    )


def _unit_mean(gate: Tensor, mask: Tensor) -> Tensor:
    gate = gate.masked_fill(~mask, 0.0)
    # Summed in double: in float32 the mean of a million weights is off by more than their own rounding.
    mean = gate.sum(dtype=torch.float64) / mask.sum().clamp(min=1)
    return torch.where(mask, gate / mean.to(gate.dtype), torch.zeros_like(gate))


def dense_ids(labels: Tensor, mask: Tensor) -> Tensor:
    """Renumber each row's labels 0, 1, … in their own order, counting valid positions only.

    Args:
        labels: [B, T] integers.
        mask: [B, T] bool.

    Returns:
        [B, T] long, -1 where ``mask`` is 0.

    Example:
        >>> dense_ids(torch.tensor([[7, 7, 900, 3]]), torch.tensor([[True, True, True, False]]))
        tensor([[ 0,  0,  1, -1]])
    """
    labels = labels.long()
    # Invalid positions sort last and so cannot take a number from valid ones.
    ordered, order = labels.masked_fill(~mask, torch.iinfo(torch.long).max).sort(dim=1)
    steps = torch.zeros_like(ordered)
    steps[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(labels).scatter_(1, order, steps.cumsum(1)).masked_fill(~mask, -1)


def _per_segment(values: Tensor, ids: Tensor, mask: Tensor, reduce: str) -> Tensor:
    # One more bucket than there can be segments: it takes the invalid positions.
    index = torch.where(mask, ids, values.shape[1])
    buckets = values.new_zeros(values.shape[0], values.shape[1] + 1)
    return buckets.scatter_reduce_(1, index, values, reduce).gather(1, index)


def _segment_mean(values: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    total = _per_segment(values, ids, mask, "sum")
    count = _per_segment(mask.to(values.dtype), ids, mask, "sum")
    return (total / count.clamp(min=1)).masked_fill(~mask, 0.0)


def segment_statistic(drift: Tensor, ids: Tensor, mask: Tensor, statistic: Statistic) -> Tensor:
    """Reduce drift over each segment and give every position its segment's value.

    Args:
        drift: [B, T], nats.
        ids: [B, T] long, numbers from 0 per row; see :func:`dense_ids`.
        mask: [B, T] bool.
        statistic: see :class:`GateStrategy`.

    Returns:
        [B, T], nats, at least 0; 0 where ``mask`` is 0.

    Example:
        >>> drift = torch.tensor([[1.0, -1.0, 3.0]])
        >>> ids, mask = torch.tensor([[0, 0, 1]]), torch.ones(1, 3, dtype=torch.bool)
        >>> segment_statistic(drift, ids, mask, "signed_mean"), segment_statistic(drift, ids, mask, "rms")
        (tensor([[0., 0., 3.]]), tensor([[1., 1., 3.]]))
    """
    if statistic == "signed_mean":
        return _segment_mean(drift, ids, mask).abs()
    if statistic == "abs_mean":
        return _segment_mean(drift.abs(), ids, mask)
    peak = _per_segment(drift.abs(), ids, mask, "amax").masked_fill(~mask, 0.0)
    if statistic == "max":
        return peak
    # Scaled by the segment's largest drift, so that squares neither overflow nor vanish.
    scale = torch.where(peak > 0, peak, torch.ones_like(peak))
    return _segment_mean((drift / scale).square(), ids, mask).sqrt() * peak


_REGISTRY: Registry[GateStrategy] = Registry("gate", GateStrategy, "opdlab.strategies", "opdlab.gates")


def gate_registry() -> Registry[GateStrategy]:
    """The registry itself, for the command line."""
    return _REGISTRY


register_gate = _REGISTRY.register
"""Class decorator that registers a gate under a name; see :meth:`opdlab.registry.Registry.register`."""


def gate_names() -> list[str]:
    """Names of all registered gates, built-in and installed.

    Example:
        >>> {"none", "token", "sequence", "block64", "span"} <= set(gate_names())
        True
    """
    return _REGISTRY.names()


def build_gate(name: str, **options: Any) -> GateStrategy:
    """Build a gate by its registered name.

    Args:
        name: see :func:`gate_names`.
        options: keyword arguments of the gate's class.

    Raises:
        UsageError: no such gate (the nearest name is given), or an option is out of range.

    Example:
        >>> build_gate("block64", tau=2.0).tau
        2.0
        >>> build_gate("blok64")
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: unknown gate 'blok64'; did you mean 'block64'? Registered: ...
    """
    return _REGISTRY.build(name, **options)
