"""The laws of objectives: every registered one obeys them, and each law refuses an objective that breaks it alone."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, get_args

import pytest
import torch

from opdlab.errors import UsageError
from opdlab.objectives import (
    FullDivergence,
    Objective,
    SampledTokenOPD,
    SupportDivergence,
    TeacherTopK,
    build_objective,
    objective_names,
)
from opdlab.objectives.functional import Divergence, Tail
from opdlab.objectives.support_divergence import Support
from opdlab.scoring import head as scoring_head
from opdlab.testing import ObjectiveTester
from opdlab.types import TeacherRequest

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "teacher_topk": TeacherTopK,
    "teacher_topk of all": partial(TeacherTopK, k=40),
    "sampled_token": SampledTokenOPD,
    "current": partial(SampledTokenOPD, reference="current", clip=None),
    "clamp": partial(SampledTokenOPD, shape="clamp", advantage_clamp=0.5),
    "signed_log": partial(SampledTokenOPD, shape="signed_log"),
    "power": partial(SampledTokenOPD, shape="power", power=0.5),
    "support_kl": partial(SampledTokenOPD, baseline="support_kl", k=4),
    "reward": partial(SampledTokenOPD, reward_weight=0.5, reward_scaled=True),
    **{name: partial(SampledTokenOPD, estimator=name) for name in ("k2", "k3", "abs", "nll")},
}
for divergence in get_args(Divergence):
    OBJECTIVES[f"full {divergence}"] = partial(FullDivergence, divergence, beta=0.3)
    for support, tail in product(get_args(Support), get_args(Tail)):
        OBJECTIVES[f"{divergence} {support} {tail}"] = partial(SupportDivergence, divergence, support, tail, k=4)
CASES = [(name, law) for name, make in OBJECTIVES.items() for law, _ in ObjectiveTester(make).laws()]


@pytest.mark.parametrize(("name", "law"), CASES, ids=[f"{name}-{law}" for name, law in CASES])
def test_laws(name: str, law: str) -> None:
    getattr(ObjectiveTester(OBJECTIVES[name]), law)()


def test_every_registered_objective_is_tested() -> None:
    tested = {type(make()) for make in OBJECTIVES.values()}
    built_in = [name for name in objective_names() if type(build_objective(name)).__module__.startswith("opdlab.")]
    assert {type(build_objective(name)) for name in built_in} == tested


# -- one broken objective a law ----------------------------------------------------------------------------------------


class Broken(TeacherTopK):
    """LSM with a change of its losses."""

    def __init__(self, k: int = 4) -> None:
        super().__init__(k)

    def changed(self, losses: Any, student: Any, rollouts: Any, targets: Any) -> Any:
        return losses

    def position_losses(self, student: Any, rollouts: Any, targets: Any) -> Any:
        positions = super().position_losses(student, rollouts, targets)
        return replace(positions, losses=self.changed(positions.losses, student, rollouts, targets))


class Shifted(Broken):
    def changed(self, losses: Any, student: Any, rollouts: Any, targets: Any) -> Any:
        return losses + rollouts.mask


class Entropic(Broken):
    """A gradient of a value that is always 0, as a detached term leaves it."""

    def changed(self, losses: Any, student: Any, rollouts: Any, targets: Any) -> Any:
        logprobs = student.padded(student.statistics().logprobs)
        return losses + logprobs - logprobs.detach()


class Unmasked(Broken):
    def changed(self, losses: Any, student: Any, rollouts: Any, targets: Any) -> Any:
        return losses + (~rollouts.mask).float()


class Peeking(Broken):
    def changed(self, losses: Any, student: Any, rollouts: Any, targets: Any) -> Any:
        behind = rollouts.tokens.masked_fill(rollouts.mask, 0).sum(1, keepdim=True)
        return losses * (1 + behind)


class Entangled(Broken):
    def changed(self, losses: Any, student: Any, rollouts: Any, targets: Any) -> Any:
        return (losses + losses.mean(1, keepdim=True) * losses.shape[1] / 10) * rollouts.mask


class Widened(Broken):
    def changed(self, losses: Any, student: Any, rollouts: Any, targets: Any) -> Any:
        return losses * losses.shape[1]


class Ranked(Broken):
    def changed(self, losses: Any, student: Any, rollouts: Any, targets: Any) -> Any:
        return losses * torch.arange(1, len(losses) + 1, dtype=losses.dtype)[:, None]


class Tiled(Broken):
    def changed(self, losses: Any, student: Any, rollouts: Any, targets: Any) -> Any:
        return losses * len(list(scoring_head.tiles(5, student.head)))


class Overflowing(Broken):
    def changed(self, losses: Any, student: Any, rollouts: Any, targets: Any) -> Any:
        log_ratio = targets.logprobs - student.padded(student.statistics().logprobs)
        return losses + (log_ratio.exp() - 1 - log_ratio) * rollouts.mask


class Rounded(Broken):
    def changed(self, losses: Any, student: Any, rollouts: Any, targets: Any) -> Any:
        return (losses + 2.0**14) - 2.0**14


class Undetached(Broken):
    def position_losses(self, student: Any, rollouts: Any, targets: Any) -> Any:
        positions = super().position_losses(student, rollouts, targets)
        return replace(positions, logprobs=student.padded(student.statistics().logprobs))


class InBits(Broken):
    def position_losses(self, student: Any, rollouts: Any, targets: Any) -> Any:
        positions = super().position_losses(student, rollouts, targets)
        return replace(positions, entropy=positions.entropy / torch.tensor(2.0).log())


class Greedy(Broken):
    """Reads the teacher's entropy without asking for it."""

    def changed(self, losses: Any, student: Any, rollouts: Any, targets: Any) -> Any:
        return losses if targets.entropy is None else losses * targets.entropy


class Wasteful(Broken):
    """Asks for the teacher's entropy without reading it."""

    @property
    def request(self) -> TeacherRequest:
        return replace(super().request, entropy=True)


class InPlace(Broken):
    def changed(self, losses: Any, student: Any, rollouts: Any, targets: Any) -> Any:
        rollouts.behavior_logprobs.add_(1.0)
        return losses


class Forgetful(Broken):
    def __init__(self, k: int = 4, scale: float = 1.0) -> None:
        super().__init__(k)
        self._scale = scale


BROKEN = {
    Shifted: "zero_loss_at_equality",
    Entropic: "zero_gradient_at_equality",
    Unmasked: "masked_positions_have_no_loss",
    Peeking: "garbage_behind_the_mask_has_no_influence",
    Entangled: "positions_are_independent",
    Ranked: "rows_are_independent",
    Widened: "padding_invariance",
    Tiled: "tiling_invariance",
    Overflowing: "extreme_logits_are_finite",
    Rounded: "float64_agreement",
    Undetached: "outputs_are_well_formed",
    InBits: "outputs_are_well_formed",
    Greedy: "reads_what_it_asks_of_the_teacher",
    Wasteful: "reads_what_it_asks_of_the_teacher",
    InPlace: "inputs_are_not_modified",
    Forgetful: "yaml_round_trip",
}


def test_every_law_has_an_objective_that_breaks_it() -> None:
    assert set(BROKEN.values()) == {name for name, _ in ObjectiveTester(Broken).laws()}


@pytest.mark.parametrize("objective", BROKEN, ids=lambda cls: cls.__name__)
def test_a_broken_objective_is_refused_by_exactly_its_law(objective: type[Broken]) -> None:
    broken = {}
    for name, law in ObjectiveTester(objective).laws():
        try:
            law()
        except AssertionError as error:
            broken[name] = str(error)
    assert list(broken) == [BROKEN[objective]], broken
    assert broken[BROKEN[objective]].startswith(f"law '{BROKEN[objective]}' does not hold for {objective.__name__}(k=4")


def test_what_the_messages_say() -> None:
    with pytest.raises(AssertionError, match=r"the loss at row 0, column 0: .* instead of 0\.0"):
        ObjectiveTester(Shifted).run()
    with pytest.raises(AssertionError, match="it reads entropy, which its request does not ask for"):
        ObjectiveTester(Greedy).reads_what_it_asks_of_the_teacher()
    with pytest.raises(AssertionError, match="its request asks for entropy, which it never reads"):
        ObjectiveTester(Wasteful).reads_what_it_asks_of_the_teacher()
    with pytest.raises(AssertionError, match="no attribute holds the argument scale: store it, or give init_args"):
        ObjectiveTester(Forgetful).yaml_round_trip()


# -- laws that do not apply --------------------------------------------------------------------------------------------


def test_laws_that_do_not_apply_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    tester = ObjectiveTester(partial(SampledTokenOPD, estimator="abs"))
    assert "zero_gradient_at_equality" not in dict(tester.laws())
    tester.run()
    *lines, left_out, last = capsys.readouterr().out.splitlines()
    assert lines == [f"passed    {name}" for name, _ in tester.laws()]
    assert left_out.startswith("left out  zero_gradient_at_equality: the abs")
    assert last == f"SampledTokenOPD: {len(lines)} laws passed, 1 left out"


def test_an_unknown_law_is_refused() -> None:
    class Misspelt(TeacherTopK):
        inapplicable_laws = {"zero_los_at_equality": "it is positive"}  # noqa: RUF012

    words = "Misspelt.inapplicable_laws names 'zero_los_at_equality', which is no law; did you mean 'zero_loss_at_equ"
    with pytest.raises(UsageError, match=re.escape(words)):
        ObjectiveTester(lambda: Misspelt(k=4)).laws()


def test_wrong_calls_are_named() -> None:
    with pytest.raises(UsageError, match="vocab_size is 40, but the objective asks for 64 tokens: raise it"):
        ObjectiveTester(lambda: TeacherTopK(k=64))
    with pytest.raises(UsageError, match="num_tokens is 2, but must be at least 4"):
        ObjectiveTester(TeacherTopK, num_tokens=2)

    def needy(k: int) -> Objective:
        return TeacherTopK(k)

    with pytest.raises(UsageError, match="calls make_objective without arguments, which fails"):
        ObjectiveTester(needy)  # type: ignore[arg-type]
