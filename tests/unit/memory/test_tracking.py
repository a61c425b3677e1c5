"""Peaks by phase, with allocations of a known size."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import pytest
import torch
from torch import nn

from gemtune.memory import PHASES, PeakTracker
from gemtune.memory.tracking import _ResidentMeter

CPU = torch.device("cpu")
MIB = 2**20
GIB_PER_MIB = 1 / 1024


@pytest.fixture
def tracker() -> PeakTracker:
    tracker = PeakTracker(CPU)
    if tracker.source == "unavailable":
        pytest.skip("this kernel does not let a process reset its resident peak")
    return tracker


def touch(mib: int) -> None:
    """Fresh pages, given back at once: malloc may have as much free that is resident already."""
    with mmap.mmap(-1, mib * MIB) as pages:
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1


def test_a_temporary_counts_in_its_own_phase_only(tracker: PeakTracker) -> None:
    tracker.enter("forward")
    tracker.enter("loss")
    touch(200)  # gone at once
    tracker.enter("backward")
    touch(10)
    tracker.enter("optimizer")
    peaks = tracker.finish()
    assert list(peaks) == list(PHASES)
    rise = {phase: (peaks[phase] - peaks["forward"]) / GIB_PER_MIB for phase in PHASES}
    assert 190 < rise["loss"] < 215
    assert rise["backward"] < 30
    assert rise["optimizer"] < 30


def test_a_phase_that_comes_again_keeps_its_highest_peak(tracker: PeakTracker) -> None:
    for mib in (10, 150, 20):
        tracker.enter("forward")
        touch(mib)
        tracker.enter("backward")
    peaks = tracker.finish()
    assert 120 < (peaks["forward"] - peaks["backward"]) / GIB_PER_MIB < 165


def test_a_phase_that_did_not_run_has_no_peak_and_a_new_step_starts_afresh(
    tracker: PeakTracker,
) -> None:
    tracker.enter("forward")
    assert math.isnan(tracker.finish()["loss"])
    assert all(math.isnan(peak) for peak in tracker.finish().values())


def test_the_loss_begins_when_the_watched_module_returns(tracker: PeakTracker) -> None:
    module = nn.Linear(2, 2)
    tracker.begin_loss_after(module)
    module(torch.zeros(1, 2))  # no phase is open: nothing to do
    tracker.enter("forward")
    module(torch.zeros(1, 2))
    tracker.enter("backward")
    module(torch.zeros(1, 2))  # recomputed in backward: still backward
    peaks = tracker.finish()
    ran = [phase for phase in PHASES if not math.isnan(peaks[phase])]
    assert ran == ["forward", "loss", "backward"]


def test_without_the_kernel_interface_it_says_unavailable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(OSError):
        _ResidentMeter(tmp_path / "no_proc")
    (tmp_path / "clear_refs").touch()
    (tmp_path / "status").write_text("Name: x\n")
    with pytest.raises(OSError, match="no VmHWM"):
        _ResidentMeter(tmp_path)

    monkeypatch.setattr("gemtune.memory.tracking._ResidentMeter", _Refusing)
    tracker = PeakTracker(CPU)
    assert tracker.source == "unavailable"
    tracker.enter("forward")
    assert all(math.isnan(peak) for peak in tracker.finish().values())


class _Refusing:
    def __init__(self) -> None:
        raise PermissionError("restricted")
