"""scripts/inspect_checkpoint.py: what it says of whole, damaged and unfinished checkpoints."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_training import build, write

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "inspect_checkpoint.py"


Inspect = Callable[..., tuple[int, str]]


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Inspect:
    """`inspect(*arguments)` runs the script: exit status and output."""
    main = runpy.run_path(str(SCRIPT))["main"]

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        status = main()
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Steps 1 and 2 whole, 3 damaged, 4 unfinished."""
    model, optimizer = build()
    for step in (1, 2, 3):
        write(tmp_path, model, optimizer, step, keep_last=9)
    damaged = tmp_path / "checkpoints" / "step_00000003" / "rng_rank0.json"
    damaged.write_text(damaged.read_text().replace("1", "2", 1))
    (tmp_path / "checkpoints" / ".staging-step_00000004").mkdir()
    return tmp_path


def test_a_run(inspect: Inspect, run_dir: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    status, text = inspect(run_dir)
    assert status == 0
    assert "step_00000003: DOES NOT VERIFY\n  problem       rng_rank0.json is not what" in text
    assert ".staging-step_00000004: unfinished: the next save deletes it" in text
    assert "step_00000002: verifies" in text
    assert text.rstrip().endswith("step_00000002")
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before


def test_one_checkpoint_as_json(inspect: Inspect, run_dir: Path) -> None:
    status, text = inspect(run_dir / "checkpoints" / "step_00000002", "--json")
    found: dict[str, Any] = json.loads(text)
    (report,) = found["checkpoints"]
    assert status == 0 and found["resumes"] == report["path"]
    assert report["tensors"]["model"] == {"tensors": 3, "values": 27, "dtypes": ["float32"]}
    assert report["state"]["step"] == 2 and report["world_size"] == 1


def test_nothing_to_go_on_from(inspect: Inspect, run_dir: Path) -> None:
    assert inspect(run_dir / "checkpoints" / "step_00000003")[0] == 1
    status, text = inspect(run_dir / "nowhere")
    assert status == 2 and "holds no checkpoint. Give runs/NAME" in text
