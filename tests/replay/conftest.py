"""A recorded run, made once for the tests of the command line."""

import shutil
import sys
from pathlib import Path

import pytest
from lightning.pytorch import seed_everything

from opdlab.cli import main

SMALL = """
trainer: {max_steps: 4, val_check_interval: 100, enable_progress_bar: false, enable_model_summary: false}
model:
  sampling: {max_new_tokens: 24}
  eval_sampling: {num_samples: 2, max_new_tokens: 12}
  evaluation: {pass_at: [1], teacher: false}
  optimizer: {init_args: {lr: 0.002}}
data:
  train: {class_path: opdlab.toy.ChainProblems, init_args: {num_problems: 8}}
  benchmarks:
    toy: {class_path: opdlab.toy.ChainProblems, init_args: {num_problems: 2, split: held_out}}
  reuse: {prompts_per_pool: 4, epochs: 2, batch_size: 4}
export: {enabled: false}
save_pools: true
pool_recorder: {every_n_steps: 2}
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded run's folder, in a root of its own."""
    folder = tmp_path_factory.mktemp("replay")
    (folder / "small.yaml").write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.chdir(folder)
        assert main(["fit", "-c", "quickstart", "-c", "small.yaml"]) == 0
    seed_everything(0)
    return folder / "runs/quickstart/version_0"


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return Path(shutil.copytree(trained, tmp_path / "runs/version_0"))
