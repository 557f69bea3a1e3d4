"""Divergences over the vocabulary and on supports, against those of other packages: values and gradients."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance.batch import FRESH, Case, run
from tests.conformance.others import against

# In float32 inside, whatever the inputs are.
SINGLE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-5}
# TRL and liger-kernel switch to the Kullback-Leibler divergences at the ends of beta's range.
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.3}
each_divergence = pytest.mark.parametrize("name", list(BETAS))


def options(name: str) -> dict[str, Any]:
    return {"divergence": name, **({"beta": BETAS[name]} if name == "jsd" else {})}


@each_divergence
@against(
    "trl.experimental.gkd.gkd_trainer:GKDTrainer.generalized_jsd_loss",
    "trl.experimental.gold.gold_trainer:GOLDTrainer.generalized_jsd_loss",
)
def test_the_whole_vocabulary(other: Any, name: str) -> None:
    case = run("full_divergence", **options(name))
    case.agrees(other(case.student, case.teacher, beta=BETAS[name], reduction="none").sum(-1))


@each_divergence
@against("trl.experimental.sdpo.loss_utils:compute_full_logit_self_distillation_loss")
def test_the_whole_vocabulary_of_self_distillation(other: Any, name: str) -> None:
    case = run("full_divergence", **options(name))
    case.agrees(other(case.student, case.teacher, distillation_alpha=BETAS[name]))


@each_divergence
@against("trl.kernels.chunked_divergence:ChunkedDivergenceFunction.apply")
def test_the_whole_vocabulary_by_tiles(other: Any, name: str) -> None:
    case = run("full_divergence", **options(name))
    hidden, weight = case.leaves
    teacher = case.states.teacher[case.mask], case.states.teacher_weight
    value, entropy = other(hidden, weight, None, *teacher, None, BETAS[name], case.batch.rollouts.temperature)
    case.agrees(value, **SINGLE)
    torch.testing.assert_close(case.output.entropy[case.mask].float(), entropy, rtol=1e-4, atol=1e-5)


@each_divergence
@against("liger_kernel.chunked_loss:LigerFusedLinearJSDLoss")
def test_the_whole_vocabulary_by_chunks_of_positions(other: Any, name: str) -> None:
    case = run("full_divergence", **options(name))
    chunks = {"chunk_size": 4, "temperature": case.batch.rollouts.temperature, "beta": BETAS[name]}
    loss = other(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False, **chunks)
    teacher = case.states.teacher[case.mask], case.states.teacher_weight
    case.agrees(loss(*case.leaves, *teacher, case.batch.rollouts.tokens[case.mask]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
@each_divergence
@against("trl.experimental.sdpo.loss_utils:compute_topk_self_distillation_loss")
def test_the_students_support(other: Any, name: str, tail: str) -> None:
    case = run("support_divergence", FRESH, support="student", tail=tail, k=4, **options(name))
    settings = {"distillation_topk": 4, "distillation_alpha": BETAS[name], "distillation_add_tail": tail == "bucket"}
    case.agrees(other(case.student, case.teacher, **settings))


def given_support(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of student and teacher on the support, and which of them count, [N, K] each."""
    targets = case.batch.targets
    assert targets.support_ids is not None
    ids = targets.support_ids[case.mask].long()
    valid = (
        torch.ones_like(ids, dtype=torch.bool) if targets.support_valid is None else targets.support_valid[case.mask]
    )
    student, teacher = (
        side.log_softmax(-1).gather(-1, ids).masked_fill(~valid, -torch.inf) for side in (case.student, case.teacher)
    )
    return student, teacher, valid


@pytest.mark.parametrize("support", ["teacher", "union"])
@each_divergence
@against(
    "trl.experimental.async_distillation.async_distillation_trainer:_jsd_divergence",
    "trl.experimental.server_distillation.server_distillation_trainer:_jsd_divergence",
)
def test_a_given_support(other: Any, name: str, support: str) -> None:
    for tail in ("renormalize", "drop"):
        case = run("support_divergence", support=support, tail=tail, k=4, **options(name))
        student, teacher, valid = given_support(case)
        if tail == "renormalize":
            student, teacher = (side - side.logsumexp(-1, keepdim=True) for side in (student, teacher))
        case.agrees(other(student, teacher, BETAS[name], valid).sum(-1))


@pytest.mark.parametrize("support", ["teacher", "union"])
@each_divergence
@against("trl.experimental.async_distillation.async_distillation_trainer:_add_tail_bucket")
def test_the_bucket_of_a_given_support(other: Any, name: str, support: str) -> None:
    case = run("support_divergence", support=support, tail="bucket", k=4, **options(name))
    student, teacher, valid = given_support(case)
    (student, counted), (teacher, _) = other(student, valid), other(teacher, valid)
    a, b = (side.exp().where(counted, 0.0) for side in (student, teacher))
    log_a, log_b = (side.where(counted, 0.0) for side in (student, teacher))
    beta = BETAS[name]
    if name == "jsd":
        log_m = ((1 - beta) * a + beta * b).where(counted, 1.0).log()
        terms = beta * b * (log_b - log_m) + (1 - beta) * a * (log_a - log_m)
    else:
        terms = a * (log_a - log_b) if name == "reverse_kl" else b * (log_b - log_a)
    case.agrees(terms.sum(-1))


@against("trl.experimental.sdpo.loss_utils:compute_divergence")
def test_teacher_topk(other: Any) -> None:
    case = run("teacher_topk", k=4)
    student, teacher, _ = given_support(case)
    case.agrees(other(student.log_softmax(-1), teacher.log_softmax(-1), 1.0))


@against("verl.trainer.distillation.fsdp.losses:compute_forward_kl_topk")
def test_a_dropped_tail(other: Any) -> None:
    case = run("support_divergence", divergence="forward_kl", support="teacher", tail="drop", k=4)
    _, teacher, _ = given_support(case)
    assert case.batch.targets.support_ids is not None
    ids = case.batch.targets.support_ids[case.mask].long()
    packed = (torch.nested.as_nested_tensor([side], layout=torch.jagged) for side in (teacher, ids))
    config: Any = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=None))
    found = other(case.student[None], *packed, config, "thd")
    case.agrees(found["distillation_losses"][0], **SINGLE)
    torch.testing.assert_close(case.output.metrics["teacher_support_mass"][case.mask], found["teacher_mass"][0])
    torch.testing.assert_close(
        case.output.metrics["student_support_mass"][case.mask], found["student_mass"][0].detach()
    )
