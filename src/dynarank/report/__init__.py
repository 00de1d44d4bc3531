"""Run records as pictures: static figures and one self-contained HTML page."""

from dynarank.report.page import write_report

__all__ = ["write_report"]
