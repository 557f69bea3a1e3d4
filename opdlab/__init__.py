"""opdlab: gated on-policy distillation of language models on PyTorch Lightning.

Each public name is imported on first access, so ``import opdlab`` alone loads neither torch nor Lightning. No module of
the package imports this one.

Example:
    >>> import opdlab
    >>> opdlab.build_gate("block64", tau=2.0).tau
    2.0
    >>> "OPDModule" in dir(opdlab)
    True
"""

from importlib import import_module

from opdlab.version import __version__

TYPE_CHECKING = False  # not from typing, whose import takes a while, in which Ctrl-C is not handled yet
if TYPE_CHECKING:
    from opdlab.callbacks import BehaviorRefresh as BehaviorRefresh
    from opdlab.callbacks import CollapseGuard as CollapseGuard
    from opdlab.callbacks import EvaluationTable as EvaluationTable
    from opdlab.callbacks import GateMonitor as GateMonitor
    from opdlab.callbacks import HFExport as HFExport
    from opdlab.callbacks import LabProgressBar as LabProgressBar
    from opdlab.callbacks import PoolRecorder as PoolRecorder
    from opdlab.callbacks import SampleLogger as SampleLogger
    from opdlab.callbacks import StopCheckpoint as StopCheckpoint
    from opdlab.data import PromptDataModule as PromptDataModule
    from opdlab.data import ReuseConfig as ReuseConfig
    from opdlab.evaluation import EvaluationConfig as EvaluationConfig
    from opdlab.gating import DriftGate as DriftGate
    from opdlab.gating import GateInputs as GateInputs
    from opdlab.gating import Gates as Gates
    from opdlab.gating import GateStrategy as GateStrategy
    from opdlab.gating import RuleGate as RuleGate
    from opdlab.gating import build_gate as build_gate
    from opdlab.gating import gate_names as gate_names
    from opdlab.gating import register_gate as register_gate
    from opdlab.module import OPDModule as OPDModule
    from opdlab.objectives import Objective as Objective
    from opdlab.objectives import SampledTokenOPD as SampledTokenOPD
    from opdlab.objectives import TeacherTopK as TeacherTopK
    from opdlab.objectives import build_objective as build_objective
    from opdlab.objectives import objective_names as objective_names
    from opdlab.objectives import register_objective as register_objective
    from opdlab.policies import LanguageModel as LanguageModel
    from opdlab.policies import LocalTeacher as LocalTeacher
    from opdlab.policies import SamplingConfig as SamplingConfig
    from opdlab.policies import Teacher as Teacher
    from opdlab.runs import load_run as load_run
    from opdlab.testing import GateTester as GateTester
    from opdlab.testing import ObjectiveTester as ObjectiveTester

# Public names by the module that defines them.
_MODULES = {
    "opdlab.callbacks": (
        *("BehaviorRefresh", "CollapseGuard", "EvaluationTable", "GateMonitor", "HFExport", "LabProgressBar"),
        *("PoolRecorder", "SampleLogger", "StopCheckpoint"),
    ),
    "opdlab.data": ("PromptDataModule", "ReuseConfig"),
    "opdlab.evaluation": ("EvaluationConfig",),
    "opdlab.gating": (
        *("DriftGate", "GateInputs", "GateStrategy", "Gates", "RuleGate", "build_gate", "gate_names"),
        "register_gate",
    ),
    "opdlab.module": ("OPDModule",),
    "opdlab.objectives": (
        *("Objective", "SampledTokenOPD", "TeacherTopK", "build_objective", "objective_names", "register_objective"),
    ),
    "opdlab.policies": ("LanguageModel", "LocalTeacher", "SamplingConfig", "Teacher"),
    "opdlab.runs": ("load_run",),
    "opdlab.testing": ("GateTester", "ObjectiveTester"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'opdlab' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
