"""A trace and a snapshot: of the step that was asked for, and of no other."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemtune.errors import ConfigError
from gemtune.step_recordings import StepRecordings, require_gpu_for_snapshot

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def recordings_of(
    folder: Path,
    rank: int,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
    *,
    profile_at_step: int | None = None,
    snapshot_at_step: int | None = None,
) -> StepRecordings:
    config = SimpleNamespace(
        loop=SimpleNamespace(profile_at_step=profile_at_step),
        memory=SimpleNamespace(snapshot_at_step=snapshot_at_step),
    )
    runtime = SimpleNamespace(run_dir=folder, rank=rank, device=device)
    return StepRecordings(config, runtime, say)  # type: ignore[arg-type]


def test_a_trace_of_one_step(tmp_path: Path) -> None:
    said: list[str] = []
    recordings = recordings_of(tmp_path, 1, CPU, said.append, profile_at_step=2)
    for step in (1, 2, 3):
        with recordings(step):
            torch.ones(step, 7) @ torch.ones(7, 5)
    (path,) = tmp_path.iterdir()
    assert path.name == "trace_step_2_rank_1.json.gz" and said == [f"step 2: trace in {path}"]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    shapes = [e["args"].get("Input Dims") for e in events if e.get("name") == "aten::mm"]
    assert shapes == [[[2, 7], [7, 5]]]


def test_a_snapshot_of_one_step_also_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(
        memory, "_record_memory_history", lambda enabled="all", **_: calls.append(enabled)
    )
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: calls.append(Path(path).name))
    recordings = recordings_of(tmp_path, 3, CUDA, snapshot_at_step=7)
    with recordings(6):
        pass
    with pytest.raises(torch.OutOfMemoryError), recordings(7):
        raise torch.OutOfMemoryError("no more")
    assert calls == ["all", "memory_step_7_rank_3.pickle", None]


def test_a_snapshot_needs_a_gpu() -> None:
    require_gpu_for_snapshot(None, CPU)
    require_gpu_for_snapshot(5, CUDA)
    with pytest.raises(ConfigError, match=r"memory\.snapshot_at_step=5 .*there is no GPU"):
        require_gpu_for_snapshot(5, CPU)


@pytest.mark.gpu
def test_a_snapshot_of_a_real_allocator(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    recordings = recordings_of(tmp_path, 0, device, snapshot_at_step=1)
    with recordings(1):
        torch.ones(1 << 20, device=device)
    assert (tmp_path / "memory_step_1_rank_0.pickle").stat().st_size > 1000
