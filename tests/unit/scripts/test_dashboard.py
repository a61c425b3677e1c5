"""The script: the layout as a file, and what it says where it cannot make a view."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "dashboard.py"


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """dashboard(*arguments) -> (exit status, output, errors)."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("dashboard", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # The dataclasses of the script look their module up.
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def run(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["dashboard.py", *arguments])
        status = module.main()
        return status, *capsys.readouterr()

    return run


def test_the_layout_is_written_without_an_account(dashboard, tmp_path: Path) -> None:
    pytest.importorskip(
        "wandb_workspaces", reason="not installed: pip install 'gemtune[dashboard]'"
    )
    path = tmp_path / "layout.json"
    status, output, errors = dashboard(
        "tracker.project=ours", "tracker.entity=us", f"dashboard.json={path}"
    )
    assert (status, output, errors) == (0, f"written: {path}\n", "")
    view = json.loads(path.read_text())
    assert (view["entity"], view["project"]) == ("us", "ours")
    assert view["spec"]["section"]["panelBankConfig"]["sections"]


def test_without_the_extra_it_is_refused(dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    status, output, errors = dashboard("tracker.project=ours")
    assert (status, output) == (2, "")
    assert "pip install 'gemtune[dashboard]'" in errors


def test_a_key_that_it_does_not_have(dashboard) -> None:
    status, _, errors = dashboard("dashboard.jsn=x", "tracker.project=ours")
    assert status == 2 and "dashboard.json" in errors
