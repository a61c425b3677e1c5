"""Write what a run did as one HTML page that needs nothing else, or compare runs:

    python scripts/report.py runs/NAME                 # writes runs/NAME/report.html
    python scripts/report.py a b c                     # compares runs/a, runs/b and runs/c
    python scripts/report.py a b --output page.html

A run is a folder, or the name of one below runs/. It may still be going on, or have been stopped;
the page says so. A comparison is written to comparison.html beside the first run's folder. Nothing
but the page is written, and nothing of what is read is executed. The exit status is 2 where there
is nothing to report of.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Of this checkout, installed or not.
sys.path.insert(0, str(REPOSITORY / "src"))

from gemtune.errors import ReportError
from gemtune.report import comparison_page, read_run, report_page, write_page
from gemtune.run_files import REPORT_FILE

RUNS = Path("runs")
COMPARISON_FILE = "comparison.html"


def run_folder(name: str) -> Path:
    """The folder that the argument names: itself, or one below runs/."""
    given = Path(name).expanduser()
    if not given.is_dir() and len(given.parts) == 1:
        if (RUNS / given).is_dir():
            return RUNS / given
        raise ReportError(
            f"there is neither a folder {name} nor {RUNS / name}. Name a run, or its folder."
        )
    return given


def main() -> int:
    """Write the page that the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(usage="python scripts/report.py RUN [RUN ...] [--output PAGE]")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("-o", "--output", type=Path)
    parser.format_help = lambda: __doc__ or ""  # type: ignore[method-assign]
    options = parser.parse_args()
    try:
        folders = [run_folder(name) for name in options.runs]
        records = [read_run(folder) for folder in folders]
        if len(records) == 1:
            output = options.output or folders[0] / REPORT_FILE
            page = report_page(records[0])
        else:
            output = options.output or folders[0].resolve().parent / COMPARISON_FILE
            page = comparison_page(records)
        write_page(page, output.expanduser())
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
