"""A recorded step under every gate: weights, losses, gradients.

Shapes: V gates, N valid positions of the step, J fresh draws, P trained parameters.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.gating import DriftGate, GateInputs, Normalization
from opdlab.module import OPDModule
from opdlab.replay.fresh import Tokens, fresh_gradients, other_prompts, recorded_prompts
from opdlab.replay.record import RecordedBatch, RecordedStep
from opdlab.replay.step_gradients import (
    LEAST_TOLERANCE,
    Autocast,
    Products,
    StepGradients,
    gradient_products,
    inner_products,
)
from opdlab.replay.variants import Grid, Variant, expand
from opdlab.seeds import derive_seed
from opdlab.training import join_gate_inputs, split_gates
from opdlab.types import Minibatch, TeacherRequest

Value = float | int | str | bool | None
Row = dict[str, Value]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# For the plot of effective sample sizes, which needs no gradients; per nat.
PLOTTED_TAUS = tuple(10 ** (e / 8) for e in range(-8, 17))


@dataclass(frozen=True)
class ReplayConfig:
    """References for the gated gradients, and the precision of the comparison.

    Args:
        draws: J, independent batches of fresh rollouts per step, at least 2.
        seed: of the sampling.
        other_prompts: also compare with fresh rollouts of other prompts.
        tolerance: of gates that share backward passes, see :func:`opdlab.replay.step_gradients.mixtures`; with 0 each
            gate has its own.
    """

    draws: int = 4
    seed: int = 0
    other_prompts: bool = False
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        require(self.draws >= 2, f"--draws is {self.draws}, but must be at least 2: their spread is the noise")
        require(
            self.tolerance == 0 or LEAST_TOLERANCE <= self.tolerance < 1,
            f"--tolerance is {self.tolerance}, but must be 0, or at least {LEAST_TOLERANCE} and below 1",
        )


@dataclass(frozen=True)
class ReplayedStep:
    """Results of a replayed step.

    Args:
        number: of the optimizer step, counted from 1.
        age: of its rollouts, optimizer steps.
        recorded_loss: nats.
        replayed_loss: the loss under the run's own gate in the replay, nats.
        recorded_norm: norm of the gradient before clipping, or None.
        replayed_norm: the norm under the run's own gate in the replay.
        ceilings: by reference (``fresh``, ``other``) the mean cosine between two fresh gradients.
        rows: a line for each gate.
        sample_sizes: by gate, the effective sample size at each of :data:`PLOTTED_TAUS`.
        num_backward: backward passes that the gates took.
    """

    number: int
    age: float
    recorded_loss: float
    replayed_loss: float
    recorded_norm: float | None
    replayed_norm: float
    ceilings: dict[str, float]
    rows: list[Row]
    sample_sizes: dict[str, list[float]]
    num_backward: int


class Replayer:
    """Replays recorded steps.

    Args:
        module: built from the run's configuration, on its device; its student takes each record's weights.
        grid: the gates.
        config: see :class:`ReplayConfig`.
        autocast: context of forward passes, the run's precision.
        prompts: the run's training prompts; required for fresh rollouts of other prompts.
    """

    def __init__(
        self,
        module: OPDModule,
        grid: Grid,
        config: ReplayConfig,
        autocast: Autocast,
        prompts: Sequence[Tokens] = (),
    ) -> None:
        self._module, self._grid, self._config = module, grid, config
        self._autocast, self._prompts = autocast, prompts
        # autograd.grad returns the gradients; `.grad` stays unchanged.
        module.student.accumulate_head_grad = False
        module.teacher.to(module.device)
        self.skipped: dict[str, str] = {}
        """Gates whose inputs a record lacks, with the reasons."""

    def replay(self, record: RecordedStep) -> ReplayedStep:
        """Replay one step."""
        module, facts = self._module, record.facts
        record.load_weights(module.student)
        variants, skipped = expand(self._grid, module.gate, module.student.tokenizer, self._served(record))
        self.skipped |= skipped
        batches, shares = self._batches(record, variants)
        gradients = StepGradients(module, batches, shares, facts.step, self._autocast)
        weights = _weights(variants, gradients.inputs)
        losses = [gradients.losses([w[v] for w in weights]) for v in range(len(variants))]
        references = self._references(record)
        own = next(v for v, variant in enumerate(variants) if variant.own)
        others = torch.cat(list(references.values()))
        products = gradient_products(gradients, weights, others, self._config.tolerance)
        comparison = _Comparison(products, references)
        distribution = weight_figures(_valid(weights, gradients.inputs))
        known: Row = {"step": record.number, "age": record.age, "reuse_epoch": facts.reuse_epoch}
        rows = [
            known | _names(variant) | distribution[v] | {"loss": _summed(losses[v])} | comparison.figures(v)
            for v, variant in enumerate(variants)
        ]
        return ReplayedStep(
            number=record.number,
            age=record.age,
            recorded_loss=facts.loss,
            replayed_loss=_summed(losses[own]),
            recorded_norm=facts.gradient_norm,
            replayed_norm=float(gradients.gradient([w[own] for w in weights]).double().norm()),
            ceilings=comparison.ceilings,
            rows=rows,
            sample_sizes=_sample_sizes(variants, gradients.inputs),
            num_backward=products.num_backward,
        )

    def _served(self, record: RecordedStep) -> set[str]:
        # Computed here if the run has not computed the teacher's entropy.
        served = {"teacher_logprobs", "position_losses", "entropy", "teacher_entropy"}
        judged = all(batch.rollouts.correct is not None for batch in record.batches)
        return served | ({"correct"} if judged else set())

    def _batches(self, record: RecordedStep, variants: Sequence[Variant]) -> tuple[list[Minibatch], list[Tensor]]:
        entropy = any("teacher_entropy" in variant.strategy.needs for variant in variants)
        parts = [self._with_entropy(batch) if entropy else batch for batch in record.batches]
        num_tokens = torch.cat([part.rollouts.num_tokens for part in parts])
        batches = [
            Minibatch(
                part.rollouts,
                part.targets,
                torch.arange(len(part.rollouts)),
                num_tokens=int(num_tokens.sum()),
                num_rollouts=int((num_tokens > 0).sum()),
                micro_batches=tuple((each.rollouts, each.targets) for each in parts),
                position=place,
                reuse_epoch=record.facts.reuse_epoch,
                pool_metrics={},
            ).to(self._module.device)
            for place, part in enumerate(parts)
        ]
        return batches, [part.shares.to(self._module.device) for part in parts]

    def _with_entropy(self, batch: RecordedBatch) -> RecordedBatch:
        if batch.targets.entropy is not None:
            return batch
        again = self._module.teacher.score(batch.rollouts, TeacherRequest(entropy=True))
        return replace(batch, targets=replace(batch.targets, entropy=again.entropy))

    def _references(self, record: RecordedStep) -> dict[str, Tensor]:
        config, seed = self._config, self._config.seed
        wanted = {"fresh": [recorded_prompts(record)] * config.draws}
        if config.other_prompts:
            wanted["other"] = [other_prompts(record, self._prompts, draw, seed) for draw in range(config.draws)]
            require(
                bool(wanted["other"][0]), f"step {record.number} uses every training prompt: leave out --other_prompts"
            )
        return {
            name: fresh_gradients(
                self._module, record, draws, derive_seed("replay", name, seed, record.number), self._autocast
            )
            for name, draws in wanted.items()
        }


def _names(variant: Variant) -> Row:
    return {
        "gate": variant.gate,
        "statistic": variant.statistic,
        "normalization": variant.normalization,
        "tau": variant.tau,
        "own": variant.own,
    }


def _weights(variants: Sequence[Variant], inputs: Sequence[GateInputs]) -> list[Tensor]:
    """Return the weights of each micro-batch, [V, B, T], normalised over the whole step."""
    joined = join_gate_inputs(inputs) if len(inputs) > 1 else inputs[0]
    gates = [split_gates(variant.strategy(joined), inputs) for variant in variants]
    return [torch.stack([parts[place].weights for parts in gates]) for place in range(len(inputs))]


def _valid(weights: Sequence[Tensor], inputs: Sequence[GateInputs]) -> Tensor:
    return torch.cat([w[:, part.mask.bool()] for w, part in zip(weights, inputs, strict=True)], dim=1)


def _sample_sizes(variants: Sequence[Variant], inputs: Sequence[GateInputs]) -> dict[str, list[float]]:
    """Return effective sample sizes over a range of taus, of every gate with a tau, with the paper's options."""
    joined = join_gate_inputs(inputs) if len(inputs) > 1 else inputs[0]
    valid, found = joined.mask.bool(), {}
    gates = {v.gate: v.strategy for v in variants if v.tau is not None}
    for name, gate in gates.items():
        assert isinstance(gate, DriftGate)
        each = copy.copy(gate)
        each.statistic, each.normalization = "signed_mean", Normalization()
        weights = []
        for tau in PLOTTED_TAUS:
            each.tau = tau
            weights.append(each(joined).weights[valid].double())
        found[name] = effective_sample_size(torch.stack(weights)).tolist()
    return found


class _Comparison:
    """Cosines and norms from inner products.

    Args:
        products: of every gate; the first gate is the ungated one.
        references: by name, [J, P]; ``products`` has them in this order, after the ungated gradient.
    """

    def __init__(self, products: Products, references: Mapping[str, Tensor]) -> None:
        self._norms, self._products = products.squares.sqrt(), products.references
        among = {name: inner_products(fresh, fresh) for name, fresh in references.items()}
        self._lengths = {name: products.diagonal().sqrt() for name, products in among.items()}
        self.ceilings = {name: _mean_cosine(products) for name, products in among.items()}

    def figures(self, v: int) -> Row:
        """Return the metrics of a gate. Cosines with a zero gradient are None."""
        norm, ungated = self._norms[v], self._norms[0]
        row: Row = {
            "gradient_norm": float(norm),
            "ungated_norm_ratio": _number(norm / ungated),
            "ungated_cosine": _number((self._products[v, 0] / (norm * ungated)).clamp(max=1)),
        }
        start = 1
        for name, lengths in self._lengths.items():
            place = slice(start, start + len(lengths))
            start = place.stop
            cosines = self._products[v, place] / (norm * lengths)
            change = cosines - self._products[0, place] / (ungated * lengths)
            row |= {
                f"{name}_cosine": _number(cosines.mean()),
                f"{name}_cosine_se": _standard_error(cosines),
                f"{name}_change": _number(change.mean()),
                f"{name}_change_se": _standard_error(change),
                f"{name}_norm_ratio": _number(norm / lengths.mean()),
                f"{name}_ceiling": _number(torch.tensor(self.ceilings[name])),
            }
        return row


def _mean_cosine(products: Tensor) -> float:
    """Return the mean cosine between two of J vectors, from their inner products [J, J]."""
    lengths = products.diagonal().sqrt().clamp(min=torch.finfo(products.dtype).tiny)
    cosines = products / lengths / lengths[:, None]
    count = len(products)
    return float((cosines.sum() - cosines.trace()) / (count * (count - 1)))


def _standard_error(values: Tensor) -> float | None:
    return _number(values.std() / math.sqrt(len(values)))


def _number(value: Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None


def _summed(losses: Sequence[float]) -> float:
    """Return the sum of the micro-batches' parts in float32, as the log sums them."""
    return float(torch.tensor(losses).sum())


def effective_sample_size(weights: Tensor) -> Tensor:
    """Return ``(sum w)^2 / (N * sum w^2)`` of [V, N] weights: the effective share of the positions."""
    return weights.sum(1).square() / (weights.shape[1] * weights.square().sum(1))


def weight_figures(weights: Tensor) -> list[Row]:
    """Return the distribution of each gate's weights.

    Args:
        weights: [V, N].

    Example:
        >>> figures = weight_figures(torch.tensor([[0.5, 1.5]]))[0]
        >>> figures["weight_mean"], figures["effective_sample_size"], figures["weight_q50"]
        (1.0, 0.8, 1.0)
    """
    wide = weights.double().cpu()
    columns = {
        "weight_min": wide.amin(1),
        **{
            f"weight_q{round(100 * q):02d}": torch.from_numpy(value)
            for q, value in zip(QUANTILES, np.quantile(wide.numpy(), QUANTILES, axis=1), strict=True)
        },
        "weight_max": wide.amax(1),
        "weight_mean": wide.mean(1),
        "weight_std": wide.std(1, correction=0),
        "effective_sample_size": effective_sample_size(wide),
    }
    table = torch.stack(list(columns.values()), dim=1).tolist()
    return [dict(zip(columns, values, strict=True)) for values in table]
