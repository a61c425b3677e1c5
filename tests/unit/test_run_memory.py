"""The plan beside the records of a run, the growth that is said, and what oom.md is told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from whole_runs import compose

from gemtune import run_memory
from gemtune.memory import PHASES, Readings
from gemtune.planning.bounds import RowBounds
from gemtune.run_memory import RunMemory
from gemtune.step_result import StepResult

GIB = 2**30
DOCUMENT = {"peak_bytes": GIB // 2, "batch": "4 rows", "phase": "backward", "proposals": []}
BATCHES = [SimpleNamespace(labels=torch.zeros(2, 9))]


class Planner:
    """In the place of the process."""

    def __init__(self, path: Path, command: list[str]) -> None:
        self.path, self.command = path, command
        self.document: dict[str, Any] | None = None
        self.problem = ""

    def close(self) -> None:
        pass


class Harness:
    def __init__(self, folder: Path, *overrides: str, is_main: bool = True) -> None:
        self.said: list[str] = []
        self.plans: list[dict[str, Any]] = []
        config = compose("memory.plan=true", *overrides)
        self.runtime = SimpleNamespace(
            is_main=is_main,
            world_size=2,
            is_sharded=False,
            device=torch.device("cpu"),
            run_dir=folder,
            status=SimpleNamespace(step=1),
        )
        self.memory = RunMemory(
            config,
            self.runtime,  # type: ignore[arg-type]
            resident_gib=0.25,
            say=self.said.append,
            on_plan=self.plans.append,
        )

    def step(self, peak_gib: float, held_gib: float = 1.0) -> dict[str, float]:
        result = StepResult(
            loss=1.0, grad_norm=1.0, token_accuracy=None, entropy=None, supervised_tokens=1,
            tokens=1, longest_row_tokens=9, updated=True, suspects=[], stop_requested=False,
            save_failed=False, peaks_gib=[dict.fromkeys(PHASES, peak_gib)],
            readings=[Readings(float("nan"), float("nan"), held_gib, 9.0)],
        )  # fmt: skip
        found = self.memory.watch(result, BATCHES)  # type: ignore[arg-type]
        self.runtime.status.step += 1
        return found


@pytest.fixture
def train_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which nothing is planned."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "plan_memory.py").touch()
    monkeypatch.setattr(run_memory, "BackgroundPlan", Planner)
    monkeypatch.setattr(run_memory, "bounds_of", lambda stream: RowBounds(52, 2, 4, 0.1))
    return tmp_path / "train.py"


def test_the_planned_peak_beside_the_measured_one(train_py: Path, tmp_path: Path) -> None:
    run = Harness(tmp_path)
    words = [str(train_py), "recipe=gemma4_sft", "++loop.max_steps=5"]
    run.memory.plan(None, words)  # type: ignore[arg-type]
    planner = run.memory._beside
    assert isinstance(planner, Planner) and planner.path == tmp_path / "plan.json"
    assert planner.command[0] == str(tmp_path / "scripts" / "plan_memory.py")
    assert planner.command[1:7] == [
        "recipe=gemma4_sft", "++loop.max_steps=5", "plan.row_tokens=52", "plan.images_per_row=2",
        "plan.image_tokens=4", "plan.learned_fraction=0.1000",
    ]  # fmt: skip
    assert {"plan.world_size=2", "plan.device=cpu", "plan.alternatives=0"} < set(planner.command)

    assert run.step(0.85) == {} and run.said == []
    planner.document = DOCUMENT
    # 0.85 - 0.25 before there was a model, over 0.5; a later, smaller step is no better news.
    for peak in (0.80, 0.60):
        assert run.step(peak) == {
            "memory/planned_peak_gib": 0.5,
            "memory/plan_error": pytest.approx(0.2),
        }
    assert run.step(1.0)["memory/plan_error"] == pytest.approx(0.5)
    assert run.plans == [DOCUMENT]
    assert run.said == ["memory: 0.50 GiB planned for the largest batch (4 rows), 0.60 so far"]


def test_a_plan_that_fails_is_said_once(train_py: Path, tmp_path: Path) -> None:
    run = Harness(tmp_path)
    run.memory.plan(None, [str(train_py)])  # type: ignore[arg-type]
    run.memory._beside.problem = "no such model"  # type: ignore[union-attr, misc]
    assert run.step(1.0) == run.step(1.0) == {}
    assert run.said == ["memory: no plan: no such model"]


@pytest.mark.parametrize("why", ["not train.py", "another rank", "off"])
def test_where_nothing_is_planned(train_py: Path, tmp_path: Path, why: str) -> None:
    off = ["memory.plan=false"] if why == "off" else []
    run = Harness(tmp_path, *off, is_main=why != "another rank")
    words = [str(train_py.with_name("pytest") if why == "not train.py" else train_py)]
    run.memory.plan(None, words)  # type: ignore[arg-type]
    assert run.memory._beside is None


def test_growth_is_said_and_recorded(tmp_path: Path) -> None:
    run = Harness(tmp_path, "memory.leak_mib_per_step=2")
    records = [run.step(1.0, held_gib=1 + 3 * number / 1024) for number in range(60)]
    grown = [record["memory/growth_mib_per_step"] for record in records if record]
    assert grown[0] == pytest.approx(3) and len(grown) == len(run.said) <= 2
    assert "rank 0 holds 3.0 MiB more after each step" in run.said[0]


def test_what_the_report_is_told(train_py: Path, tmp_path: Path) -> None:
    run = Harness(tmp_path)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters())
    before = run.memory.facts(model, optimizer)
    assert before.plan is None and before.plan_command == "" and before.checkpoint == ""
    run.memory.plan(None, [str(train_py), "++optim.lr=1", "adapter=lora"])  # type: ignore[arg-type]
    run.memory._beside.document = DOCUMENT  # type: ignore[union-attr, misc]
    facts = run.memory.facts(model, optimizer)
    assert facts.folder == tmp_path and json.dumps(facts.plan) == json.dumps(DOCUMENT)
    command = facts.plan_command
    assert command.startswith("python scripts/plan_memory.py optim.lr=1 adapter=lora plan.row")
    assert facts.advice[0].startswith("loop.micro_batch_size=16 (now 32)")
    assert facts.holdings()["weights of (root)"] == 4 * (8 * 4 + 4)
