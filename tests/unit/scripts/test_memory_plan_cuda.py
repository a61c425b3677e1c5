"""Planned peaks at real sizes: the cases are runs of train.py, and errors are what they say."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from gemtune.memory import tracking
from gemtune.planning.storages import StorageFollower

REPOSITORY = Path(__file__).resolve().parents[3]
CASES = (
    *("e2b_lora_2k", "e2b_full_2k", "e2b_lora_8k", "e4b_lora_2k", "e2b_lora_images"),
    *("e2b_lora_stock", "e2b_full_stock", "e2b_full_8k", "e4b_lora_8k", "e2b_lora_offload"),
    *("e2b_full_images", "e4b_full_2k"),
)

Load = Callable[[str], Any]


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_what_train_composes(
    load: Load, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    cases = load("memory_plan_cuda").CASES
    assert set(cases) == set(CASES)
    data = ["data=chat", "data.path=conversations.jsonl", "data.eval_max_rows=null"]
    composed = load("command_line").compose([*cases[name].keys(), *data])
    ours = cases[name].sections()
    for section in ("model", "data", "patches", "adapter", "optim", "loop", "parallel"):
        assert getattr(ours, section) == getattr(composed, section), section
        assert type(getattr(ours, section)) is type(getattr(composed, section))
    assert ours.run.seed == composed.run.seed


class Counters(StorageFollower):
    """The allocator's two counters, of tensors on the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source, self.peak = "counted", 0

    def reset(self) -> None:
        self.peak = self.live_bytes

    def peak_bytes(self) -> int:
        return self.peak

    def _rise(self) -> None:
        super()._rise()
        self.peak = max(self.peak, self.live_bytes)


@pytest.mark.usefixtures("new_runtime")
@pytest.mark.parametrize("training", ["full", "lora"])
@pytest.mark.parametrize("images", [0, 2])
def test_planned_is_what_an_allocator_counts_in_the_step_that_is_made(
    load: Load, training: str, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load("memory_plan_cuda")
    case = script.Case("bundled:tiny", training, 256, images)
    counters = Counters()
    monkeypatch.setattr(tracking, "_meter_for", lambda device: counters)
    with counters:
        measured = script.run(case, "cpu")
    row = script.row_of(case, script.plan(case, "cpu"), measured)
    assert row["within"]
    assert abs(row["error"]) < 0.01
    assert row["num_parameters"] > 1e6
    for planned, found in row["phases"].values():
        assert found == pytest.approx(planned, rel=0.02)


def planned(**gib: float) -> dict[str, Any]:
    return {"gib": gib, "seconds": 12.34, "num_parameters": 7, "batch": "1 rows"}


def test_the_error_is_of_the_highest_peaks(load: Load) -> None:
    script = load("memory_plan_cuda")
    case = script.CASES["e2b_lora_2k"]
    measured = {"gib": {"forward": 10.5, "backward": 8.0}, "reserved_gib": 12.0}
    row = script.row_of(case, planned(forward=9.0, backward=10.0), measured)
    assert row["phase"] == "backward" and row["measured_gib"] == 10.5
    assert row["error"] == pytest.approx(10.0 / 10.5 - 1) and row["within"]
    assert "error -4.8%" in script.line_of("name", row)
    row = script.row_of(case, planned(forward=11.1), measured)
    assert not row["within"]
    late = script.row_of(case, planned(forward=1.0), {"out_of_memory": True})
    assert late["out_of_memory"] and "error" not in late


def test_a_case_without_time_says_so_and_the_table_shows_all(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, child = load("memory_plan_cuda"), load("child_process")

    def no_time(*_: Any) -> dict[str, Any]:
        raise child.OutOfTimeError

    monkeypatch.setattr(script, "in_process", no_time)
    row = script.case_of("e4b_full_2k", Future(), "cuda", child.Deadline(0))
    assert row["not_measured"] == "the time limit was reached"
    good = script.row_of(
        script.CASES["e2b_lora_2k"],
        planned(forward=10.0),
        {"gib": {"forward": 9.0}, "reserved_gib": 12.0},
    )
    machine = {"cpu": "C", "num_cores": 2, "ram_gib": 8, "load_before": 0.1}
    head = dict.fromkeys(("command", "os", "python", "torch", "transformers", "gemtune"), "x")
    head |= {"git_revision": "r", "date": "d", "machine": machine, "bound": 0.05}
    head |= {"settings": {"learned": 0.3, "steps": 3}, "cases": {"one": good, "two": row}}
    text = load("step_tables").memory_plan_cuda(head)
    assert "| 10.00 GiB, forward | 9.00 GiB | +11.1% (missed) | 12.00 GiB | 12 s |" in text
    assert "(the time limit was reached) | not measured |" in text


def test_a_gpu_that_is_not_there_is_refused(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks/memory_plan.py", "--device=cuda"])
    with pytest.raises(SystemExit):
        load("memory_plan").main()
    assert "torch sees no CUDA device here" in capsys.readouterr().err
