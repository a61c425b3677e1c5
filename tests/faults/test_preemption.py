"""A run that is asked to stop saves the same step on all ranks, and goes on as if it never had."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from launches import Launch, is_running, launched
from whole_runs import RunFolder, TrainRun

STEPS = 16
# See test_gradients.py: Adam's usual eps makes rounding errors visible.
MORE = (
    f"loop.max_steps={STEPS}",
    "data.num_workers=1",
    "checkpoint.keep_last=1",
    "optim.eps=0.01",
    "optim.lr=1e-3",
)


def saved_step(run: RunFolder) -> int:
    """Of the newest checkpoint, which must be whole and the only new one."""
    assert not list((run.path / "checkpoints").glob(".*"))
    newest = run.checkpoints()[-1]
    assert {f"rng_rank{rank}.json" for rank in (0, 1)} <= {f.name for f in newest.iterdir()}
    return json.loads((newest / "state.json").read_text())["state"]["step"]


def check_preempted(run: Launch, *, after: int, said: str, status: str, code: int) -> int:
    """All ranks are gone, saved the last step on record, and said so; that step."""
    returned, output = run.finish()
    assert returned != 0
    step = saved_step(run.run)
    assert step > after and max(run.run.losses()) == step
    assert run.status() | {"status": status, "exit_code": code, "step": step} == run.status()
    assert said in output and "run the same command again" in output, output
    assert "Traceback" not in output.replace("torch/distributed", "").split("Stopped by")[0]
    return step


def test_a_run_that_is_stopped_again_and_again_equals_one_without(
    train_run: TrainRun, tmp_path: Path
) -> None:
    with launched(tmp_path / "whole", *MORE) as whole:
        assert whole.finish()[0] == 0
        assert whole.status()["status"] == "finished" and whole.status()["exit_code"] == 0
    check_same_training(whole.run, train_run(*MORE))

    cut = tmp_path / "cut"
    with launched(cut, *MORE) as run:
        run.wait_for_step(2)
        run.signal_rank(1, signal.SIGUSR1)
        step = check_preempted(
            run, after=1, said="Stopped by SIGUSR1 on rank 1", status="preempted", code=75
        )
    shutil.copytree(cut, tmp_path / "fewer")
    with launched(cut, *MORE) as run:
        run.wait_for_step(step + 1)
        run.signal_group(signal.SIGTERM)  # also to the loader workers, and again by the launcher
        step = check_preempted(
            run, after=step, said="Stopped by SIGTERM on rank 0", status="preempted", code=75
        )
    assert step < STEPS
    with launched(cut, *MORE) as run:
        assert run.finish()[0] == 0
    assert run.run.losses() == whole.run.losses()
    assert run.run.training_state() == whole.run.training_state()

    # One process goes on where two were stopped: the same samples, none twice and none left out.
    check_same_training(train_run(*MORE, run_dir=tmp_path / "fewer"), whole.run)


def check_same_training(ours: RunFolder, theirs: RunFolder) -> None:
    """The same on another number of processes, up to the order of sums."""
    assert list(ours.losses()) == list(range(1, STEPS + 1))
    # Measured: float32 sums in another order differ by 2e-5 after 14 steps.
    assert ours.losses() == pytest.approx(theirs.losses(), rel=1e-4)
    for step in (1, 2, 3):
        assert ours.losses()[step] == pytest.approx(theirs.losses()[step], rel=1e-5)
    for mine, other in zip(ours.metrics(), theirs.metrics(), strict=True):
        # The number of learned tokens tells the samples of a step.
        for key in ("step", "train/supervised_tokens", "train/tokens"):
            assert mine.get(key) == other.get(key)
        if "eval/loss" in other:
            assert mine["eval/loss"] == pytest.approx(other["eval/loss"], rel=1e-4)
    answers = [(run.path / "answers.jsonl").read_text().splitlines() for run in (ours, theirs)]
    assert sorted(answers[0]) == sorted(answers[1])


def test_sigterm_to_the_launcher_of_one_process_leaves_no_orphan(tmp_path: Path) -> None:
    steps = "loop.max_steps=200"
    with launched(tmp_path, steps, processes=1) as run:
        run.wait_for_step(2)
        pid = run.workers()[0]
        os.kill(run.process.pid, signal.SIGTERM)
        returned, output = run.finish(30)
        assert returned == -signal.SIGTERM and not is_running(pid)
        assert "Stopped by SIGTERM on rank 0" in output
        assert run.status()["exit_code"] == 75
        assert run.status()["step"] == len(run.run.losses()) < 200
        assert len(run.run.checkpoints()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_signal_to_the_launcher_of_two_processes(tmp_path: Path, number: int) -> None:
    with launched(tmp_path, "loop.max_steps=200") as run:
        run.wait_for_step(2)
        workers = run.workers()
        os.kill(run.process.pid, number)  # torchrun passes SIGTERM on; SIGKILL ends it alone
        _, output = run.finish(40)
        assert not any(map(is_running, workers.values()))
        assert "Stopped by SIGTERM on rank" in output and run.status()["exit_code"] == 75
        assert saved_step(run.run) == len(run.run.losses()) < 200


def test_a_signal_while_loading_ends_all_at_once(tmp_path: Path) -> None:
    script, flag = Path(__file__).with_name("train_with_fault.py"), tmp_path / "loading"
    fault = {"FAULT": "slow_load:1:0", "FAULT_FLAG": str(flag)}
    with launched(tmp_path, script=script, environment=fault) as run:
        run.wait_until(flag.exists)
        run.signal_rank(1, signal.SIGTERM)
        returned, output = run.finish(25)
        assert returned != 0
        assert "SIGTERM outside training: there is nothing to save" in output
        assert not run.run.path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_each_signal_has_its_code(
    train_run: TrainRun, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    import gemtune.reporting

    original = gemtune.reporting.Reporter.training

    def training(self: gemtune.reporting.Reporter, record: dict) -> None:
        original(self, record)
        if self._state.step == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(gemtune.reporting.Reporter, "training", training)
    run = train_run()
    assert run.status == (130 if number == signal.SIGINT else 75)
    status = json.loads((run.path / "status.json").read_text())
    assert status["status"] == ("interrupted" if number == signal.SIGINT else "preempted")
    assert status["exit_code"] == run.status and status["step"] == 2
    assert [p.name for p in run.checkpoints()] == ["step_00000002"]
