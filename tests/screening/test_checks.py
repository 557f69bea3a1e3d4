"""Each check turns bad where it must, on pairs with one fault each."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opdlab.data import ChatTemplate, prompt_set
from opdlab.errors import UsageError
from opdlab.policies import LanguageModel, LocalTeacher, SamplingConfig
from opdlab.progress import SilentProgress
from opdlab.screening import Missing, Pair, Screening, judge, screen
from opdlab.screening.answers import answer, continuations
from opdlab.screening.measure import Speed
from opdlab.screening.pair import ConfiguredRun, choose_prompts
from opdlab.screening.report import as_json
from opdlab.screening.thresholds import ORDER
from opdlab.toy import ChainProblems
from opdlab.verifiers import BoxedVerifier, Verdict, Verifier
from tests.policies.tiny_models import CONFIGS, save_random
from tests.screening.pairs import (
    SHORT,
    WHOLE,
    Changed,
    KnowsNoMarker,
    LosesTheThread,
    SeesPadding,
    Served,
    Shifted,
    ShiftedLogprobs,
    WithoutTemperature,
    check,
    copied,
    make_pair,
    rows,
    verdict,
)
from tests.test_viewer import byte_level
from tests.toy_run import STUDENT, TEACHER

EVERY = {
    *(
        "tokenizer",
        "stop_tokens",
        "context",
        "padding",
        "chat_template",
        "first_token",
        "thinking",
        "alignment",
        "temperature",
    ),
    *("headroom:chains", "same_model", "overlap", "gap", "entropy", "positions", "truncated", "repeated", "prefixes"),
    *("objective", "memory", "time"),
}


@pytest.fixture(scope="module")
def whole() -> Screening:
    """The toy pair, with whole answers."""
    return screen(make_pair(), WHOLE)


@pytest.fixture(scope="module")
def random_teacher(tmp_path_factory: pytest.TempPathFactory) -> LocalTeacher:
    config = CONFIGS["qwen3"]()
    config.initializer_range = 0.6
    return LocalTeacher(str(save_random(tmp_path_factory.mktemp("random") / "model", config)))


def test_nothing_is_wrong_with_the_toy_pair(whole: Screening) -> None:
    verdicts = {each.name: each.verdict for each in whole.checks}
    assert set(verdicts) == EVERY
    assert {name for name, found in verdicts.items() if found == "not measured"} == {"memory", "time"}
    assert set(verdicts.values()) == {"good", "not measured"}, verdicts
    assert not any(each.mend for each in whole.checks)


def test_the_same_call_gives_the_same_numbers() -> None:
    results = [screen(make_pair(), replace(SHORT, seed=seed)) for seed in (0, 0, 1)]
    first, again, other = (as_json(each, {}) for each in results)
    for found in (first, again, other):
        del found["measurements"]["speed"]
    assert first == again != other


def test_the_worst_come_first() -> None:
    found = [each.verdict for each in screen(make_pair(teacher=STUDENT), SHORT).checks]
    assert found == sorted(found, key=ORDER.index)
    assert len(set(found)) > 2


def test_a_teacher_that_is_the_student() -> None:
    result = screen(make_pair(teacher=STUDENT), SHORT)
    assert check(result, "same_model").verdict == "bad"
    assert check(result, "gap").number == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        (Shifted, "alignment"),
        (ShiftedLogprobs, "alignment"),
        (WithoutTemperature, "temperature"),
        (LosesTheThread, "positions"),
    ],
)
def test_a_teacher_with_a_fault(teacher: type[Changed], name: str) -> None:
    assert verdict(make_pair(teacher=teacher()), name) == "bad"


def test_a_teacher_that_looks_at_padding(random_teacher: LocalTeacher) -> None:
    assert verdict(make_pair(teacher=SeesPadding(random_teacher.model.path)), "padding") == "bad"


def test_the_temperature_of_the_run_is_looked_at_too() -> None:
    config = replace(SHORT, temperature=0.5)
    result = screen(make_pair(teacher=WithoutTemperature()), config)
    assert check(result, "temperature").verdict == "bad"
    assert "temperature 0.5" in check(result, "temperature").finding


@pytest.mark.filterwarnings("ignore:Models disagree on the end of an answer")
def test_stop_tokens_that_differ(tmp_path: Path) -> None:
    newline = LanguageModel(TEACHER).tokenizer.get_vocab()["\n"]
    teacher = copied("teacher", tmp_path / "teacher", generation_config={"eos_token_id": [1, newline]})
    result = screen(make_pair(teacher=teacher), SHORT)
    assert check(result, "stop_tokens").verdict == "bad"
    assert "does not stop at '\\n'" in check(result, "stop_tokens").finding
    student = copied("student", tmp_path / "student", generation_config={"eos_token_id": [1, newline]})
    assert verdict(make_pair(student=student), "stop_tokens") == "look"


def test_characters_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    source = rows(tmp_path / "prompts.jsonl", "86 a+7\n", "é 3", "a+1", "b+1")
    problems = prompt_set(source, LanguageModel(STUDENT).tokenizer, 64)
    assert verdict(make_pair(problems=problems), "tokenizer") == "bad"


def test_a_template_that_the_teacher_does_not_know(tmp_path: Path) -> None:
    plain = "{{ messages[-1].content }}"
    teacher = copied("teacher", tmp_path / "teacher", tokenizer_config={"chat_template": plain})
    chains = [f"{start} a+7 b*9 c-1 d+2 e+3 f*2 g+4 h-5 i+6 j*3 k+1\n" for start in range(10, 14)]
    chats = [[{"role": "user", "content": text}] for text in chains]
    for template, expected in (("p" + plain, "bad"), (plain, "good")):
        folder = copied("student", tmp_path / f"student-{expected}", tokenizer_config={"chat_template": template})
        source = rows(tmp_path / "prompts.jsonl", *chats)
        problems = prompt_set(source, LanguageModel(folder).tokenizer, 128)
        result = screen(make_pair(folder, KnowsNoMarker(teacher), problems, template=source.template), SHORT)
        assert (check(result, "chat_template").verdict, check(result, "first_token").verdict) == (expected, expected)
    assert "0% of the prompts differently" in check(result, "chat_template").finding


def test_thinking_that_only_one_of_both_begins(tmp_path: Path) -> None:
    config = CONFIGS["llama"]()
    config.vocab_size, config.eos_token_id, config.pad_token_id = 300, 0, 0
    folders = []
    for name, end in (("student", "A:"), ("teacher", "A: <think>\n")):
        tokenizer = byte_level()
        tokenizer.chat_template = "Q: {{ messages[-1].content }} " + end
        folders.append(str(save_random(tmp_path / name, config, tokenizer)))
    source = rows(tmp_path / "prompts.jsonl", *([[{"role": "user", "content": text}] for text in ("cat", "hat")]))
    problems = prompt_set(source, LanguageModel(folders[0]).tokenizer, 64)
    result = screen(
        make_pair(folders[0], folders[1], problems, template=ChatTemplate()), replace(SHORT, max_new_tokens=4)
    )
    assert check(result, "thinking").verdict == "bad"
    assert "'<think>'" in check(result, "thinking").finding
    assert check(result, "headroom:chains").finding.startswith("not measured: prompts have no answers, or no verifier")
    assert check(result, "prefixes").verdict == "not measured"


def test_a_teacher_whose_tokens_the_student_never_takes(random_teacher: LocalTeacher) -> None:
    pair = make_pair(TEACHER, random_teacher)
    result = screen(pair, replace(SHORT, k=4))
    for name in ("overlap", "gap", "entropy", "objective"):
        assert check(result, name).verdict == "bad", check(result, name)
    assert "full_divergence" in check(result, "objective").mend


def test_a_teacher_that_is_worse_than_its_student() -> None:
    result = screen(make_pair(TEACHER, STUDENT), WHOLE)
    for name in ("headroom:chains", "prefixes"):
        assert check(result, name).verdict == "bad", check(result, name)


def test_answers_that_end_too_late() -> None:
    assert verdict(make_pair(), "truncated") == "bad"


def test_answers_that_repeat(random_teacher: LocalTeacher) -> None:
    student = LanguageModel(random_teacher.model.path)
    with torch.no_grad():  # without layers, a model with tied embeddings finds each token's own most likely
        for name, parameter in student.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    repeated = check(screen(make_pair(student), replace(SHORT, top_p=1e-6)), "repeated")
    assert repeated.verdict == "bad", repeated


def test_memory_time_and_the_configured_support(whole: Screening) -> None:
    run = ConfiguredRun("TeacherTopK", 2, 1 << 20, 4, 32, 1 << 30, (20, 10, "does not fit"))
    checks = {each.name: each for each in judge(replace(whole.measurements, run=run))}
    assert (checks["memory"].verdict, checks["time"].verdict) == ("bad", "bad")
    assert checks["objective"].verdict == "look"
    small = replace(run, k=32, rollouts=8, num_steps=1, memory=(1, 10, "fits"))
    checks = {each.name: each for each in judge(replace(whole.measurements, run=small))}
    assert {checks[name].verdict for name in ("memory", "time", "objective")} == {"good"}
    unknown = {each.name: each for each in judge(replace(whole.measurements, run=replace(run, memory=None)))}
    assert unknown["memory"].finding == "not measured: the memory of the device is not known"


def test_the_time_of_scoring_counts_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds are those of response tokens, as a buffer's are counted; long prompts make them smaller."""
    clock = itertools.count()
    monkeypatch.setattr("opdlab.screening.measure.time.perf_counter", lambda: float(next(clock)))
    found = screen(make_pair(), SHORT).measurements
    assert isinstance(found.speed, Speed)
    tokens = found.lengths["student"].mean * SHORT.num_prompts * SHORT.num_samples
    for speed in (found.speed.sampled, found.speed.student_scored, found.speed.teacher_scored):
        seconds = tokens / speed  # the clock's are whole numbers
        assert seconds == pytest.approx(round(seconds), abs=1e-6)
        assert round(seconds) > 0


def test_an_answer_that_goes_on_is_no_longer_than_any_other() -> None:
    """The beginnings have 0 and 6 of 8 tokens, and the models stop nowhere."""
    model = LanguageModel(STUDENT)
    seen: list[str] = []

    class Noting(Verifier):
        def verify(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
            seen.extend(responses)
            return [Verdict(False, None, "different")] * len(responses)

    prompts = choose_prompts(prompt_set(ChainProblems(num_problems=2), model.tokenizer, 64).prompts, 2, 0)
    sampling = SamplingConfig(1, max_new_tokens=8)
    begun = answer(model, prompts, None, sampling, 0, progress=SilentProgress())
    short = replace(begun.rollouts, mask=begun.rollouts.mask & torch.tensor([[True] * 8, [True] + [False] * 7]))
    answers = replace(begun, rollouts=short)
    silent = [SilentProgress()] * 2
    continuations([model, model], answers, Noting(), sampling, 0.75, 0, progress=silent)
    tokens = [len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in seen]
    assert tokens == [8] * 4


def test_answers_go_on_up_to_the_last_position_of_a_model(tmp_path: Path) -> None:
    """Prompts and answers have up to 128 tokens, as the model has positions; the beginnings have 12 to 60."""
    model = LanguageModel(str(save_random(tmp_path / "gpt2", CONFIGS["gpt2"]())))
    prompts = prompt_set(ChainProblems(num_problems=4), model.tokenizer, 64)
    sampling = SamplingConfig(1, max_new_tokens=128 - prompts.facts.longest)
    begun = answer(model, prompts.prompts, None, sampling, 0, progress=SilentProgress())
    valid = torch.arange(sampling.max_new_tokens) < torch.tensor([[16], [40], [80], [80]])
    answers = replace(begun, rollouts=replace(begun.rollouts, mask=valid))
    silent = [SilentProgress()] * 2
    found = continuations([model, model], answers, BoxedVerifier(), sampling, 0.75, 0, progress=silent)
    assert (found.num_problems, found.difference) == (4, 0.0)
    pair = make_pair(model.path, LocalTeacher(model.path), problems=prompts)
    longer = replace(SHORT, max_new_tokens=sampling.max_new_tokens + 1)
    with pytest.raises(UsageError, match=r"the student has 128 positions and cannot read more"):
        screen(pair, longer)


def test_positions_beyond_those_that_a_model_was_made_for() -> None:
    assert verdict(make_pair(), "context", replace(SHORT, max_new_tokens=440)) == "good"
    result = check(screen(make_pair(), replace(SHORT, max_new_tokens=480)), "context")
    assert result.verdict == "bad"
    assert result.number is not None
    assert result.number == pytest.approx(int(result.finding.rpartition("for ")[2].split()[0]) / 512)


def test_a_served_teacher_is_asked_for_what_it_knows() -> None:
    result = screen(make_pair(teacher=Served()), SHORT)
    found = {each.name: each for each in result.checks}
    for name in ("headroom:chains", "prefixes", "chat_template", "thinking", "stop_tokens", "entropy"):
        assert found[name].verdict == "not measured", found[name]
    assert "no model in this process" in found["headroom:chains"].finding
    assert "the student's answers" in found["alignment"].finding
    for name in ("alignment", "temperature", "gap", "overlap", "same_model"):
        assert found[name].verdict == "good", found[name]
    warm = {each.name: each for each in screen(make_pair(teacher=Served()), replace(SHORT, temperature=0.8)).checks}
    assert "over the support" in warm["gap"].finding
    assert (warm["same_model"].verdict, warm["first_token"].verdict) == ("not measured", "not measured")
    assert "the server knows ratios only" in warm["first_token"].finding


def test_a_teacher_that_cannot_score_is_not_measured() -> None:
    class Refuses(Served):
        def check_request(self, request: object, temperature: float) -> None:
            raise ValueError("no")

    class Silent(Served):
        def check_request(self, request: object, temperature: float) -> None:
            raise UsageError("the server is down")

    result = screen(make_pair(teacher=Silent()), SHORT)
    assert check(result, "gap").finding == "not measured: the server is down"
    assert isinstance(result.measurements.speed, Missing)
    with pytest.raises(ValueError, match="no"):  # an error of the code is no finding
        screen(make_pair(teacher=Refuses()), SHORT)


def test_weights_and_seeds_stay() -> None:
    pair: Pair = make_pair()
    before = {name: tensor.clone() for name, tensor in pair.student.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    screen(pair, SHORT)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in pair.student.state_dict().items())
