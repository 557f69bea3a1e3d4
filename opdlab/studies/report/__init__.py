"""What came out of a study: paired comparisons of every variant with the baseline, and a report of them."""

from opdlab.studies.report.render import Report, make_report, write_report

__all__ = ["Report", "make_report", "write_report"]
