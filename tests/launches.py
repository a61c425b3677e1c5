"""Runs started as a user starts them, to be signalled, stopped and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whole_runs import CONFIGS, REPOSITORY, SMALL, RunFolder

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join(
        [str(REPOSITORY / "src"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    ),
}
LIMIT_SECONDS = 120
"""For a whole launch; tests pass shorter ones where they promise something."""


@dataclass
class Launch:
    """One `accelerate launch`, in a session (and so a process group) of its own."""

    process: subprocess.Popen[str]
    run: RunFolder

    def wait_for_step(self, step: int) -> None:
        """Until metrics.jsonl has the record of that step; fails if the launch ends before."""
        metrics = self.run.path / "metrics.jsonl"
        wanted = b'{"step": %d, "train/loss"' % step
        self.wait_until(lambda: metrics.exists() and wanted in metrics.read_bytes())

    def wait_until(self, true: Any, seconds: float = LIMIT_SECONDS) -> None:
        """Fails if the launch ends, or after some time."""
        deadline = time.monotonic() + seconds
        while not true():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"not reached:\n{self.finish(1)}")
            time.sleep(0.005)

    def workers(self) -> dict[int, int]:
        """Rank -> pid of the training processes; loader workers are not among them."""
        found = {}
        for pid in descendants(self.process.pid):
            with suppress(OSError, ValueError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if parent != self.process.pid or b"train" not in command:
                    continue
                ranks = [e[5:] for e in environment if e.startswith(b"RANK=")]
                found[int(ranks[0]) if ranks else 0] = pid
        return found

    def signal_rank(self, rank: int, number: int) -> int:
        """Send a signal to one training process; its pid."""
        pid = self.workers()[rank]
        os.kill(pid, number)
        return pid

    def signal_group(self, number: int) -> None:
        """As a terminal or a scheduler does: launcher, ranks and loader workers."""
        os.killpg(self.process.pid, number)

    def finish(self, seconds: float = LIMIT_SECONDS) -> tuple[int, str]:
        """Exit status of the launcher and everything printed.

        Waits for the workers too, which may outlive it. AssertionError after `seconds`.
        """
        deadline = time.monotonic() + seconds
        members = set(descendants(self.process.pid))
        late = False
        try:
            # Ends when the last process that holds the pipe has ended.
            output, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
            self.kill()
            output, _ = self.process.communicate()
        while not late and any(map(is_running, members)):
            late = time.monotonic() > deadline
            time.sleep(0.02)
        assert not late, f"still there after {seconds} s:\n{output}"
        return self.process.returncode, output

    def kill(self) -> None:
        """Everything of the launch, also what was stopped; workers are in groups of their own."""
        for pid in descendants(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def status(self) -> dict[str, Any]:
        """`status.json`."""
        return json.loads((self.run.path / "status.json").read_text())


def descendants(pid: int) -> list[int]:
    """Children of a process and theirs."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(c) for t in tasks for c in (t / "children").read_text().split()]
    except OSError:
        return []
    return children + [d for child in children for d in descendants(child)]


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@contextmanager
def launched(
    run_dir: Path,
    *overrides: str,
    processes: int = 2,
    script: Path = REPOSITORY / "train.py",
    environment: dict[str, str] | None = None,
    launch: Sequence[str] = (),
) -> Iterator[Launch]:
    """`accelerate launch script run.dir=run_dir run.name=run ...`; what is left is killed."""
    name = "cpu_2_processes.yml" if processes > 1 else "one_process.yml"
    program = Path(sys.executable).with_name("accelerate")
    config = CONFIGS / "accelerate" / name
    command = [program, "launch", "--config_file", config, *launch]
    if processes > 2:
        command += ["--num_processes", str(processes)]
    arguments = [f"run.dir={run_dir}", "run.name=run", *SMALL, *overrides]
    process = subprocess.Popen(
        [*map(str, command), str(script), *arguments],
        env=ENVIRONMENT | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    found = Launch(process, RunFolder(run_dir / "run", 0))
    try:
        yield found
    finally:
        found.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
