"""Mathematical equality: correct answers, and answers that must not hang, kill or fool the run."""

import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opdlab.errors import UsageError
from opdlab.verifiers import MathVerifier, Verdict
from opdlab.verifiers.math.judging import judge
from opdlab.verifiers.worker_pool import WorkerPool, WorkerStartError, _Worker
from tests.children import run_child
from tests.verifiers.hostile_answers import HOSTILE_ANSWERS

# Most answers here are not judged, and one test looks for the warning.
pytestmark = pytest.mark.filterwarnings("ignore:the verifier MathVerifier did not judge")

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
TIME_LIMIT = 1.0
TOWER = HOSTILE_ANSWERS["tower of nines"]


@pytest.fixture(scope="module")
def verifier() -> MathVerifier:
    """For honest answers: patient, since the tests may run on a busy machine."""
    return MathVerifier(num_workers=2, time_limit=30)


@pytest.fixture(scope="module")
def strict() -> Iterator[MathVerifier]:
    """One for all hostile answers, so that each test also shows that those before it left the workers in health."""
    verifier = MathVerifier(num_workers=6, time_limit=TIME_LIMIT)
    yield verifier
    assert verifier.verify([r"\boxed{1}", r"\boxed{2}"] * 4, ["1"] * 8) == _verdicts("1", "2") * 4


def _verdicts(*answers: str) -> list[Verdict]:
    return [Verdict(answer == "1", answer, "equal" if answer == "1" else "different") for answer in answers]


RIGHT = [
    (r"thus \boxed{\frac{2}{4}}", "0.5"),
    (r"\boxed{\dfrac12}", r"\frac{1}{2}"),
    (r"\boxed{2^{10}}", "1024"),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}"),
    (r"\boxed{\frac{\pi}{2}.}", r"\frac{\pi}{2}"),
    (r"\boxed{x^2+2x+1}", "(x+1)^2"),
    (r"\boxed{(1,2)}", "(1, 2)"),
    (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})"),
    (r"\boxed{[0,\infty)}", r"[0, \infty)"),
    (r"\boxed{\{3, 1, 2\}}", r"\{1,2,3\}"),
    (r"\boxed{2, 1}", "1,2"),
    (r"no, \boxed{3}, rather \boxed{4}", "4"),
    ("The final answer is $72$.", "72"),
    ("The answer is 1,250.", "1250"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{5}", "x=5"),
    (r"\boxed{\text{Evelyn}.}", "Evelyn"),
    (r"\boxed{east}", r"\text{east}"),
    (r"\boxed{10 cm^2}", "10"),
    (r"\boxed{5 \text{ dollars}}", "5"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{12 \text{ apples}}", "12"),
    (r"\boxed{1 1/2}", r"\frac{3}{2}"),
    (r"\boxed{1\frac12}", "1.5"),
    (r"\boxed{1 000}", "1000"),
    (r"\boxed{1,000}", "1000"),
    (r"\boxed{1\,000}", "1000"),
    (r"\boxed{3{,}14}", "3.14"),
    (r"\boxed{1.2e5}", "120000"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{50%}", "0.5"),
    (r"\boxed{12.}", "12"),
    (r"\boxed{\$5}", "5"),
    (r"\boxed{2516_{8}}", "2516_8"),
    (r"\boxed{3:45\text{ p.m.}}", "3:45 pm"),
    (r"\boxed{10\text{ apple}}", r"10\text{ apples}"),
    (r"\boxed{10}", r"10\text{ apples}"),
    (r"\boxed{x=10=10}", "10"),
    (r"\boxed{1+1=2}", "2"),
    (r"\boxed{10\\}", "10"),
    (r"\boxed{\text{The answer is }12}", "12"),
    (r"\boxed{The answer is 12}", "12"),
    (r"\boxed{\text{true}}", "True"),
    (r"\boxed{[-2,7]}", r"-2\le x\le 7"),
    (r"\boxed{-2\le x\le 7}", "[-2,7]"),
    (r"\boxed{(-\infty,2)}", "x<2"),
    (r"\boxed{x<2}", r"(-\infty,2)"),
    (r"\boxed{2(3)}", "6"),
    (r"\boxed{2\left(3\right)}", "6"),
]
# Answers close to the gold one that must not pass; some of them do in math-verify.
WRONG = [
    (r"\boxed{7}", "8"),
    (r"\boxed{-7}", "7"),
    (r"\boxed{0.33}", r"\frac{1}{3}"),
    (r"\boxed{(2,1)}", "(1,2)"),
    (r"\boxed{(1,2)}", "[1,2]"),
    (r"\boxed{(1,2]}", "(1,2)"),
    (r"\boxed{\{1,2\}}", "(1,2)"),
    (r"\boxed{(1,2)}", r"\{1,2\}"),
    (r"\boxed{(1,2)}", "12"),
    (r"\boxed{(1,2)}", "1.2"),
    (r"\boxed{\{1, 2, 3\}}", r"\{1, 2\}"),
    (r"\boxed{1,2}", "12"),
    (r"\boxed{1,2}", "1.2"),
    (r"\boxed{3,14}", "3.14"),
    (r"\boxed{1 2}", "12"),
    (r"\boxed{1 2}", "3"),
    (r"\boxed{1 2}", "2"),
    (r"\boxed{1 1/2}", "1"),
    (r"\boxed{2 3/4}", r"\frac{5}{4}"),
    (r"\boxed{2\frac{3}{4}}", r"\frac{6}{4}"),
    (r"\boxed{1 000}", "1"),
    (r"\boxed{1 000}", "0"),
    (r"\boxed{1.000}", "1000"),
    (r"\boxed{3/4}", "34"),
    (r"\boxed{10 cm}", "10 m"),
    (r"\boxed{5 \text{ cm}}", r"5 \text{ m}"),
    (r"\boxed{50}", "0.5"),
    (r"\boxed{50\%}", "5"),
    (r"\boxed{5 \text{ million}}", "5"),
    (r"\boxed{1e5}", "5"),
    (r"\boxed{y=5}", "x=5"),
    (r"\boxed{west}", r"\text{east}"),
    (r"no, \boxed{4}, rather \boxed{3}", "4"),
    (r"\boxed{2516_9}", "2516_8"),
    (r"\boxed{2516}", "2516_8"),
    (r"\boxed{1011}", "1011_2"),
    (r"\boxed{3:45 am}", "3:45 pm"),
    (r"\boxed{3:45}", "3:45 pm"),
    (r"\boxed{10\text{ oranges}}", r"10\text{ apples}"),
    (r"\boxed{11=10}", "10"),
    (r"\boxed{x=11=10}", "10"),
    (r"\boxed{x=11=10}", "x=10"),
    (r"\boxed{2+2=5}", "5"),
    (r"\boxed{The answer is 13}", "12"),
    (r"\boxed{-2\le x< 7}", "[-2,7]"),
    (r"\boxed{x<3}", r"(-\infty,2)"),
    (r"\boxed{x\le 2}", r"(-\infty,2)"),
    (r"\boxed{2(3)}", "5"),
    (r"\boxed{}", "1"),
    ("", "1"),
    ("I do not know.", "1"),
]


def test_right_and_equivalent_answers(verifier: MathVerifier) -> None:
    verdicts = verifier.verify(*zip(*RIGHT, strict=True))
    assert [case for case, verdict in zip(RIGHT, verdicts, strict=True) if not verdict.correct] == []


def test_wrong_answers(verifier: MathVerifier) -> None:
    verdicts = verifier.verify(*zip(*WRONG, strict=True))
    assert [case for case, verdict in zip(WRONG, verdicts, strict=True) if verdict.correct] == []
    assert [verdict.reason for verdict in verdicts[-3:]] == ["no answer"] * 3
    assert {verdict.reason for verdict in verdicts[:-3]} == {"different"}


@pytest.mark.parametrize(
    ("gold", "answers", "extracted"),
    [
        ("0.5", (r"\frac{2}{4}", "0.5", "1/2", r"\dfrac12", "50%", ".50"), "1/2"),
        ("7", (r"\frac{2}{4}", "0.5", "1/2", r"\dfrac12", "x = 0.5", r"\frac12 \text{ cm}"), "1/2"),
        (r"2\sqrt{2}", (r"\sqrt{8}", r"2\sqrt{2}", r"\frac{4}{\sqrt{2}}"), "2*sqrt(2)"),
        ("7", (r"\sqrt{8}", r"2\sqrt{2}", r"2 \sqrt 2."), "2*sqrt(2)"),
        ("7", ("(x+1)^2", "x^2+2x+1", "1+x(x+2)"), "x**2 + 2*x + 1"),
        ("7", (r"\{2,1\}", "1,2", "2, 1", r"\{1, 2.0\}"), "{1, 2}"),
        ("7", (r"\text{East}", "east", " East."), "east"),
        ("7", ("1000", "1,000", r"1\,000"), "1000"),
        ("10 m", ("10 cm", r"10 \text{ centimeters}"), "10 cm"),
        ("7", (r"0.5\pi", r"\frac{\pi}{2}", r"\pi/2"), "pi/2"),
    ],
)
def test_equal_answers_have_one_form(
    gold: str, answers: tuple[str, ...], extracted: str, verifier: MathVerifier
) -> None:
    verdicts = verifier.verify([rf"\boxed{{{answer}}}" for answer in answers], [gold] * len(answers))
    assert [verdict.extracted for verdict in verdicts] == [extracted] * len(answers)


def test_gold_answers_equal_themselves_with_other_numbers_in_them(verifier: MathVerifier) -> None:
    """Each integer n is written as 2n/2, so that no text is compared."""
    structured = re.compile(r"[$_%:!.]|mbox|\\frac *[0-9]|[0-9] *\\frac|[0-9],|\\text|[0-9] [0-9]")
    golds = [gold for gold in _golds("math500") if not structured.search(gold)]
    doubled = [re.sub("[0-9]+", lambda number: rf"\frac{{{2 * int(number[0])}}}{{2}}", gold) for gold in golds]
    assert sum(gold != other for gold, other in zip(golds, doubled, strict=True)) > 130
    verdicts = verifier.verify([rf"\boxed{{{other}}}" for other in doubled], golds)
    assert [gold for gold, verdict in zip(golds, verdicts, strict=True) if not verdict.correct] == []


def test_long_forms_are_cut_but_kept_apart(verifier: MathVerifier) -> None:
    verdicts = verifier.verify([rf"\boxed{{\text{{x{'1' * 300}{tail}}}}}" for tail in "ab"], ["1"] * 2)
    assert verdicts[0].extracted != verdicts[1].extracted
    assert [len(verdict.extracted or "") for verdict in verdicts] == [200, 200]


def test_hostile_answers_end_and_harm_nobody(strict: MathVerifier) -> None:
    responses = [text for hostile in HOSTILE_ANSWERS.values() for text in (hostile, r"\boxed{1}")]
    started = time.monotonic()
    verdicts = strict.verify(responses, ["1"] * len(responses))
    assert time.monotonic() - started < 30  # most are slow: one after the other, and with a second per process, 40
    assert [name for name, v in zip(HOSTILE_ANSWERS, verdicts[::2], strict=True) if v.correct] == []
    reasons = {verdict.reason for verdict in verdicts[::2]}
    assert {"time limit", "too long", "no answer"} <= reasons
    assert all(v.extracted is None or len(v.extracted) <= 200 for v in verdicts)
    assert verdicts[1::2] == _verdicts("1") * len(HOSTILE_ANSWERS)  # the honest answers between them, in order
    "".join(verdict.extracted or "" for verdict in verdicts).encode()  # can be written to a file


def test_each_answer_has_its_own_clock(strict: MathVerifier) -> None:
    """Six workers, twelve towers of which six wait for a second: all get the time limit, no more and no less."""
    towers = [TOWER.replace("{9}", f"{{{n}}}") for n in range(10, 22)]
    started = time.monotonic()
    verdicts = strict.verify(towers, ["1"] * 12)
    assert verdicts == [Verdict(False, tower[7:-1], "time limit") for tower in towers]
    assert 2 * TIME_LIMIT <= time.monotonic() - started < 2 * TIME_LIMIT + 20  # processes are replaced at once


def test_starting_a_process_is_on_no_answers_clock() -> None:
    # Loading SymPy takes longer than this.
    assert MathVerifier(num_workers=1, time_limit=0.2).verify([r"\boxed{1}"], ["1"]) == _verdicts("1")


def test_hostile_gold_is_no_different(strict: MathVerifier) -> None:
    verdicts = strict.verify([r"\boxed{1}", r"\boxed{1}"], [TOWER, "1"])
    assert [verdict.correct for verdict in verdicts] == [False, True]


def test_verdict_stands_where_only_the_canonical_form_takes_too_long(strict: MathVerifier) -> None:
    tower = "9^{9^{9^{9^{9}}}}"
    assert strict.verify([rf"\boxed{{{tower}}}"], [tower]) == [Verdict(True, tower, "equal")]


@pytest.mark.parametrize("gold", ["2016!", "2^{20000}", "9^{9^9}"])
def test_a_form_that_cannot_be_written_is_the_text(gold: str, strict: MathVerifier) -> None:
    """Right answers have one form and a vote; so have wrong ones, also those that take too long."""
    answers = [rf"\boxed{{{gold}}}", rf"\boxed{{ {gold}. }}", r"\boxed{3}", TOWER]
    right = Verdict(True, gold, "equal")
    verdicts = strict.verify(answers, [gold] * 4)
    assert verdicts[:2] == [right, right]
    assert [(v.correct, v.extracted) for v in verdicts[2:]] == [(False, "3"), (False, TOWER[7:-1])]


def test_wrong_answers_never_have_the_form_of_the_gold_one(verifier: MathVerifier) -> None:
    golds = [r"10\text{ apples}", "3:45 pm", "2516_8"]
    wrong = [r"\boxed{10\text{ oranges}}", r"\boxed{3:45 am}", r"\boxed{2516_9}"]
    verdicts = verifier.verify([*wrong, *(rf"\boxed{{{gold}}}" for gold in golds)], golds * 2)
    assert [verdict.extracted for verdict in verdicts] == ["10 oranges", "3:45am", "2516_9", "10", "3:45pm", "2516_8"]


def test_a_pool_that_was_stopped_says_so() -> None:
    pool = WorkerPool(MathVerifier.task, {}, num_workers=1, time_limit=1.0, memory_limit=1024)
    pool.stop()
    with pytest.raises(WorkerStartError, match="the verifier was stopped"):
        pool.submit(["1"], "1", True).result(timeout=60)


def test_two_threads_first_answers_start_one_pool() -> None:
    verifier = MathVerifier(num_workers=2)
    before = threading.active_count()
    threads = [threading.Thread(target=verifier.submit, args=([], [])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert threading.active_count() == before + 2  # one thread feeds a process


def test_order_is_kept(verifier: MathVerifier) -> None:
    golds = [str(i) for i in range(24)]
    responses = [rf"\boxed{{{i if i % 3 else i + 1}}}" for i in range(24)]
    verdicts = verifier.verify(responses, golds)
    assert [verdict.correct for verdict in verdicts] == [bool(i % 3) for i in range(24)]
    assert [verdict.extracted for verdict in verdicts] == [str(i if i % 3 else i + 1) for i in range(24)]


def test_submit_returns_at_once_and_repeated_answers_are_judged_once(strict: MathVerifier) -> None:
    tower = TOWER.replace("{9}", "{99}")
    started = time.monotonic()
    wait = strict.submit([tower] * 180, ["1"] * 180)
    other = strict.submit([r"\boxed{1}"], ["1"])
    assert time.monotonic() - started < TIME_LIMIT
    assert other() == _verdicts("1")
    assert wait() == [Verdict(False, tower[7:-1], "time limit")] * 180
    assert wait() == [Verdict(False, tower[7:-1], "time limit")] * 180  # may be requested again
    assert time.monotonic() - started < TIME_LIMIT + 20  # six workers would take thirty seconds for all


def test_as_many_golds_as_responses(verifier: MathVerifier) -> None:
    with pytest.raises(ValueError, match="zip"):
        verifier.submit(["1", "2"], ["1"])


def test_killed_processes_are_replaced() -> None:
    verifier = MathVerifier(num_workers=1, time_limit=30)
    assert verifier.verify([r"\boxed{1}"], ["1"]) == _verdicts("1")
    for victim in ("fork", "process"):
        process = _children(os.getpid(), "opdlab.verifiers.worker_process")[-1]
        os.kill(process if victim == "process" else _children(process)[0], signal.SIGKILL)
        assert verifier.verify([r"\boxed{1}"] * 2, ["1", "2"]) == [*_verdicts("1"), Verdict(False, "1", "different")]


def test_answers_that_are_not_judged_are_said_once() -> None:
    verifier = MathVerifier(num_workers=2, time_limit=0.3)
    said = r"MathVerifier did not judge 2 answers, .* it did not end within 0.3 s: raise verifier\.time_limit$"
    with pytest.warns(UserWarning, match=said):
        verifier.verify([TOWER, "\\boxed{1}", TOWER], ["1"] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verifier.verify([TOWER], ["1"])


def test_a_stopped_process_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opdlab.verifiers.worker_pool._GRACE", 0.3)  # five seconds otherwise
    verifier = MathVerifier(num_workers=1, time_limit=0.2)
    assert verifier.verify([r"\boxed{1}"], ["1"]) == _verdicts("1")
    process = _children(os.getpid(), "opdlab.verifiers.worker_process")[-1]
    os.kill(_children(process)[0], signal.SIGSTOP)
    assert verifier.verify([r"\boxed{1}"], ["1"]) == [Verdict(False, "1", "time limit")]
    assert verifier.verify([r"\boxed{1}"], ["1"]) == _verdicts("1")


def _children(parent: int, command: str = "") -> list[int]:
    """Processes of ``parent`` in the order of their start; their numbers begin anew at some point."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            line = (folder / "cmdline").read_text()
        except OSError:
            continue  # it has just ended
        if int(fields[1]) == parent and fields[0] != "Z" and command in line:
            found.append((int(fields[19]), int(folder.name)))
    return [process for _, process in sorted(found)]


def test_memory_is_bounded() -> None:
    verifier = MathVerifier(num_workers=1, time_limit=30, memory_limit=777)
    assert verifier.verify([r"\boxed{1}"], ["1"]) == _verdicts("1")
    process = _children(os.getpid(), "opdlab.verifiers.worker_process")[-1]
    limits = Path(f"/proc/{process}/limits").read_text()
    assert f"Max address space         {777 << 20} " in limits


def test_memory_limit_stays_within_the_systems() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); "
        "from opdlab.verifiers import MathVerifier; "
        r"print(MathVerifier(num_workers=1, memory_limit=2048).verify(['\\boxed{1}'], ['1'])[0].correct)"
    )
    assert _python(code).stdout == "True\n"


def test_an_answer_beyond_the_memory_limit_is_wrong() -> None:
    verifier = MathVerifier(num_workers=1, time_limit=30, memory_limit=512)
    # The two agree in their first digits, so they are computed: 1 GiB each.
    assert verifier.verify([r"\boxed{2^{8589934592}+1}"], ["2^{8589934592}"])[0].reason == "memory limit"
    assert verifier.verify([r"\boxed{1}"], ["1"]) == _verdicts("1")


def test_an_answer_that_kills_its_process_is_wrong() -> None:
    verifier = MathVerifier(num_workers=1, time_limit=30)
    assert verifier.verify([r"\boxed{1}"], ["1"]) == _verdicts("1")
    wait = verifier.submit([r"\boxed{2^{8589934592}+1}"], ["2^{8589934592}"])
    (fork,) = _children(_children(os.getpid(), "opdlab.verifiers.worker_process")[-1])
    time.sleep(0.5)
    os.kill(fork, signal.SIGSEGV)
    assert wait()[0].reason == "worker died"
    assert verifier.verify([r"\boxed{1}"], ["1"]) == _verdicts("1")


@pytest.mark.parametrize("boxed", [True, False])
def test_judge_says_what_it_decided_before_the_canonical_form(boxed: bool) -> None:
    outcomes: list[bool] = []
    answer = "2" if boxed else "The final answer is $2$."
    assert judge([answer], "2", boxed, outcomes.append) == Verdict(True, "2", "equal")
    assert judge([answer], "3", boxed, outcomes.append) == Verdict(False, "2", "different")
    assert outcomes == [True, False]


# -- processes -------------------------------------------------------------------------------------------------------


def _python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *options, "-c", code]
    return run_child(command, env=environment, timeout=60)


def test_processes_do_not_load_torch(verifier: MathVerifier) -> None:
    """Neither the module that they run nor, as multiprocessing would, the main script."""
    module = "opdlab.verifiers.worker_process"
    result = _python(f"import sys, {module}; print({{'torch', 'lightning', 'transformers'}} & {{*sys.modules}})")
    assert result.stdout.strip() == "set()"
    verifier.verify([r"\boxed{1}"], ["1"])
    process = _children(os.getpid(), "opdlab.verifiers.worker_process")[-1]
    assert "torch" not in Path(f"/proc/{process}/maps").read_text()
    assert "torch" in Path("/proc/self/maps").read_text()


_SCRIPT = """
import sys
from opdlab.verifiers import MathVerifier
verifier = MathVerifier(num_workers=1, time_limit=2.0)  # no guard of __main__ is needed
print(verifier.verify([r"\\boxed{1}"] * 2, ["1", "2"])[0].correct, flush=True)
wait = verifier.submit([r"\\boxed{9^{9^{9^{9^{%d}}}}}" % n for n in range(40)], ["1"] * 40)
"""


@pytest.mark.parametrize("end", ["", "del verifier, wait"])
def test_nothing_is_said_and_nothing_waits_at_the_end(end: str) -> None:
    started = time.monotonic()
    result = _python(_SCRIPT + end, "-X", "dev", "-W", "error")
    assert result.stdout == "True\n"
    assert (result.returncode, result.stderr) == (0, "")
    assert time.monotonic() - started < 40  # 40 towers would take 80 seconds


def test_processes_end_with_a_parent_that_is_killed() -> None:
    code = _SCRIPT + "import time; time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "True\n"
        _wait_until(lambda: len(_children(parent.pid)) == 1)
        processes = _children(parent.pid)
        forks = [fork for process in processes for fork in _children(process)]
        assert len(forks) == 1
        parent.kill()
    started = time.monotonic()
    _wait_until(lambda: not any(_is_alive(process) for process in processes + forks))
    assert time.monotonic() - started < 15  # an answer's time limit at most


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_processes_end_with_the_verifier() -> None:
    before = set(_children(os.getpid()))  # of other tests' verifiers
    verifier = MathVerifier(num_workers=1)
    verifier.verify([r"\boxed{1}"], ["1"])
    (process,) = set(_children(os.getpid(), "opdlab.verifiers.worker_process")) - before
    threads = threading.active_count()
    del verifier
    assert not _is_alive(process)
    assert threading.active_count() == threads - 1


def test_processes_that_cannot_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/no/such/folder"])  # a process searches where this one does
    verifier = MathVerifier(num_workers=1)
    for _ in range(2):
        with pytest.raises(WorkerStartError, match="no process can be started .* ModuleNotFoundError"):
            verifier.verify([r"\boxed{1}"] * 100, [str(n) for n in range(100)])


def test_an_interpreter_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(WorkerStartError, match="no process can be started .*/no/such/python"):
        MathVerifier(num_workers=1).verify([r"\boxed{1}"], ["1"])


def test_pickles_without_its_workers(verifier: MathVerifier) -> None:
    copy = pickle.loads(pickle.dumps(verifier))
    assert (copy.num_workers, copy.time_limit, copy.memory_limit) == (2, 30, 1024)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, r"num_workers is 0, but must be at least 1"),
        ({"time_limit": 0.0}, r"time_limit is 0.0, but must be above 0 and at most 86400 seconds"),
        ({"time_limit": float("nan")}, r"time_limit is nan, but must be above 0 and at most"),
        ({"time_limit": float("inf")}, r"time_limit is inf, but must be above 0 and at most"),
        ({"memory_limit": 100}, r"memory_limit is 100, but must lie between 512 MiB"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MathVerifier(**options)  # type: ignore[arg-type]


def test_an_error_while_judging_is_told_of_and_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next words would be about the answer before, so another worker judges the next one."""
    ended: list[subprocess.Popen[bytes]] = []

    def broken(worker: _Worker, request: bytes) -> Verdict:
        ended.append(worker._process)
        worker._channel.send_bytes(request)  # its verdict is never read
        raise ValueError("no verdict")

    verifier = MathVerifier(num_workers=1, time_limit=30)
    with monkeypatch.context() as patched:
        patched.setattr(_Worker, "judge", broken)
        with pytest.raises(ValueError, match="no verdict"):
            verifier.verify([r"\boxed{1}"], ["1"])
    assert not verifier.verify([r"\boxed{1}"], ["2"])[0].correct
    assert ended[0].poll() is not None


# -- real golds ------------------------------------------------------------------------------------------------------


def _golds(name: str) -> list[str]:
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there: the evaluation sets are not shipped")
    return [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "step"),
    [("aime24", 1), ("aime25", 1), ("amc23", 1), ("math500", 1), ("gsm8k_test", 1), ("dapo_math_17k", 17)],
)
def test_every_gold_answer_is_its_own_equal(name: str, step: int, verifier: MathVerifier) -> None:
    golds = _golds(name)[::step]
    verdicts = verifier.verify([f"so the answer is $\\boxed{{{gold}}}$." for gold in golds], golds)
    assert [(g, v) for g, v in zip(golds, verdicts, strict=True) if not v.correct] == []
    pairs = list(itertools.pairwise(golds))[:200]
    others = verifier.verify([f"\\boxed{{{answer}}}" for answer, _ in pairs], [gold for _, gold in pairs])
    fooled = {pair for pair, v in zip(pairs, others, strict=True) if v.correct and pair[0] != pair[1]}
    assert fooled <= {("5", "x=5")}
