"""Reports of calibrations as files, figures and pages."""

from calipers.reports.file import FILE_NAME, FORMAT, read_report, write_report
from calipers.reports.page import render_page
from calipers.reports.plot import plot

__all__ = ["FILE_NAME", "FORMAT", "plot", "read_report", "render_page", "write_report"]
