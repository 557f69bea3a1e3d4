"""The example of the gate pages: eight rollouts of the toy student at the end of a pool that was reused harshly.

``python docs/scripts/example.py`` samples them anew, from the shipped toy models and a seed, in half a minute, and
writes ``docs/example_rollouts.json``; :func:`load` reads that file, so that pictures and tables need no training.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from opdlab.callbacks import BehaviorRefresh
from opdlab.data import PromptDataModule, ReuseConfig
from opdlab.gating import GateInputs, Gates, build_gate
from opdlab.module import OPDModule
from opdlab.objectives import TeacherTopK
from opdlab.policies import LanguageModel, LocalTeacher, SamplingConfig
from opdlab.toy import ChainProblems

FILE = Path(__file__).parents[1] / "example_rollouts.json"
NUM_ROLLOUTS = 8
# What the pages show of it.
NAMES = ("none", "token", "sequence", "block32", "block64", "block128", "span")
ROW = 4  # of the rollouts
TAU = 5.0  # per nat
# How it is made.
STEPS = 16  # one pool of 64 x 4 rollouts, passed over twice in batches of 32
SEED = 0


@dataclass(frozen=True)
class Example:
    """Rollouts as a gate sees them.

    Args:
        inputs: B rollouts of T tokens.
        texts: of each rollout, its tokens' texts.
        newline_token_ids: for the span gate.
    """

    inputs: GateInputs
    texts: list[list[str]]
    newline_token_ids: list[int]

    def gates(self, name: str, **options: Any) -> Gates:
        """What the gate of that name returns for the rollouts, taken as one batch."""
        if name == "span":
            options["newline_token_ids"] = self.newline_token_ids
        return build_gate(name, **options)(self.inputs)


def load(file: Path = FILE) -> Example:
    """Read the rollouts."""
    record = json.loads(file.read_text(encoding="utf-8"))
    rollouts = record["rollouts"]
    width = max(len(rollout["token_ids"]) for rollout in rollouts)

    def padded(key: str) -> Tensor:
        return torch.tensor([rollout[key] + [0] * (width - len(rollout[key])) for rollout in rollouts])

    lengths = torch.tensor([len(rollout["token_ids"]) for rollout in rollouts])
    inputs = GateInputs(
        tokens=padded("token_ids"),
        mask=torch.arange(width) < lengths.unsqueeze(1),
        behavior_logprobs=padded("behavior_logprobs"),
        current_logprobs=padded("current_logprobs"),
    )
    return Example(inputs, [rollout["tokens"] for rollout in rollouts], record["newline_token_ids"])


class _LastStep(pl.Callback):
    """Keeps the trace of the last training step."""

    trace: Any = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trace = outputs["trace"]


def record() -> dict[str, Any]:
    """Train on a pool as harshly as `-c harsh_reuse` does, and tell of the last step's first rollouts."""
    torch.set_num_threads(1)
    pl.seed_everything(SEED)
    student = LanguageModel("package://opdlab.toy/models/student")
    module = OPDModule(
        student,
        LocalTeacher("package://opdlab.toy/models/teacher"),
        TeacherTopK(k=32),
        build_gate("none"),
        sampling=SamplingConfig(num_samples=4, max_new_tokens=176),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-4, betas=(0.9, 0.95)),
    )
    data = PromptDataModule(ChainProblems(256), {}, ReuseConfig(prompts_per_pool=64, epochs=2, batch_size=32))
    last = _LastStep()
    pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=STEPS,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        callbacks=[BehaviorRefresh(every_n_steps=16), last],
    ).fit(module, datamodule=data)
    gate = build_gate("span")
    gate.setup(student.tokenizer)
    return {
        "what": "rollouts of opdlab's toy student, sampled by the untrained student and scored again by the student of "
        f"step {STEPS - 1}; log-probabilities in nats; made by docs/scripts/example.py",
        "newline_token_ids": gate.newline_token_ids,
        "rollouts": [_told(last.trace.inputs, row, student.tokenizer) for row in range(NUM_ROLLOUTS)],
    }


def _told(inputs: GateInputs, row: int, tokenizer: Any) -> dict[str, Any]:
    mask = inputs.mask[row].bool()
    ids = inputs.tokens[row][mask].tolist()
    return {
        "token_ids": ids,
        "tokens": [tokenizer.decode([index]) for index in ids],
        "behavior_logprobs": [round(value, 4) for value in inputs.behavior_logprobs[row][mask].tolist()],
        "current_logprobs": [round(value, 4) for value in inputs.current_logprobs[row][mask].tolist()],
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(record(), ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
