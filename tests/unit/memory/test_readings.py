"""What a process holds: compared with what the kernel says, and the worst of all ranks."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import psutil
import pytest
import torch

from gemtune.memory.readings import (
    GIB,
    Readings,
    machine_memory,
    memory_record,
    read_memory,
    resident_gib,
)

CPU = torch.device("cpu")
NAN = math.nan


def test_a_process_without_a_gpu() -> None:
    read = read_memory(CPU)
    assert math.isnan(read.allocated_gib) and math.isnan(read.reserved_gib)
    assert read.host_resident_gib * GIB == pytest.approx(
        psutil.Process().memory_info().rss, rel=0.1
    )
    machine = psutil.virtual_memory()
    assert read.device_free_gib * GIB == pytest.approx(machine.available, rel=0.3)
    assert machine_memory()[1] * GIB == pytest.approx(machine.total, rel=0.01)


def test_what_a_process_takes_is_seen() -> None:
    before = resident_gib()
    with mmap.mmap(-1, 100 << 20) as pages:
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1
        assert 0.09 < resident_gib() - before < 0.12


def test_a_machine_that_says_nothing(tmp_path: Path) -> None:
    read = read_memory(CPU, tmp_path)
    assert all(map(math.isnan, read.as_row()))
    assert memory_record([read, read], [NAN, NAN]) == {}
    assert all(map(math.isnan, machine_memory(tmp_path)))


def test_the_worst_of_all_ranks() -> None:
    ranks = [Readings(3.0, 8.0, 2.0, 40.0), Readings(5.0, 6.0, 1.0, 30.0)]
    assert memory_record(ranks, [4.0, 6.0]) == {
        "memory/allocated_gib": 5.0,
        "memory/reserved_gib": 8.0,
        "memory/fragmentation": 0.5,  # rank 0: 4 of 8 at most
        "memory/host_resident_gib": 2.0,
        "memory/device_free_gib": 30.0,
    }
    on_cpu = [Readings(NAN, NAN, 2.0, 9.0), Readings(NAN, NAN, 3.0, 8.0)]
    assert memory_record(on_cpu, [1.0, 1.0]) == {
        "memory/host_resident_gib": 3.0,
        "memory/device_free_gib": 8.0,
    }


def test_a_gpu_by_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {
        "allocated_bytes": {"all": {"current": 3 * GIB, "peak": 9 * GIB}},
        "reserved_bytes": {"all": {"current": 4 * GIB}},
    }
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)
    read = read_memory(torch.device("cuda", 0))
    assert (read.allocated_gib, read.reserved_gib, read.device_free_gib) == (3, 4, 5)
    stats.clear()  # before the first allocation
    assert read_memory(torch.device("cuda", 0)).allocated_gib == 0


@pytest.mark.gpu
def test_a_real_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    before = read_memory(device)
    held = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    after = read_memory(device)
    assert after.allocated_gib - before.allocated_gib == pytest.approx(1 / 16, abs=1e-3)
    assert after.allocated_gib == torch.cuda.memory_allocated(device) / GIB
    assert after.reserved_gib == torch.cuda.memory_reserved(device) / GIB
    del held
