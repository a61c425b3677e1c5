"""Trials of scripts/sweep.py as processes: one that fails, requests to stop, going on again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from fake_slurm import kill_tree
from whole_runs import REPOSITORY

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LIMIT_SECONDS = 120
LOG = "sweep.log"
RUN = "gemma4_sft-tiny-digits-lr_"

# Takes the place of train.py: a run folder as train.py leaves one. With lr=1 it first trains for
# 100 s, unless it is told to stop or goes on from a checkpoint; with lr=2 it fails.
STAND_IN = """
import json, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
keys = dict(word.split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(keys["run.dir"]) / keys["run.name"]
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as file:
    file.write("start\\n")
lr = float(keys["optim.lr"])
if lr == 2:
    sys.exit(1)
try:
    (folder / "ready").touch()
    time.sleep(100 if lr == 1 and not (folder / "checkpoints").exists() else 0)
except KeyboardInterrupt:
    (folder / "checkpoints").mkdir()
    time.sleep(3)  # a launcher that dies of the signal would not wait for this
    (folder / "saved").touch()
    sys.exit(130)
records = [{"step": 0, "eval/loss": 9.0, "eval/exact_match": 0.0}]
records += [{"step": 5, "eval/loss": lr, "eval/exact_match": lr / 10}, {"step": 6, "train/loss": 1}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in records) + '{"st')
(folder / "model").mkdir()
"""

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a copy of the scripts beside the stand-in; kills what is left."""
    (tmp_path / "scripts").mkdir()
    for name in ("src", "configs", "recipes"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    for name in ("sweep.py", "trials.py"):
        source = REPOSITORY / "scripts" / name
        (tmp_path / "scripts" / name).write_bytes(source.read_bytes())
    (tmp_path / "train.py").write_text(STAND_IN)
    processes: list[subprocess.Popen] = []

    def run(*words: str) -> subprocess.Popen:
        script = tmp_path / "scripts" / "sweep.py"
        # Not a pipe: reading one would wait for the trials, where the sweep does not.
        with (tmp_path / LOG).open("w") as log:
            process = subprocess.Popen(
                [sys.executable, script, f"run.dir={tmp_path / 'runs'}", *words],
                env=ENVIRONMENT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
        return process

    yield run
    for process in processes:
        kill_tree(process)


def finish(process: subprocess.Popen, folder: Path) -> str:
    """What it printed."""
    process.wait(LIMIT_SECONDS)
    return (folder / LOG).read_text()


def wait_for(happened: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not happened():
        assert process.poll() is None, "it ended"
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.01)


def test_a_failed_trial_does_not_end_the_sweep(start: Start, tmp_path: Path) -> None:
    output = tmp_path / "out" / "sweep.json"
    keys = ("sweep.metric=eval/exact_match", "sweep.jobs=2", f"sweep.output={output}")
    process = start("optim.lr=2,4", *keys)
    printed = finish(process, tmp_path)
    assert process.returncode == 1, printed
    table = printed.rpartition("trial\n")[2].splitlines()
    assert [line.split() for line in table] == [
        ["0.4", "5", "finished", f"{RUN}4"],
        ["-", "-", "failed", f"{RUN}2"],
    ]
    rows = json.loads(output.read_text())["trials"]
    assert [row["overrides"] for row in rows] == [["optim.lr=4"], ["optim.lr=2"]]
    assert [row["value"] for row in rows] == [0.4, None]
    assert (tmp_path / "runs" / f"{RUN}2.log").exists(), "of several at a time"


def test_ctrl_c_and_the_same_command_again(start: Start, tmp_path: Path) -> None:
    first, second = (tmp_path / "runs" / f"{RUN}{lr}" for lr in (1, 3))
    process = start("optim.lr=1,3")
    wait_for((first / "ready").exists, process)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "stopped: " in (tmp_path / LOG).read_text(), process)
    assert (first / "saved").exists(), "the sweep does not wait for the save"
    printed = finish(process, tmp_path)
    assert process.returncode == 130, printed
    assert f"stopped: {RUN}1" in printed and "1 trials were not started" in printed
    assert not second.exists()

    process = start("optim.lr=1,3")
    printed = finish(process, tmp_path)
    assert process.returncode == 0, printed
    assert f"to go on -> running: {RUN}1" in printed and f"new -> running: {RUN}3" in printed
    assert (first / "starts").read_text() == 2 * "start\n"


def test_sigterm_while_the_launcher_loads(start: Start, tmp_path: Path) -> None:
    """The launcher ignores Ctrl-C, and has nothing behind it yet that answers."""
    process = start("optim.lr=1,3")
    wait_for(psutil.Process(process.pid).children, process)
    time.sleep(0.2)  # it is started, and reads torch and accelerate for some seconds
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    printed = finish(process, tmp_path)
    assert process.returncode == 75, printed
    assert time.monotonic() - began < 60, "it waited for the trial to end by itself"
    assert not (tmp_path / "runs").exists()


def test_number_of_processes_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    import trials

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(trials, "visible_gpus", lambda: ["0", "1", "2"])
    one, two, every = (
        f"--config_file configs/accelerate/{name}.yml"
        for name in ("one_process", "cpu_2_processes", "one_machine")
    )
    assert trials.processes_of(one) == 1
    assert trials.processes_of(two) == 2
    assert trials.processes_of(f"{two} --num_processes 3") == 3
    assert trials.processes_of("") == 3, "accelerate takes every GPU"
    with pytest.raises(trials.SweepError, match="has no num_processes"):
        trials.processes_of(every)
    sys.modules.pop("trials")


def test_what_a_name_cannot_show_still_tells_trials_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    import trials

    values = ["[a,b]", "[a_b]", "[a]", "a", "a b", "'a'", "-1", "1", "x" * 300, "x" * 301]
    names = {trials.trial_name("run", [f"optim.key={value}"]) for value in values}
    assert len(names) == len(values)
    assert trials.trial_name("run", ["a.rank=1", "b.rank=2"]).startswith("run-a.rank_1-b.rank_2")
    assert trials.trial_name("run", ["patches=[rms_norm]"]).startswith("run-patches_rms_norm-")
    sys.modules.pop("trials")
