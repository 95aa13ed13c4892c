"""Reports of calibrations as files: `calipers-report.json` beside a checkpoint."""

from calipers.reports.file import FILE_NAME, FORMAT, read_report, write_report

__all__ = ["FILE_NAME", "FORMAT", "read_report", "write_report"]
