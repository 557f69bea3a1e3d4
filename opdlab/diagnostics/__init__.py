"""What is measured of a training step, as pure functions. Nothing here knows how it is shown."""

from opdlab.diagnostics.trace import StepTrace, hidden_gradient_norms
from opdlab.diagnostics.training_metrics import StepRecord, merge_records, step_metrics, step_record

__all__ = ["StepRecord", "StepTrace", "hidden_gradient_norms", "merge_records", "step_metrics", "step_record"]
