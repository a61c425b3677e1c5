"""The files for clusters: what they start, what they pass on, and when a job runs again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_slurm import BATCH, FakeSlurm

REPOSITORY = Path(__file__).resolve().parents[3]
CLUSTER = REPOSITORY / "scripts" / "cluster"
ACCELERATE = sorted((REPOSITORY / "configs" / "accelerate").glob("*.yml"))
LIMIT_SECONDS = 30
ARGUMENTS = ("run.dir=runs", "run.name=NAME", "recipe=gemma4_sft")

# Takes the place of python: as `python -m accelerate.commands.launch` it plays the launcher with
# its ranks behind it, which ends as FAKE_END says once it is told to; else it is python.
LAUNCHER = """#!{python} -S
import json, os, pathlib, signal, sys, time
if sys.argv[1] != "-m":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
rank = os.environ["SLURM_NODEID"]
end = os.environ["FAKE_END"]
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append("TERM"))
path = pathlib.Path("launched" + rank)
path.with_suffix(".staging").write_text(json.dumps(sys.argv[1:]))
path.with_suffix(".staging").rename(path)
status, _, waits = end.partition(" ")
while waits and not heard:
    time.sleep(0.01)
time.sleep(0.2)
pathlib.Path("heard" + rank).write_text(" ".join(heard))
if rank == "0" and status != "silent":
    folder = pathlib.Path("runs/NAME")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".staging").write_text(json.dumps({{"status": status, "step": 7}}))
    (folder / ".staging").rename(folder / "status.json")
time.sleep(0.2)
sys.exit(0 if status == "finished" else 1)
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[FakeSlurm]:
    fake = FakeSlurm(tmp_path)
    yield fake
    fake.kill()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What the files need of the repository, with a stand-in for python."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("configs", "scripts", "train.py"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "python").write_text(LAUNCHER.format(python=sys.executable))
    (folder / "python").chmod(0o755)
    return folder


def run_job(
    slurm: FakeSlurm, repository: Path, end: str, send: signal.Signals | None = None, **more: str
) -> int:
    """One start of the job; `send` goes to its shell once both machines run. The exit code."""
    environment = {"PYTHON": str(repository / "python"), "FAKE_END": end} | more
    job = slurm.start(repository, *ARGUMENTS, **environment)
    deadline = time.monotonic() + LIMIT_SECONDS
    if send is not None:
        while not all((repository / f"launched{rank}").exists() for rank in range(2)):
            assert job.poll() is None and time.monotonic() < deadline, slurm.log()
            time.sleep(0.01)
        job.send_signal(send)
    return job.wait(deadline - time.monotonic())


def test_each_machine_starts_one_launcher(slurm: FakeSlurm, repository: Path) -> None:
    assert run_job(slurm, repository, "finished", SLURM_CPUS_PER_TASK="7") == 0, slurm.log()
    [srun] = slurm.calls("srun")
    assert srun[-4:] == ["scripts/cluster/node.sh", *ARGUMENTS]
    assert {"--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=7"} <= set(srun)
    assert "--kill-on-bad-exit=0" in srun, "a rank that still saves would be killed"
    for rank in range(2):
        words = json.loads((repository / f"launched{rank}").read_text())
        assert words[:2] == ["-m", "accelerate.commands.launch"]
        at = words.index("train.py")
        options = dict(zip(words[2:at:2], words[3:at:2], strict=True))
        assert words[at + 1 :] == list(ARGUMENTS)
        assert 1024 < int(options.pop("--main_process_port")) < 32768
        assert options == {
            "--config_file": "configs/accelerate/several_machines.yml",
            "--num_machines": "2",
            "--num_processes": "2",
            "--machine_rank": str(rank),
            "--main_process_ip": "127.0.0.1",
        }
    assert slurm.requeued() == 0


# How the run ends, what the job's shell is sent, and whether the job is queued again.
ENDS: dict[str, tuple[str, signal.Signals | None, int]] = {
    "failed": ("failed", None, 0),
    "killed without a word": ("running", None, 0),
    "Ctrl-C": ("interrupted", None, 0),
    "a hung rank": ("hung", None, 1),
    "the time is nearly up": ("preempted when told", signal.SIGUSR1, 1),
    "SIGTERM to the shell": ("preempted when told", signal.SIGTERM, 1),
    "SIGTERM to the ranks alone": ("preempted", None, 1),
    "stopped before it had a folder": ("silent when told", signal.SIGUSR1, 1),
    "stopped while it loads": ("running when told", signal.SIGUSR1, 1),
    "fails while it saves": ("failed when told", signal.SIGUSR1, 0),
    "finished while it was told": ("finished when told", signal.SIGUSR1, 0),
}


@pytest.mark.parametrize("name", ENDS)
def test_when_a_job_runs_again(name: str, slurm: FakeSlurm, repository: Path) -> None:
    end, send, times = ENDS[name]
    code = run_job(slurm, repository, end, send)
    assert slurm.requeued() == times, slurm.log()
    assert code == (0 if times or end.startswith("finished") else 1)
    if send is not None:
        heard = [(repository / f"heard{rank}").read_text() for rank in range(2)]
        assert heard == ["TERM", "TERM"], "the launcher is told once, on both machines"
        assert slurm.calls("signal") == [[signal.SIGUSR1]], "srun kills at SIGTERM"


def test_the_status_of_a_former_start_is_not_believed(slurm: FakeSlurm, repository: Path) -> None:
    folder = repository / "runs" / "NAME"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"status": "preempted", "step": 3}')
    assert run_job(slurm, repository, "silent") == 1
    assert slurm.requeued() == 0


@pytest.mark.parametrize(("former_step", "times"), [(6, 1), (7, 0)])
def test_a_run_that_hangs_again_must_have_got_further(
    former_step: int, times: int, slurm: FakeSlurm, repository: Path
) -> None:
    folder = repository / "runs" / "NAME"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"status": "hung", "step": former_step}))
    assert run_job(slurm, repository, "hung") == (0 if times else 1), slurm.log()
    assert slurm.requeued() == times


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"FAKE_JOB_STATE": "CANCELLED"}, "SLURM has ended the job"),
        ({"SLURM_RESTART_COUNT": "5", "MAX_RESTARTS": "5"}, "restarted 5 times (MAX_RESTARTS=5)"),
    ],
)
def test_there_is_an_end_to_it(
    environment: dict[str, str], said: str, slurm: FakeSlurm, repository: Path
) -> None:
    assert run_job(slurm, repository, "preempted", **environment) == 75
    assert slurm.requeued() == 0 and said in slurm.log()


def test_mistakes_are_said(slurm: FakeSlurm, repository: Path, tmp_path: Path) -> None:
    def end(folder: Path, *arguments: str, **environment: str) -> int:
        return slurm.start(folder, *arguments, **environment).wait(LIMIT_SECONDS)

    assert end(repository, *ARGUMENTS, PROCESSES_PER_MACHINE="") == 2
    assert "this job has no GPUs. Ask for them with --gpus-per-node" in slurm.log()
    assert end(tmp_path, *ARGUMENTS) == 2
    assert f"there is no scripts/cluster/node.sh in {tmp_path}" in slurm.log()
    assert not slurm.calls("srun")
    assert end(repository, "recipe=gemma4_sft") == 2
    assert "error: run.name= is missing" in slurm.log()


def test_the_options_of_the_batch_file() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", BATCH.read_text(), re.MULTILINE))
    assert options["signal"] == "B:USR1@300"
    assert options["open-mode"] == "append" and "requeue" in options
    assert options["ntasks-per-node"] == "1"
    # The ranks are killed before SLURM does it, and after the time that they have for a save.
    patience = re.search(r"SHUTDOWN_TIMEOUT:-(\d+)", (CLUSTER / "node.sh").read_text())
    assert patience and 200 < int(patience[1]) < 300


@pytest.mark.parametrize("path", [BATCH, CLUSTER / "node.sh"], ids=lambda path: path.name)
def test_bash_reads_it(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], capture_output=True).stderr == b""


def test_skypilot(repository: Path) -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    variables: dict[str, Any] = {
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "PYTHON": str(repository / "python"),
        "SLURM_NODEID": "1",  # of the stand-in
        "FAKE_END": "finished",
    }
    [runs] = task["volumes"]
    assert f"run.dir={runs}/runs" in task["run"] and f"HF_HOME={runs}/" in task["run"]
    variables |= task["envs"] | {"RUN_NAME": "NAME", "ARGUMENTS": "recipe=gemma4_lora 'patches=[]'"}
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=repository,
        env=os.environ | variables,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0
    words = json.loads((repository / "launched1").read_text())
    at = words.index("train.py")
    assert words[at + 1 :] == [
        f"run.dir={runs}/runs",
        "run.name=NAME",
        "recipe=gemma4_lora",
        "patches=[]",
    ]
    options = dict(zip(words[2:at:2], words[3:at:2], strict=True))
    assert options["--num_processes"] == "16" and options["--machine_rank"] == "1"
    assert options["--main_process_ip"] == "10.0.0.7"


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_accelerate_files(path: Path) -> None:
    """accelerate reads it, and it says how it is used."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert f"--config_file configs/accelerate/{path.name}" in path.read_text()
    # Any other type would have accelerate shard the model, or move it to another backend.
    assert config.distributed_type in ("NO", "MULTI_GPU")
    assert config.mixed_precision == "no", "parallel.mixed_precision decides"
    if path.stem in ("one_machine", "several_machines"):
        assert config.num_processes == -1, "a number here would be used where none is given"


def test_without_a_number_of_processes_nothing_starts() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        + ["configs/accelerate/one_machine.yml", "train.py"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "You need to manually pass in `--num_processes`" in done.stderr
