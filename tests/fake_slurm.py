"""`srun` and `scontrol` that record their arguments and start the machines as processes here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parent.parent
BATCH = REPOSITORY / "scripts" / "cluster" / "slurm.sbatch"

RECORD = """#!{python} -S
import json, os, signal, subprocess, sys
def record(*words):
    with open(os.environ["FAKE_RECORD"], "a") as file:
        file.write(json.dumps(words) + "\\n")
"""
# As srun does: a task per machine; SIGUSR1 goes to the tasks, SIGTERM kills them; the highest code.
SRUN = """
record("srun", *sys.argv[1:])
options = [word for word in sys.argv[1:] if word.startswith("--")]
command = sys.argv[1 + len(options):]
machines = range(int(next(o for o in options if o.startswith("--nodes=")).partition("=")[2]))
tasks = [subprocess.Popen(command, env=os.environ | {"SLURM_NODEID": str(n)}) for n in machines]
def pass_on(number, _):
    record("signal", number)
    for task in tasks:
        task.send_signal(signal.SIGKILL if number == signal.SIGTERM else number)
signal.signal(signal.SIGUSR1, pass_on)
signal.signal(signal.SIGTERM, pass_on)
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
record("scontrol", *sys.argv[1:])
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1\\nmachine2")
elif sys.argv[1:3] == ["show", "job"]:
    print("   JobState=" + os.environ.get("FAKE_JOB_STATE", "RUNNING") + " Reason=None")
"""


class FakeSlurm:
    """A cluster of two machines with one process each, in `folder`."""

    job = "4321"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._record = folder / "record.jsonl"
        self._processes: list[subprocess.Popen] = []
        (folder / "bin").mkdir()
        for name, body in (("srun", SRUN), ("scontrol", SCONTROL)):
            program = folder / "bin" / name
            program.write_text(RECORD.format(python=sys.executable) + body)
            program.chmod(0o755)

    def start(self, repository: Path, *arguments: str, **environment: str) -> subprocess.Popen:
        """The batch script as SLURM starts it: a copy, somewhere else, in no folder of ours."""
        copy = self.folder / "slurm_script"
        copy.write_bytes(BATCH.read_bytes())
        variables = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PROCESSES_PER_MACHINE": "1",
            "SLURM_SUBMIT_DIR": str(repository),
            "SLURM_JOB_ID": self.job,
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "machine[1-2]",
            "FAKE_RECORD": str(self._record),
        }
        with (self.folder / "job.log").open("a") as log:  # --open-mode=append
            process = subprocess.Popen(
                ["bash", str(copy), *arguments],
                cwd="/",
                env=os.environ | variables | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def calls(self, program: str) -> list[list[str]]:
        """The arguments of every call, oldest first."""
        if not self._record.exists():
            return []
        lines = map(json.loads, self._record.read_text().splitlines())
        return [words[1:] for words in lines if words[0] == program]

    def requeued(self) -> int:
        """How often the job was sent back to the queue."""
        return self.calls("scontrol").count(["requeue", self.job])

    def log(self) -> str:
        """What the job printed."""
        return (self.folder / "job.log").read_text()

    def kill(self) -> None:
        """End what still runs, ranks in sessions of their own included."""
        for process in self._processes:
            kill_tree(process)


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to a process that has not ended, and to all that it started."""
    if process.poll() is not None:
        return
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
    process.kill()
    process.wait()
