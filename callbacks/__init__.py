"""Lightning callbacks of opdlab."""

if __name__ != "opdlab.callbacks":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import opdlab.callbacks (two imports of one file make two classes)"
    )

from opdlab.callbacks.behavior_refresh import BehaviorRefresh
from opdlab.callbacks.collapse_guard import CollapseGuard
from opdlab.callbacks.evaluation_table import EvaluationTable
from opdlab.callbacks.gate_monitor import GateMonitor
from opdlab.callbacks.hf_export import HFExport
from opdlab.callbacks.pool_recorder import PoolRecorder
from opdlab.callbacks.progress_bar import LabProgressBar
from opdlab.callbacks.run_checkpoint import RunCheckpoint
from opdlab.callbacks.run_files import RunFiles
from opdlab.callbacks.sample_logger import SampleLogger
from opdlab.callbacks.stop_checkpoint import StopCheckpoint

__all__ = [
    "BehaviorRefresh",
    "CollapseGuard",
    "EvaluationTable",
    "GateMonitor",
    "HFExport",
    "PoolRecorder",
    "RunCheckpoint",
    "RunFiles",
    "SampleLogger",
    "StopCheckpoint",
    "LabProgressBar",
]
