"""The installed package: complete, one name, and a public surface that changes only on purpose."""

import importlib
import pkgutil
import re
import sys
import tomllib
from pathlib import Path

import pytest

import opdlab
from tests.children import run_child

ROOT = Path(__file__).parents[1]

PUBLIC = {
    "opdlab.gating": [
        *("DriftGate", "GateInputs", "GateStrategy", "Gates", "RuleGate"),
        *("Normalization", "NormalizationName", "Statistic", "dense_ids", "segment_statistic"),
        *("build_gate", "gate_names", "gate_registry", "register_gate"),
    ],
    "opdlab.strategies": [
        *("Block128Gate", "Block32Gate", "Block64Gate", "BlockGate"),
        *("NoGate", "SequenceGate", "SpanGate", "TokenGate"),
        *("FilterReweightGate", "PrefixGate", "RatioMaskGate", "SequenceRatioMaskGate", "SignConsistencyGate"),
        *("EntropyTopGate", "FreshnessGate", "HorizonGate", "RewardGate", "TeachabilityGate", "TokenImportanceGate"),
        *("TopShareGate", "TruncatedRatioGate"),
    ],
    "opdlab.callbacks": [
        *("BehaviorRefresh", "CollapseGuard", "EvaluationTable", "GateMonitor", "HFExport", "PoolRecorder"),
        *("RunCheckpoint", "RunFiles", "SampleLogger", "StopCheckpoint", "LabProgressBar"),
    ],
    "opdlab.objectives": [
        *("Objective", "PositionLosses", "Reduction", "SampledTokenOPD", "SupportDivergence", "TeacherTopK"),
        *("build_objective", "loss_shares", "objective_names", "objective_registry", "reduce_losses"),
        *("FullDivergence", "register_objective"),
    ],
    "opdlab.objectives.functional": [
        *("Correction", "sampler_correction"),
        *("Divergence", "Estimator", "Reference", "Shape", "Tail", "clip_binds", "full_divergence", "group_reward"),
        *("policy_gradient_loss", "sampled_token_divergence", "sampled_token_loss", "support_divergence"),
        *("teacher_advantage", "teacher_topk_loss"),
    ],
    "opdlab.scoring": [
        *("Head", "LowRank", "SupportTail", "TokenStatistics", "TopK", "support_logits", "support_overlap"),
        "support_statistics",
        "divergence_statistics",
        *("support_tail", "token_logprobs", "token_statistics", "topk_with_statistics", "topk_with_tail"),
    ],
    "opdlab.metrics": ["MajorityVote", "PassAtK", "ProblemMean"],
    "opdlab.verifiers": [
        *("BoxedVerifier", "ExactMatchVerifier", "FunctionVerifier", "JsonSchemaVerifier", "MathVerifier"),
        *("NumericVerifier", "RegexVerifier", "Verdict", "Verifier", "WorkerVerifier"),
    ],
    "opdlab.types": [
        *(
            "EvaluationBatch",
            "MergedTargets",
            "Message",
            "Minibatch",
            "Problem",
            "Prompt",
            "Rollouts",
            "StopReason",
            "Targets",
        ),
        "TeacherRequest",
        *("Part", "Verdicts", "assign_rows", "id_dtype", "left_padded", "prompts_at", "trimmed"),
    ],
    "opdlab.rollouts": [
        "DemonstrationConfig",
        *("Collector", "Minibatch", "Pool", "ReuseConfig", "RolloutLoader", "Rollouts", "StopReason", "Targets"),
    ],
    "opdlab.toy": [
        "CapitalProblems",
        "CapitalVerifier",
        "ChainProblem",
        "ChainProblems",
        "StringProblem",
        "StringProblems",
        "ToyProblems",
        "chain_problems",
        "chain_tokenizer",
        "string_problems",
        "string_tokenizer",
    ],
    "opdlab.policies": [
        *("AdapterConfig", "BaseTeacher", "StopTokens", "share_vocabulary", "single_token_ids", "warn_of_stop_tokens"),
        *("BehaviorPolicy", "LanguageModel", "LocalTeacher", "Sampler", "SamplingConfig", "Scored"),
        *("Samples", "TransformersSampler", "register_sampler", "sample_rollouts", "sampler_registry"),
        *("BehaviorConfig", "NoTeacher", "Teacher", "TeacherHolder", "TeacherRequest", "check_same_vocabulary"),
        *("RoutedTeacher", "SelfTeacher", "ServedTeacher", "TargetCache", "check_targets"),
        *("EngineSampler", "VLLMSampler", "VLLMServerSampler"),
    ],
    "opdlab.data": [
        *("Benchmark", "ChatTemplate", "CleaningReport", "CleaningConfig", "DapoMath17k", "EvaluationBatch"),
        *("JsonlProblems", "Problem", "ProblemSource", "ProblemStore", "Prompt"),
        *("PromptDataModule", "PromptSet", "RawTemplate"),
        *("DemonstrationConfig", "ReuseConfig", "TableProblems", "Template", "prompt_set"),
    ],
    "opdlab.training": [
        *("NonFiniteLossError", "OPDModule", "ScoredBatch", "gate_inputs", "join_gate_inputs", "score_batch"),
        "split_gates",
    ],
    "opdlab.diagnostics": [
        *("Chart", "Metric", "StepRecord", "StepTrace", "find_metric", "hidden_gradient_norms", "merge_records"),
        *("metric_rows", "register_metric", "step_metrics", "step_record", "teacher_support_overlap"),
    ],
    "opdlab.replay": [
        *("GateSummary", "Grid", "RecordedStep", "ReplayConfig", "ReplayedStep", "Replayer", "Variant"),
        *("expand", "read_record", "record_folders", "summarise"),
    ],
    "opdlab.screening": [
        *(
            "Check",
            "LIMITS",
            "Limits",
            "Missing",
            "Pair",
            "ScreenConfig",
            "Screening",
            "judge",
            "render_page",
            "screen",
        ),
        "write_results",
    ],
    "opdlab.viewer": [
        *("INDEX", "RolloutText", "ShownRollout", "choose_rollouts", "color_scale", "drop_pages_after"),
        *("markdown_literal", "page_name", "quantities", "render_page", "token_texts", "visible", "write_page"),
    ],
    "opdlab.testing": ["GateTester", "ObjectiveTester"],
    "opdlab.runs": ["Run", "load_run"],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module: str) -> None:
    imported = importlib.import_module(module)
    assert [name for name in PUBLIC[module] if not hasattr(imported, name)] == []
    if hasattr(imported, "__all__"):
        assert sorted(imported.__all__) == sorted(PUBLIC[module])


def test_the_package_offers_its_public_names_lazily() -> None:
    code = (
        "import sys, opdlab; heavy = {'torch', 'lightning', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy; print(*(getattr(opdlab, name) for name in dir(opdlab) if name in opdlab.__all__))"
    )
    result = run_child([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert "OPDModule" in result.stdout
    with pytest.raises(AttributeError, match="module 'opdlab' has no attribute 'Nothing'"):
        opdlab.Nothing  # noqa: B018


def test_the_module_keeps_its_import_path() -> None:
    # Saved configurations and programs name it.
    from opdlab.module import BehaviorConfig, NonFiniteLossError, OPDModule

    assert OPDModule is opdlab.OPDModule
    assert {cls.__module__.split(".")[1] for cls in (BehaviorConfig, NonFiniteLossError)} == {"policies", "training"}


def test_type_checkers_see_every_public_name() -> None:
    names = set(re.findall(r"^    from opdlab\S* import \w+ as (\w+)$", Path(opdlab.__file__).read_text(), re.M))
    assert names | {"__version__"} == set(opdlab.__all__)


def test_every_package_is_listed_for_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"opdlab", *(m.name for m in pkgutil.walk_packages(opdlab.__path__, "opdlab.") if m.ispkg)}
    assert set(listed) == found


def test_files_that_are_no_code_are_listed_for_the_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in ("viewer", "screening"):
        templates = ROOT / "opdlab" / package
        patterns = setuptools["package-data"][f"opdlab.{package}"]
        listed = {path for pattern in patterns for path in templates.glob(pattern)}
        assert {path for path in templates.rglob("*") if path.suffix in (".html", ".css", ".js")} == listed != set()


def test_folders_cannot_be_imported_under_a_second_name() -> None:
    code = "import strategies"
    result = run_child([sys.executable, "-c", code], cwd=ROOT)
    assert "import opdlab.strategies" in result.stderr


def test_the_core_does_not_know_strategies_or_callbacks() -> None:
    # Only the command line adds callbacks; the registry has the built-in gates' module as a string.
    for file in (ROOT / "opdlab").rglob("*.py"):
        if file.is_relative_to(ROOT / "opdlab" / "strategies") or file.is_relative_to(ROOT / "opdlab" / "callbacks"):
            continue
        imports = [line for line in file.read_text().splitlines() if line.startswith(("import ", "from "))]
        if file.parent.name != "cli" and file.name != "testing.py":
            assert not any("opdlab.strategies" in line or "opdlab.callbacks" in line for line in imports), file
