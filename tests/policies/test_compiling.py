"""A compiled student scores like a plain one; nothing else changes. No compiler is needed: graphs run uncompiled."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from opdlab.errors import UsageError
from opdlab.policies import AdapterConfig, BaseTeacher, LanguageModel, SamplingConfig
from tests.policies.tiny_models import CONFIGS, rollouts, sampled, save_random

# From torch.compile itself: it imports deprecated modules, and reads gradients of tensors that have none.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_random(tmp_path_factory.mktemp("qwen3"), CONFIGS["qwen3"]()))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often compiled code was called."""
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*arguments: Any) -> Any:
            calls.append(1)
            return graph.forward(*arguments)

        return run

    torch.compiler.reset()
    # There is no option for another backend, and inductor needs a compiler and minutes.
    monkeypatch.setattr("opdlab.policies.compiling._BACKEND", backend)
    return calls


def gradients(model: LanguageModel) -> tuple[Tensor, list[Tensor]]:
    scored = model.score(rollouts())
    logprobs = scored.statistics().logprobs
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.arange(len(logprobs)) % 3 - 1.0
    return logprobs.detach(), list(torch.autograd.grad((logprobs * weights).sum(), trained, allow_unused=False))


@pytest.mark.usefixtures("peft_pair")
@pytest.mark.parametrize(
    ("adapter", "budget", "gradient_checkpointing"),
    [
        (None, None, False),
        (None, None, True),
        (None, 20, False),
        (None, 20, True),
        (AdapterConfig(r=2, target_modules=["q_proj"]), 20, False),
    ],
)
def test_scores_and_gradients_are_the_same(
    qwen3: str, graphs: list[int], adapter: AdapterConfig | None, budget: int | None, gradient_checkpointing: bool
) -> None:
    model, plain = (
        LanguageModel(qwen3, adapter=adapter, gradient_checkpointing=gradient_checkpointing, compile=compile)
        for compile in (True, False)
    )
    model.max_tokens = budget
    ours, found = gradients(model)
    assert graphs
    graphs.clear()
    theirs, wanted = gradients(plain)
    assert not graphs
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_sampling_runs_as_it_is(qwen3: str, graphs: list[int]) -> None:
    model, plain = LanguageModel(qwen3, compile=True), LanguageModel(qwen3)
    model.score(rollouts())
    graphs.clear()
    ours, theirs = (sampled(each, SamplingConfig(max_new_tokens=5), [[5, 6, 7], [8, 9]]) for each in (model, plain))
    assert torch.equal(ours.tokens, theirs.tokens)
    assert not graphs


def test_copies_compile_anew_with_weights_of_their_own(qwen3: str, graphs: list[int]) -> None:
    model = LanguageModel(qwen3, compile=True)
    before = model.score(rollouts()).statistics().logprobs.detach()
    snapshot, other = model.snapshot(), copy.deepcopy(model)
    for copied in (snapshot, other):
        assert all(m._compiled_call_impl is None for m in copied.modules())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    after = model.score(rollouts()).statistics().logprobs.detach()
    assert float((after - before).abs().max()) > 0.01
    graphs.clear()
    for copied in (snapshot, other):
        torch.testing.assert_close(copied.score(rollouts()).statistics().logprobs.detach(), before, rtol=0, atol=1e-5)
    assert graphs
    assert not any(p.requires_grad for p in snapshot.parameters())


def test_names_and_files_are_the_same(qwen3: str, graphs: list[int], tmp_path: Path) -> None:
    model, plain = LanguageModel(qwen3, compile=True), LanguageModel(qwen3)
    model.score(rollouts())
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    model.save(tmp_path / "compiled")
    plain.save(tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "compiled" / file.name).read_bytes()


@pytest.mark.usefixtures("peft_pair")
def test_the_teacher_below_an_adapter_is_not_compiled(qwen3: str, graphs: list[int]) -> None:
    student = LanguageModel(qwen3, adapter=AdapterConfig(r=2, target_modules=["q_proj"]), compile=True)
    student.score(rollouts())
    teacher = BaseTeacher()
    teacher.bind(student)
    graphs.clear()
    teacher.model.score(rollouts())
    assert not graphs


def test_layers_stand_in_one_graph_for_any_shape(qwen3: str, graphs: list[int]) -> None:
    model = LanguageModel(qwen3, compile=True)
    model.group_lengths = False
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for rows in ([0, 1, 2], [0, 1], [1, 3], [0, 1, 2, 3]):
            model.score(rollouts().rows(torch.tensor(rows)))
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert len(graphs) == 4 * len(layers)  # no breaks within a layer, and the code of one layer serves the other


def test_every_kind_of_pass_is_compiled(qwen3: str, graphs: list[int]) -> None:
    # Beyond torch's own limit of 8 variants, layers would run uncompiled.
    kinds = 0
    for dtype in (torch.float32, torch.bfloat16):
        for training in (True, False):
            model = LanguageModel(qwen3, compile=True).to(dtype).train(training)
            layers = sum(isinstance(m, GradientCheckpointingLayer) for m in model.modules())
            for with_gradients in (True, False):
                for rows in ([0], [0, 1, 2]):
                    graphs.clear()
                    with torch.set_grad_enabled(with_gradients):
                        model.score(rollouts().rows(torch.tensor(rows)))
                    assert len(graphs) >= layers, (dtype, training, with_gradients, rows)
                    kinds += 1
    assert kinds == 16


def test_no_compiler(qwen3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/no/such/compiler",))
    monkeypatch.setattr("torch._inductor.cpp_builder.cpp_compiler_search.cache_clear", lambda: None, raising=False)
    LanguageModel(qwen3)
    with pytest.raises(UsageError, match="compile true, but torch finds no C.. compiler: install one such as g.."):
        LanguageModel(qwen3, compile=True)
