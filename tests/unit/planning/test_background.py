"""A plan beside a run: read when it is there, never waited for, gone with the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gemtune.planning.background import BackgroundPlan

# Writes what it was started with, after a while.
PLANNER = """
import json, os, pathlib, sys, time
path = pathlib.Path(sys.argv[2])
path.with_suffix(".pid").write_text(str(os.getpid()))
time.sleep(float(sys.argv[1]))
told = {"nice": os.nice(0), "rank": os.environ.get("RANK"), "argv": sys.argv[1:]}
staging = path.with_suffix(".staging")
for number in (1, 2):
    staging.write_text(json.dumps(told | {"number": number}))
    staging.replace(path)
    time.sleep(0.5)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "planner.py"
    path.write_text(PLANNER)
    return path


def wait_for(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_is_read_when_it_is_there_and_again_when_it_grows(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    path = tmp_path / "plan.json"
    path.write_text('{"of": "an earlier start"}')
    began = time.monotonic()
    plan = BackgroundPlan(path, [str(script), "1.0", str(path)])
    assert time.monotonic() - began < 1 and plan.document is None and plan.problem == ""
    wait_for(lambda: plan.document)
    first = plan.document
    assert first == {
        "nice": min(19, os.nice(0) + 19), "rank": None, "argv": ["1.0", str(path)], "number": 1,
    }  # fmt: skip
    wait_for(lambda: plan.document["number"] == 2)  # type: ignore[index]
    assert plan.problem == ""
    plan.close()


def test_a_planner_that_fails_is_quoted(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('error: there is no such model')")
    plan = BackgroundPlan(tmp_path / "plan.json", [str(script)])
    wait_for(lambda: plan.problem)
    assert plan.problem == "error: there is no such model" and plan.document is None
    plan.close()


@pytest.mark.parametrize("how", ["close", "killed"])
def test_it_ends_with_the_run(script: Path, tmp_path: Path, how: str) -> None:
    path = tmp_path / "plan.json"
    if how == "close":
        plan = BackgroundPlan(path, [str(script), "100", str(path)])
        wait_for(path.with_suffix(".pid").exists)
        plan.close()
    else:
        code = (
            "import pathlib, sys, time\n"
            "from gemtune.planning.background import BackgroundPlan\n"
            "plan = BackgroundPlan(pathlib.Path(sys.argv[2]), [sys.argv[1], '100', sys.argv[2]])\n"
            "time.sleep(100)\n"
        )
        search = os.pathsep.join(sys.path)
        run = subprocess.Popen(
            [sys.executable, "-c", code, str(script), str(path)],
            env=os.environ | {"PYTHONPATH": search},
        )
        wait_for(path.with_suffix(".pid").exists)
        run.send_signal(signal.SIGKILL)
        run.wait()
    wait_for(path.with_suffix(".pid").read_text)
    pid = int(path.with_suffix(".pid").read_text())
    wait_for(lambda: not psutil.pid_exists(pid))
    assert not path.exists()
