"""Ids without a row or without a token: never sampled, scored or sent to a teacher that lacks them."""

# mypy: disable-error-code="no-untyped-call"

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    MambaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opdlab.data import JsonlProblems, PromptDataModule
from opdlab.errors import UsageError
from opdlab.gating import build_gate
from opdlab.module import OPDModule
from opdlab.objectives import Objective, SampledTokenOPD, TeacherTopK
from opdlab.objectives.functional import sampled_token_loss, teacher_topk_loss
from opdlab.policies import (
    AdapterConfig,
    BehaviorPolicy,
    LanguageModel,
    LocalTeacher,
    SamplingConfig,
    TeacherRequest,
    share_vocabulary,
)
from opdlab.toy import chain_tokenizer
from opdlab.types import Rollouts
from tests.policies.tiny_models import COMMON, IDS, sampled, save_random
from tests.test_resume import SaveAt
from tests.toy_run import STUDENT, Run

MakeRun = Callable[..., Run]
SAMPLING = SamplingConfig(num_samples=8, max_new_tokens=12)
PROMPTS = [[5, 9, 3], [7]]


def with_tokens(*added: str, **special: str) -> PreTrainedTokenizerFast:
    """The toy tokenizer, of 38 tokens, with some added."""
    tokenizer = chain_tokenizer()
    tokenizer.add_tokens(list(added))
    tokenizer.add_special_tokens(special)
    return tokenizer


def saved(folder: Path, num_rows: int, tokenizer: PreTrainedTokenizerFast | None = None, **options: Any) -> str:
    """A random model with ``num_rows`` rows in its embedding and in its output layer."""
    config = Qwen3Config(**{**COMMON, "vocab_size": num_rows, "initializer_range": 0.3, "head_dim": 8, **options})
    return str(save_random(folder, config, tokenizer))


@pytest.fixture(params=["own loop", "loop of transformers"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    def prepare(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        return GenerationMixin.prepare_inputs_for_generation(self, *inputs, **kwargs)

    if request.param != "own loop":  # which leaves models that prepare their own inputs to transformers
        monkeypatch.setattr(Qwen3ForCausalLM, "prepare_inputs_for_generation", prepare)
    return str(request.param)


# -- sampling and scoring ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_rows_without_a_token_are_not_sampled(tmp_path: Path, top_p: float) -> None:
    model = LanguageModel(saved(tmp_path, num_rows=74))
    assert model.vocab_size == 38
    rollouts = sampled(model, replace(SAMPLING, num_samples=40, top_p=top_p), PROMPTS)
    assert int(rollouts.tokens.max()) < 38
    if top_p == 1.0:
        assert len(set(rollouts.tokens[rollouts.mask].tolist())) > 25


def reference(folder: str, rollouts: Rollouts, size: int) -> Tensor:
    """The model's logits of the first ``size`` ids at every response position, in float64, [B, T, size]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    logits = torch.zeros(*rollouts.tokens.shape, size, dtype=torch.float64)
    for row in range(len(rollouts)):
        prompt = rollouts.prompt_tokens[row][rollouts.prompt_mask[row]]
        response = rollouts.tokens[row][rollouts.mask[row]]
        whole = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logits[row, : len(response)] = whole[:, :size] / rollouts.temperature
    return logits


@pytest.mark.usefixtures("peft_pair")
@pytest.mark.parametrize("objective", [TeacherTopK(k=6), SampledTokenOPD()], ids=["lsm", "sampled"])
@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(74, 38), (38, 74), (64, 48)])
def test_objectives_leave_the_other_columns_out(
    tmp_path: Path, objective: Objective, student_rows: int, teacher_rows: int
) -> None:
    ours = saved(tmp_path / "student", student_rows)
    theirs = saved(tmp_path / "teacher", teacher_rows, tie_word_embeddings=False)
    head = AdapterConfig(r=2, target_modules=["lm_head"])
    for adapter in (None, head):
        student, teacher = LanguageModel(ours, adapter=adapter), LocalTeacher(theirs)
        module = OPDModule(student, teacher, objective, build_gate("none"), SAMPLING)
        rollouts = module.behavior.sample(PROMPTS, [0, 1], seed=1)
        targets = teacher.score(rollouts, replace(objective.request, vocab_size=student.vocab_size, entropy=True))
        positions = objective.position_losses(student.score(rollouts), rollouts, targets)
        with torch.no_grad():
            p, q = reference(ours, rollouts, 38), reference(theirs, rollouts, 38)
        logprobs, teacher_logprobs = (
            logits.log_softmax(-1).gather(-1, rollouts.tokens[..., None]).squeeze(-1) for logits in (p, q)
        )
        if isinstance(objective, TeacherTopK):
            ids = q.topk(objective.k, dim=-1).indices
            losses = teacher_topk_loss(p.gather(-1, ids), q.gather(-1, ids))
        else:
            losses = sampled_token_loss(logprobs, logprobs, teacher_logprobs)
        entropies = [torch.distributions.Categorical(logits=logits).entropy() for logits in (p, q)]
        assert targets.entropy is not None
        mask = rollouts.mask
        for found, wanted in (
            (rollouts.behavior_logprobs, logprobs),
            (positions.logprobs, logprobs),
            (targets.logprobs, teacher_logprobs),
            (positions.losses.detach(), losses),
            (positions.entropy, entropies[0]),
            (targets.entropy, entropies[1]),
        ):
            torch.testing.assert_close(found[mask].double(), wanted[mask], rtol=0, atol=2e-4)
        positions.losses.sum().backward()
        weight = student.model.get_output_embeddings()
        if adapter is None:
            assert weight.weight.grad is not None
            assert not weight.weight.grad[38:].any()


def test_a_student_with_more_rows_is_trained_and_evaluated(make_run: MakeRun, tmp_path: Path) -> None:
    # In one step: this crashed in the teacher's embedding.
    run = make_run(student=LanguageModel(saved(tmp_path / "wide", num_rows=74)))
    run.fit(2)
    assert len(run.recorder.losses) == 2
    assert run.module.behavior.policy.vocab_size == 38


def test_a_student_without_drift_from_its_teacher(tmp_path: Path) -> None:
    # The teacher has the student's weights and other rows: the distributions are equal.
    folder = saved(tmp_path / "small", 38, tie_word_embeddings=False)
    wide = Qwen3ForCausalLM.from_pretrained(folder)
    wide.resize_token_embeddings(60, mean_resizing=False)
    with torch.no_grad():
        wide.lm_head.weight[38:] = 3 * wide.lm_head.weight[:22]
    wide.save_pretrained(tmp_path / "wide")
    chain_tokenizer().save_pretrained(tmp_path / "wide")
    student, teacher = LanguageModel(folder), LocalTeacher(str(tmp_path / "wide"))
    share_vocabulary(student, teacher)
    rollouts = BehaviorPolicy(student, SAMPLING).sample(PROMPTS, [0, 1], seed=1)
    targets = teacher.score(rollouts, TeacherRequest(vocab_size=student.vocab_size))
    torch.testing.assert_close(targets.logprobs, rollouts.behavior_logprobs, rtol=0, atol=1e-5)


def with_hole(index: int) -> PreTrainedTokenizerFast:
    """The toy tokenizer with the token of one id moved to id 38, behind all others."""
    layout = json.loads(chain_tokenizer().backend_tokenizer.to_str())
    vocabulary = layout["model"]["vocab"]
    vocabulary[next(text for text, place in vocabulary.items() if place == index)] = 38
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(layout)), **special)


def test_ids_without_a_token_inside_the_vocabulary(tmp_path: Path) -> None:
    """Models share them if both have the same ones: such an id has a row, and is sampled and scored like others."""
    folders = {hole: saved(tmp_path / str(hole), 39, with_hole(hole)) for hole in (20, 21)}
    student = LanguageModel(folders[20])
    assert student.tokenizer.convert_ids_to_tokens(20) is None
    share_vocabulary(student, LocalTeacher(folders[20]))
    assert student.vocab_size == 39
    rollouts = BehaviorPolicy(student, replace(SAMPLING, num_samples=60)).sample(PROMPTS, [0, 1], seed=1)
    assert 20 in rollouts.tokens[rollouts.mask]
    targets = LocalTeacher(folders[20]).score(rollouts, TeacherRequest(vocab_size=student.vocab_size))
    torch.testing.assert_close(targets.logprobs, rollouts.behavior_logprobs, rtol=0, atol=1e-5)
    assert "None" not in student.tokenizer.decode([5, 20, 6])
    with pytest.raises(UsageError, match=r"token 20 is '.' to the teacher \(38 tokens\) and missing to the student"):
        share_vocabulary(student, LocalTeacher(folders[21]))
    (tmp_path / "full").mkdir()
    with pytest.raises(UsageError, match=r"token 20 is '.' to the teacher \(39 tokens\) and missing to the student"):
        share_vocabulary(student, LocalTeacher(saved(tmp_path / "full", 39, with_tokens("<extra>"))))


# -- tokens without a row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("special", "words"),
    [
        ({"eos_token": "<end>"}, r"the stop token '<end>' \(id 38\)"),
        ({"pad_token": "<fill>"}, r"the padding token '<fill>' \(id 38\)"),
        ({"bos_token": "<start>"}, r"the BOS token '<start>' \(id 38\)"),
    ],
)
def test_special_tokens_without_a_row_are_refused(tmp_path: Path, special: dict[str, str], words: str) -> None:
    folder = saved(tmp_path, 38, with_tokens(**special))
    with pytest.raises(UsageError, match=rf"model '.*' has 38 rows, and none for {words}: give the tokenizer"):
        LanguageModel(folder)


def test_a_stop_token_of_the_generation_config_without_a_row_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, 38)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 50]}))
    with pytest.raises(UsageError, match=r"has 38 rows, and none for the stop token \(id 50\)"):
        LanguageModel(folder)


def test_a_stop_token_that_only_the_teacher_lacks_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, 39, with_tokens(eos_token="<end>"), eos_token_id=38)
    student, teacher = LanguageModel(folder), LocalTeacher(folder)
    teacher.vocab_size = 38  # as another kind of teacher may say
    with pytest.raises(UsageError, match=r"model.teacher has 38 rows, and none for the stop token '<end>' \(id 38\)"):
        share_vocabulary(student, teacher)


@pytest.mark.parametrize("rows", [(38, 74), (74, 38), (38, 38)])
def test_other_tokens_without_a_row_are_named_once_and_not_sampled(
    make_run: MakeRun, tmp_path: Path, rows: tuple[int, int]
) -> None:
    folders = []
    for name, num_rows in zip(("student", "teacher"), rows, strict=True):
        folders.append(saved(tmp_path / name, num_rows, with_tokens("<extra>", "<more>")))
    with pytest.warns(UserWarning, match=r"has 38 rows, but its tokenizer has 2 tokens beyond them: ") as warned:
        run = make_run(student=LanguageModel(folders[0]), teacher=LocalTeacher(folders[1]))
    assert len(warned) == rows.count(38)
    assert "'<extra>', '<more>'; they are never sampled, and prompts with them" in str(warned[0].message)
    assert run.module.student.vocab_size == 38
    path = tmp_path / "problems.jsonl"
    path.write_text('{"id": "fine", "problem": "1 a+1"}\n{"id": "second", "problem": "2 <more>"}\n')
    run.data = PromptDataModule(JsonlProblems(str(path), answer_field=None))
    with pytest.raises(
        UsageError, match=r"data.train: line 2 of .*problems.jsonl \(id 'second'\) has a prompt with the token '<more>'"
    ):
        run.fit(1)


# -- NaN and infinite values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, name: str, value: float) -> None:
    folder = saved(tmp_path, 74)
    weights = load_file(tmp_path / "model.safetensors")
    weights[name][-1, -1] = value  # in the embedding, of a row that no comparison reads
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"has NaN or infinite weights, first in {name}: write the folder again"):
        LanguageModel(folder)


def test_a_checkpoint_with_weights_that_are_not_finite_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    make_run(callbacks=(SaveAt(path, 1),)).fit(1)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["student.model.model.norm.weight"][3] = torch.nan
    torch.save(checkpoint, path)
    with pytest.raises(UsageError, match="with NaN or infinite weights, first in student.model.model.norm.weight"):
        make_run().fit(2, ckpt_path=path)


@pytest.mark.usefixtures("loop")
def test_logits_that_are_not_finite_stop_sampling(tmp_path: Path) -> None:
    model = LanguageModel(saved(tmp_path, 38))
    with torch.no_grad():
        model.model.model.norm.weight[0] = torch.nan
    with pytest.raises(UsageError, match="^sampling: the logits of the model are NaN or infinite: lower the learning"):
        sampled(model, SAMPLING, PROMPTS)


def test_the_step_is_named(make_run: MakeRun) -> None:
    run = make_run(lr=float("inf"), refresh=1)  # two steps a pass over the first buffer, and two passes
    with pytest.raises(UsageError, match="at step 1"):
        run.fit(6)
    run = make_run()
    with torch.no_grad():
        run.module.student.model.model.norm.weight[0] = torch.nan
    with pytest.raises(UsageError, match="^sampling at step 0: the logits of the model are NaN or infinite"):
        run.fit(1)


def test_a_model_with_another_state_is_checked_too(tmp_path: Path) -> None:
    config = MambaConfig(**IDS, vocab_size=74, hidden_size=32, num_hidden_layers=1, state_size=4, initializer_range=0.3)
    model = LanguageModel(str(save_random(tmp_path, config)))
    assert int(sampled(model, SAMPLING, PROMPTS).tokens.max()) < 38
    assert LanguageModel(STUDENT).vocab_size == 38
