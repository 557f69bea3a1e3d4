"""A recorded step under every gate and objective: weights, losses, gradients.

Shapes: V gates, N valid positions of the step, J fresh draws, P trained parameters.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from opdlab.errors import UsageError, first_line, require
from opdlab.module import OPDModule
from opdlab.objectives import Objective
from opdlab.replay.comparison import ReplayedStep, Row, compare, sample_sizes, weight_metrics
from opdlab.replay.fresh import Draws, Sampling, sampled_draws
from opdlab.replay.objectives import chosen_objectives
from opdlab.replay.parts import part_rows, token_kinds
from opdlab.replay.plugins import Named
from opdlab.replay.record import RecordedBatch, RecordedStep
from opdlab.replay.step_gradients import LEAST_TOLERANCE, Autocast, StepGradients, gradient_products
from opdlab.replay.targets import MissingTargetsError, gives_entropy, with_entropy, with_targets
from opdlab.replay.variants import KEYS, Grid, Variant, expand, has_papers_form
from opdlab.training import join_gate_inputs, split_gates
from opdlab.types import Prompt, TeacherRequest
from opdlab.verifiers.verifier import Verifier


@dataclass(frozen=True)
class ReplayConfig(Sampling):
    """References for the gated gradients, and the precision of the comparison.

    Args:
        draws: J, independent batches of fresh rollouts per step, at least 2.
        seed: of the sampling.
        other_prompts: also compare with fresh rollouts of other prompts.
        tolerance: of gates that share backward passes, see :func:`opdlab.replay.step_gradients.mixtures`; with 0 each
            gate has its own.
        parts: also divide weights and gradients by position and kind of token, see :mod:`opdlab.replay.parts`, for
            gates of the paper's form; some ten backward passes for each of them.

    Raises:
        UsageError: a value is out of range.
    """

    tolerance: float = 0.01
    parts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.tolerance == 0 or LEAST_TOLERANCE <= self.tolerance < 1,
            f"--tolerance is {self.tolerance}, but must be 0, or at least {LEAST_TOLERANCE} and below 1",
        )


class Replayer:
    """Replays recorded steps.

    Args:
        module: built from the run's configuration, on its device; its student takes each record's weights.
        grid: the gates.
        config: see :class:`ReplayConfig`.
        autocast: context of forward passes, the run's precision.
        prompts: the run's training prompts; required for fresh rollouts of other prompts, and with a verifier.
        objectives: replayed besides the run's own: registered names, class paths, or objectives with options.
        draws: returns the fresh rollouts of a step, whose weights the student has; None samples them.
        verifier: checks fresh rollouts, for objectives that read verdicts.

    Raises:
        UsageError: the run's teacher follows the student, or an objective is unknown.
    """

    def __init__(
        self,
        module: OPDModule,
        grid: Grid,
        config: ReplayConfig,
        autocast: Autocast,
        prompts: Sequence[Prompt] = (),
        objectives: Sequence[str | Named[Objective]] = (),
        draws: Callable[[RecordedStep], Draws] | None = None,
        verifier: Verifier | None = None,
    ) -> None:
        self._module, self._grid, self._config, self._autocast = module, grid, config, autocast
        prepare(module)
        self._draws: Callable[[RecordedStep], Draws] = draws or partial(
            sampled_draws, module, sampling=config, prompts=prompts, autocast=autocast, verifier=verifier
        )
        self._own, *self._others = chosen_objectives(objectives, module.objective)
        self._kinds = token_kinds(module.student.tokenizer) if config.parts else None
        self.skipped: dict[str, str] = {}
        """Gates and objectives whose inputs a record lacks, with the reasons."""

    def replay(self, record: RecordedStep) -> ReplayedStep:
        """Replay one step under the run's own objective, and then under the others."""
        record.load_weights(self._module.student)
        draws = self._draws(record)
        step, ungated = self._replayed(record, draws, self._own.name)
        num_backward = step.num_backward
        for other in self._others:
            try:
                with self._asking(other.plugin) as request:
                    batches = self._served(record.batches, request, "its rollouts")
                    drawn = {
                        name: [self._served(draw, request, "its fresh rollouts") for draw in found]
                        for name, found in draws.items()
                    }
                    found, _ = self._replayed(replace(record, batches=batches), drawn, other.name, ungated)
            except (MissingTargetsError, UsageError) as error:
                known = isinstance(error, MissingTargetsError)
                self.skipped[other.name] = str(error) if known else f"cannot be replayed ({first_line(error)})"
                continue
            step.others[other.name] = [row | {"own": False} for row in found.rows]
            step.parts.extend(row | {"own": False} for row in found.parts)
            num_backward += found.num_backward
        return replace(step, num_backward=num_backward)

    def _served(
        self, batches: Sequence[RecordedBatch], request: TeacherRequest, named: str
    ) -> tuple[RecordedBatch, ...]:
        for need in self._module.objective.needs:
            if any(getattr(batch.rollouts, need) is None for batch in batches):
                raise MissingTargetsError(f"needs the verifier's verdicts ({need}), which {named} lack")
        return tuple(with_targets(self._module.teacher, batch, request) for batch in batches)

    @contextmanager
    def _asking(self, objective: Objective) -> Iterator[TeacherRequest]:
        """Give the module another objective inside the block, and return what that requests of the teacher."""
        module = self._module
        kept, shared = module.objective, module.student.vocab_size
        objective.setup(module.student, module.teacher)
        request = replace(objective.request, vocab_size=shared)
        if max(request.top_k, request.behavior_top_k) > shared:
            raise MissingTargetsError(f"has more tokens in its support than the vocabulary, which has {shared}")
        module.objective = objective
        try:
            yield request
        finally:
            module.objective = kept

    def _replayed(
        self, record: RecordedStep, draws: Draws, objective: str, run: Tensor | None = None
    ) -> tuple[ReplayedStep, Tensor]:
        """Return a step under the module's objective, and its ungated gradient.

        Args:
            record: with the targets of the objective; its weights are loaded.
            draws: fresh rollouts with the targets of the objective.
            objective: its name.
            run: ungated gradient of the run's own objective; None for that objective itself.
        """
        module, facts, batches = self._module, record.facts, record.batches
        variants = self._variants(batches, objective if run is not None else "")
        # Another objective may not compute what the run's gate needs. Its loss under that gate is of no interest.
        own = next((v for v, variant in enumerate(variants) if variant.own), None if run is None else 0)
        require(own is not None, f"the record lacks what the run's gate, {type(module.gate).__name__}, needs")
        assert own is not None
        if any("teacher_entropy" in variant.strategy.needs for variant in variants):
            vocab_size = module.student.vocab_size
            batches = tuple(with_entropy(module.teacher, batch, vocab_size) for batch in batches)
        gradients = StepGradients(module, batches, facts.step, self._autocast, reuse_epoch=facts.reuse_epoch)
        # The gates are normalised over the whole step.
        inputs = gradients.inputs
        joined = join_gate_inputs(inputs) if len(inputs) > 1 else inputs[0]
        gates = [split_gates(variant.strategy(joined), inputs) for variant in variants]
        weights = [torch.stack([parts[place].weights for parts in gates]) for place in range(len(inputs))]
        # Summed in float32, as the log sums them.
        losses = [float(torch.tensor(gradients.losses([w[v] for w in weights])).sum()) for v in range(len(variants))]
        references = {name: self._gradients(found, facts.step) for name, found in draws.items()}
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
        options = [{name: getattr(variant, name) for name in (*KEYS, "own")} for variant in variants]
        parts: list[Row] = []
        num_backward = products.num_backward
        if self._kinds is not None:
            chosen = [v for v, each in enumerate(options) if not v or each["own"] or has_papers_form(each)]
            of_chosen = [weight[chosen] for weight in weights]
            divided, more = part_rows(gradients, of_chosen, self._kinds, references["fresh"], self._config.tolerance)
            num_backward += more
            parts = [known | options[v] | row for v, rows in zip(chosen, divided, strict=True) for row in rows]
        step = ReplayedStep(
            number=record.number,
            age=record.age,
            recorded_loss=facts.loss,
            replayed_loss=losses[own],
            recorded_norm=facts.gradient_norm,
            replayed_norm=float(gradients.gradient([w[own] for w in weights]).double().norm()),
            ceilings=ceilings,
            rows=[
                known | gate | distribution | {"loss": loss} | more
                for gate, distribution, loss, more in zip(
                    options, weight_metrics(valid), losses, comparisons, strict=True
                )
            ],
            sample_sizes=sample_sizes(variants, joined),
            num_backward=num_backward,
            parts=parts,
        )
        return step, ungated

    def _variants(self, batches: Sequence[RecordedBatch], other: str) -> list[Variant]:
        """Return the gates whose inputs a step has; ``other`` is the objective's name unless it is the run's own."""
        module = self._module
        served = {"position_losses", "entropy", "divergence", "age"}
        if all(b.targets.known_logprobs is not None for b in batches):
            served.add("teacher_logprobs")
        # The teacher's entropy is computed if the run has not computed it.
        known = all(b.targets.entropy is not None or b.targets.hidden is not None for b in batches)
        if known or gives_entropy(module.teacher, batches[0].rollouts.temperature):
            served.add("teacher_entropy")
        if all(b.rollouts.correct is not None for b in batches):
            served.add("correct")
        if all(b.rollouts.behavior_support_ids is not None and b.targets.log_normalizer is not None for b in batches):
            served.add("compatible_mass")
        variants, skipped = expand(self._grid, module.gate, module.student.tokenizer, served)
        for name, reason in skipped.items():
            if self.skipped.get(name) != reason:
                self.skipped[f"{name} under {other}" if other else name] = reason
        return variants

    def _gradients(self, draws: Sequence[Sequence[RecordedBatch]], step: int) -> Tensor:
        """Return the ungated gradient of each draw, [J, P] float32."""
        found = (StepGradients(self._module, draw, step, self._autocast, behavior_known=False) for draw in draws)
        return torch.stack([each.gradient() for each in found])


def prepare(module: OPDModule) -> None:
    """Prepare a module for a replay on its device.

    Raises:
        UsageError: its teacher follows the student.
    """
    require(
        not module.teacher.follows_student,
        f"model.teacher is a {type(module.teacher).__name__} that follows the student, and records do not hold its "
        "weights, so fresh rollouts cannot be scored: replay a run whose teacher is frozen",
    )
    # autograd.grad returns the gradients; `.grad` stays unchanged.
    module.student.accumulate_head_grad = False
    module.teacher.to(module.device)
