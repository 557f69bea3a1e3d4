"""The local teacher: its targets are those of the model itself, and other vocabularies are refused."""

import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3ForCausalLM

from opdlab.errors import UsageError
from opdlab.policies import LocalTeacher, TeacherRequest, check_same_vocabulary
from opdlab.toy import chain_tokenizer
from opdlab.toy.make_models import toy_config
from opdlab.types import Rollouts, Targets


def saved(folder: Path, num_rows: int = 38) -> Path:
    """A random model whose embedding has ``num_rows`` rows; rows beyond the tokenizer's are the likeliest of all."""
    tokenizer = chain_tokenizer()
    config = toy_config(tokenizer, hidden_size=32)
    config.initializer_range, config.tie_word_embeddings = 0.3, False
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
        if num_rows > len(tokenizer):
            head = model.lm_head.weight.detach()
            model.resize_token_embeddings(num_rows, mean_resizing=False)
            with torch.no_grad():
                model.lm_head.weight[:38] = head
                model.lm_head.weight[38:] = 0
                model.lm_head.weight[-10:] = 2 * head[:10]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("padded"), num_rows=48)


@pytest.fixture
def rollouts() -> Rollouts:
    generator = torch.Generator().manual_seed(0)
    prompt_mask = torch.arange(6).flip(0) < torch.tensor([[6], [2], [4], [1], [3]])
    mask = torch.arange(7) < torch.tensor([[7], [5], [1], [3], [6]])
    prompt_tokens, tokens = (
        torch.randint(3, 37, m.shape, generator=generator).masked_fill(~m, 0) for m in (prompt_mask, mask)
    )
    zeros = torch.zeros(5, dtype=torch.long)
    return Rollouts(
        *(prompt_tokens, prompt_mask, tokens, mask, torch.zeros(5, 7)),
        *(zeros, torch.arange(5), zeros, zeros, zeros),
        temperature=0.7,
    )


@torch.no_grad()
def own_logits(folder: Path, rollouts: Rollouts) -> Tensor:
    """The model's own logits at the sampling temperature, [B, T, V]; 0 where the mask is 0."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = torch.zeros(*rollouts.mask.shape, model.config.vocab_size)
    for row in range(len(rollouts)):
        prompt, response = (
            tokens[row][mask[row]]
            for tokens, mask in ((rollouts.prompt_tokens, rollouts.prompt_mask), (rollouts.tokens, rollouts.mask))
        )
        logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        rows[row, : len(response)] = logits / rollouts.temperature
    return rows


def check_targets(targets: Targets, logits: Tensor, rollouts: Rollouts, k: int, vocab_size: int) -> None:
    assert targets.support_ids is not None
    assert targets.support_logits is not None
    assert targets.support_mass is not None
    valid = rollouts.mask
    log_q = logits[valid].log_softmax(-1)
    wanted = logits[valid][:, :vocab_size].topk(k)
    assert torch.equal(targets.support_ids[valid].long(), wanted.indices)
    torch.testing.assert_close(targets.support_logits[valid], wanted.values, rtol=0, atol=1e-4)
    mass = log_q.gather(1, wanted.indices).exp().sum(-1)
    torch.testing.assert_close(targets.support_mass[valid], mass, rtol=0, atol=1e-4)
    sampled = log_q.gather(1, rollouts.tokens[valid][:, None]).squeeze(1)
    torch.testing.assert_close(targets.logprobs[valid], sampled, rtol=0, atol=1e-4)
    for padded in (targets.logprobs, targets.support_ids, targets.support_logits, targets.support_mass):
        assert not padded[~valid].any()


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_targets_are_those_of_the_model(plain: Path, rollouts: Rollouts, batch_size: int) -> None:
    teacher = LocalTeacher(str(plain), batch_size=batch_size)
    check_targets(teacher.score(rollouts, TeacherRequest(top_k=5)), own_logits(plain, rollouts), rollouts, 5, 38)


def test_only_what_was_asked_for(plain: Path, rollouts: Rollouts) -> None:
    targets = LocalTeacher(str(plain)).score(rollouts, TeacherRequest())
    assert targets.support_ids is None
    assert targets.support_logits is None
    assert targets.support_mass is None
    with_support = LocalTeacher(str(plain)).score(rollouts, TeacherRequest(top_k=5))
    torch.testing.assert_close(targets.logprobs, with_support.logprobs, rtol=0, atol=1e-6)


def test_whole_vocabulary_as_support(plain: Path, rollouts: Rollouts) -> None:
    targets = LocalTeacher(str(plain)).score(rollouts, TeacherRequest(top_k=38))
    check_targets(targets, own_logits(plain, rollouts), rollouts, 38, 38)
    assert targets.support_mass is not None
    torch.testing.assert_close(targets.support_mass[rollouts.mask], torch.ones(22))


def test_padded_embedding(padded: Path, rollouts: Rollouts) -> None:
    teacher = LocalTeacher(str(padded))
    assert teacher.vocab_size == 38
    check_same_vocabulary(chain_tokenizer(), teacher.tokenizer)
    logits = own_logits(padded, rollouts)
    assert bool((logits[rollouts.mask].topk(5).indices >= 38).any())  # they would enter if that were possible
    for k, vocab_size in ((5, 38), (38, None), (5, 37)):
        targets = teacher.score(rollouts, TeacherRequest(top_k=k, vocab_size=vocab_size))
        size = vocab_size or 38
        check_targets(targets, logits[..., :size], rollouts, k, size)
        assert targets.support_ids is not None
        assert int(targets.support_ids.max()) < size


@pytest.mark.parametrize(("num_rows", "dtype"), [(256, torch.uint8), (40_000, torch.uint16), (66_000, torch.int32)])
def test_ids_take_the_smallest_type_that_holds_them(
    tmp_path: Path, rollouts: Rollouts, num_rows: int, dtype: torch.dtype
) -> None:
    folder = saved(tmp_path, num_rows)
    teacher = LocalTeacher(str(folder), batch_size=2)
    teacher.vocab_size = num_rows  # as if each row had a token
    targets = teacher.score(rollouts, TeacherRequest(top_k=5))
    assert targets.support_ids is not None
    assert targets.support_ids.dtype == dtype
    assert int(targets.support_ids.int().max()) >= num_rows - 10
    check_targets(targets, own_logits(folder, rollouts), rollouts, 5, num_rows)
    again = Targets.from_state_dict(targets.rows(torch.tensor([3, 0])).state_dict())
    assert again.support_ids is not None
    assert torch.equal(again.support_ids.long(), targets.support_ids.long()[[3, 0]])


@pytest.mark.parametrize("batch_size", [2, 32])
def test_hidden_states_and_head_give_the_logits(plain: Path, rollouts: Rollouts, batch_size: int) -> None:
    teacher = LocalTeacher(str(plain), batch_size=batch_size)
    targets = teacher.score(rollouts, TeacherRequest(hidden=True))
    assert targets.hidden is not None
    assert targets.hidden.shape == (5, 7, 32)
    assert not targets.hidden[~rollouts.mask].any()
    head = teacher.head(rollouts.temperature)
    assert not head.trained
    ours = head.tile(targets.hidden[rollouts.mask], slice(None))
    torch.testing.assert_close(ours, own_logits(plain, rollouts)[rollouts.mask], rtol=0, atol=1e-4)
    own = teacher.score(rollouts, TeacherRequest())
    torch.testing.assert_close(targets.logprobs, own.logprobs)
    assert own.hidden is None


def test_hidden_states_keep_the_dtype_in_which_the_teacher_computes(
    plain: Path, rollouts: Rollouts, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = LocalTeacher(str(plain), dtype="bfloat16")
    with caplog.at_level(logging.INFO):
        targets = [teacher.score(rollouts, TeacherRequest(hidden=True)) for _ in range(2)]
        LocalTeacher(str(plain)).score(rollouts, TeacherRequest(hidden=True))  # float32 needs no remark
    (line,) = [record.message for record in caplog.records if "rounding" in record.message]
    found = re.search(r"kept in bfloat16.* by about (\S+) nats a token \(KL\)", line)
    assert found is not None
    states = targets[0].hidden
    assert states is not None
    assert states.dtype == torch.bfloat16
    again = Targets.from_state_dict(targets[0].state_dict()).hidden
    assert again is not None
    assert torch.equal(again, states)
    # Exact states are not known for this model. The line must name the error of states that are rounded here.
    head = teacher.head(rollouts.temperature)
    wide = states[rollouts.mask].float()
    wide *= 0.9 + 0.2 * torch.rand(wide.shape, generator=torch.Generator().manual_seed(1))
    errors = [wide, wide.bfloat16().float()]
    exact, rounded = (head.tile(each, slice(None)).log_softmax(-1) for each in errors)
    kl = float((exact.exp() * (exact - rounded)).sum(-1).mean())
    assert kl / 3 < float(found[1]) < 3 * kl


def test_no_rollouts_have_no_hidden_states(plain: Path, rollouts: Rollouts) -> None:
    none = rollouts.rows(torch.zeros(0, dtype=torch.long))
    targets = LocalTeacher(str(plain)).score(none, TeacherRequest(hidden=True))
    assert targets.hidden is not None
    assert targets.hidden.shape == (0, 7, 32)


def test_frozen_and_without_gradient(plain: Path, rollouts: Rollouts) -> None:
    teacher = LocalTeacher(str(plain))
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.model.training
    assert not teacher.score(rollouts, TeacherRequest(top_k=2)).logprobs.requires_grad


def test_bad_batch_size(plain: Path) -> None:
    with pytest.raises(UsageError, match="batch_size is 0"):
        LocalTeacher(str(plain), batch_size=0)


def with_tokens(*added: str) -> PreTrainedTokenizerFast:
    """The toy tokenizer with some tokens added."""
    tokenizer = chain_tokenizer()
    tokenizer.add_tokens(list(added))
    return tokenizer


def swapped() -> PreTrainedTokenizerFast:
    """The toy tokenizer with the ids of 4 and 5, and of 8 and 9, exchanged."""
    tokenizer = chain_tokenizer()
    text = tokenizer.backend_tokenizer.to_str()
    for one, other in (("4", "5"), ("8", "9")):
        first, second = (f'"{token}":{tokenizer.convert_tokens_to_ids(token)}' for token in (one, other))
        assert first in text
        text = text.replace(first, "#").replace(second, f'"{other}":{first.split(":")[1]}')
        text = text.replace("#", f'"{one}":{second.split(":")[1]}')
    return PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(text),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def test_same_vocabulary() -> None:
    check_same_vocabulary(chain_tokenizer(), chain_tokenizer())


def test_tokens_of_other_meaning_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        check_same_vocabulary(chain_tokenizer(), swapped())
    # "4" is token 7 and "5" token 8: the first of the four that differ.
    assert "token 7 is '5' to the teacher (38 tokens) and '4' to the student (38 tokens)" in str(caught.value)


def test_additional_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match=r"token 38 is .extra. to the teacher \(39 tokens\) and missing to the"):
        check_same_vocabulary(chain_tokenizer(), with_tokens("extra"))
    with pytest.raises(UsageError, match=r"token 38 is missing to the teacher \(38 tokens\) and .extra. to the"):
        check_same_vocabulary(with_tokens("extra"), chain_tokenizer())


# -- quantization ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantization_needs_its_package(plain: Path, quantization: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"needs bitsandbytes, .* pip install 'opdlab\[bitsandbytes\]'"):
        LocalTeacher(str(plain), quantization=quantization)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantization_is_asked_of_transformers(plain: Path, quantization: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    original = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args: Any, quantization_config: Any, **options: Any) -> Any:
        asked.append(quantization_config)
        return original(*args, **options)

    # bitsandbytes needs a GPU, and transformers would remember a fake package for the rest of the process.
    monkeypatch.setattr("opdlab.policies.loading.require_package", lambda *_: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    teacher = LocalTeacher(str(plain), dtype="bfloat16", quantization=quantization)
    with pytest.raises(UsageError, match=f"model.student has quantization '{quantization}', .* cannot be trained"):
        teacher.model.snapshot()
    assert asked[0].load_in_4bit == (quantization == "4bit")
    assert asked[0].load_in_8bit == (quantization == "8bit")
    if quantization == "4bit":
        assert (asked[0].bnb_4bit_quant_type, asked[0].bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)


def test_unknown_quantization(plain: Path) -> None:
    with pytest.raises(UsageError, match="quantization is '2bit', but must be one of 4bit, 8bit"):
        LocalTeacher(str(plain), quantization="2bit")  # type: ignore[arg-type]


def test_attention_and_gguf_reach_the_model(plain: Path, tmp_path: Path) -> None:
    teacher = LocalTeacher(str(plain), attn_implementation="eager")
    assert teacher.model.model.config._attn_implementation == "eager"
    with pytest.raises(UsageError, match="cannot be loaded"):
        LocalTeacher(str(tmp_path), gguf_file="nothing.gguf")
