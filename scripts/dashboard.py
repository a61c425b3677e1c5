"""Lay out the panels of a project in wandb, once for all of its runs:

    python scripts/dashboard.py tracker.project=gemtune tracker.entity=TEAM

Takes the keys of train.py, of which these two matter, and its own:

    dashboard.json=FILE.json    write the layout there, and connect to nothing

Needs `pip install 'gemtune[dashboard]'` and a key (`wandb login`). Each call makes a new view and
changes none. Runs made offline are uploaded before, with `wandb sync`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Of this checkout, installed or not.
sys.path[:0] = [str(REPOSITORY / place) for place in ("src", ".", "scripts")]

from command_line import compose, finish, own_keys

from gemtune.options import option
from gemtune.tracking.workspace import make_workspace, save_workspace


@dataclasses.dataclass
class DashboardConfig:
    """The keys of the script itself."""

    json: str = option("", "write the layout to this JSON file, and connect to nothing")


def lay_out(arguments: Sequence[str]) -> int:
    """Make the view, or write the file; the exit status."""
    own, rest = own_keys("dashboard", DashboardConfig, arguments)
    tracker = compose(rest).tracker
    if not own.json:
        print(f"panels: {save_workspace(tracker)}")
        return 0
    workspace = make_workspace(tracker.entity or "", tracker.project)
    path = Path(own.json).expanduser()
    path.write_text(json.dumps(workspace._spec, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 0


def main() -> int:
    """The exit status."""
    return finish(str(__doc__), lay_out)


if __name__ == "__main__":
    sys.exit(main())
