#!/bin/sh
# Build a wheel, unpack it outside the repository, and use it from there: usage check_wheel.sh PYTHON VENV_PYTHON
set -eu
venv_python=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$venv_python" -m build --wheel --outdir "$folder/dist" . >"$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
if grep -n "is absent from the .packages. configuration" "$folder/log"; then
  echo "setuptools takes a folder with data for a package that is missing in pyproject.toml" >&2
  exit 1
fi
"$venv_python" -m pip install --quiet --no-deps --target "$folder/site" "$folder"/dist/*.whl
cd "$folder"
# The editable install of the same package is found later on the path than PYTHONPATH.
PYTHONPATH="$folder/site" "$venv_python" - <<'PY'
import opdlab, opdlab.module, opdlab.cli.app
from opdlab.cli.shipped import shipped_configs
from opdlab.gating import gate_names
from opdlab.policies import LanguageModel
from opdlab.viewer import render_page

assert "site/opdlab" in opdlab.__file__.replace("\\", "/"), opdlab.__file__
assert "quickstart" in shipped_configs(), shipped_configs()
assert "block64" in gate_names()
LanguageModel("package://opdlab.toy/models/teacher")
assert "<title>Rollouts at step 7</title>" in render_page(7, [], [])
print("wheel: imports, configurations, gates, toy models and page templates are there")
PY
PYTHONPATH="$folder/site" "$venv_python" -m opdlab.toy.make_models --help >/dev/null
PYTHONPATH="$folder/site" "$venv_python" -c "from opdlab.cli import main; raise SystemExit(main(['gates']))"
PYTHONPATH="$folder/site" "$venv_python" -m opdlab fit -c quickstart --trainer.max_steps 2 --trainer.enable_progress_bar false \
  --model.eval_sampling.num_samples 2 --model.evaluation.teacher false --model.evaluation.pass_at '[1]'
test -f runs/quickstart/version_0/student/model.safetensors
PYTHONPATH="$folder/site" "$venv_python" -m opdlab init project && test -f project/config.yaml
PYTHONPATH="$folder/site" "$venv_python" -m opdlab report runs/quickstart/version_0 && test -f runs/quickstart/version_0/report/report.html
