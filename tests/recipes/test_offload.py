"""Whole runs with optimizer state that rests elsewhere: the same runs, gone on with either way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from offloading import LateTransport
from whole_runs import RunFolder, TrainRun, press_ctrl_c_after

from gemtune.optim import adamw
from gemtune.optim.offloaded import OffloadedOptimizer

OFFLOADED = ("optim.offload_state=true", "optim.offload_group_mib=1")
KINDS = {
    "full": ("optim.weight_decay=0.1", "optim.part_lrs.vision=1e-4"),
    "muon": ("optim=muon",),
}
SHORT = ("loop.max_steps=3", "data.eval_generate_rows=0")


@pytest.fixture
def moved_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """State moves as on a GPU; how many groups each of the optimizers has that were made."""
    made: list[int] = []
    build = adamw.offloaded

    def moving(*arguments: Any, **settings: Any) -> OffloadedOptimizer:
        optimizer = build(*arguments, **settings)
        optimizer.transport = LateTransport()
        made.append(optimizer.num_groups)
        return optimizer

    monkeypatch.setattr(adamw, "offloaded", moving)
    return made


def tensors_of(run: RunFolder) -> dict[str, bytes]:
    """Of every checkpoint, the files with tensors, as bytes."""
    return {
        f"{checkpoint.name}/{name}": (checkpoint / name).read_bytes()
        for checkpoint in run.checkpoints()
        for name in ("__0_0.distcp", ".metadata", "rng_rank0.json")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_same_with_and_without(
    train_run: TrainRun, tmp_path: Path, moved_steps: list[int], kind: str
) -> None:
    keys = (*KINDS[kind], *SHORT, "checkpoint.every_steps=2")
    without = train_run(*keys, run_dir=tmp_path / "without")
    assert not moved_steps
    found = train_run(*keys, *OFFLOADED, "checkpoint.async_save=true", run_dir=tmp_path / "with")
    assert len(moved_steps) == 1 and moved_steps[0] > 5
    assert found.losses() == without.losses()
    assert tensors_of(found) == tensors_of(without) and len(tensors_of(found)) == 6


@pytest.mark.parametrize("begins_with", [True, False])
def test_a_run_goes_on_either_way(
    train_run: TrainRun,
    tmp_path: Path,
    moved_steps: list[int],
    monkeypatch: pytest.MonkeyPatch,
    begins_with: bool,
) -> None:
    """The key may change on the way: it decides where numbers lie, not which they are."""
    whole = train_run(*SHORT, run_dir=tmp_path / "whole")
    parts = (OFFLOADED, ()) if begins_with else ((), OFFLOADED)
    with monkeypatch.context() as patched:
        press_ctrl_c_after(patched, step=1)
        assert train_run(*SHORT, *parts[0]).status == 130
    assert len(moved_steps) == begins_with
    resumed = train_run(*SHORT, *parts[1])
    assert resumed.status == 0 and len(moved_steps) == 1
    assert resumed.losses() == whole.losses()
    assert resumed.training_state() == whole.training_state()


def test_a_step_that_is_left_out_moves_nothing(
    train_run: TrainRun, tmp_path: Path, moved_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = OffloadedOptimizer.step, []

    def counted(self: OffloadedOptimizer, closure: Any = None) -> Any:
        calls.append(1)
        return step(self, closure)

    from gemtune import loop

    clip, number = loop.clip_gradients, []

    def clip_nan(parameters: Any, max_norm: float | None) -> torch.Tensor:
        number.append(1)
        norm = clip(parameters, max_norm)
        return norm * float("nan") if len(number) == 2 else norm

    monkeypatch.setattr(loop, "clip_gradients", clip_nan)
    monkeypatch.setattr(OffloadedOptimizer, "step", counted)
    keys = (*SHORT, "loop.max_nonfinite_steps=1")
    run = train_run(*keys, *OFFLOADED, run_dir=tmp_path / "with")
    assert run.status == 0 and len(calls) == 2 and len(number) == 3
    number.clear()
    without = train_run(*keys, run_dir=tmp_path / "without")
    assert run.training_state() == without.training_state()


def test_on_a_cpu_the_page_says_that_nothing_is_saved(
    train_run: TrainRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_run(*OFFLOADED, "loop.max_steps=1", "data.eval_generate_rows=0")
    said = " ".join(capsys.readouterr().out.split())
    assert "AdamW with its state in host memory" in said
    assert "optim.offload_state=true saves nothing here" in said
    assert json.loads((run.path / "status.json").read_text())["exit_code"] == 0
