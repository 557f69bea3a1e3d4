"""Divergences on a support, from the sampled buffer to every parameter's gradient."""

# mypy: disable-error-code="no-untyped-call"

import copy
import functools
import math
import re
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from opdlab.cli.memory_parts import estimate
from opdlab.cli.parsing import parse_fit
from opdlab.diagnostics import StepTrace
from opdlab.diagnostics.collapse import entropy_sums
from opdlab.errors import UsageError
from opdlab.gating import build_gate, gate_names
from opdlab.objectives import SupportDivergence, TeacherTopK, build_objective
from opdlab.objectives.functional import Divergence, Tail
from opdlab.objectives.support_divergence import Support
from opdlab.policies import BehaviorPolicy, LanguageModel, LocalTeacher, SamplingConfig, Scored, TeacherRequest
from opdlab.progress import Progress
from opdlab.rollouts import Collector, Pool
from opdlab.testing import ObjectiveTester
from opdlab.training import gate_inputs
from opdlab.types import Problem, Prompt, Rollouts, Targets
from tests.toy_run import STUDENT, TEACHER

DIVERGENCES, SUPPORTS, TAILS = get_args(Divergence), get_args(Support), get_args(Tail)
K, V = 4, 38
BETA, ALPHA = 0.3, 0.2
PROMPTS = [Prompt(i, Problem(str(i), "", None), tokens) for i, tokens in enumerate([(5, 6, 7), (9, 8), (7, 7, 5, 4)])]


@dataclass
class World:
    """A student in float64 that has left its snapshot, and a teacher."""

    student: LanguageModel
    teacher: LocalTeacher
    behavior: BehaviorPolicy
    logits: dict[str, Tensor]  # [N, V] of the valid positions, the student's with a graph, and the snapshot's before
    scored: Scored | None = None


@functools.cache
def world() -> World:
    student, teacher = LanguageModel(STUDENT), LocalTeacher(TEACHER)
    behavior = BehaviorPolicy(student, SamplingConfig(num_samples=2, temperature=0.9, max_new_tokens=9))
    student.double()
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(0.1 * parameter.detach().std() * noise)
    made = World(student, teacher, behavior, {})
    rollouts = pool_of(made, "teacher", tail=False).rollouts
    made.logits = {
        "student": plain_logits(student, rollouts),
        "behavior": plain_logits(behavior.policy, rollouts).detach(),
        "teacher": plain_logits(copy.deepcopy(teacher.model).double(), rollouts).detach(),
    }
    made.scored = student.score(rollouts)
    return made


def plain_logits(model: LanguageModel, rollouts: Rollouts) -> Tensor:
    """The logits of the valid positions at the sampling temperature, [N, V], one row at a time and without padding."""
    rows = []
    for row in range(len(rollouts)):
        prompt = rollouts.prompt_tokens[row][rollouts.prompt_mask[row]]
        response = rollouts.tokens[row][: int(rollouts.mask[row].nonzero().max()) + 1]
        logits = model.model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1, :V]
        rows.append(logits[rollouts.mask[row, : len(response)]] / rollouts.temperature)
    return torch.cat(rows)


def pool_of(world: World, support: Any, tail: bool) -> Pool:
    """Six rollouts of prompts of different lengths, some positions masked, with what the objective asks for."""
    objective = SupportDivergence(support=support, tail="bucket" if tail else "renormalize", k=K)
    request = replace(objective.request, entropy=True, vocab_size=V)
    return Collector(world.behavior, world.teacher, request, masked_first=(7,)).collect(PROMPTS, seed=3)


@functools.cache
def pool(support: str, tail: bool) -> Pool:
    return pool_of(world(), support, tail)


def plain_divergence(objective: SupportDivergence) -> Tensor:
    """The loss of every valid position, [N], from all logits: distributions over V outcomes and one more."""
    logits = world().logits
    inside = torch.zeros_like(logits["teacher"], dtype=torch.bool)
    for side in {"teacher": ["teacher"], "student": ["behavior"], "union": ["teacher", "behavior"]}[objective.support]:
        inside = inside.scatter(1, logits[side].topk(objective.k).indices, True)
    sides = []
    for z in (logits["student"], logits["teacher"]):
        p = z.softmax(1) * inside
        if objective.tail == "renormalize":
            p = p / p.sum(1, keepdim=True)
        if objective.tail == "bucket":
            p = torch.cat([p, (z.softmax(1) * ~inside).sum(1, keepdim=True)], dim=1)
        sides.append(p)
    counted = inside if objective.tail != "bucket" else torch.cat([inside, inside[:, :1] | True], dim=1)
    a, b = (side.where(counted, torch.ones_like(side)) for side in sides)  # log(1) = 0 outside

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum(1)

    mixed = {
        "reverse_kl": lambda: kl(a, b),
        "forward_kl": lambda: kl(b, a),
        "jsd": lambda: BETA * kl(b, (1 - BETA) * a + BETA * b) + (1 - BETA) * kl(a, (1 - BETA) * a + BETA * b),
        "skew_reverse_kl": lambda: kl(a, (1 - ALPHA) * b + ALPHA * a),
        "skew_forward_kl": lambda: kl(b, (1 - ALPHA) * a + ALPHA * b),
    }
    return mixed[objective.divergence]()


@pytest.mark.parametrize(("divergence", "support", "tail"), list(product(DIVERGENCES, SUPPORTS, TAILS)))
def test_losses_and_gradients_from_the_buffer_on(divergence: Any, support: Any, tail: Any) -> None:
    objective = SupportDivergence(divergence, support, tail, K, BETA, ALPHA)
    found, scored = pool(support, tail != "renormalize"), world().scored
    assert scored is not None
    positions = objective.position_losses(scored, found.rollouts, found.targets)
    ours, wanted = positions.losses[scored.mask], plain_divergence(objective)
    assert wanted.detach().abs().mean() > 1e-3
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)  # the teacher computes in float32
    assert not positions.losses[~scored.mask].any()
    factors = torch.linspace(-1, 2, len(ours), dtype=torch.float64)
    parameters = dict(world().student.named_parameters())
    gradients = [
        torch.autograd.grad((losses * factors).sum(), list(parameters.values()), retain_graph=True)
        for losses in (ours, wanted)
    ]
    for name, mine, plain in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()), msg=name)
    logprobs = world().logits["student"].detach().log_softmax(1)
    assert not positions.logprobs.requires_grad
    torch.testing.assert_close(positions.logprobs[scored.mask], logprobs.gather(1, scored.tokens[:, None])[:, 0])
    own = objective.own_logprobs(scored, found.rollouts, found.targets)
    assert torch.equal(own, positions.logprobs)  # from the same pass: no drift
    assert torch.equal(positions.losses, positions.divergence)  # type: ignore[arg-type]


@pytest.mark.parametrize(("divergence", "support", "tail"), list(product(DIVERGENCES, SUPPORTS, TAILS)))
def test_laws(divergence: Any, support: Any, tail: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ObjectiveTester(functools.partial(SupportDivergence, divergence, support, tail, K, BETA, ALPHA)).run()
    said = "left out  zero_gradient_at_equality: " in capsys.readouterr().out
    assert said == (tail == "drop" and divergence != "jsd")


@pytest.mark.parametrize("support", SUPPORTS)
def test_masses_and_overlap(support: Any) -> None:
    objective, found = SupportDivergence(support=support, k=K), pool(support, tail=True)
    made = world()
    assert made.scored is not None
    metrics = objective.position_losses(made.scored, found.rollouts, found.targets).metrics
    tops = {side: set_of(made.logits[side].detach().topk(K).indices) for side in ("teacher", "behavior")}
    inside = {"teacher": tops["teacher"], "student": tops["behavior"], "union": tops["teacher"] | tops["behavior"]}
    for side in ("teacher", "student"):
        mass = (made.logits[side].detach().softmax(1) * inside[support]).sum(1)
        torch.testing.assert_close(metrics[f"{side}_support_mass"][made.scored.mask].double(), mass, rtol=0, atol=1e-5)
    assert ("top1_agreement" in metrics) == (support != "student")
    if support != "student":
        first = {side: made.logits[side].detach().argmax(1) for side in ("teacher", "student")}
        agree = first["teacher"] == first["student"]
        assert torch.equal(metrics["top1_agreement"][made.scored.mask].bool(), agree)
        assert not agree.all()
    assert ("support_overlap" in metrics) == (support == "union")
    if support == "union":
        overlap = (tops["teacher"] & tops["behavior"]).sum(1) / K
        assert 0 < overlap.mean() < 1
        assert torch.equal(metrics["support_overlap"][made.scored.mask], overlap)
        assert not metrics["support_overlap"][~made.scored.mask].any()


def set_of(ids: Tensor) -> Tensor:
    return torch.zeros(len(ids), V, dtype=torch.bool).scatter(1, ids, True)


def test_the_whole_vocabulary_has_an_empty_tail() -> None:
    made = world()
    request = TeacherRequest(V, V, behavior_top_k=V, tail=True)
    found = Collector(made.behavior, made.teacher, request).collect(PROMPTS, seed=3)
    scored = made.student.score(found.rollouts)
    for tail in ("bucket", "drop"):
        losses = SupportDivergence(support="union", tail=tail, k=V).position_losses(scored, *parts(found)).losses
        z, q = plain_logits(made.student, found.rollouts), plain_logits(made.teacher.model, found.rollouts)
        full = (z.softmax(1) * (z.log_softmax(1) - q.log_softmax(1))).sum(1)
        torch.testing.assert_close(losses[scored.mask], full, rtol=1e-4, atol=1e-5)
        gradients = torch.autograd.grad(losses.sum(), list(made.student.parameters()), retain_graph=True)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def parts(found: Pool) -> tuple[Rollouts, Targets]:
    return found.rollouts, found.targets


def test_teacher_topk_is_a_named_case() -> None:
    named, found, scored = TeacherTopK(k=K), pool("teacher", tail=False), world().scored
    assert scored is not None
    case = SupportDivergence("reverse_kl", "teacher", "renormalize", K)
    assert named.request == case.request == TeacherRequest(top_k=K, logprobs=False)
    ours, theirs = (each.position_losses(scored, *parts(found)) for each in (named, case))
    assert torch.equal(ours.losses, theirs.losses)
    ids, of_teacher = found.targets.support_ids, found.targets.support_logits
    assert ids is not None
    assert of_teacher is not None
    logits, _ = scored.support_statistics(ids)  # LSM as the paper has it, bit for bit
    log_p, log_q = logits.log_softmax(-1), of_teacher[scored.mask].to(logits.dtype).log_softmax(-1)
    plain = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert torch.equal(ours.losses[scored.mask], plain)
    gradients = [torch.autograd.grad(each.sum(), scored.hidden, retain_graph=True) for each in (ours.losses, plain)]
    assert torch.equal(*gradients[0], *gradients[1])
    names = {"teacher_support_mass", "student_support_mass", "top1_agreement"}
    assert ours.metrics.keys() == theirs.metrics.keys() == names


@pytest.mark.parametrize("support", SUPPORTS)
def test_one_token_is_refused_only_where_it_says_nothing(support: Any) -> None:
    with pytest.raises(UsageError, match="k is 1, but must be at least 2: renormalised over a single token"):
        SupportDivergence(support=support, tail="renormalize", k=1)
    for tail in ("bucket", "drop"):
        assert SupportDivergence(support=support, tail=tail, k=1).k == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0, but must be at least 1"),
        ({"support": "teachers"}, "support is 'teachers'; did you mean 'teacher'"),
        ({"tail": "buckets"}, "tail is 'buckets'; did you mean 'bucket'"),
        ({"divergence": "kl"}, "divergence is 'kl'"),
        ({"divergence": "jsd", "beta": 1.0}, "beta is 1.0, where jsd is always 0: use divergence reverse_kl"),
        ({"divergence": "skew_forward_kl", "alpha": 1.0}, "alpha is 1.0, but must be at least 0 and below 1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_objective("support_divergence", **options)


class Forgetful(LocalTeacher):
    """A teacher written before there were tails and given ids."""

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
        return super().score(rollouts, TeacherRequest(request.top_k, request.vocab_size), progress)


@pytest.mark.parametrize(
    ("support", "tail", "missing"),
    [
        ("teacher", "bucket", "no log_normalizer, log_tail"),
        ("student", "renormalize", "no support_ids, support_logits, support_mass"),
        ("union", "renormalize", "no support_valid"),
    ],
)
def test_a_teacher_that_cannot_deliver_is_refused(support: Any, tail: Any, missing: str) -> None:
    request = SupportDivergence(support=support, tail=tail, k=K).request
    collector = Collector(world().behavior, Forgetful(TEACHER), request)
    with pytest.raises(UsageError, match=f"model.teacher is Forgetful, which returned {missing}, but .*LocalTeacher"):
        collector.collect(PROMPTS, seed=3)


class WithoutOverlap(LocalTeacher):
    """Returns no overlap of supports, as targets on disk that an older version wrote."""

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Any = None) -> Targets:
        return replace(super().score(rollouts, request, progress), support_overlap=None)


@pytest.mark.parametrize("teacher", [LocalTeacher, WithoutOverlap])
def test_a_process_without_an_overlap_does_not_count_in_its_mean(teacher: type[LocalTeacher]) -> None:
    request = SupportDivergence(support="student", k=K).request
    found = Collector(world().behavior, teacher(TEACHER), request).collect(PROMPTS, seed=3)
    measured = 0 if teacher is WithoutOverlap else 2 * len(found.rollouts)
    assert found.weights["train/support_overlap"] == measured
    assert ("train/support_overlap" in found.metrics) == (measured > 0)


def test_the_snapshots_tokens_are_found_for_rows_that_it_need_not_score() -> None:
    request = SupportDivergence(support="student", k=K).request
    collector = Collector(world().behavior, world().teacher, request)
    every, some = (collector.collect(PROMPTS, seed=3, unscored=rows) for rows in (None, torch.tensor([1, 4])))
    ids = every.rollouts.behavior_support_ids
    assert ids is not None
    assert ids.dtype == torch.uint8
    assert torch.equal(ids, some.rollouts.behavior_support_ids)  # type: ignore[arg-type]
    assert torch.equal(every.targets.support_ids, ids.where(every.rollouts.mask[..., None], 0))  # type: ignore[arg-type]
    logits = plain_logits(world().behavior.policy, every.rollouts)
    assert torch.equal(ids[every.rollouts.mask].long(), logits.topk(K).indices)
    assert not some.rollouts.behavior_logprobs[[1, 4]].any()  # the training step fills them in
    assert torch.equal(some.rollouts.behavior_logprobs[[0, 2]], every.rollouts.behavior_logprobs[[0, 2]])


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
@pytest.mark.parametrize("support", SUPPORTS)
def test_the_buffer_takes_what_is_estimated(support: Any, tail: Any) -> None:
    flags = {"objective": "support_divergence", "objective.support": support, "objective.tail": tail, "objective.k": K}
    config = parse_fit(["-c", "quickstart", *(f"--model.{name}={value}" for name, value in flags.items())])
    _, said = estimate(config).host["rollout buffer"]
    found = re.search(r"tokens x (\d+) bytes", said)
    assert found is not None
    rollouts, targets = parts(pool(support, tail != "renormalize"))
    tensors = {**rollouts.state_dict(), **replace(targets, entropy=None).state_dict()}
    per_token = {
        name: tensor[0, 0].numel() * (4 if name.endswith("support_ids") else tensor.element_size())
        for name, tensor in tensors.items()
        if torch.is_tensor(tensor) and tensor.shape[:2] == rollouts.mask.shape
    }
    assert int(found[1]) == sum(per_token.values()), per_token


@pytest.mark.parametrize("support", SUPPORTS)
def test_every_gate_weights_it(support: Any) -> None:
    found, scored = pool(support, tail=True), world().scored
    assert scored is not None
    rollouts = replace(found.rollouts, correct=torch.tensor([1, 0, 1, 1, 0, -1], dtype=torch.int8))
    positions = SupportDivergence(support=support, k=K).position_losses(scored, rollouts, found.targets)
    inputs = gate_inputs(rollouts, found.targets, positions, step=3)
    for name in gate_names():
        gate = build_gate(name)
        if support == "teacher" and "compatible_mass" in gate.needs:
            continue  # of the student's support, which is not scored then
        gate.setup(world().student.tokenizer)
        gates = gate(inputs)
        assert bool(gates.weights.isfinite().all()), name
        assert bool((gates.weights[scored.mask] >= 0).all()), name


def test_the_teachers_entropy_counts_an_id_of_a_union_once() -> None:
    found, made = pool("union", tail=True), world()
    assert made.scored is not None
    positions = SupportDivergence(support="union", k=K).position_losses(made.scored, *parts(found))
    inputs = gate_inputs(found.rollouts, found.targets, positions)
    targets = replace(found.targets, entropy=None)
    gates = build_gate("none")(inputs)
    values = {"entropy": positions.entropy}
    trace = StepTrace(found.rollouts, 0, 0, inputs, gates, positions.losses, values, None, targets)
    tops = [set_of(made.logits[side].topk(K).indices) for side in ("teacher", "behavior")]
    q = made.logits["teacher"].softmax(1)
    inside = q * (tops[0] | tops[1])
    bound = torch.special.entr(inside).sum(1) + torch.special.entr(1 - inside.sum(1))
    assert float(entropy_sums(trace)[2]) == pytest.approx(float(bound.sum()), rel=1e-4)
    assert math.isfinite(float(entropy_sums(trace).sum()))
