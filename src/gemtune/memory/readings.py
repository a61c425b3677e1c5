"""What a process holds between two steps, and what is left: read without waiting for the GPU."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

GIB = 2**30
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Readings:
    """Of one process, in GiB; NaN for what this machine does not say."""

    allocated_gib: float
    """In tensors on the GPU."""
    reserved_gib: float
    """Taken from the GPU by the allocator of this process."""
    host_resident_gib: float
    """Resident set of the process."""
    device_free_gib: float
    """Of the GPU, whoever has the rest; without a GPU what the machine has available."""

    def as_row(self) -> tuple[float, ...]:
        """The values in the order of the fields."""
        return astuple(self)


def read_memory(device: torch.device, proc: Path = Path("/proc")) -> Readings:
    """What this process holds now; some microseconds, and a tenth of a millisecond with a GPU."""
    host = _resident_bytes(proc) / GIB
    if device.type != "cuda":
        available = _kib(proc / "meminfo", "MemAvailable:") / 2**20
        return Readings(math.nan, math.nan, host, available)
    free, _ = torch.cuda.mem_get_info(device)
    # Two counters of the allocator; memory_allocated() would sort all 60 of them each time.
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    allocated = stats.get("allocated_bytes", {}).get("all", {}).get("current", 0)
    reserved = stats.get("reserved_bytes", {}).get("all", {}).get("current", 0)
    return Readings(allocated / GIB, reserved / GIB, host, free / GIB)


def resident_gib(proc: Path = Path("/proc")) -> float:
    """Resident set of this process, GiB; NaN where /proc does not say."""
    return _resident_bytes(proc) / GIB


def memory_record(readings: Sequence[Readings], peaks_gib: Sequence[float]) -> dict[str, float]:
    """The worst of all ranks under the names of metrics.jsonl; without what nobody could read.

    `memory/fragmentation` is the share of what the allocator reserved that no tensor ever used in
    the step: memory that lies in pieces, or is kept for nothing.

    Args:
        peaks_gib: of each rank, the most in tensors during the step.
    """
    unused = [
        1 - min(1.0, peak / held.reserved_gib) if held.reserved_gib > 0 else math.nan
        for held, peak in zip(readings, peaks_gib, strict=True)
    ]
    worst = {
        "memory/allocated_gib": _highest(held.allocated_gib for held in readings),
        "memory/reserved_gib": _highest(held.reserved_gib for held in readings),
        "memory/fragmentation": _highest(unused),
        "memory/host_resident_gib": _highest(held.host_resident_gib for held in readings),
        "memory/device_free_gib": -_highest(-held.device_free_gib for held in readings),
    }
    return {name: value for name, value in worst.items() if not math.isnan(value)}


def machine_memory(proc: Path = Path("/proc")) -> tuple[float, float]:
    """Available and in all, GiB of this machine; NaN where /proc does not say."""
    meminfo = proc / "meminfo"
    return _kib(meminfo, "MemAvailable:") / 2**20, _kib(meminfo, "MemTotal:") / 2**20


def _highest(values: object) -> float:
    known = [value for value in values if not math.isnan(value)]  # type: ignore[attr-defined]
    return max(known, default=math.nan)


def _resident_bytes(proc: Path) -> float:
    try:
        return int((proc / "self" / "statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return math.nan


def _kib(path: Path, key: str) -> float:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return math.nan
    return next((float(x.split()[1]) for x in lines if x.startswith(key)), math.nan)
