"""The documentation is correct: pages, options, command lines, code, numbers. Building it is `make docs`."""

import csv
import importlib
import inspect
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from opdlab.cli import main
from opdlab.cli.config_files import expand_names
from opdlab.cli.export import parser as export_parser
from opdlab.cli.parsing import fit_parser, parse_fit
from opdlab.cli.replay import parser as replay_parser
from opdlab.cli.report import parser as report_parser
from opdlab.cli.screen import parser as screen_parser
from opdlab.cli.serve_teacher import parser as serve_parser
from opdlab.cli.sharding_checks import num_processes
from opdlab.cli.study import find_study, plain_config, plan_study, shipped_studies
from opdlab.cli.study import parser as study_parser
from opdlab.diagnostics import metric_table
from opdlab.gating import DriftGate, GateStrategy, RuleGate, gate_names, gate_registry
from opdlab.objectives.base import objective_registry
from opdlab.policies import sampler_registry
from opdlab.studies.study import read_study
from tests.studies.tiny import SHORT, study_run
from tests.test_package import PUBLIC

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "configs/README.md", "configs/paper/README.md"))]
GATES = [name for name in gate_names() if gate_registry().get(name).__module__.startswith("opdlab.strategies.")]
OBJECTIVES = objective_registry().names()

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INCLUDE = re.compile(r"^<!-- include: (\S+)#(\S+) -->$", re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def section(text: str, heading: str) -> str:
    found = re.search(rf"^(#+) {re.escape(heading)}$(.*?)(?=^#{{1,2}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no heading {heading}"
    return found[2]


# -- the site ---------------------------------------------------------------------------------------------------------


def entries(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for value in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from entries(value)


def test_every_page_is_in_the_navigation_once_and_there_is_no_other() -> None:
    hooks = (DOCS / "scripts/hooks.py").read_text()
    from_elsewhere = dict(re.findall(r'^    "(\S+\.md)": "(\S+\.md)",$', hooks, re.MULTILINE))
    assert all((ROOT / source).is_file() for source in from_elsewhere)
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES} | set(from_elsewhere.values())
    assert sorted(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == sorted(pages)


def test_includes_lead_to_a_heading() -> None:
    for page in PAGES:
        for name, anchor in INCLUDE.findall(page.read_text()):
            headings = re.findall(r"^#+ (.*)$", (ROOT / name).read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings], page


def test_every_public_module_has_its_api_page() -> None:
    documented = [
        module for page in DOCS.glob("api/*.md") for module in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    assert set(PUBLIC) <= set(documented)
    assert len(documented) == len(set(documented))
    for module in documented:
        importlib.import_module(module)


# -- gates and objectives ---------------------------------------------------------------------------------------------


def documented_options(text: str) -> dict[str, str]:
    """Names and defaults in the tables of a page: option, meaning, default, unit."""
    included = "".join(section((ROOT / file).read_text(), "Every gate's options") for file, _ in INCLUDE.findall(text))
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", text + included, re.MULTILINE)
    cells = {name: re.split(r"(?<!\\)\|", rest) for name, rest in rows}
    return {name: row[1].strip() for name, row in cells.items() if len(row) == 3}


def options(*classes: type) -> dict[str, str]:
    """Names and defaults in the signatures, as YAML writes them."""
    parameters = [p for cls in classes for p in inspect.signature(cls).parameters.values()]
    return {p.name: "null" if p.default is None else str(p.default) for p in parameters if p.default is not p.empty}


CONTROLS = [gate for gate in GATES if issubclass(gate_registry().get(gate), RuleGate)]


@pytest.mark.parametrize("gate", CONTROLS)
def test_every_control_has_a_section_with_its_options_and_source(gate: str) -> None:
    text = (DOCS / "gates/controls.md").read_text()
    cls = gate_registry().get(gate)
    assert documented_options(section(text, gate)) == options(cls)
    assert documented_options(section(text, "Options of all of them")) == options(GateStrategy, RuleGate)
    assert "https://" in section(text, gate)


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate not in CONTROLS])
def test_every_gate_has_a_page_with_its_picture_and_options(gate: str) -> None:
    text = (DOCS / f"gates/{gate}.md").read_text()
    assert text.startswith(f"# {gate}\n")
    assert f"../pictures/gate-{gate}.svg" in text
    assert (DOCS / f"pictures/gate-{gate}.svg").is_file()
    assert "https://arxiv.org/abs/2606.24084" in text
    assert documented_options(text) == options(gate_registry().get(gate), GateStrategy, DriftGate)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_has_a_section_with_its_options(objective: str) -> None:
    text = section((DOCS / "objectives.md").read_text(), objective)
    assert documented_options(text) == options(objective_registry().get(objective))


def test_the_table_of_gates_has_the_examples_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "scripts")
    script = runpy.run_path(str(DOCS / "scripts/gate_table.py"))
    lines = script["table"](script["load"]())
    del sys.modules["example"]
    assert "\n".join(lines) in (DOCS / "gates/index.md").read_text()


def test_the_tables_of_metrics_are_up_to_date() -> None:
    script, text = runpy.run_path(str(DOCS / "scripts/metric_tables.py")), (DOCS / "metrics.md").read_text()
    assert script["page"](text) == text, "run python docs/scripts/metric_tables.py"


# -- code and command lines -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; what code registers is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (gate_registry(), objective_registry(), sampler_registry()):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(metric_table, "_TABLE", dict(metric_table._TABLE))
    yield tmp_path
    for name in [name for name in sys.modules if (tmp_path / f"{name}.py").is_file()]:
        del sys.modules[name]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_code_runs(page: Path, folder: Path) -> None:
    code_blocks = blocks(page, "python")
    if any("runs/quickstart" in code for code in code_blocks):
        few = "--data.benchmarks.toy.num_problems 4 --model.eval_sampling.max_new_tokens 24 --model.sampling"
        assert main(["fit", "-c", "quickstart", *f"{few}.max_new_tokens 24 --trainer.max_steps 1".split()]) == 0
    for study in {found for code in code_blocks for found in re.findall(r"runs/studies/([\w-]+)/report/tables", code)}:
        shutil.copytree(DOCS / "results" / study / "tables", folder / "runs/studies" / study / "report/tables")
    for number, code in enumerate(code_blocks):
        # In a file, so that testers find the class by its path, and later blocks what a block with a file's name has.
        named = re.match(r"# (\w+)\.py\b", code)
        module = named[1] if named else f"{page.stem}_block_{number}"
        (folder / f"{module}.py").write_text(code)
        importlib.invalidate_caches()
        importlib.import_module(module)


def test_the_pages_objective_runs_from_yaml(folder: Path) -> None:
    write_files(DOCS / "own_objective.md", folder)
    example = (folder / "my_objectives.py").read_text()
    assert len(example.strip().splitlines()[1:]) == 15
    importlib.invalidate_caches()
    options = "--trainer.limit_val_batches 0 --sample_logger.every_n_steps 1 --model.sampling.max_new_tokens 24"
    recorded = "--save_pools true --pool_recorder.every_n_steps 1 --trainer.max_steps 2"
    assert main(["fit", "-c", "my_run.yaml", *options.split(), *recorded.split()]) == 0
    (page, *_) = (folder / "runs").rglob("step-*.html")
    assert "SquaredGap(margin=0.5)" in page.read_text()
    run = page.parents[1]
    asked = ["--objectives", "teacher_topk", "--gates", "block64", "--draws", "2", "--steps", "2"]
    assert main(["replay", str(run), *asked]) == 0
    with (run / "replay" / "replay.csv").open() as file:
        assert {row["objective"] for row in csv.DictReader(file)} == {"squared_gap", "teacher_topk"}


def test_the_pages_study_runs_the_objective(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(DOCS / "own_objective.md", folder)
    study = yaml.safe_load((folder / "my_objective_study.yaml").read_text())
    small = {"overrides": SHORT, "seeds": [0], "budgets": [2], "variants": study["variants"][:2]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**study, **small}))
    assert study_run(monkeypatch, folder / "tiny.yaml") == 0
    saved = [path.read_text() for path in folder.rglob("gap/seed-0/**/config.yaml")]
    assert any("my_objectives.SquaredGap" in text for text in saved)
    assert list(folder.rglob("gap/seed-0/evaluations/*/*.jsonl"))


def commands(page: Path) -> Iterator[str]:
    """Command lines in blocks and in the text, those with placeholders left out."""
    text = page.read_text()
    lines = "\n".join(blocks(page, "sh", "bash")).replace("\\\n", " ").splitlines()
    for line in [*lines, *re.findall(r"`(opdlab [^`\n]*)`", FENCE.sub("", text))]:
        line = re.sub(r"^(?:srun|torchrun .* -m) (opdlab .*?)(?: \"\$@\")?$", r"\1", line)
        found = re.match(r"(?:\w+=\S+ )*(opdlab (?:gates|objectives|\w[\w-]* .*))", line)
        if found and not re.search(r"…|\||NAME|FILE|: error:", found[1]):
            yield found[1]


def write_files(page: Path, folder: Path) -> None:
    """Blocks that begin with a file's name are that file."""
    for code in blocks(page, "python", "yaml"):
        if found := re.match(r"# (\w+\.(?:py|yaml))\b", code):
            (folder / found[1]).write_text(code)


@pytest.mark.parametrize("name", ["scale", "fsdp2"])
def test_commands_for_several_processes_are_accepted(name: str, folder: Path) -> None:
    """The processes can share the buffer, and nothing is refused that is known before models are loaded."""
    page = DOCS / f"guide/{name}.md"
    for each in (page, ROOT / "README.md"):
        write_files(each, folder)
    words = [shlex.split(command, comments=True)[1:] for command in commands(page) if "paper/" in command]
    accepted = [
        parse_fit(arguments, "estimate") for subcommand, *arguments in words if subcommand in ("fit", "estimate")
    ]
    assert max(num_processes(config) or 1 for config in accepted) > 1


def test_the_table_of_sizes_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    before = set(sys.modules)
    sizing = importlib.import_module("sizing")
    lines = sizing.table(sizing.MODELS[::3])  # some, since each takes seconds
    for module in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]
    page = (DOCS / "guide/scale.md").read_text().splitlines()
    assert not [line for line in lines if line not in page], "put in what python benchmarks/sizing.py prints"


RUN = ("gates", "objectives", "configs", "init")
PARSERS = {
    "replay": replay_parser,
    "screen": screen_parser,
    "serve-teacher": serve_parser,
    "export": export_parser,
    "report": report_parser,
}


@pytest.mark.parametrize("page", [page for page in TEXTS if any(commands(page))], ids=name_of)
def test_command_lines_parse(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for each in (page, ROOT / "README.md"):  # the guide continues with the files of the sections that it includes
        write_files(each, folder)
    for command in commands(page):
        _, subcommand, *arguments = shlex.split(command, comments=True)
        if subcommand in RUN:
            assert main([subcommand, *arguments]) == 0
            continue
        if subcommand in PARSERS:
            PARSERS[subcommand]().parse_args(arguments)
            continue
        if subcommand == "study":
            options = study_parser().parse_args(arguments)
            file = find_study(options.run.study) if options.subcommand == "run" else None
            if file is not None and file not in shipped_studies().values():  # these have a test of their own
                plan_study(read_study(file), folder / "study", plain_config)
            continue
        try:
            fit_parser(subcommand).parse_args(expand_names(arguments))
        except SystemExit as stop:  # --print_config, --…help
            status = stop.code or 0
        except Exception as error:
            raise AssertionError(f"{name_of(page)}: {command}: {error}") from error
        else:
            status = 0
        assert status == 0, command
