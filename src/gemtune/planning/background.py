"""A plan that is made in a process beside the run, and read when it is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

# Ends with the run however that ends (prctl(2)), and leaves the processors to it.
_BESIDE = """
import ctypes, os, runpy, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.nice(19)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Of the launch: the plan is one process, without a GPU.
_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class BackgroundPlan:
    """`scripts/plan_memory.py` beside a run: at the lowest priority, on one thread, without a GPU.

    The run never waits for it and never fails with it.

    Args:
        path: where the script writes its document; what stands there is removed.
        command: the script and its arguments, without the interpreter.
    """

    def __init__(self, path: Path, command: Sequence[str]) -> None:
        self._path = path
        self._document: dict[str, Any] | None = None
        self._stamp: tuple[int, int] | None = None
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        path.unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if k not in _LAUNCH}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BESIDE, str(os.getpid()), *command],
            env=environment | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            start_new_session=True,  # Ctrl-C is for the run
        )

    @property
    def document(self) -> dict[str, Any] | None:
        """The newest plan that is written; None as long as there is none."""
        with suppress(OSError, ValueError):
            found = self._path.stat()
            stamp = (found.st_mtime_ns, found.st_ino)
            if stamp != self._stamp:
                self._document, self._stamp = json.loads(self._path.read_bytes()), stamp
        return self._document

    @property
    def problem(self) -> str:
        """Why there is no plan and will be none, in a line; "" otherwise."""
        status = self._process.poll()
        if status is None or self.document is not None:
            return ""
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {status}"

    def close(self) -> None:
        """End it, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._said.close()
