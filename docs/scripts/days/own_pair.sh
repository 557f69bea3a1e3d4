#!/bin/sh
# A day with a pair of one's own and chat data: screen, train with W&B offline, stop, resume, validate, export, load.
# Needs opdlab and wandb on the PATH, and nothing of the repository. Prints the minutes of each part.
set -eu
cd "$(mktemp -d)"
part() { now=$(date +%s); echo "== $1 ($(( (now - ${started:-$now}) / 60 )) min since the start)"; started=${started:-$now}; }

part "models in folders, chats in a file"
python - <<'PY'
import json
from itertools import islice
from pathlib import Path

from opdlab.policies import LanguageModel
from opdlab.toy.chain import chain_problems

for name in ("student", "teacher"):
    model = LanguageModel(f"package://opdlab.toy/models/{name}")
    model.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    model.save(Path(f"my-{name}"))
for file, split, count in (("chats.jsonl", "train", 256), ("held_out.jsonl", "held_out", 32)):
    rows = [
        {"messages": [{"role": "user", "content": chain.prompt}], "answer": str(chain.answer)}
        for chain in islice(chain_problems(split, 0), count)
    ]
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
PY
cat >checks.py <<'PY'
def check(response, answer):
    """True if the last number of the response is the answer."""
    numbers = "".join(c if c.isdigit() or c == "-" else " " for c in response).split()
    return bool(numbers) and numbers[-1] == answer
PY
cat >mine.yaml <<'YAML'
extends: base
trainer: {max_steps: 24, val_check_interval: 12, default_root_dir: runs/mine}
model:
  student: {init_args: {path: ./my-student}}
  teacher: {init_args: {path: ./my-teacher}}
  sampling: {max_new_tokens: 176}
  eval_sampling: {max_new_tokens: 176}
  optimizer: {init_args: {lr: 2.0e-4}}
data:
  train: {init_args: {path: chats.jsonl, problem_field: messages, verifier: checks.check}}
  benchmarks:
    mine: {class_path: opdlab.data.JsonlProblems, init_args: {path: held_out.jsonl, problem_field: messages, verifier: checks.check}}
YAML

part "screen"
opdlab screen -c mine.yaml --num_prompts 16 | cat

part "train with W&B offline, and stop"
export WANDB_MODE=offline
opdlab fit -c mine.yaml -c loggers/wandb >log 2>&1 & run=$!
until grep -q "^5," runs/mine/version_0/metrics.csv 2>/dev/null || ! kill -0 $run; do sleep 0.2; done # the row of step 5, or the run has failed
kill -TERM $run; wait $run || echo "exit code $?"; grep "opdlab: stopped" log

part "resume"
opdlab fit -c mine.yaml -c loggers/wandb --ckpt_path last 2>&1 | tail -n 14

part "validate, export, load"
opdlab validate -c mine.yaml --ckpt_path last 2>&1 | tail -n 8
opdlab export runs/mine/version_0 --out exported
python -c "from transformers import AutoModelForCausalLM, AutoTokenizer as T; m = AutoModelForCausalLM.from_pretrained('exported'); print(type(m).__name__, len(T.from_pretrained('exported')))"
part "done"
