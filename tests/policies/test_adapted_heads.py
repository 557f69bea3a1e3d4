"""LoRA on the output layer: scored tile by tile as peft's own layer computes it, trained, saved and merged."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from opdlab.diagnostics import hidden_gradient_norms
from opdlab.errors import UsageError
from opdlab.estimate import model_size
from opdlab.objectives import Objective, SampledTokenOPD, TeacherTopK
from opdlab.policies import (
    AdapterConfig,
    BaseTeacher,
    BehaviorPolicy,
    LanguageModel,
    LocalTeacher,
    SamplingConfig,
    TeacherRequest,
)
from tests.policies.test_adapters import logprobs, storages, trained
from tests.policies.tiny_models import CONFIGS, rollouts, save_random
from tests.test_resume import SaveAt
from tests.toy_run import STUDENT, TEACHER, Run

pytestmark = pytest.mark.usefixtures("peft_pair")
MakeRun = Callable[..., Run]
HEAD = AdapterConfig(r=2, alpha=4, target_modules=["q_proj", "lm_head"])
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 20, 11]])


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    return logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its embedding is its output layer too."""
    return save_random(tmp_path_factory.mktemp("llama"), CONFIGS["llama"]())


# Tied: llama, gemma2 with a soft cap, gpt2 with transposed layers below, cohere with a scale; phi has a bias.
@pytest.mark.parametrize("kind", ["llama", "llama untied", "gemma2", "gpt2", "phi", "cohere"])
def test_attached_saved_merged(kind: str, tmp_path: Path) -> None:
    folder = save_random(tmp_path / "base", CONFIGS[kind]())
    targets = ["c_attn" if kind == "gpt2" else "q_proj", "lm_head"]
    model, plain = LanguageModel(str(folder), adapter=AdapterConfig(r=2, target_modules=targets)), logits_of
    before = logprobs(LanguageModel(str(folder)))
    torch.testing.assert_close(logprobs(model), before, rtol=0, atol=1e-5)
    ours = logprobs(trained(model))
    assert float((ours - before).abs().max()) > 0.1
    head = model.head()
    states = model.model.base_model(TOKENS).last_hidden_state[0]
    torch.testing.assert_close(head.tile(states, slice(None)), plain(model.model)[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(logprobs(model.without_adapter()), before)
    assert model.without_adapter().head().low_rank is None

    model.save(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("lm_head.lora_B" in key for key in saved)
    assert not any(key.endswith("base_layer.weight") or "embed" in key for key in saved)
    assert torch.equal(logprobs(LanguageModel(str(tmp_path / "adapter"))), ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own warnings on ties and transposed layers
        by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    torch.testing.assert_close(plain(by_peft), plain(model.model))

    expected = plain(model.model)
    embedding = model.model.get_input_embeddings().weight.clone()
    model.save(tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain(merged), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged.get_input_embeddings().weight, embedding, rtol=0, atol=0)
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logprobs(LanguageModel(str(tmp_path / "merged"))), ours, rtol=0, atol=1e-4)
    assert torch.equal(logprobs(model), ours)  # saving does not change the model


def test_merging_elsewhere_leaves_shared_weights_shared(llama: Path, tmp_path: Path) -> None:
    model = trained(LanguageModel(str(llama), adapter=AdapterConfig(r=2)))
    assert model.head().low_rank is None  # all-linear leaves the output layer out
    model.save(tmp_path, merge=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.tie_word_embeddings


def test_narrow_weights_with_a_wide_adapter(llama: Path) -> None:
    model = trained(LanguageModel(str(llama), dtype="bfloat16", adapter=HEAD))
    low_rank = model.head().low_rank
    assert low_rank is not None
    assert low_rank.down.dtype == low_rank.up.dtype == torch.float32
    model.score(rollouts()).statistics().logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert all(factor.grad is not None and factor.grad.any() for factor in (low_rank.down, low_rank.up))


def test_snapshot_and_base_teacher_share_the_head() -> None:
    student = trained(LanguageModel(STUDENT, adapter=HEAD))
    behavior, teacher = BehaviorPolicy(student, SamplingConfig()), BaseTeacher()
    teacher.bind(student)
    own, base = storages(student), sum(storages(LanguageModel(STUDENT)).values())
    for model in (behavior.policy, teacher.model):
        assert sum(size for pointer, size in storages(model).items() if pointer not in own) < 0.03 * base
        assert model.head().weight.data_ptr() == student.head().weight.data_ptr()
    assert teacher.model.head().low_rank is None
    targets = teacher.score(rollouts(), TeacherRequest(top_k=4))
    torch.testing.assert_close(targets.logprobs[rollouts().mask], logprobs(LanguageModel(STUDENT)), rtol=0, atol=1e-5)
    before = logprobs(behavior.policy)
    assert torch.equal(before, logprobs(student))
    head = student.head().low_rank
    assert head is not None
    head.up.data += 0.1
    assert torch.equal(logprobs(behavior.policy), before)
    behavior.refresh(student)
    assert torch.equal(logprobs(behavior.policy), logprobs(student))


@pytest.mark.parametrize("objective", [SampledTokenOPD(), TeacherTopK(k=8)], ids=lambda o: type(o).__name__)
def test_training(make_run: MakeRun, tmp_path: Path, objective: Objective) -> None:
    # Only the output layer, so that no other weights can lower the loss.
    student = LanguageModel(STUDENT, adapter=AdapterConfig(r=4, alpha=8, target_modules=["lm_head"]))
    run = make_run(student=student, objective=objective, gate="none", lr=0.01, refresh=4, num_problems=8)
    path = tmp_path / "stopped.ckpt"
    run.trainer_options["callbacks"].append(SaveAt(path, 12))
    run.fit(24)
    steps, losses = run.recorder.steps, run.recorder.losses
    assert steps[1]["train/drift/max"] == 0.0
    assert steps[5]["train/drift/max"] < 1e-5  # a fresh buffer of a freshly refreshed snapshot
    assert steps[4]["train/drift/max"] > 1e-3
    if isinstance(objective, TeacherTopK):  # the other objective's loss does not measure distance
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    state = torch.load(path, weights_only=True)["state_dict"]
    assert {key.rpartition(".lm_head.")[2] for key in state if key.startswith("student.")} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }


@pytest.mark.parametrize("objective", [SampledTokenOPD(), TeacherTopK(k=8)], ids=lambda o: type(o).__name__)
def test_gradient_norms_at_the_last_hidden_state(objective: Objective) -> None:
    student, batch = trained(LanguageModel(STUDENT, adapter=HEAD)), rollouts()
    targets = LocalTeacher(TEACHER).score(batch, objective.request)
    scored = student.score(batch)
    losses = objective.position_losses(scored, batch, targets).losses
    (gradient,) = torch.autograd.grad(losses.sum(), scored.hidden)
    norms = hidden_gradient_norms(objective, scored, batch, targets)
    torch.testing.assert_close(norms[batch.mask], gradient.norm(dim=-1), rtol=1e-4, atol=1e-5)
    assert norms.max() > 0.01


def test_sampling_follows_the_adapter() -> None:
    student = LanguageModel(STUDENT, adapter=AdapterConfig(r=2, target_modules=["lm_head"]))
    low_rank = student.head().low_rank
    assert low_rank is not None
    # Token 7 wins for every hidden state: a model's states are never equal, so use the direction of their mean.
    with torch.no_grad():
        state = student.score(rollouts()).hidden.mean(0)
        low_rank.down[0] = state
        low_rank.up[7, 0] = 1e3
    policy = BehaviorPolicy(student, SamplingConfig(num_samples=4, max_new_tokens=6))
    sampled = policy.sample([[5, 6, 7]], [0], seed=0)
    assert (sampled.tokens[sampled.mask] == 7).float().mean() > 0.9
    assert sampled.behavior_logprobs[sampled.mask].isfinite().all()


# -- folders that peft has written -----------------------------------------------------------------------------------


def written_by_peft(base: Path, folder: Path, **options: Any) -> PeftModel:
    """An adapter away from its start, written by peft itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own warnings on ties, and on the frozen weight that it writes too
        config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM", **options})
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "llama untied"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"lm_head": 40}}], ids=str)
def test_written_by_peft(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", CONFIGS[kind]())
    theirs = written_by_peft(base, tmp_path / "adapter", **options)
    assert any("lm_head.base_layer" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    model = LanguageModel(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(model.model), logits_of(theirs))
    states = model.model.base_model(TOKENS).last_hidden_state[0]
    torch.testing.assert_close(model.head().tile(states, slice(None)), logits_of(theirs)[0], rtol=1e-4, atol=1e-4)
    narrow = LanguageModel(str(tmp_path / "adapter"), dtype="bfloat16")  # the frozen weight is compared as rounded
    assert narrow.head().weight.dtype == torch.bfloat16


def test_an_adapted_embedding_is_merged_into_itself(llama: Path, tmp_path: Path) -> None:
    theirs = written_by_peft(llama, tmp_path / "adapter", target_modules=["embed_tokens"])
    LanguageModel(str(tmp_path / "adapter")).save(tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), logits_of(theirs), rtol=1e-4, atol=1e-4)


def test_the_frozen_head_of_another_base_is_refused(llama: Path, tmp_path: Path) -> None:
    written_by_peft(llama, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    weights["base_model.model.lm_head.base_layer.weight"][3, 4] += 0.5
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"does not fit its base: lm_head\.base_layer\.weight is another there"):
        LanguageModel(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("llama", {"use_dora": True}, "puts Dora on the output layer"),
        ("phi", {"lora_bias": True}, r"puts a bias \(lora_bias\) on the output layer"),
        ("llama", {"ensure_weight_tying": True}, "ties output layer and embedding"),
    ],
)
def test_more_than_a_low_rank_product_is_refused(
    kind: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    written_by_peft(save_random(tmp_path / "base", CONFIGS[kind]()), tmp_path / "adapter", **options)
    with pytest.raises(UsageError, match=words):
        LanguageModel(str(tmp_path / "adapter"))


def test_the_head_is_compared_with_the_adapter_on(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(LanguageModel(str(llama), adapter=HEAD)).save(tmp_path)
    LanguageModel(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "lm_head"}
    # A mistake of opdlab's own, which only a patch can make.
    monkeypatch.setattr("opdlab.policies.language_model.low_rank_of", lambda layer: None)
    with pytest.raises(UsageError, match="changes its logits in a way that opdlab does not know"):
        LanguageModel(str(tmp_path))


# -- what is refused, what is counted --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (AdapterConfig(target_modules=["embed_tokens"]), "the embedding is not adapted: take some of .*, lm_head, "),
        (replace(HEAD, use_dora=True), "has 'lm_head', but .*: leave 'lm_head' out, or set adapter.use_dora to false"),
    ],
)
def test_targets_that_are_refused(adapter: AdapterConfig, words: str, llama: Path) -> None:
    with pytest.raises(UsageError, match=words):
        LanguageModel(str(llama), adapter=adapter)


def test_parameters_are_counted() -> None:
    options = {"path": STUDENT, "dtype": "float32", "adapter": {"r": 2, "target_modules": ["lm_head"]}}
    counted, plain = model_size(options, None), model_size({**options, "adapter": None}, None)
    assert counted.trainable == 2 * (38 + 96)
    assert counted.parameters == plain.parameters + counted.trainable
