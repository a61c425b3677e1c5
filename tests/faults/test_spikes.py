"""The loss-spike guard: off by default, exact on resume, and with a budget."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from whole_runs import RunFolder, TrainRun, compose

import gemtune.loop
from gemtune.errors import ConfigError, TrainingError
from gemtune.reporting import Reporter
from gemtune.skipped_steps import remember_loss, spike_limit

STEPS = 22
MORE = (f"loop.max_steps={STEPS}", "checkpoint.every_steps=100")
GUARD = ("loop.spike_sigma=6", "loop.spike_window_steps=16")


def spike_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The loss of these steps is a hundred times what it is, with its gradient."""
    original = gemtune.loop._accumulate

    def accumulate(session, micro_batches, supervised):
        if session.state.step + 1 in steps:
            return original(session, micro_batches, supervised / 100) * 100
        return original(session, micro_batches, supervised)

    monkeypatch.setattr(gemtune.loop, "_accumulate", accumulate)


def state(run: RunFolder, step: int) -> dict:
    path = run.path / "checkpoints" / f"step_{step:08d}" / "state.json"
    return json.loads(path.read_text())["state"]


def parameters_of_steps(monkeypatch: pytest.MonkeyPatch) -> dict[int, bytes]:
    """What the steps of the runs to come leave behind, filled while they run."""
    found: dict[int, bytes] = {}
    original = gemtune.loop.step

    def step(session, *arguments):
        result = original(session, *arguments)
        tensors = [p.detach().numpy() for p in session.model.parameters()]
        found[session.state.step + 1] = b"".join(tensor.tobytes() for tensor in tensors)
        return result

    monkeypatch.setattr(gemtune.loop, "step", step)
    return found


def test_a_spike_is_left_out_counted_named_and_resumed(
    train_run: TrainRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    # Step 18: the window of 16 is full. Step 10: too early to judge, so it is applied.
    spike_at(monkeypatch, 18)
    with monkeypatch.context() as patched:
        parameters = parameters_of_steps(patched)
        whole = train_run(*MORE, *GUARD, run_dir=tmp_path / "whole")
    said = capsys.readouterr().out
    assert "a spike (loop.spike_sigma=6), so nothing was updated (1 such steps, 10" in said
    assert said.split("Rows: ")[1].split("\n")[0].count("train.parquet row") == 8
    assert parameters[18] == parameters[17] != parameters[19]
    assert [m["train/spike_steps"] for m in whole.metrics() if m["step"] in (17, 18, 19)] == [
        0,
        1,
        1,
    ]
    assert whole.metrics()[18]["train/nonfinite_steps"] == 0
    accepted = [loss for step, loss in sorted(whole.losses().items()) if step != 18]
    assert state(whole, STEPS)["recent_losses"] == accepted[-16:]

    # Cut before the spike: the window comes from the checkpoint.
    original = Reporter.training

    def training(self: Reporter, record: dict) -> None:
        original(self, record)
        if self._state.step == 16:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Reporter, "training", training)
        assert train_run(*MORE, *GUARD).status == 75
    resumed = train_run(*MORE, *GUARD)
    assert resumed.losses() == whole.losses()
    assert resumed.training_state() == whole.training_state()
    ours, theirs = state(resumed, STEPS), state(whole, STEPS)
    assert ours | {"run_id": ""} == theirs | {"run_id": ""} and ours["spike_steps"] == 1


def test_off_by_default_and_not_before_16_losses(
    train_run: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spike_at(monkeypatch, 15, 18)
    off = train_run(*MORE, "loop.max_steps=18", run_dir=tmp_path / "off")
    assert state(off, 18)["spike_steps"] == 0
    parameters = parameters_of_steps(monkeypatch)
    early = train_run(*MORE, *GUARD, "loop.max_steps=15", run_dir=tmp_path / "early")
    assert state(early, 15)["spike_steps"] == 0
    assert parameters[15] != parameters[14]


def test_too_many_spikes_stop_the_run(train_run: TrainRun, monkeypatch: pytest.MonkeyPatch) -> None:
    spike_at(monkeypatch, 17, 18, 19)
    with pytest.raises(TrainingError, match=r"3 such steps, 2 allowed.*\n.*loop\.spike_sigma"):
        train_run(*MORE, *GUARD, "loop.max_spike_steps=2")


def test_the_limit() -> None:
    losses = [float(x) for x in torch.randn(16, generator=torch.Generator().manual_seed(0))]
    assert spike_limit(losses, None) == spike_limit(losses[1:], 6) == float("inf")
    as_tensor = torch.tensor(losses, dtype=torch.float64)
    expected = as_tensor.mean() + 6 * as_tensor.std(unbiased=False)
    assert spike_limit(losses, 6) == pytest.approx(float(expected), rel=1e-12)
    window: list[float] = []
    for loss in range(40):
        remember_loss(window, float(loss), 16)
    assert window == [float(loss) for loss in range(24, 40)]


def test_the_window_is_long_enough() -> None:
    with pytest.raises(ConfigError, match=r"loop\.spike_window_steps=8 is too small"):
        compose("loop.spike_window_steps=8")
