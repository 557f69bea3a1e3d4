"""Ways of loading: GGUF files, attention kernels, gradient checkpointing."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from opdlab.errors import UsageError
from opdlab.policies import BehaviorPolicy, LanguageModel, SamplingConfig
from opdlab.toy import chain_tokenizer
from tests.policies.tiny_models import COMMON, CONFIGS, rollouts, save_random


def logprobs(model: LanguageModel) -> Tensor:
    return model.score(rollouts()).statistics().logprobs


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("qwen3"), CONFIGS["qwen3"]())


# -- GGUF ------------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, model: Qwen3ForCausalLM) -> dict[str, Tensor]:
    """Write a model with its matrices in 8 bits; returns the weights that the file stands for."""
    gguf = pytest.importorskip("gguf")
    config, tokenizer = model.config, chain_tokenizer()
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokenizer.convert_ids_to_tokens(range(37)), "12"])
    writer.add_token_types([3 if index < 3 else 1 for index in range(38)])
    writer.add_token_merges(["1 2"])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    weights = {}
    for name, weight in model.state_dict().items():
        stem = name.removesuffix(".weight")
        block = f"blk.{stem.split('.')[2]}." if stem.startswith("model.layers") else ""
        stem = ".".join(stem.split(".")[3:]) if block else stem
        values = weight.numpy()
        if values.ndim == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{block}{GGUF_NAMES[stem]}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{block}{GGUF_NAMES[stem]}.weight", values)
        weights[name] = torch.from_numpy(np.array(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


# transformers adds a token to what it reads from the file.
@pytest.mark.filterwarnings("ignore:.* tokens beyond them")
def test_gguf_is_unpacked_trained_and_saved(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # transformers takes a head's size from the architecture's default rather than from the file.
        source = Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=128, tie_word_embeddings=False))
    weights = write_gguf(tmp_path / "tiny.gguf", source)
    model = LanguageModel(str(tmp_path), gguf_file="tiny.gguf")
    loaded = model.model.state_dict()
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(loaded[name], weight, rtol=0, atol=1e-6)
    assert model.stop_ids == [1]
    logprobs(model).sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save(tmp_path / "saved")
    again = LanguageModel(str(tmp_path / "saved"))
    assert torch.equal(logprobs(again), logprobs(model))
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not hasattr(reference.config, "quantization_config")


def test_gguf_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot be loaded"):
        LanguageModel(str(tmp_path), gguf_file="nothing.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="cannot be loaded"):
        LanguageModel(str(tmp_path), gguf_file="broken.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"needs gguf, .* pip install 'opdlab\[gguf\]'"):
        LanguageModel(str(tmp_path), gguf_file="tiny.gguf")


# -- attention -------------------------------------------------------------------------------------------------------


def test_attention_kernels_agree(qwen3: Path) -> None:
    eager = LanguageModel(str(qwen3), attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager"
    torch.testing.assert_close(logprobs(eager), logprobs(LanguageModel(str(qwen3))), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["flash_attention_3", "nonsense", "nobody/kernel"])
def test_missing_attention_kernel(qwen3: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        LanguageModel(str(qwen3), attn_implementation=name)
    message = str(caught.value)
    assert f"attn_implementation '{name}' cannot be used" in message
    assert "\n" not in message
    assert "connection" not in message


def test_kernels_for_accelerators_are_not_run_while_loading(qwen3: Path) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("runs on an accelerator only")

    AttentionInterface.register("accelerator_only", refuse)
    model = LanguageModel(str(qwen3), attn_implementation="accelerator_only")
    assert model.model.config._attn_implementation == "accelerator_only"
    with pytest.raises(RuntimeError, match="accelerator only"):
        logprobs(model)


# -- gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gpt2"])
def test_checkpointing_gives_the_same_gradients(kind: str, tmp_path: Path) -> None:
    folder = str(save_random(tmp_path, CONFIGS[kind]()))
    plain, saving = LanguageModel(folder), LanguageModel(folder, gradient_checkpointing=True)
    kept = {}
    for name, model in (("plain", plain), ("saving", saving)):
        numbers: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, n=numbers: (n.append(t.numel()), t)[1], lambda t: t):  # type: ignore[misc]
            loss = logprobs(model).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        kept[name] = sum(numbers)
    assert kept["saving"] < 0.6 * kept["plain"]  # checkpointing is really on
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)  # by two attentions, see cpu_attention


def test_snapshot_of_a_checkpointing_student_samples_with_its_cache(qwen3: Path) -> None:
    sampled = []
    for gradient_checkpointing in (False, True):
        student = LanguageModel(str(qwen3), gradient_checkpointing=gradient_checkpointing)
        behavior = BehaviorPolicy(student, SamplingConfig(num_samples=2, max_new_tokens=12))
        widths: list[int] = []
        behavior.policy.model.base_model.register_forward_pre_hook(
            lambda _module, _args, kwargs, seen=widths: seen.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        sampled.append(behavior.sample([[5, 6, 7], [8]], [0, 1], seed=0))
        assert widths.count(1) >= 11  # one new token at a time, the rest from the cache
        assert not behavior.policy.model.training
        assert student.model.training == gradient_checkpointing
    assert torch.equal(sampled[0].tokens, sampled[1].tokens)
    assert torch.equal(sampled[0].behavior_logprobs, sampled[1].behavior_logprobs)


def test_a_student_with_given_stop_tokens_is_saved_whatever_its_sampling_options(tmp_path: Path) -> None:
    source = save_random(tmp_path / "model", CONFIGS["qwen3"]())
    file = source / "generation_config.json"
    options = json.loads(file.read_text()) | {"temperature": 0.9, "top_p": 0.6}  # without do_sample
    file.write_text(json.dumps(options))
    student = LanguageModel(str(source), stop_tokens=["\n"])
    student.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == list(student.stop_tokens.ids)
