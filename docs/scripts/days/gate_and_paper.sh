#!/bin/sh
# A day with a gate of one's own: write it, test it, compare it over seeds, replay it, and make the paper's table.
# Needs opdlab on the PATH, and nothing of the repository. Prints the minutes of each part.
set -eu
cd "$(mktemp -d)"
part() { now=$(date +%s); echo "== $1 ($(( (now - ${started:-$now}) / 60 )) min since the start)"; started=${started:-$now}; }

part "a gate"
cat >my_gates.py <<'PY'
import torch

from opdlab.gating import DriftGate, register_gate


@register_gate("thirds")
class ThirdsGate(DriftGate):
    """Beginning, middle and end of each response."""

    def segment_ids(self, inputs):
        lengths = inputs.mask.sum(1, keepdim=True)  # [B, 1]
        columns = torch.arange(inputs.mask.shape[1], device=inputs.mask.device)  # [T]
        return (3 * columns // lengths.clamp(min=1)).clamp(max=2)  # [B, T]
PY
python -c "from opdlab.testing import GateTester; from my_gates import ThirdsGate; GateTester(ThirdsGate).run()"

part "a study: two variants, four seeds"
cat >my_study.yaml <<'YAML'
name: thirds
base: [quickstart, toy_study, harsh_reuse]
overrides: [--data.benchmarks.toy.num_problems=64] # of toy_study's 256, for a first look
variants:
  - {name: none, overrides: [--model.gate=none]}
  - {name: thirds, overrides: [--model.gate=my_gates.ThirdsGate, --model.gate.tau=5]}
baseline: none
seeds: [0, 1, 2, 3]
budgets: [16]
threads: 1
YAML
opdlab study run my_study.yaml --jobs 2

part "a replay"
opdlab fit -c quickstart -c harsh_reuse --save_pools true --trainer.max_steps 16 --trainer.default_root_dir runs/recorded
opdlab replay runs/recorded/version_0 --gates none block64 my_gates.ThirdsGate | cat

part "the table of the paper"
opdlab report runs/studies/thirds
cat runs/studies/thirds/report/tables/comparisons.tex
if command -v pdflatex >/dev/null; then
  printf '%s\n' '\documentclass{article}\usepackage{booktabs}\begin{document}' \
    '\begin{table}\centering\footnotesize\input{runs/studies/thirds/report/tables/comparisons.tex}\end{table}\end{document}' >paper.tex
  pdflatex -interaction=batchmode -halt-on-error paper.tex && ls -l paper.pdf
fi
part "done"
