"""A rank that stops, dies, hangs or fails is named, and the run ends on all ranks in time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from launches import Launch, is_running, launched

SCRIPT = Path(__file__).with_name("train_with_fault.py")
HEARTBEAT, TIMEOUT = 3, 8
LIMITS = (f"parallel.heartbeat_seconds={HEARTBEAT}", "parallel.timeout_seconds=60")
LONG = "loop.max_steps=500"


def check_ended(run: Launch, workers: dict[int, int], within: float) -> str:
    """Launcher and ranks are gone in time and unsuccessfully; the output."""
    returned, output = run.finish(within)
    assert returned != 0
    assert not any(map(is_running, workers.values()))
    return output


@pytest.mark.parametrize(("stopped", "survivor"), [(1, 0), (0, 1)])
def test_a_stopped_rank(tmp_path: Path, stopped: int, survivor: int) -> None:
    with launched(tmp_path, LONG, *LIMITS) as run:
        run.wait_for_step(2)
        workers = run.workers()
        pid = run.signal_rank(stopped, signal.SIGSTOP)
        output = check_ended(run, workers, HEARTBEAT + 30)

        assert f"rank {stopped} (pid {pid}, host " in output
        assert "its process is stopped, last seen in " in output
        # Everything of the survivor: where its main thread waits, and the threads beside it.
        stacks = (run.run.path / f"stacks_rank{survivor}.txt").read_text()
        assert "in _watch" in stacks and "loop.py" in stacks and f"(pid {pid}" in stacks
        assert "gemtune/loop.py" in output
        status = run.status()
        assert status["status"] == "hung" and status["exit_code"] == 76
        assert f"rank {stopped}" in status["reason"]


def test_a_killed_rank(tmp_path: Path) -> None:
    with launched(tmp_path, LONG, "parallel.timeout_seconds=60") as run:  # 120 s between pulses
        run.wait_for_step(2)
        workers = run.workers()
        pid = run.signal_rank(1, signal.SIGKILL)
        output = check_ended(run, workers, 30)
        assert f"rank 1 (pid {pid}, host " in output and "is gone without a word" in output
        assert run.status() | {"status": "hung", "exit_code": 76} == run.status()


def test_a_rank_that_is_behind(tmp_path: Path) -> None:
    flag = tmp_path / "hangs"
    fault = {"FAULT": "hang:1:3", "FAULT_FLAG": str(flag), "FORWARDS_OF_A_STEP": "1"}
    limits = (f"parallel.heartbeat_seconds={HEARTBEAT}", f"parallel.timeout_seconds={TIMEOUT}")
    with launched(tmp_path, LONG, *limits, script=SCRIPT, environment=fault) as run:
        run.wait_until(flag.exists)
        workers = run.workers()
        output = check_ended(run, workers, TIMEOUT + 30)
        assert f"rank 1 (pid {workers[1]}, host " in output
        assert "is behind, in step 3, phase forward: no progress since" in output
        stacks = (run.run.path / "stacks_rank1.txt").read_text()
        assert "train_with_fault.py" in stacks and " in fail" in stacks
        assert (run.run.path / "stacks_rank0.txt").exists()
        assert run.status()["exit_code"] == 76


def test_no_limit_where_one_rank_may_take_long(tmp_path: Path) -> None:
    # Rank 1 pauses for 5 s in its first step, and for each batch of the evaluation after step 2.
    environment = {"FAULT": "pause:1:1"}
    limits = ("parallel.heartbeat_seconds=2", "parallel.timeout_seconds=3", "loop.max_steps=3")
    more = ("loop.eval_every_steps=2", "data.eval_generate_rows=0")
    with launched(tmp_path, *limits, *more, script=SCRIPT, environment=environment) as run:
        returned, output = run.finish()
        assert returned == 0, output
        assert len(run.run.losses()) == 3 and run.status()["status"] == "finished"


def test_one_process_that_hangs(tmp_path: Path) -> None:
    flag = tmp_path / "hangs"
    fault = {"FAULT": "slow_data:0:3", "FAULT_FLAG": str(flag)}
    limit = "parallel.timeout_seconds=3"
    with launched(tmp_path, limit, processes=1, script=SCRIPT, environment=fault) as run:
        run.wait_until(flag.exists)
        os.kill(run.workers()[0], signal.SIGUSR2)  # stacks, and it goes on
        output = check_ended(run, run.workers(), 20)
        assert output.count(" in rows_of") >= 2
        assert "this process does not get on, in step 3, phase data" in output
        assert run.status()["status"] == "hung" and run.status()["step"] == 2


def test_a_step_that_never_ends_does_not_eat_the_grace_period(tmp_path: Path) -> None:
    flag = tmp_path / "hangs"
    fault = {"FAULT": "hang:1:3", "FAULT_FLAG": str(flag)}
    grace = "run.grace_seconds=3"
    with launched(tmp_path, LONG, grace, script=SCRIPT, environment=fault) as run:
        run.wait_until(flag.exists)
        workers = run.workers()
        time.sleep(0.5)
        run.signal_rank(1, signal.SIGTERM)
        output = check_ended(run, workers, 25)
        assert "rank 1 got SIGTERM 3 s ago and has not ended since: it is in step 3" in output
        assert " in fail" in (run.run.path / "stacks_rank1.txt").read_text()
        assert run.status()["exit_code"] == 76


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("oom_cuda", 2, "out of memory on rank 1 in step 2, phase forward of micro-batch 1 of 1"),
        ("crash", 1, "ValueError: a fault that nobody foresaw"),
    ],
)
def test_an_error_on_one_rank_ends_all(tmp_path: Path, kind: str, code: int, said: str) -> None:
    flag = tmp_path / "fails"
    fault = {"FAULT": f"{kind}:1:2", "FAULT_FLAG": str(flag)}
    with launched(tmp_path, LONG, script=SCRIPT, environment=fault) as run:
        run.wait_until(flag.exists)
        workers = run.workers()
        output = check_ended(run, workers, 25)
        assert said in output
        assert max(run.run.losses()) == 1  # nobody went on
        assert run.status()["exit_code"] == code and run.status()["status"] == "failed"
        assert run.status()["reason"].startswith("rank 1 failed: ")
        if kind == "oom_cuda":
            assert "error (rank 1): out of memory" in output
            assert "digits/train.parquet" in output and "input_ids [4, " in output
            assert "1. loop.micro_batch_size=2 (now 4)" in output
            assert "model.gradient_checkpointing=true" in output and "parallel=fsdp2" in output
