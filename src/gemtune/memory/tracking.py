"""Peak memory by phase: from CUDA's allocator, or from the kernel's resettable resident peak."""

from __future__ import annotations

import math
import os
import weakref
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gemtune.memory.readings import GIB

PHASES = ("forward", "loss", "backward", "optimizer")


class _Meter(Protocol):
    source: str

    def reset(self) -> None:
        """Begin a new peak at what is in use now."""

    def peak_bytes(self) -> int:
        """The peak since the last reset."""


class _CudaMeter:
    """Bytes held by tensors on one device; neither call waits for the GPU.

    The allocator counts on the host when a kernel is queued, in program order, so that the peaks
    belong to the phase that asked for the memory.
    """

    source = "cuda allocator"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)


class _ResidentMeter:
    """Linux: `VmHWM`, reset by writing 5 to clear_refs (proc(5)). Counts the whole process."""

    source = "resident set (VmHWM)"

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        # Kept open: a step asks some ten times, and opening would be most of the time.
        self._clear = os.open(proc / "clear_refs", os.O_WRONLY)
        weakref.finalize(self, os.close, self._clear)
        self._status = os.open(proc / "status", os.O_RDONLY)
        weakref.finalize(self, os.close, self._status)
        self.reset()
        self.peak_bytes()

    def reset(self) -> None:
        os.pwrite(self._clear, b"5", 0)

    def peak_bytes(self) -> int:
        said = os.pread(self._status, 4096, 0)
        _, found, rest = said.partition(b"VmHWM:")
        if not found:
            raise OSError("/proc/self/status has no VmHWM")
        return int(rest.partition(b"kB")[0]) * 1024


class _NoMeter:
    source = "unavailable"

    def reset(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return -1


def _meter_for(device: torch.device) -> _Meter:
    if device.type == "cuda":
        return _CudaMeter(device)
    try:
        return _ResidentMeter()
    except OSError:  # not Linux, or /proc is restricted
        return _NoMeter()


class PeakTracker:
    """Follows the phases of a step and keeps each one's highest peak.

    `enter(phase)` closes the running phase and opens the next; phases may come again (each
    micro-batch has a forward). `finish()` closes the step. Where no peak can be read the values are
    NaN and `source` is "unavailable".
    """

    def __init__(self, device: torch.device) -> None:
        self._meter = _meter_for(device)
        self._phase: str | None = None
        self._peaks = dict.fromkeys(PHASES, -1)
        self.num_forwards = 0
        """Forward phases begun in this step: the number of the micro-batch."""

    @property
    def phase(self) -> str:
        """The running phase."""
        return self._phase or "between phases"

    @property
    def source(self) -> str:
        """Where the figures come from."""
        return self._meter.source

    def enter(self, phase: str) -> None:
        """Begin a phase, one of `PHASES`."""
        self._close()
        self._phase = phase
        self.num_forwards += phase == "forward"
        self._meter.reset()

    def begin_loss_after(self, module: nn.Module) -> RemovableHandle:
        """Let the loss phase begin when `module` returns within a forward phase."""

        def hook(*_: object) -> None:
            if self._phase == "forward":
                self.enter("loss")

        return module.register_forward_hook(hook)

    def finish(self) -> dict[str, float]:
        """Phase -> peak in GiB since the last `finish()`; NaN for a phase that did not run."""
        self._close()
        peaks = {p: b / GIB if b >= 0 else math.nan for p, b in self._peaks.items()}
        self._peaks = dict.fromkeys(PHASES, -1)
        self.num_forwards = 0
        return peaks

    def _close(self) -> None:
        if self._phase is not None:
            peak = self._meter.peak_bytes()
            self._peaks[self._phase] = max(self._peaks[self._phase], peak)
            self._phase = None
