"""A recorded step under every gate: weights, losses, gradients.

Shapes: V gates, N valid positions of the step, J fresh draws, P trained parameters.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from opdlab.errors import UsageError, first_line, require
from opdlab.gating import DriftGate, GateInputs, Normalization
from opdlab.module import OPDModule
from opdlab.objectives import Objective
from opdlab.replay.fresh import fresh_gradients, other_prompts, recorded_prompts
from opdlab.replay.objectives import MissingTargetsError, chosen_objectives, with_targets
from opdlab.replay.record import RecordedBatch, RecordedStep
from opdlab.replay.step_gradients import (
    LEAST_TOLERANCE,
    Autocast,
    Products,
    StepGradients,
    gradient_products,
    inner_products,
)
from opdlab.replay.variants import KEYS, Grid, Variant, expand
from opdlab.seeds import derive_seed
from opdlab.training import join_gate_inputs, split_gates
from opdlab.types import Prompt, TeacherRequest

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
        others: by the name of another objective, a line for each gate.
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
    others: dict[str, list[Row]] = field(default_factory=dict)


class Replayer:
    """Replays recorded steps.

    Args:
        module: built from the run's configuration, on its device; its student takes each record's weights.
        grid: the gates.
        config: see :class:`ReplayConfig`.
        autocast: context of forward passes, the run's precision.
        prompts: the run's training prompts; required for fresh rollouts of other prompts.
        objectives: registered names or class paths, replayed besides the run's own.
    """

    def __init__(
        self,
        module: OPDModule,
        grid: Grid,
        config: ReplayConfig,
        autocast: Autocast,
        prompts: Sequence[Prompt] = (),
        objectives: Sequence[str] = (),
    ) -> None:
        self._module, self._grid, self._config = module, grid, config
        self._autocast, self._prompts = autocast, prompts
        require(
            not module.teacher.follows_student,
            f"model.teacher is a {type(module.teacher).__name__} that follows the student, and records do not hold its "
            "weights, so fresh rollouts cannot be scored: replay a run whose teacher is frozen",
        )
        # autograd.grad returns the gradients; `.grad` stays unchanged.
        module.student.accumulate_head_grad = False
        module.teacher.to(module.device)
        self._own, *self._others = chosen_objectives(objectives, module.objective)
        self.skipped: dict[str, str] = {}
        """Gates and objectives whose inputs a record lacks, with the reasons."""

    def replay(self, record: RecordedStep) -> ReplayedStep:
        """Replay one step under the run's own objective, and then under the others."""
        record.load_weights(self._module.student)
        step, ungated = self._replayed(record, self._own.name)
        for other in self._others:
            try:
                with self._asking(other.objective) as request:
                    batches = tuple(with_targets(self._module.teacher, batch, request) for batch in record.batches)
                    found, _ = self._replayed(replace(record, batches=batches), other.name, ungated)
            except (MissingTargetsError, UsageError) as error:
                known = isinstance(error, MissingTargetsError)
                self.skipped[other.name] = str(error) if known else f"cannot be replayed ({first_line(error)})"
                continue
            step.others[other.name] = [row | {"own": False} for row in found.rows]
        return step

    @contextmanager
    def _asking(self, objective: Objective) -> Iterator[TeacherRequest]:
        """Give the module another objective inside the block, and return what that requests of the teacher."""
        module = self._module
        kept, shared = (module.objective, module.collector), module.student.vocab_size
        objective.setup(module.student, module.teacher)
        request = replace(objective.request, vocab_size=shared)
        if max(request.top_k, request.behavior_top_k) > shared:
            raise MissingTargetsError(f"has more tokens in its support than the vocabulary, which has {shared}")
        module.objective, module.collector = objective, module.collector.asking(request)
        try:
            yield request
        finally:
            module.objective, module.collector = kept

    def _replayed(self, record: RecordedStep, objective: str, run: Tensor | None = None) -> tuple[ReplayedStep, Tensor]:
        """Return a step under the module's objective, and its ungated gradient.

        Args:
            record: with the targets of the objective; its weights are loaded.
            objective: its name.
            run: ungated gradient of the run's own objective; None for that objective itself.
        """
        module, facts = self._module, record.facts
        # Computed here if the run has not computed the teacher's entropy.
        served = {"teacher_logprobs", "position_losses", "entropy", "teacher_entropy", "divergence", "age"}
        batches = record.batches
        if all(b.rollouts.correct is not None for b in batches):
            served.add("correct")
        if all(b.rollouts.behavior_support_ids is not None and b.targets.log_normalizer is not None for b in batches):
            served.add("compatible_mass")
        variants, skipped = expand(self._grid, module.gate, module.student.tokenizer, served)
        self.skipped |= skipped
        own = next(v for v, variant in enumerate(variants) if variant.own)
        scored = self._batches(record, entropy=any("teacher_entropy" in v.strategy.needs for v in variants))
        gradients = StepGradients(module, scored, facts.step, self._autocast, reuse_epoch=facts.reuse_epoch)
        # The gates are normalised over the whole step.
        inputs = gradients.inputs
        joined = join_gate_inputs(inputs) if len(inputs) > 1 else inputs[0]
        gates = [split_gates(variant.strategy(joined), inputs) for variant in variants]
        weights = [torch.stack([parts[place].weights for parts in gates]) for place in range(len(inputs))]
        # Summed in float32, as the log sums them.
        losses = [float(torch.tensor(gradients.losses([w[v] for w in weights])).sum()) for v in range(len(variants))]
        references = self._references(record)
        ungated = gradients.gradient()
        run = ungated if run is None else run
        others = torch.cat([*references.values(), run[None]])
        products = gradient_products(gradients, weights, others, self._config.tolerance)
        comparisons, ceilings = compare(products, references, run)
        valid = torch.cat([w[:, part.mask.bool()] for w, part in zip(weights, inputs, strict=True)], dim=1)
        known: Row = {
            **{"step": record.number, "age": record.age, "reuse_epoch": facts.reuse_epoch},
            "objective": objective,
        }
        step = ReplayedStep(
            number=record.number,
            age=record.age,
            recorded_loss=facts.loss,
            replayed_loss=losses[own],
            recorded_norm=facts.gradient_norm,
            replayed_norm=float(gradients.gradient([w[own] for w in weights]).double().norm()),
            ceilings=ceilings,
            rows=[
                known | {name: getattr(variant, name) for name in (*KEYS, "own")} | distribution | {"loss": loss} | more
                for variant, distribution, loss, more in zip(
                    variants, weight_metrics(valid), losses, comparisons, strict=True
                )
            ],
            sample_sizes=_sample_sizes(variants, joined),
            num_backward=products.num_backward,
        )
        return step, ungated

    def _batches(self, record: RecordedStep, *, entropy: bool) -> list[RecordedBatch]:
        """Return the micro-batches of a step, with the teacher's entropy if it is needed."""
        batches = []
        for batch in record.batches:
            targets = batch.targets
            if entropy and targets.entropy is None:
                again = self._module.teacher.score(batch.rollouts, TeacherRequest(entropy=True))
                targets = replace(targets, entropy=again.entropy)
            batches.append(replace(batch, targets=targets))
        return batches

    def _references(self, record: RecordedStep) -> dict[str, Tensor]:
        """Return gradients on fresh rollouts, [J, P], by the name of the reference."""
        config, seed = self._config, self._config.seed
        wanted = {"fresh": [recorded_prompts(record, self._module.teacher.names)] * config.draws}
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


def _sample_sizes(variants: Sequence[Variant], inputs: GateInputs) -> dict[str, list[float]]:
    """Return effective sample sizes over a range of taus, of every gate with a tau, with the paper's options."""
    valid, found = inputs.mask.bool(), {}
    gates = {v.gate: v.strategy for v in variants if v.tau is not None}
    for name, gate in gates.items():
        assert isinstance(gate, DriftGate)
        each = copy.copy(gate)
        each.statistic, each.normalization = "signed_mean", Normalization()
        weights = []
        for tau in PLOTTED_TAUS:
            each.tau = tau
            weights.append(each(inputs).weights[valid].double())
        found[name] = effective_sample_size(torch.stack(weights)).tolist()
    return found


def compare(products: Products, references: Mapping[str, Tensor], run: Tensor) -> tuple[list[Row], dict[str, float]]:
    """Return cosines and norms of every gate's gradient, and the ceiling of each reference.

    Args:
        products: of every gate; the first gate is the ungated one.
        references: by name, [J, P]; ``products`` has them in this order, after the ungated gradient.
        run: ungated gradient of the run's own objective, [P]; the last one in ``products``.

    Returns:
        A row for each gate, None where a gradient is zero; and by reference the mean cosine between two of its J
        gradients.
    """
    norms, ceilings = products.squares.sqrt(), {}
    columns = {
        "gradient_norm": norms,
        "ungated_norm_ratio": norms / norms[0],
        "ungated_cosine": (products.references[:, 0] / (norms * norms[0])).clamp(max=1),
        "run_cosine": (products.references[:, -1] / (norms * run.double().norm().cpu())).clamp(max=1),
    }
    start = 1
    for name, fresh in references.items():
        among, count = inner_products(fresh, fresh), len(fresh)
        lengths = among.diagonal().sqrt()
        units = lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
        between = among / units / units[:, None]
        ceilings[name] = float((between.sum() - between.trace()) / (count * (count - 1)))
        cosines = products.references[:, start : start + count] / (norms[:, None] * lengths)  # [V, J]
        change = cosines - cosines[0]
        start += count
        for part, values in (("cosine", cosines), ("change", change)):
            columns |= {
                f"{name}_{part}": values.mean(1),
                f"{name}_{part}_se": values.std(1) / math.sqrt(count),
            }
        columns[f"{name}_norm_ratio"] = norms / lengths.mean()
        columns[f"{name}_ceiling"] = torch.full_like(norms, ceilings[name])
    return _rows(columns), ceilings


def effective_sample_size(weights: Tensor) -> Tensor:
    """Return ``(sum w)^2 / (N * sum w^2)`` of [V, N] weights: the effective share of the positions."""
    return weights.sum(1).square() / (weights.shape[1] * weights.square().sum(1))


def weight_metrics(weights: Tensor) -> list[Row]:
    """Return the distribution of each gate's weights.

    Args:
        weights: [V, N].

    Example:
        >>> row = weight_metrics(torch.tensor([[0.5, 1.5]]))[0]
        >>> row["weight_mean"], row["effective_sample_size"], row["weight_q50"]
        (1.0, 0.8, 1.0)
    """
    wide = weights.double().cpu()
    # numpy, because torch.quantile takes at most 2^24 numbers
    quantiles = torch.from_numpy(np.quantile(wide.numpy(), QUANTILES, axis=1))
    columns = {
        "weight_min": wide.amin(1),
        **{f"weight_q{round(100 * q):02d}": values for q, values in zip(QUANTILES, quantiles, strict=True)},
        "weight_max": wide.amax(1),
        "weight_mean": wide.mean(1),
        "weight_std": wide.std(1, correction=0),
        "effective_sample_size": effective_sample_size(wide),
    }
    return _rows(columns)


def _rows(columns: Mapping[str, Tensor]) -> list[Row]:
    """Return a row for each gate; numbers that are not finite become None."""
    table = torch.stack(list(columns.values()), dim=1).tolist()
    return [{name: v if math.isfinite(v) else None for name, v in zip(columns, row, strict=True)} for row in table]
