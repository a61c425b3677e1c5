"""Real processes that train, started in a second: forked from one that has imported everything.

Run as a program it reads a JSON list of overrides a line, and for each forks a child that trains as
`train.py` would; it answers with the child's process id, and with its status once that has ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent


@dataclass
class Child:
    """One process that trains."""

    pid: int
    log: Path
    status: int | None = None
    """Of the exit; -9: killed."""


@dataclass
class Nursery:
    """Starts children, one at a time. Close it."""

    logs: Path
    prefix: tuple[str, ...] = ()
    """In front of the command, such as unshare."""
    _process: subprocess.Popen = field(init=False, repr=False)
    _number: int = 0

    def __post_init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        source = os.pathsep.join([str(TESTS.parent / "src"), environment.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [*self.prefix, sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONPATH": source},
            cwd=TESTS.parent,
        )

    def start(self, *overrides: str) -> Child:
        """Begin to train with these overrides of the small run."""
        self._number += 1
        log = self.logs / f"child_{self._number}.log"
        self._write([str(log), *overrides])
        return Child(int(self._read()), log)

    def wait(self, child: Child) -> int:
        """Until it has ended."""
        if child.status is None:
            child.status = int(self._read())
        return child.status

    def kill(self, child: Child) -> None:
        """SIGKILL, now. The process id is its own until it was waited for."""
        os.kill(child.pid, signal.SIGKILL)

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self, line: list[str]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the nursery ended: {self._process.poll()}"
        return line


def has_ended(child: Child) -> bool:
    """Whether it is gone, or waits to be asked for its status."""
    try:
        state = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def wait_until(what, child: Child, seconds: float = 120.0) -> bool:
    """Until `what()` holds; False if the child ends before that."""
    deadline = time.monotonic() + seconds
    while not what():
        if has_ended(child):
            return False
        assert time.monotonic() < deadline, child.log.read_text()
        time.sleep(0.0005)
    return True


def train(arguments: list[str]) -> int:
    """In the forked child: the exit status of a run."""
    from whole_runs import SMALL, compose

    from gemtune.config import find_recipe
    from gemtune.errors import UserError

    try:
        config = compose("run.name=run", *SMALL, *arguments)
        return find_recipe(config)(config)
    except UserError as error:
        print(f"error: {error}", flush=True)
        return 2


def main() -> None:
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    import datasets.packaged_modules.parquet.parquet  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.gemma4.modeling_gemma4  # noqa: F401

    import gemtune.patches
    import recipes.gemma4_sft  # noqa: F401

    torch.set_num_threads(1)
    gemtune.patches.catalogue.available()
    for line in sys.stdin:
        log, *arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                for stream in (1, 2):
                    os.dup2(output, stream)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                status = train(arguments)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        print(pid, flush=True)
        _, ended = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(ended), flush=True)


if __name__ == "__main__":
    main()
