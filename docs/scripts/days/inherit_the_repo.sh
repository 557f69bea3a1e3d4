#!/bin/sh
# A day with the repository: clone it, add a metric, a command and a gate, run one test, build the documentation.
# usage: inherit_the_repo.sh REPOSITORY. Prints the minutes of each part.
set -eu
repository=$(cd "$1" && pwd)
cd "$(mktemp -d)"
part() { now=$(date +%s); echo "== $1 ($(( (now - ${started:-$now}) / 60 )) min since the start)"; started=${started:-$now}; }

part "clone and install"
git clone --quiet "$repository" opdlab
cd opdlab
make .venv/.installed

part "a gate"
cat >strategies/halves.py <<'PY'
"""Two halves of each response."""

import torch
from torch import Tensor

from opdlab.gating import DriftGate, GateInputs, register_gate


@register_gate("halves")
class HalvesGate(DriftGate):
    """Gate with two segments, the halves of a response."""

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        """Return 0 in the first half and 1 in the second, [B, T]."""
        columns = torch.arange(inputs.mask.shape[1], device=inputs.mask.device)
        return (2 * columns // inputs.mask.sum(1, keepdim=True).clamp(min=1)).clamp(max=1)
PY
sed -i 's/^from opdlab.strategies.horizon/from opdlab.strategies.halves import HalvesGate\n&/; s/^    "HorizonGate",/    "HalvesGate",\n&/' strategies/__init__.py
sed -i 's/^    HorizonGate,/    HalvesGate,\n&/; s/^    "span": lambda/    "halves": HalvesGate,\n&/' tests/strategies/test_strategies.py
.venv/bin/opdlab gates | grep halves
.venv/bin/python -m pytest -q tests/strategies/test_strategies.py -k "halves or row"
.venv/bin/ruff check .

part "a metric"
cat >my_metrics.py <<'PY'
from lightning.pytorch import Callback

from opdlab.diagnostics import Metric, register_metric

register_metric(
    Metric("train/longest", "longest response", "tokens", "longest response of the step", "my_metrics.Longest")
)


class Longest(Callback):
    """Logs the longest response of each step."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        """Log it."""
        module.log("train/longest", float(batch.rollouts.num_tokens.max()))
        module.log("step", float(trainer.global_step))  # steps taken; Lightning's own number is one lower
PY
.venv/bin/opdlab fit -c quickstart --trainer.max_steps 2 --data.benchmarks.toy.num_problems 8 --trainer.callbacks+=my_metrics.Longest 2>&1 | tail -n 3
.venv/bin/python -c "import opdlab; s = opdlab.load_run('runs/quickstart/version_0').scalars[['train/loss', 'train/longest']].dropna(); print(s); assert len(s) == 2"

part "a command"
cat >opdlab/cli/hello.py <<'PY'
"""``opdlab hello``."""

from collections.abc import Sequence

from opdlab.cli.commands import PlainParser


def hello(arguments: Sequence[str]) -> int:
    """Print a greeting."""
    parser = PlainParser(prog="opdlab hello", description="Print a greeting.")
    parser.parse_args(arguments)
    print("hello")
    return 0
PY
sed -i 's/^    "replay": Command/    "hello": Command("opdlab.cli.hello:hello", "Print a greeting."),\n&/' opdlab/cli/commands.py
.venv/bin/opdlab hello
.venv/bin/opdlab --help | grep hello

part "the documentation"
make docs 2>&1 | tail -n 3
part "done"
