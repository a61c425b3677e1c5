"""A run, or several beside each other, as one HTML page that needs nothing else.

Reads what stands in the run folder and imports neither torch nor the rest of a run.
"""

import os
from pathlib import Path

from gemtune.errors import ReportError
from gemtune.report.comparison import comparison_page
from gemtune.report.page import report_page
from gemtune.report.run_record import RunRecord, read_run

__all__ = ["RunRecord", "comparison_page", "read_run", "report_page", "write_page"]


def write_page(page: str, path: Path) -> None:
    """Write it in one step: what stood there before stays until the new one is whole.

    Raises:
        ReportError: it cannot be written there.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staging.write_text(page, encoding="utf-8")
        staging.replace(path)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise ReportError(f"{path} cannot be written: {error.strerror or error}") from error
