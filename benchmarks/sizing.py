"""Memory of a GPU for students and teachers of published sizes: arithmetic only, nothing is measured.

Each cell is the largest peak of ``opdlab estimate`` over the phases of a run, for one GPU of 80 GB. The configuration
is ``paper/lsm-block64`` (responses of 16,384 tokens, layers checkpointed, weights in float32, arithmetic in bfloat16)
with the student, strategy, teacher and sampler of the cell, 512 rollouts a buffer and one a micro-batch. The models are
Qwen3's published shapes, of which only a ``config.json`` is written.

``python benchmarks/sizing.py`` prints the table of docs/guide/scale.md.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import REPOSITORY
from gpu_models import CARD_BYTES, QWEN3

sys.path.insert(0, str(REPOSITORY))

from opdlab.cli.memory_parts import estimate
from opdlab.cli.memory_table import DeviceMemory, Estimate
from opdlab.cli.parsing import parse_fit
from opdlab.cli.sharding_checks import check_sharding
from opdlab.errors import UsageError
from opdlab.estimate import ModelSize, model_size

CARD = DeviceMemory("GPU", int(CARD_BYTES), int(CARD_BYTES))
# Student, teacher, what is said of the student, its dtype, its adapter.
Models = tuple[str, str, str, str, dict[str, int] | None]
MODELS: tuple[Models, ...] = (
    ("1.7B", "4B", "", "float32", None),
    ("8B", "32B", "", "float32", None),
    ("8B", "32B", ", bfloat16", "bfloat16", None),
    ("8B", "32B", ", bfloat16, adapter", "bfloat16", {"r": 16}),
)
# Name, GPUs, strategy. With DDP a GPU of 64 needs what one of 8 needs.
SETUPS = (
    ("1", 1, "auto"),
    ("8 or 64, DDP", 8, "ddp"),
    ("8, FSDP2", 8, "model_parallel"),
    ("64, FSDP2", 64, "model_parallel"),
)
TEACHERS = {"local": (), "served": ("--model.teacher", "ServedTeacher", "--model.teacher.url", "http://teacher:8700")}
SAMPLERS = {
    "loop here": (),
    "vLLM beside": ("--model.sampler", "vllm", "--model.sampler.dtype", "bfloat16"),
    "vLLM servers": ("--model.sampler", "vllm_server", "--model.sampler.url", "http://vllm:8000"),
}
# A step has 64 rollouts: one for each of 64 GPUs. The teacher is not evaluated: sharded, it would be gathered whole.
SIZES = ("--data.reuse.prompts_per_pool", "64", "--data.reuse.batch_size", "64", "--model.evaluation.teacher", "false")


@dataclass(frozen=True)
class Cell:
    """The estimate of a process.

    Args:
        models: row: student, teacher.
        setup: row: GPUs, strategy.
        kind: column: teacher, sampler.
        estimate: of a process; None for a run that opdlab refuses.
    """

    models: str
    setup: str
    kind: str
    estimate: Estimate | None

    def __str__(self) -> str:
        """Return the largest peak in GiB, in bold if it is more than the GPU has."""
        if self.estimate is None:
            return "refused"
        peak = max(self.estimate.peak(phase, CARD.total) for phase in self.estimate.phases)
        text = f"{peak / (1 << 30):.0f}"
        return text if self.estimate.verdict(CARD).endswith(", fits") else f"**{text}**"


def cells(folder: Path, rows: Sequence[Models]) -> Iterator[Cell]:
    """Yield cells, row by row.

    Args:
        folder: for the models' configurations.
        rows: of ``MODELS``.
    """
    sizes: dict[Any, ModelSize] = {}

    def size(model: str, dtype: str, precision: str | None, adapter: dict[str, int] | None = None) -> ModelSize:
        key = model, dtype, precision, str(adapter)
        if key not in sizes:
            QWEN3[model].config().save_pretrained(folder / model)
            options = {"path": str(folder / model), "dtype": dtype, "adapter": adapter}
            sizes[key] = model_size(options, precision)
        return sizes[key]

    # The parser fills in all defaults. It takes seconds, so the values of the rows are put in afterwards.
    configs = {
        f"{teacher}, {sampler}": parse_fit(["-c", "paper/lsm-block64", *SIZES, *of_teacher, *of_sampler], "estimate")
        for teacher, of_teacher in TEACHERS.items()
        for sampler, of_sampler in SAMPLERS.items()
    }
    for student, teacher, said, dtype, adapter in rows:
        for setup, devices, strategy in SETUPS:
            for kind, config in configs.items():
                trainer = config.trainer
                models = {"student": size(student, dtype, trainer.precision, adapter)}
                if kind.startswith("local"):
                    models["teacher"] = size(teacher, "bfloat16", None)
                trainer.devices, trainer.num_nodes, trainer.strategy = min(devices, 8), -(-devices // 8), strategy
                trainer.accumulate_grad_batches = 64 // devices
                config.model.student.init_args.adapter = adapter
                try:
                    check_sharding(config)
                    found = estimate(config, models, on_cpu=False)
                except UsageError:
                    found = None
                yield Cell(f"{student} / {teacher}{said}", setup, kind, found)


def table(rows: Sequence[Models] = MODELS) -> list[str]:
    """Return the lines of the table, or of its head and the rows of some models."""
    kinds = [f"{teacher}, {sampler}" for teacher in TEACHERS for sampler in SAMPLERS]
    lines = [f"| student / teacher | GPUs | {' | '.join(kinds)} |", "|---" * (2 + len(kinds)) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        found = list(cells(Path(folder), rows))
    for first in range(0, len(found), len(kinds)):
        row = found[first : first + len(kinds)]
        lines.append(f"| {row[0].models} | {row[0].setup} | {' | '.join(map(str, row))} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
