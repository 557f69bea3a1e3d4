"""Prompts that only the teacher sees: from a row of the data to the teacher's targets."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from opdlab.callbacks import PoolRecorder
from opdlab.data import ChatTemplate, JsonlProblems, PromptDataModule, RawTemplate, Template, prompt_set
from opdlab.diagnostics import StepTrace
from opdlab.errors import UsageError
from opdlab.gating import build_gate
from opdlab.objectives import SampledTokenOPD
from opdlab.policies import BehaviorPolicy, LanguageModel, LocalTeacher, SamplingConfig, TeacherRequest
from opdlab.progress import Progress
from opdlab.replay import read_record, record_folders
from opdlab.replay.fresh import recorded_prompts
from opdlab.rollouts import Collector, Rollouts, Targets
from opdlab.toy import ChainProblems, chain_tokenizer
from opdlab.training import score_batch
from opdlab.types import Minibatch, Problem, Prompt, trimmed
from opdlab.viewer import choose_rollouts
from tests.test_resume import SaveAt
from tests.toy_run import STUDENT, TEACHER, Run

MakeRun = Callable[..., Run]
WITH_SOLUTION = "{solution}\n{problem}"
CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a=\n{% endif %}"
)
ROWS = [
    {"id": "1", "problem": "1 a+1\n", "answer": "2", "solution": "a+1: 1+1=2\n"},
    {"id": "2", "problem": "98 a+1 b+5\n", "answer": "4", "solution": "a+1: 98+1=99\nb+5: 99+5=4\n"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = chain_tokenizer()
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def student() -> LanguageModel:
    return LanguageModel(STUDENT)


@pytest.fixture(scope="module")
def teacher() -> LocalTeacher:
    return LocalTeacher(TEACHER)


def rows_file(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@torch.no_grad()
def logprobs_after(model: LanguageModel, prompt: Sequence[int], response: Tensor) -> Tensor:
    """Log-probabilities of a response right after a prompt, by the model's own forward pass."""
    whole = torch.cat([torch.tensor(prompt), response])[None]
    logits = model.model(input_ids=whole).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, response[:, None]).squeeze(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("template", "teacher_template", "seen"),
    [
        (None, None, "a+1: 1+1=2\n\n1 a+1\n"),
        (RawTemplate(suffix=" "), None, "a+1: 1+1=2\n\n1 a+1\n "),
        (None, RawTemplate(prefix="2 "), "2 a+1: 1+1=2\n\n1 a+1\n"),
        (None, ChatTemplate(), "u:a+1: 1+1=2\n\n1 a+1\n\na=\n"),
        (ChatTemplate(), ChatTemplate(suffix="="), "u:a+1: 1+1=2\n\n1 a+1\n=\na=\n"),
    ],
)
def test_the_first_response_token_follows_the_last_token_of_each_prompt(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    student: LanguageModel,
    teacher: LocalTeacher,
    template: Template | None,
    teacher_template: Template | None,
    seen: str,
) -> None:
    source = JsonlProblems(
        rows_file(tmp_path, ROWS),
        template=template,
        teacher_text=WITH_SOLUTION,
        teacher_template=teacher_template,
    )
    prompts = prompt_set(source, tokenizer, 99, max_teacher_prompt_tokens=99).prompts
    assert prompts[0].teacher_tokens is not None
    # The toy's tokenizer knows no "u", which stays one token of its own.
    assert list(prompts[0].teacher_tokens) == tokenizer(seen)["input_ids"]
    behavior = BehaviorPolicy(student, SamplingConfig(num_samples=2, max_new_tokens=12))
    pool = Collector(behavior, teacher, TeacherRequest(top_k=3)).collect(prompts, seed=0)
    rollouts, targets = trimmed(pool.rollouts, pool.targets)
    assert rollouts.teacher_prompt_mask is not None
    assert rollouts.teacher_prompt_mask.sum(1).tolist() == [len(p.teacher_tokens or ()) for p in prompts for _ in "12"]
    assert targets.support_ids is not None
    for row in range(4):
        prompt, response = prompts[row // 2], rollouts.tokens[row][rollouts.mask[row]]
        assert prompt.teacher_tokens is not None
        for values, model, tokens in (
            (rollouts.behavior_logprobs, student, prompt.tokens),
            (targets.logprobs, teacher.model, prompt.teacher_tokens),
        ):
            expected = logprobs_after(model, tokens, response)
            torch.testing.assert_close(values[row][rollouts.mask[row]], expected, rtol=0, atol=1e-4)


class Watched(LocalTeacher):
    """Keeps the prompts that it receives."""

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
        masks = zip(rollouts.prompt_tokens, rollouts.prompt_mask, strict=True)
        self.seen = [tokens[mask].tolist() for tokens, mask in masks]
        return super().score(rollouts, request, progress)


def test_a_teacher_need_not_know_of_prompts_of_its_own(student: LanguageModel) -> None:
    problem, teacher = Problem("0", "1 a+1\n", "2"), Watched(TEACHER)
    prompts = [Prompt(0, problem, (8, 5), (4, 3, 5)), Prompt(1, problem, (7, 5))]
    behavior = BehaviorPolicy(student, SamplingConfig(max_new_tokens=2))
    Collector(behavior, teacher, TeacherRequest()).collect(prompts, seed=0)
    assert teacher.seen == [[4, 3, 5], [7, 5]]  # the student's where a problem has none for the teacher


def test_the_teacher_sees_the_students_prompt_unless_it_has_its_own(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain = prompt_set(JsonlProblems(rows_file(tmp_path, ROWS)), tokenizer, 99, max_teacher_prompt_tokens=99)
    assert [prompt.teacher_tokens for prompt in plain.prompts] == [None, None]
    source = JsonlProblems(rows_file(tmp_path, ROWS), teacher_text=WITH_SOLUTION)
    assert prompt_set(source, tokenizer, 99).prompts[0].teacher_tokens is None  # a benchmark has no teacher
    zeros, mask = torch.zeros(1).long(), torch.ones(1, 1, dtype=torch.bool)
    rollouts = Rollouts(*2 * (torch.tensor([[7]]), mask), torch.zeros(1, 1), *5 * (zeros,))
    assert rollouts.as_teacher_sees() is rollouts


def test_a_chat_keeps_its_turns(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}]
    rows = [{"problem": turns, "answer": "2", "note": {"hint": 7}}]
    source = JsonlProblems(rows_file(tmp_path, rows), teacher_text="{problem}{note.hint}{{3}}")
    (prompt,) = prompt_set(source, tokenizer, 99, max_teacher_prompt_tokens=99).prompts
    assert tokenizer.decode(prompt.tokens) == tokenizer.decode(tokenizer("s:1\nu:2\na=\n")["input_ids"])
    assert list(prompt.teacher_tokens or ()) == tokenizer("s:1\nu:27{3}\na=\n")["input_ids"]


def test_long_prompts_of_the_teacher_are_left_out_and_counted(tmp_path: Path) -> None:
    path = rows_file(tmp_path, ROWS)
    data = PromptDataModule(JsonlProblems(path, teacher_text=WITH_SOLUTION), max_teacher_prompt_tokens=18)
    data.prepare(chain_tokenizer(), training=True)
    assert data.train_prompts is not None
    assert [prompt.problem.id for prompt in data.train_prompts.prompts] == ["1"]
    assert data.train_prompts.num_teacher_too_long == 1
    assert str(data.cleaning_report).endswith("0 too long, 1 too long for the teacher, 1 kept")
    short = PromptDataModule(JsonlProblems(path, teacher_text=WITH_SOLUTION), max_teacher_prompt_tokens=9)
    with pytest.raises(UsageError, match=r"data.max_teacher_prompt_tokens is 9, but every prompt that the .* 18 tok"):
        short.prepare(chain_tokenizer(), training=True)
    with pytest.raises(UsageError, match="max_teacher_prompt_tokens is 0, but must be at least 1"):
        PromptDataModule(JsonlProblems(path), max_teacher_prompt_tokens=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{problem} {hint}", r"line 1, has no field 'hint'; its fields: id, problem, answer, solution"),
        ("{problem} {solutoin}", r"line 1, has no field 'solutoin'; did you mean 'solution'\?"),
        ("{solution} {more}", "line 1: the field 'more' is a list, but must be text or a finite number"),
    ],
)
def test_fields_that_a_row_lacks_are_refused(tmp_path: Path, text: str, message: str) -> None:
    rows = ROWS if "more" not in text else [{**ROWS[0], "more": [1]}]
    with pytest.raises(UsageError, match=message):
        list(JsonlProblems(rows_file(tmp_path, rows), teacher_text=text).problems())


def test_text_without_fields_is_refused() -> None:
    with pytest.raises(UsageError, match="teacher_text is 'Solve it', which names no field: put a name in braces"):
        JsonlProblems("none.jsonl", teacher_text="Solve it")
    with pytest.raises(UsageError, match=r"toy chains \(train\) has no field 'trace'; its fields: problem, an"):
        ChainProblems(2, teacher_text="{trace}").problems()


# -- in a run ---------------------------------------------------------------------------------------------------------


def privileged(make_run: MakeRun, **options: Any) -> Run:
    return make_run(data={"train": ChainProblems(16, teacher_text=WITH_SOLUTION)}, **options)


def test_a_resumed_run_keeps_the_teachers_prompts(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "inside.ckpt"
    whole = privileged(make_run)
    whole.trainer_options["callbacks"].append(SaveAt(path, 2))
    whole.fit(6)
    saved = torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["pool"]
    assert saved["rollouts"]["teacher_prompt_tokens"].shape[1] > saved["rollouts"]["prompt_tokens"].shape[1]
    resumed = privileged(make_run)
    resumed.fit(6, ckpt_path=path)
    assert resumed.recorder.losses == whole.recorder.losses[2:]
    with pytest.raises(UsageError, match=r"data.train \(the teacher's prompts\) is None, but \w+ in ckpt_path"):
        make_run().fit(6, ckpt_path=path)


def test_records_and_pages_have_the_teachers_prompts(make_run: MakeRun) -> None:
    run = privileged(make_run, callbacks=(PoolRecorder(steps=[1]),), objective=SampledTokenOPD())
    trainer = run.fit(1)
    (folder,) = record_folders(Path(str(trainer.log_dir))).values()
    record = read_record(folder)
    assert run.data.train_prompts is not None
    prompts = {prompt.index: prompt for prompt in run.data.train_prompts.prompts}
    for prompt in recorded_prompts(record):
        assert (prompt.tokens, prompt.teacher_tokens) == (
            prompts[prompt.index].tokens,
            prompts[prompt.index].teacher_tokens,
        )
    (shown, *_) = choose_rollouts([trace_of(run, record.batches[0].rollouts, record.batches[0].targets)], 2)
    assert shown.teacher_prompt_tokens is not None
    assert tuple(shown.teacher_prompt_tokens.tolist()) == prompts[shown.prompt_id].teacher_tokens


def trace_of(run: Run, rollouts: Rollouts, targets: Targets) -> StepTrace:
    batch = Minibatch(rollouts, targets, torch.arange(len(rollouts)), 1, 1, ((rollouts, targets),), 0, 0, {})
    scored = score_batch(run.module.student, run.module.objective, batch, 1)
    gates = build_gate("none")(scored.inputs)
    return StepTrace(rollouts, 0, 1, scored.inputs, gates, rollouts.mask.float(), {}, None, targets)
