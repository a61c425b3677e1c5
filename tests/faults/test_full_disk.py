"""A real disk, of some MiB, that fills up: said with sizes, nothing lost, and gone on from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOUNT = 'mount -t tmpfs -o size="$0" tmpfs "$1" && shift && exec "$@"'
PROGRAM = Path(__file__).with_name("fill_disk.py")
TESTS = Path(__file__).resolve().parents[1]


def on_small_disk(disk: Path, mib: int, *command: str) -> list[str]:
    """The command in a mount namespace of its own, where `disk` is a tmpfs of that size."""
    return ["unshare", "-rm", "sh", "-c", MOUNT, f"{mib}m", str(disk), *command]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where a small disk can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        tried = subprocess.run(on_small_disk(folder, 1, "true"), capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no namespaces here: {error}")
    if tried.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {tried.stderr.strip()}")
    return folder


def test_a_disk_that_fills_up(disk: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, str(PROGRAM), str(disk), str(elsewhere)]
    # Hashes of bytes must be the same in all runs of the program: there is one.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    path = [TESTS, TESTS.parent, TESTS.parent / "src", *os.environ.get("PYTHONPATH", "").split(":")]
    environment["PYTHONPATH"] = ":".join(str(folder) for folder in path if folder)
    done = subprocess.run(
        on_small_disk(disk, 120, *command),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((elsewhere / "results.json").read_text())
    whole = results.pop("whole")
    assert len(results) == 4 and len(whole["losses"]) == 4
    for name, found in results.items():
        assert "no space on the disk" in found["said"], name
        assert "16.1 MiB needed" in found["said"] and "free. Free some" in found["said"], name
        assert "previous checkpoint is untouched" in found["said"], name
        assert found["left"] == ["step_00000001"] and found["sound"], name
        assert found["losses"] == whole["losses"] and found["state"] == whole["state"], name
