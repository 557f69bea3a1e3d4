"""The objective on the whole vocabulary: through a tiny model, under every gate, in a run and its resume."""

# mypy: disable-error-code="no-untyped-call"

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from opdlab.errors import UsageError
from opdlab.gating import build_gate, gate_names
from opdlab.objectives import FullDivergence, build_objective, loss_shares, reduce_losses
from opdlab.objectives.functional import full_divergence
from opdlab.policies import AdapterConfig, LanguageModel, LocalTeacher, SelfTeacher, TargetCache, Teacher
from opdlab.training import score_batch
from opdlab.types import Minibatch, Rollouts, Targets, TeacherRequest
from tests.policies.tiny_models import CONFIGS, rollouts, save_random
from tests.scoring.test_full_divergence import NAMES, plain_divergence
from tests.toy_run import TEACHER, Run

MakeRun = Callable[..., Run]


@pytest.mark.parametrize("divergence", NAMES)
def test_pure_function(divergence: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((9, 4), (17, 4), (9, 6), (17, 6))
    student, weight, other, head = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    options = {"divergence": divergence, "beta": 0.3, "alpha": 0.2}
    ours = full_divergence(student, weight, other, head, **options, temperature=0.7)
    plain = plain_divergence(student @ weight.T / 0.7, (other @ head.T / 0.7).detach(), **options)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), [student, weight]), torch.autograd.grad(plain.sum(), [student, weight])
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"divergence": "reverse"}, "did you mean 'reverse_kl'"),
        ({"divergence": "jsd", "beta": 0.0}, "use divergence forward_kl"),
        ({"divergence": "skew_reverse_kl", "alpha": 1.0}, "alpha is 1.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        FullDivergence(**options)
    with pytest.raises(UsageError, match=words):
        full_divergence(*(torch.zeros(2, 2) for _ in range(4)), **options)


def test_it_is_registered_and_asks_for_hidden_states() -> None:
    objective = build_objective("full_divergence", divergence="jsd", beta=0.2)
    assert isinstance(objective, FullDivergence)
    assert objective.request == TeacherRequest(hidden=True)


class WithoutHead(Teacher):
    """A teacher that scores elsewhere."""

    def __init__(self) -> None:
        local = LocalTeacher(TEACHER)
        self.tokenizer, self.vocab_size = local.tokenizer, local.vocab_size

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Any = None) -> Targets:
        raise NotImplementedError


def test_a_teacher_without_a_head_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(UsageError, match="model.teacher is WithoutHead, which gives no hidden states.*LocalTeacher"):
        make_run(objective=FullDivergence(), teacher=WithoutHead())


def test_a_teacher_whose_head_changes_within_a_buffer_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(UsageError, match="SelfTeacher with decay 0.9, whose head changes .* set decay to null"):
        make_run(objective=FullDivergence(), teacher=SelfTeacher(decay=0.9))


def test_the_student_itself_is_no_teacher_at_first(make_run: MakeRun) -> None:
    run = make_run(objective=FullDivergence("jsd"), teacher=SelfTeacher())
    with pytest.warns(UserWarning, match="starts as the student's equal"):
        run.fit(2)
    assert abs(run.recorder.losses[0]) < 1e-6


def test_kept_targets_train_as_computed_ones(make_run: MakeRun, tmp_path: Path) -> None:
    losses = []
    for _ in range(2):  # the second run reads what the first one has kept
        teacher = TargetCache(LocalTeacher(TEACHER, dtype="bfloat16"), str(tmp_path / "kept"))
        run = make_run(objective=FullDivergence(), teacher=teacher)
        run.fit(2)
        losses.append(run.recorder.losses)
    assert teacher.metrics()["targets/cache_misses"] == 0
    plain = make_run(objective=FullDivergence(), teacher=LocalTeacher(TEACHER, dtype="bfloat16"))
    plain.fit(2)
    assert losses == [plain.recorder.losses] * 2


# -- through a tiny model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folders of tiny random models: the teacher is wider than the students and has another head."""
    folder = tmp_path_factory.mktemp("models")
    config = CONFIGS["gemma2"]()
    config.hidden_size = 48
    save_random(folder / "teacher", config)
    for name in ("llama", "llama untied", "gemma2", "phi"):
        save_random(folder / name, CONFIGS[name]())
    return lambda name: str(folder / name)


def scored(student: LanguageModel, teacher: LocalTeacher, objective: FullDivergence) -> tuple[Tensor, Rollouts]:
    """The loss of the rollouts, without a gate."""
    of_prompt = replace(rollouts(), temperature=0.8)
    objective.setup(student, teacher)
    targets = teacher.score(of_prompt, replace(objective.request, vocab_size=student.vocab_size))
    rows, num_tokens = torch.arange(len(of_prompt)), int(of_prompt.mask.sum())
    batch = Minibatch(of_prompt, targets, rows, num_tokens, len(rows), ((of_prompt, targets),), 0, 0, {})
    positions = score_batch(student, objective, batch, 0).positions
    shares = loss_shares(of_prompt.mask, reduction="token_mean", num_tokens=num_tokens, num_rollouts=len(rows))
    return reduce_losses(positions.losses, torch.ones_like(shares), shares), of_prompt


def logits(model: Any, of_prompt: Rollouts) -> Tensor:
    """Logits of the valid positions, [N, V], row by row without padding."""
    parts = []
    for row in range(len(of_prompt)):
        prompt, response = (
            tokens[row][mask[row]]
            for tokens, mask in (
                (of_prompt.prompt_tokens, of_prompt.prompt_mask),
                (of_prompt.tokens, of_prompt.mask),
            )
        )
        if len(response):
            parts.append(model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1])
    return torch.cat(parts) / of_prompt.temperature


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("kind", ["llama", "llama untied", "gemma2", "phi", "frozen head"])
def test_loss_and_every_gradient(models: Callable[[str], str], kind: str, divergence: Any) -> None:
    # llama and gemma2 are tied, gemma2 has a soft cap, phi a bias.
    path = models("llama untied" if kind == "frozen head" else kind)
    student, teacher = LanguageModel(path), LocalTeacher(models("teacher"))
    if kind == "frozen head":
        student.model.lm_head.requires_grad_(False)
    loss, of_prompt = scored(student, teacher, FullDivergence(divergence, beta=0.3, alpha=0.2))
    loss.backward()
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    other = AutoModelForCausalLM.from_pretrained(models("teacher"), dtype=torch.float64).eval()
    with torch.no_grad():
        of_teacher = logits(other, of_prompt)
    values = plain_divergence(logits(plain, of_prompt), of_teacher, divergence, beta=0.3, alpha=0.2)
    values.mean().backward()
    torch.testing.assert_close(loss.double(), values.mean(), rtol=1e-4, atol=1e-5)
    expected = dict(plain.named_parameters())
    compared = 0
    for name, parameter in student.model.named_parameters():
        if kind == "frozen head" and name.startswith("lm_head"):
            assert parameter.grad is None
            continue
        wanted = expected[name].grad
        assert parameter.grad is not None
        assert wanted is not None
        assert (parameter.grad.double() - wanted).norm() < 1e-3 * wanted.norm() + 1e-7
        compared += 1
    assert compared > 5


@pytest.mark.usefixtures("peft_pair")
@pytest.mark.parametrize("modules", [["q_proj"], ["q_proj", "lm_head"]], ids=str)
def test_gradients_of_an_adapter(models: Callable[[str], str], modules: list[str]) -> None:
    adapter = AdapterConfig(r=2, alpha=4, target_modules=modules)
    student, teacher = LanguageModel(models("llama untied"), adapter=adapter), LocalTeacher(models("teacher"))
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 10)
    loss, of_prompt = scored(student, teacher, FullDivergence("jsd"))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    wide = student.model.double()
    with torch.no_grad():
        of_teacher = logits(teacher.model.model.double(), of_prompt)
    values = plain_divergence(logits(wide, of_prompt), of_teacher, "jsd")
    values.mean().backward()
    torch.testing.assert_close(loss.double(), values.mean(), rtol=1e-4, atol=1e-5)
    assert sum("lora" in name for name in gradients) == len(gradients) == 4 + 2 * ("lm_head" in modules)
    for name, parameter in student.named_parameters():
        if name in gradients:
            assert parameter.grad is not None
            assert (gradients[name].double() - parameter.grad).norm() < 1e-3 * parameter.grad.norm() + 1e-7


def test_a_student_that_lacks_ids(models: Callable[[str], str]) -> None:
    student, teacher = LanguageModel(models("llama")), LocalTeacher(models("teacher"))
    student.vocab_size = 30  # as if the teacher had rows for eight more tokens
    with pytest.raises(UsageError, match="objective.divergence is forward_kl, which is infinite if the student lacks"):
        FullDivergence("forward_kl").setup(student, teacher)
    loss, of_prompt = scored(student, teacher, FullDivergence("jsd"))
    with torch.no_grad():
        own, other = (logits(each.model, of_prompt).double() for each in (student, teacher.model))
    torch.testing.assert_close(loss.detach().double(), plain_divergence(own[:, :30], other, "jsd").mean())


def test_log_probabilities_come_from_the_same_pass(models: Callable[[str], str]) -> None:
    student, teacher = LanguageModel(models("llama untied")), LocalTeacher(models("teacher"))
    objective, of_prompt = FullDivergence(), rollouts()
    objective.setup(student, teacher)
    targets = teacher.score(of_prompt, objective.request)
    scores = student.score(of_prompt)
    products = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal products
            products += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
            return func(*args, **(kwargs or {}))

    with Count():
        own = objective.own_logprobs(scores, of_prompt, targets)  # of a fresh buffer
        positions = objective.position_losses(scores, of_prompt, targets)
    assert products == 2  # one with each head
    assert torch.equal(own, positions.logprobs)
    expected = scores.padded(scores.statistics().logprobs)
    torch.testing.assert_close(own, expected.detach())


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_a_fresh_buffer_has_no_drift_and_needs_no_further_pass(make_run: MakeRun) -> None:
    run = make_run(objective=FullDivergence())
    run.fit(4)
    first = run.recorder.steps[1]
    assert first["train/drift/max"] == 0
    assert run.recorder.steps[3]["train/drift/max"] > 0
    assert run.recorder.losses[3] < run.recorder.losses[0]


@pytest.mark.parametrize("gate", [name for name in gate_names() if name != "ta_opd"])  # it needs the student's support
def test_every_gate(make_run: MakeRun, gate: str) -> None:
    run = make_run(objective=FullDivergence("jsd"), gate=build_gate(gate), accumulate=2)
    run.fit(2)
    assert len(run.recorder.losses) == 2
    assert all(0 < loss < 1 for loss in run.recorder.losses)


def test_resumed_inside_a_buffer(make_run: MakeRun, tmp_path: Path) -> None:
    whole = make_run(objective=FullDivergence())
    whole.fit(6)
    cut = make_run(objective=FullDivergence())
    trainer = cut.fit(2)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    again = make_run(objective=FullDivergence())
    again.fit(6, ckpt_path=tmp_path / "cut.ckpt")
    assert [*cut.recorder.losses, *again.recorder.losses] == whole.recorder.losses
    for ours, theirs in zip(again.module.student.parameters(), whole.module.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)
