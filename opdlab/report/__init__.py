"""Reports of runs and studies: one page that stands alone, tables, figures."""

from opdlab.report.make import make_report

__all__ = ["make_report"]
