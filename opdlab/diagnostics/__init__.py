"""Metrics of a training step, as pure functions, and the table of all logged scalars.

Callbacks and loggers decide when something is logged.
"""

from opdlab.diagnostics import built_in_metrics as built_in_metrics
from opdlab.diagnostics.metric_table import Chart, Metric, find_metric, metric_rows, register_metric
from opdlab.diagnostics.trace import StepTrace, hidden_gradient_norms, teacher_support_overlap
from opdlab.diagnostics.training_metrics import StepRecord, merge_records, step_metrics, step_record

__all__ = [
    "Chart",
    "Metric",
    "StepRecord",
    "StepTrace",
    "find_metric",
    "hidden_gradient_norms",
    "merge_records",
    "metric_rows",
    "register_metric",
    "step_metrics",
    "step_record",
    "teacher_support_overlap",
]
