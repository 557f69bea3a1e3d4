"""Adapters: small updates on shared weights, in small checkpoints, agreeing with peft."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from opdlab.errors import UsageError
from opdlab.estimate import model_size
from opdlab.module import BehaviorConfig
from opdlab.policies import AdapterConfig, BaseTeacher, BehaviorPolicy, LanguageModel, SamplingConfig, TeacherRequest
from opdlab.policies.fingerprints import fingerprint
from tests.policies.tiny_models import CONFIGS, rollouts, save_random
from tests.test_resume import SaveAt
from tests.toy_run import STUDENT, Run

pytestmark = pytest.mark.usefixtures("peft_pair")
MakeRun = Callable[..., Run]
SMALL = AdapterConfig(r=2, alpha=4, target_modules=["q_proj", "down_proj"])


def logprobs(model: LanguageModel) -> Tensor:
    return model.score(rollouts()).statistics().logprobs.detach()


def trained(model: LanguageModel, size: float = 0.1) -> LanguageModel:
    """Move the adapter away from its start, where it changes nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def storages(model: torch.nn.Module) -> dict[int, int]:
    """Bytes of each piece of memory that holds weights or buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("qwen3"), CONFIGS["qwen3"]())


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt2", "phi"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_attached_merged_and_loaded_by_peft(kind: str, use_dora: bool, tmp_path: Path) -> None:
    folder = save_random(tmp_path / "base", CONFIGS[kind]())
    model = LanguageModel(str(folder), adapter=AdapterConfig(r=2, use_dora=use_dora))
    plain = LanguageModel(str(folder))
    torch.testing.assert_close(logprobs(model), logprobs(plain), rtol=0, atol=1e-5)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    ours = logprobs(trained(model))
    assert float((ours - logprobs(plain)).abs().max()) > 0.01
    torch.testing.assert_close(logprobs(model.without_adapter()), logprobs(plain), rtol=0, atol=0)

    model.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert torch.equal(logprobs(LanguageModel(str(tmp_path / "adapter"))), ours)
    by_peft = LanguageModel(str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses deprecated names of transformers
        by_peft.model = PeftModel.from_pretrained(by_peft.model, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logprobs(by_peft), ours, rtol=0, atol=1e-4)

    model.save(tmp_path / "merged", merge=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    torch.testing.assert_close(logprobs(LanguageModel(str(tmp_path / "merged"))), ours, rtol=0, atol=1e-4)
    assert torch.equal(logprobs(model), ours)  # saving does not change the model


def test_the_start_depends_on_the_seed_alone(qwen3: Path) -> None:
    def start(seed: int) -> Tensor:
        model = LanguageModel(str(qwen3), adapter=AdapterConfig(r=2, seed=seed))
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    first = start(0)
    torch.rand(3)
    assert torch.equal(start(0), first)
    assert not torch.equal(start(1), first)


def test_snapshot_shares_the_weights() -> None:
    student = trained(LanguageModel(STUDENT, adapter=AdapterConfig(r=1, alpha=1, target_modules=["q_proj"])))
    behavior = BehaviorPolicy(student, SamplingConfig())
    own = storages(student)
    unshared = sum(size for pointer, size in storages(behavior).items() if pointer not in own)
    base = sum(storages(LanguageModel(STUDENT)).values())
    assert 0 < unshared < 0.02 * base
    assert torch.equal(logprobs(behavior.policy), logprobs(student))
    before = logprobs(behavior.policy)
    trained(student)
    assert torch.equal(logprobs(behavior.policy), before)
    behavior.refresh(student)
    assert torch.equal(logprobs(behavior.policy), logprobs(student))
    assert not torch.equal(logprobs(behavior.policy), before)
    assert all(p.requires_grad for n, p in student.named_parameters() if "lora_" in n)


def test_sharing_lasts_when_moved() -> None:
    student = LanguageModel(STUDENT, adapter=SMALL)
    behavior = BehaviorPolicy(student, SamplingConfig())
    both = torch.nn.ModuleList([student, behavior]).to(torch.float64)
    base = sum(size for size in storages(LanguageModel(STUDENT)).values())
    assert sum(storages(both).values()) < 2.5 * base


def test_base_teacher_is_the_base_without_a_copy(make_run: MakeRun) -> None:
    student = trained(LanguageModel(STUDENT, adapter=SMALL))
    run = make_run(student=student, teacher=BaseTeacher(batch_size=3))
    teacher = run.module.teacher
    assert isinstance(teacher, BaseTeacher)
    own = storages(student)
    buffers = {b.untyped_storage().data_ptr() for b in teacher.model.buffers()}
    assert set(storages(teacher.model)) - set(own) <= buffers
    targets = teacher.score(rollouts(), TeacherRequest(top_k=4))
    torch.testing.assert_close(targets.logprobs[rollouts().mask], logprobs(LanguageModel(STUDENT)), rtol=0, atol=1e-5)
    run.fit(5)
    assert run.recorder.losses[0] > run.recorder.losses[-1]  # trained back towards the base
    again = teacher.score(rollouts(), TeacherRequest(top_k=4))
    assert torch.equal(again.logprobs, targets.logprobs)


@pytest.mark.parametrize(("accumulate", "micro_batch"), [(1, 2), (1, 4), (4, 9)])
def test_resume_is_bit_for_bit_from_a_small_checkpoint(
    make_run: MakeRun, tmp_path: Path, accumulate: int, micro_batch: int
) -> None:
    path = tmp_path / "stopped.ckpt"

    def run() -> Run:
        return make_run(accumulate=accumulate, student=LanguageModel(STUDENT, adapter=SMALL))

    whole = run()
    whole.trainer_options["callbacks"].append(SaveAt(path, micro_batch))
    whole.fit(6)
    checkpoint = torch.load(path, weights_only=True)
    assert all("lora_" in name for name in checkpoint["state_dict"].keys() - {"behavior.step"})
    resumed = run()
    for module in (resumed.module.student, resumed.module.behavior):
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data.add_(1.0)  # must come from the checkpoint
    resumed.fit(6, ckpt_path=path)
    assert resumed.recorder.losses == whole.recorder.losses[micro_batch // accumulate :]
    for ours, theirs in zip(resumed.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    left = whole.module.student.without_adapter().model.state_dict()
    for name, weight in LanguageModel(STUDENT).model.state_dict().items():  # the base is unchanged
        assert torch.equal(left[name], weight)


def test_gradient_checkpointing_with_an_adapter(qwen3: Path) -> None:
    gradients = []
    for saving in (False, True):
        model = trained(LanguageModel(str(qwen3), adapter=SMALL, gradient_checkpointing=saving))
        model.score(rollouts()).statistics().logprobs.sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # by two attentions, see cpu_attention


def test_adapters_of_narrow_models_are_wide(qwen3: Path) -> None:
    model = LanguageModel(str(qwen3), dtype="bfloat16", adapter=SMALL)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logprobs(model).isfinite().all()


def test_teacher_folder_with_dropout_scores_without(qwen3: Path, tmp_path: Path) -> None:
    LanguageModel(str(qwen3), adapter=SMALL).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.5}))
    model = trained(LanguageModel(str(tmp_path))).train()
    assert torch.equal(logprobs(model), logprobs(model))


# -- what cannot work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "r is 0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"dropout": 0.1}, "dropout is 0.1, but must be 0"),
        ({"target_modules": []}, "target_modules is [], but must be 'all-linear' or a list"),
        ({"target_modules": "q_proj"}, "target_modules is 'q_proj'"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        AdapterConfig(**options)
    assert words in str(caught.value)


def test_targets_that_do_not_exist(qwen3: Path) -> None:
    with pytest.raises(UsageError) as caught:
        LanguageModel(str(qwen3), adapter=AdapterConfig(target_modules=["q_proj", "qproj"]))
    assert "has 'qproj', but the model has no linear layer of that name; did you mean 'q_proj'?" in str(caught.value)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


def test_peft_is_missing(qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LanguageModel(str(qwen3), adapter=SMALL).save(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    for path, adapter in ((qwen3, SMALL), (tmp_path, None)):
        with pytest.raises(UsageError, match=r"needs peft, .* pip install 'opdlab\[peft\]'"):
            LanguageModel(str(path), adapter=adapter)


def test_adapter_folders_that_cannot_be_read(qwen3: Path, tmp_path: Path) -> None:
    LanguageModel(str(qwen3), adapter=SMALL).save(tmp_path)
    with pytest.raises(UsageError, match="is an adapter already"):
        LanguageModel(str(tmp_path), adapter=SMALL)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"base_model_name_or_path": None}, "base_model_name_or_path in adapter_config.json is empty"),
        ({"base_model_name_or_path": "./nowhere"}, "does not exist"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole layers"),
        ({"r": 3}, "is the adapter of this base?"),
        ({"target_modules": ["q_proj"]}, "does not fit its base"),
    ]
    for change, words in changes:
        path.write_text(json.dumps(config | change))
        with pytest.raises(UsageError) as caught:
            LanguageModel(str(tmp_path))
        assert words in str(caught.value)
    ia3 = {"peft_type": "IA3", "base_model_name_or_path": str(qwen3), "target_modules": ["q_proj"]}
    path.write_text(json.dumps(ia3))
    for load in (LanguageModel, lambda path: model_size({"path": path}, None)):
        with pytest.raises(UsageError, match="an adapter of type IA3, and only LoRA and DoRA are known"):
            load(str(tmp_path))
    path.write_text("{")
    with pytest.raises(UsageError, match="is not what peft writes"):
        LanguageModel(str(tmp_path))


def test_what_needs_or_refuses_an_adapter(make_run: MakeRun) -> None:
    with pytest.raises(UsageError, match=r"model\.student has none: give model\.student\.init_args\.adapter"):
        make_run(teacher=BaseTeacher())
    with pytest.raises(UsageError, match="batch_size is 0"):
        BaseTeacher(batch_size=0)
    with pytest.raises(UsageError, match=r"behavior\.dtype is 'bfloat16'"):
        make_run(student=LanguageModel(STUDENT, adapter=SMALL), behavior=BehaviorConfig(dtype="bfloat16"))


def test_a_folder_holds_what_was_saved_last(tmp_path: Path) -> None:
    adapted = trained(LanguageModel(STUDENT, adapter=AdapterConfig(r=2)))
    tokens = torch.tensor([[5, 6, 7, 8]])
    expected = adapted.model(tokens).logits
    for merge in (False, True, False, True):
        adapted.save(tmp_path / "out", merge=merge)
        again = LanguageModel(str(tmp_path / "out"))
        assert again.has_adapter is not merge
        torch.testing.assert_close(again.model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="where the student's weights come from"):
        again.save(tmp_path / "out")


def test_the_factor_of_an_adapter_is_part_of_a_model() -> None:
    prints = {fingerprint(LanguageModel(STUDENT, adapter=AdapterConfig(r=2, alpha=alpha))) for alpha in (8, 8, 64)}
    assert len(prints) == 2
