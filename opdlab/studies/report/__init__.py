"""Reports of studies: paired comparisons of every variant with its baseline."""

from opdlab.studies.report.render import Report, make_report

__all__ = ["Report", "make_report"]
