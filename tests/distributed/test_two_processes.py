"""Two processes on the CPU, started as a user starts them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sealed import seal
from whole_runs import CONFIGS, REPOSITORY, SMALL, RunFolder, TrainRun

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
STEPS = 8
# See test_gradients.py: Adam's usual eps makes rounding errors visible.
SMOOTH = ("optim.eps=0.01", "optim.lr=1e-3", f"loop.max_steps={STEPS}")
LIMIT_SECONDS = 150


def launch(run_dir: Path, *overrides: str) -> subprocess.Popen:
    """`accelerate launch` in a process group of its own, as a shell would start it."""
    program = Path(sys.executable).with_name("accelerate")
    config = CONFIGS / "accelerate" / "cpu_2_processes.yml"
    arguments = [f"run.dir={run_dir}", "run.name=run", *SMALL, *overrides]
    return subprocess.Popen(
        [program, "launch", "--config_file", config, REPOSITORY / "train.py", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status and output; a launch that hangs is killed and fails the test."""
    try:
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"hangs:\n{output}")
    return process.returncode, output


def test_ctrl_c_and_the_same_command_again(train_run: TrainRun, tmp_path: Path) -> None:
    """Stopping and going on to the bit are in tests/faults/test_preemption.py."""
    run = interrupt(tmp_path)
    done = len(run.losses())
    assert 1 <= done < STEPS
    status, output = finish(launch(tmp_path, *SMOOTH))
    assert status == 0 and f"going on after step {done}" in output, output
    alone = train_run(*SMOOTH)
    assert [m["step"] for m in run.metrics()] == list(range(STEPS + 1))
    assert run.losses() == pytest.approx(alone.losses(), rel=1e-5)
    for record in run.metrics()[1:]:
        assert len(record["memory/peak_gib_per_rank"]) == 2
        assert record["memory/peak_rank"] in (0, 1)
    assert run.training_state().keys() - alone.training_state().keys() == {"rng_rank1.json"}


def test_sharded_from_launch_to_export(train_run: TrainRun, tmp_path: Path) -> None:
    status, output = finish(launch(tmp_path, *SMOOTH, "parallel=fsdp2"))
    assert status == 0, output
    assert "fsdp2: 2 shards of the model (as asked for)" in output
    run, alone = RunFolder(tmp_path / "run", status), train_run(*SMOOTH)
    assert run.losses() == pytest.approx(alone.losses(), rel=1e-5)
    answers = (run.path / "answers.jsonl").read_text().splitlines()
    assert sorted(answers) == sorted((alone.path / "answers.jsonl").read_text().splitlines())
    model = load_file(str(run.path / "model" / "model.safetensors"))
    theirs = load_file(str(alone.path / "model" / "model.safetensors"))
    assert model.keys() == theirs.keys()
    for name, tensor in model.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


def interrupt(run_dir: Path) -> RunFolder:
    """One Ctrl-C at a terminal: SIGINT to the whole process group, once, after the first step."""
    process = launch(run_dir, *SMOOTH)
    metrics = run_dir / "run" / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    status, output = finish(process)
    assert status != 0
    assert "everything is saved" in output and "run the same command again" in output
    run = RunFolder(run_dir / "run", status)
    assert [p.name for p in run.checkpoints()] == [f"step_{len(run.losses()):08d}"]
    assert not list((run.path / "checkpoints").glob(".*"))
    return run


def test_what_is_wrong_for_all_is_said_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    status, output = finish(launch(tmp_path, "loop.global_batch_size=7"))
    assert status != 0 and time.monotonic() - started < 90
    assert "loop.global_batch_size=7 cannot be shared evenly by 2 processes. Use 6 or 8" in output
    assert not (tmp_path / "run").exists()


def test_a_fault_of_one_rank_ends_all(finished_run: RunFolder, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", 0)
    shutil.copytree(finished_run.path, run.path)
    state = run.checkpoints()[-1] / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"world_size": 2}))
    seal(run.checkpoints()[-1])
    # Rank 0 finds what it needs and waits for rank 1, which misses its random numbers.
    status, output = finish(launch(tmp_path))
    assert status != 0
    assert "rank 1: " in output and "rng_rank1.json cannot be read" in output
