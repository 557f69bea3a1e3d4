"""Tester for objectives: the laws that every objective obeys, built-in or third-party.

Shapes: B rollouts, T response tokens, N valid positions, V vocabulary, H the student's hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from opdlab.errors import require
from opdlab.objectives import Objective, PositionLosses
from opdlab.registry import suggestion
from opdlab.scoring import head as scoring_head
from opdlab.testing.laws import NO_PATH, Law, LawTester, check, check_equal, class_path, law, yaml_copy
from opdlab.testing.objective_batch import Batch, States, WatchedTargets, make_batch, requested


class ObjectiveTester(LawTester):
    """Checks that an objective obeys the contract of :class:`opdlab.objectives.Objective`.

    Call :meth:`run` for all laws, which prints a line for each, or parametrize a test over :meth:`laws`. A law that
    does not apply to an objective is left out if :attr:`~opdlab.objectives.Objective.inapplicable_laws` names it with
    the reason. No model is loaded: ``setup`` receives a student and a teacher that are only a vocabulary and a head.

    Args:
        make_objective: builds the objective; called several times.
        init_args: constructor arguments as in a configuration file; None takes them from the attributes of the same
            names.
        num_tokens: T of the batch, at least 4.
        vocab_size: V; it must be at least the objective's K.
        seed: seed of the random batch.

    Example:
        >>> from opdlab.objectives import SampledTokenOPD
        >>> ObjectiveTester(lambda: SampledTokenOPD(estimator="nll")).run()
        passed    masked_positions_have_no_loss
        ...
        passed    yaml_round_trip
        left out  zero_loss_at_equality: the likelihood rises further ...
        left out  zero_gradient_at_equality: the likelihood rises ...
        SampledTokenOPD: 12 laws passed, 2 left out
        >>> class Shifted(SampledTokenOPD):
        ...     def position_losses(self, student, rollouts, targets):
        ...         positions = super().position_losses(student, rollouts, targets)
        ...         return replace(positions, losses=positions.losses + rollouts.mask)
        >>> ObjectiveTester(Shifted).zero_loss_at_equality()
        Traceback (most recent call last):
        ...
        AssertionError: law 'zero_loss_at_equality' does not hold for Shifted(...): the loss at row 0, column 0: ...
    """

    def __init__(
        self,
        make_objective: Callable[[], Objective],
        *,
        init_args: Mapping[str, Any] | None = None,
        num_tokens: int = 7,
        vocab_size: int = 40,
        seed: int = 0,
    ) -> None:
        self._build(make_objective, "ObjectiveTester", "make_objective", "MyObjective(k=8)")
        self._make_objective, self._init_args = make_objective, init_args
        require(num_tokens >= 4, f"num_tokens is {num_tokens}, but must be at least 4")
        request = make_objective().request
        k = max(request.top_k, request.behavior_top_k)
        require(k <= vocab_size, f"vocab_size is {vocab_size}, but the objective asks for {k} tokens: raise it")
        self._states = States.random(num_tokens, vocab_size, seed)

    def subject(self) -> Objective:
        """Return the objective that messages name."""
        return self._make_objective()

    def laws(self) -> list[tuple[str, Law]]:
        """Return (name, law) for each law that applies; a law is called without arguments and raises if broken.

        ``yaml_round_trip`` is skipped for a class without an importable path, such as one defined inside a function or
        in a notebook.

        Raises:
            UsageError: the objective declares a law that does not exist.
        """
        skipped, every = self.left_out(), super().laws()
        names = [name for name, _ in every]
        for name in skipped:
            require(
                name in names,
                f"{type(self.subject()).__name__}.inapplicable_laws names '{name}', which is no law"
                f"{suggestion(name, names) or ';'} laws: {', '.join(names)}",
            )
        return [(name, each) for name, each in every if name not in skipped]

    def left_out(self) -> dict[str, str]:
        """Return the laws that do not apply, each with the reason."""
        objective = self.subject()
        without_path = {} if class_path(type(objective)) else {"yaml_round_trip": NO_PATH}
        return {**objective.inapplicable_laws, **without_path}

    def objective(self, batch: Batch) -> Objective:
        """Return a new objective after ``setup``."""
        return _set_up(self._make_objective(), batch)

    def batch(self, states: States | None = None, dtype: torch.dtype = torch.float32) -> Batch:
        """Return the batch for the laws: five rollouts, full, short, with holes, of one token, and empty."""
        objective = self._make_objective()
        return make_batch(states or self._states, objective.request, objective.needs, dtype)

    @law
    def zero_loss_at_equality(self) -> None:
        """Check that every loss is 0 if student, snapshot and teacher are the same."""
        batch, positions = self._applied(self._states.equal())
        losses = positions.losses.detach().where(batch.rollouts.mask, 0.0)
        check_equal("the loss", losses, torch.zeros_like(losses), tolerance=2e-5)

    @law
    def zero_gradient_at_equality(self) -> None:
        """Check that no hidden state takes a gradient if student, snapshot and teacher are the same."""
        batch, positions = self._applied(self._states.equal())
        gradient = _gradient(batch, positions.losses.sum())
        check_equal("the gradient of hidden states", gradient, torch.zeros_like(gradient), tolerance=2e-4)

    @law
    def masked_positions_have_no_loss(self) -> None:
        """Check that the loss is 0 at masked positions."""
        batch, positions = self._applied()
        behind = positions.losses.detach().masked_fill(batch.rollouts.mask, 0.0)
        check_equal("the loss behind the mask", behind, torch.zeros_like(behind))

    @law
    def garbage_behind_the_mask_has_no_influence(self) -> None:
        """Check that values at masked positions change neither loss nor gradient at valid ones."""
        batch = self.batch()
        expected = self._valid(batch, batch.rollouts, batch.targets)
        mask = batch.rollouts.mask

        def soiled(tensor: Tensor) -> Tensor:
            if tensor.shape[:2] != mask.shape or tensor.dtype == torch.bool:
                return tensor
            hidden = (~mask).view(*mask.shape, *[1] * (tensor.dim() - 2))
            # Unsigned integers have no `where` of their own.
            return (
                torch.where(hidden, torch.ones((), dtype=torch.int64), tensor.long()).to(tensor.dtype)
                if (not tensor.is_floating_point())
                else tensor.masked_fill(hidden, -7.0)
            )

        seen = self._valid(self.batch(), batch.rollouts.map(soiled), batch.targets.map(soiled))
        self._compare("with other values behind the mask, ", seen, expected)

    @law
    def positions_are_independent(self) -> None:
        """Check that a position's loss has no gradient at the hidden state of another position."""
        batch, positions = self._applied()
        mask = batch.rollouts.mask
        for parity in (0, 1):
            chosen = torch.arange(int(mask.sum())) % 2 == parity
            gradient = _gradient(batch, positions.losses[mask][chosen].sum())
            others = gradient[~chosen]
            check_equal("the gradient at other positions", others, torch.zeros_like(others))

    @law
    def rows_are_independent(self) -> None:
        """Check that a rollout has the same losses in another order and alone."""
        batch = self.batch()
        expected = self._by_row(batch)
        order = torch.tensor([3, 0, 4, 2, 1])
        permuted = self._by_row(self.batch(self._states.rows(order)))
        for place, row in enumerate(order.tolist()):
            check_equal(f"in another order, losses of row {row}", permuted[place], expected[row], tolerance=1e-5)
            alone = self._by_row(self.batch(self._states.rows(torch.tensor([row]))))
            check_equal(f"alone, losses of row {row}", alone[0], expected[row], tolerance=1e-5)

    @law
    def padding_invariance(self) -> None:
        """Check that more padding of prompts and responses changes neither loss nor gradient."""
        batch = self.batch()
        wider = self.batch(self._states.padded(5))
        seen, expected = (self._valid(each, each.rollouts, each.targets) for each in (wider, batch))
        self._compare("with more padding, ", seen, expected)

    @law
    def tiling_invariance(self) -> None:
        """Check that the size of the tiles in which logits are computed changes neither loss nor gradient."""
        batch = self.batch()
        expected = self._valid(batch, batch.rollouts, batch.targets)
        with _small_tiles(64):
            tiled = self.batch()
            seen = self._valid(tiled, tiled.rollouts, tiled.targets)
        self._compare("with tiles of 64 logits, ", seen, expected)

    @law
    def extreme_logits_are_finite(self) -> None:
        """Check that loss and gradient are finite for logits up to thousands, one token, and no valid position."""
        empty = replace(self._states, mask=torch.zeros_like(self._states.mask))
        cases = {
            "logits up to thousands: ": self._states.scaled(1e3),
            "a student like the teacher, logits up to thousands: ": self._states.equal().scaled(1e3),
            "logits of 0: ": self._states.scaled(0.0),
            "one token: ": self._states.first_token(),
            "no valid position: ": empty,
        }
        for case, states in cases.items():
            batch = self.batch(states)
            losses, gradient = self._valid(batch, batch.rollouts, batch.targets)
            for what, value in (("losses", losses), ("the gradient of hidden states", gradient)):
                check(bool(value.isfinite().all()), f"{case}{what}: {value[~value.isfinite()][:1].tolist()}")

    @law
    def float64_agreement(self) -> None:
        """Check that float32 gives the losses and gradients of float64."""
        wide, batch = self.batch(dtype=torch.float64), self.batch()
        expected = self._valid(wide, wide.rollouts, wide.targets)
        self._compare("in float32, ", self._valid(batch, batch.rollouts, batch.targets), expected, tolerance=1e-4)

    @law
    def outputs_are_well_formed(self) -> None:
        """Check shapes, that only losses carry a graph, and log-probabilities and entropy against a plain softmax."""
        batch, positions = self._applied()
        mask, log_p = batch.rollouts.mask, batch.reference
        outputs = {"losses": positions.losses, "logprobs": positions.logprobs, "entropy": positions.entropy}
        for name, value in {**outputs, **positions.metrics}.items():
            check(value.shape == mask.shape, f"{name} has the shape {list(value.shape)} and not {list(mask.shape)}")
            check(value.requires_grad == (name == "losses"), f"{name}.requires_grad is {value.requires_grad}")
        sampled = log_p.gather(1, batch.scored.tokens[:, None])
        check_equal("logprobs", positions.logprobs[mask][:, None], sampled, tolerance=1e-4)
        entropy = -(log_p.exp() * log_p).sum(1, keepdim=True)
        check_equal("entropy", positions.entropy[mask][:, None], entropy, tolerance=1e-4)

    @law
    def reads_what_it_asks_of_the_teacher(self) -> None:
        """Check that the objective reads the targets that it requests, and no others."""
        batch = self.batch()
        objective, watched = self.objective(batch), WatchedTargets.of(batch.targets)
        objective.position_losses(batch.scored, batch.rollouts, watched)
        parts = requested(objective.request)
        extra = watched.read - frozenset[str]().union(*parts.values())
        check(not extra, f"it reads {', '.join(sorted(extra))}, which its request does not ask for")
        for part, names in parts.items():
            check(
                part == "logprobs" or bool(names & watched.read), f"its request asks for {part}, which it never reads"
            )

    @law
    def inputs_are_not_modified(self) -> None:
        """Check that the objective modifies neither rollouts nor targets."""
        batch = self.batch()
        before = [value.state_dict() for value in (batch.rollouts.map(torch.clone), batch.targets.map(torch.clone))]
        self.objective(batch).position_losses(batch.scored, batch.rollouts, batch.targets)
        for state, value in zip(before, (batch.rollouts, batch.targets), strict=True):
            for name, tensor in state.items():
                same = not isinstance(tensor, Tensor) or torch.equal(tensor, getattr(value, name))
                check(same, f"{name} has changed after the call")

    @law
    def yaml_round_trip(self) -> None:
        """Check that an objective written to YAML and read again gives the same losses."""
        objective = self._make_objective()
        arguments = self._init_args
        if arguments is None:
            keys = ArgumentParser().add_class_arguments(type(objective), "objective", fail_untyped=False)
            names = [key.removeprefix("objective.") for key in keys]
            missing = ", ".join(name for name in names if not hasattr(objective, name))
            check(not missing, f"no attribute holds the argument {missing}: store it, or give init_args")
            arguments = {name: getattr(objective, name) for name in names}
        copy, text = yaml_copy(objective, Objective, arguments)
        batch, expected = self._applied()
        seen = _set_up(copy, batch).position_losses(self.batch().scored, batch.rollouts, batch.targets)
        check_equal(f"after a round trip through {text!r}, losses", seen.losses.detach(), expected.losses.detach())

    def _applied(self, states: States | None = None) -> tuple[Batch, PositionLosses]:
        """Return a batch, and an objective's output for it."""
        batch = self.batch(states)
        return batch, self.objective(batch).position_losses(batch.scored, batch.rollouts, batch.targets)

    def _valid(self, batch: Batch, rollouts: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return losses of the valid positions, [N, 1], and the gradient of their hidden states, [N, H]."""
        losses = self.objective(batch).position_losses(batch.scored, rollouts, targets).losses[batch.rollouts.mask]
        return losses.detach()[:, None], _gradient(batch, losses.sum())

    def _by_row(self, batch: Batch) -> list[Tensor]:
        """Return the losses of each rollout's valid positions, [n, 1] each."""
        losses, _ = self._valid(batch, batch.rollouts, batch.targets)
        return list(losses.split_with_sizes(batch.rollouts.num_tokens.tolist()))

    @staticmethod
    def _compare(
        case: str, seen: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-5
    ) -> None:
        check_equal(f"{case}losses of valid positions", seen[0], expected[0], tolerance)
        check_equal(f"{case}the gradient of hidden states", seen[1], expected[1], tolerance)


def _set_up(objective: Objective, batch: Batch) -> Objective:
    objective.setup(batch.student, batch.teacher)
    return objective


def _gradient(batch: Batch, loss: Tensor) -> Tensor:
    """Return the gradient of the hidden states, [N, H]; 0 if the loss does not depend on them."""
    (gradient,) = torch.autograd.grad(loss, batch.scored.hidden, retain_graph=True, allow_unused=True)
    return torch.zeros_like(batch.scored.hidden) if gradient is None else gradient


@contextmanager
def _small_tiles(num_logits: int) -> Iterator[None]:
    """Compute logits in tiles of so many, inside the context."""
    before = scoring_head.MAX_TILE_LOGITS
    scoring_head.MAX_TILE_LOGITS = num_logits
    try:
        yield
    finally:
        scoring_head.MAX_TILE_LOGITS = before
