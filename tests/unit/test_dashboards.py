"""What dashboards get: groups, ranks, tables, one run however often it is resumed, no secrets."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from wandb_files import written_starts

from gemtune.errors import ConfigError
from gemtune.evaluation import Answer
from gemtune.memory import PHASES, Readings, memory_record
from gemtune.patches.base import PatchReport, PatchRow
from gemtune.reporting import Reporter
from gemtune.tracking import TrackerConfig, open_dashboard
from gemtune.tracking.groups import BEST, GROUPS, MAX_RANKS, RANK_PEAKS, grouped
from gemtune.tracking.workspace import layout, make_workspace, save_workspace

CANARY = "canary-7f3a91"


def record(step: int) -> dict[str, Any]:
    """As `loop.train` makes it on two ranks, with an evaluation."""
    return {
        "train/loss": 1.0 / step,
        "train/tokens": 100 * step,
        "train/data_wait_fraction": 0.25,
        "train/tokens_per_second": 12.5,
        "eval/loss": [9.0, 0.5, 0.75][step - 1],
        "memory/peak_gib": [3.0, 7.0, 5.0][step - 1],
        "memory/peak_gib_per_rank": [1.0 + step, 2.0 + step],
    }


def shown(step: int) -> dict[str, Any]:
    return {
        "train/loss": 1.0 / step,
        "data/tokens": 100 * step,
        "data/wait_fraction": 0.25,
        "system/tokens_per_second": 12.5,
        "eval/loss": [9.0, 0.5, 0.75][step - 1],
        "memory/peak_gib": [3.0, 7.0, 5.0][step - 1],
        "memory/rank_0_peak_gib": 1.0 + step,
        "memory/rank_1_peak_gib": 2.0 + step,
    }


PLAN = {
    "peak_bytes": 3 * 2**30,
    "phase": "backward",
    "phases": {
        "forward": {"peak_bytes": 2 * 2**30, "by_kind": {"parameters": 2**30, "forward": 2**30}},
        "backward": {"peak_bytes": 3 * 2**30, "by_kind": {"parameters": 2**30, "backward": 2**31}},
    },
}
PLAN_TABLE = (
    ["phase", "GiB", "parameters", "forward", "backward"],
    [["forward", 2.0, 1.0, 1.0, 0.0], ["backward", 3.0, 1.0, 0.0, 2.0]],
)
PATCHES = PatchReport([PatchRow("rms_norm", "applied", "12 norms", ())])
ANSWERS = [Answer(f"row {n}", None, "1+1?", "2", str(n)) for n in (2, 3)]
SAMPLES_TABLE = (
    ["step", "row", "question", "expected", "generated", "correct"],
    [[3, "row 2", "1+1?", "2", "2", True]],
)
PATCH_TABLE = (["patch", "status", "reason"], [["rms_norm", "applied", "12 norms"]])


@pytest.fixture
def no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is logged in to wandb, and its folders are in tmp_path."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def start(config: TrackerConfig, run_dir: Path, step: int) -> Reporter:
    """The reporter of a start that goes on after `step`."""
    runtime = SimpleNamespace(is_main=True, run_dir=run_dir)
    state = SimpleNamespace(step=step, run_id="abc123")
    screen = SimpleNamespace(num_steps=3, step=lambda *_, **__: None)
    run = SimpleNamespace(
        tracker=config,
        loop=SimpleNamespace(log_every_steps=1),
        eval=SimpleNamespace(samples=1),
        run=SimpleNamespace(name="my-run"),
        as_dict=lambda: {"optim": {"lr": 0.125}},
    )
    return Reporter(runtime, run, state, screen)  # type: ignore[arg-type]


def train(config: TrackerConfig, run_dir: Path) -> Reporter:
    """Two starts: steps 1 and 2, and then 3, with a plan that was late."""
    run_dir.mkdir(exist_ok=True)
    reporter = start(config, run_dir, 0)
    reporter.patches(PATCHES)
    for step in (1, 2):
        reporter._state.step = step
        reporter.training(record(step))
    reporter.finish()
    time.sleep(1.01)  # wandb names the folder of a start by the second
    reporter = start(config, run_dir, 2)
    reporter.patches(PATCHES)
    reporter._state.step = 3
    reporter.training(record(3))
    reporter.log_plan(PLAN)
    reporter.answers(ANSWERS, on_screen=False)
    reporter.figures({"checkpoint/stall_seconds": 0.5})
    reporter.finish()
    return reporter


def test_wandb_has_one_run_of_two_starts(
    no_keys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", f"secret.token={CANARY}"])
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("MY_SECRET", CANARY)
    monkeypatch.setattr("socket.gethostname", lambda: CANARY)
    run_dir = tmp_path / "run"
    reporter = train(TrackerConfig(project="ours", entity="us"), run_dir)
    assert reporter.notice == (
        f"wandb, offline; upload with: wandb sync {run_dir}/wandb/offline-run-*; then its panels: "
        "python scripts/dashboard.py tracker.project=ours tracker.entity=us"
    )
    assert capfd.readouterr() == ("", "")

    first, second = written_starts(run_dir)
    assert (first.run_id, second.run_id) == ("abc123", "abc123")
    assert first.project == second.project == "ours"
    for written in (first, second):
        assert written.config["optim"] == {"lr": 0.125}
        # Every metric is drawn over our steps.
        assert written.definitions == {
            "step": "",
            **{f"{group}/*": "step" for group in GROUPS},
            **dict.fromkeys(BEST, "step"),
        }
    expected = {(name, n): value for n in (1, 2, 3) for name, value in shown(n).items()}
    expected["system/checkpoint_stall_seconds", 3] = 0.5
    assert not first.points.keys() & second.points.keys()
    assert first.points | second.points == expected
    assert {name.split("/")[0] for name, _ in expected} == set(GROUPS)

    tables = [(name, (t["columns"], t["data"])) for s in (first, second) for name, t in s.tables]
    assert tables == [
        ("patches", PATCH_TABLE),
        ("plan", PLAN_TABLE),
        ("eval/samples", SAMPLES_TABLE),
    ]
    assert [row["step"] for row in second.rows if "eval/samples" in row] == [3]
    assert first.summary["eval/loss"] == {"min": 0.5, "last": 0.5}
    assert first.summary["memory/peak_gib"] == {"max": 7.0, "last": 7.0}
    # Of both starts.
    assert second.summary["eval/loss"] == {"min": 0.5, "last": 0.75}
    assert second.summary["memory/peak_gib"] == {"max": 7.0, "last": 5.0}
    assert second.summary["memory/planned_peak_gib"] == 3.0

    written_files = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_symlink()]
    assert any(b"train/loss" in p.read_bytes() for p in written_files)
    assert [p for p in written_files if CANARY.encode() in p.read_bytes()] == []
    machine = os.uname().nodename  # wandb-core asks the system itself
    for written in (first, second):
        content = written.path.read_bytes()
        assert b"netrc" not in content and b"train.py" not in content
        assert len(machine) < 8 or machine.encode() not in content


def test_the_best_value_speaks_for_a_run(no_keys: None, tmp_path: Path) -> None:
    dashboard = open_dashboard(TrackerConfig(), tmp_path, "my-run", "abc123", {})
    for step in (1, 2, 3):
        matches = {"eval/exact_match": [0.0, 1.0, 0.5][step - 1]}
        dashboard.log(record(step) | matches, step)
    dashboard.log({"eval/token_accuracy": math.nan}, 3)
    dashboard.finish()
    (written,) = written_starts(tmp_path)
    assert written.summary["eval/loss"] == {"min": 0.5, "last": 0.75}
    assert written.summary["eval/exact_match"] == {"max": 1.0, "last": 0.5}
    assert written.summary["memory/peak_gib"] == {"max": 7.0, "last": 5.0}
    assert "eval/token_accuracy" not in written.summary
    assert written.summary["train/loss"] == pytest.approx(1 / 3)


def test_trackio_has_one_run_of_two_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed: pip install gemtune[trackio]")
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    config = TrackerConfig(name="trackio", project="gemtune-test")
    reporter = train(config, tmp_path / "run")
    assert reporter.notice == "trackio; look with: trackio show --project gemtune-test"
    open_dashboard(config, tmp_path, "my-run", "def456", {}).finish()  # another run

    storage = sqlite_storage.SQLiteStorage
    assert sorted(storage.get_runs("gemtune-test"))[:1] == ["my-run-abc123"]
    logged = storage.get_logs("gemtune-test", "my-run-abc123")
    numbers = [
        (name, row["step"], value)
        for row in logged
        for name, value in row.items()
        if "/" in name and not isinstance(value, dict)
    ]
    expected = [(name, n, value) for n in (1, 2, 3) for name, value in shown(n).items()]
    expected.append(("system/checkpoint_stall_seconds", 3, 0.5))
    assert sorted(numbers) == sorted(expected)
    expected_tables = {"patches": PATCH_TABLE, "plan": PLAN_TABLE, "eval/samples": SAMPLES_TABLE}
    for name, (columns, rows) in expected_tables.items():
        (table,) = [row[name]["_value"] for row in logged if name in row]
        assert table == [dict(zip(columns, row, strict=True)) for row in rows]


@pytest.mark.parametrize("num_ranks", [1, MAX_RANKS, MAX_RANKS + 2])
def test_every_rank_up_to_a_limit(num_ranks: int) -> None:
    peaks = [float(n**2) for n in range(num_ranks)]
    names = grouped(
        {"memory/peak_rank": 1, "memory/peak_gib_per_rank": peaks, "other": [1], "x": {}}
    )
    assert names.pop("memory/peak_rank") == 1
    assert all(RANK_PEAKS.search(name) for name in names)
    if num_ranks <= MAX_RANKS:
        assert names == {f"memory/rank_{n}_peak_gib": float(n**2) for n in range(num_ranks)}
    else:  # 66 ranks: between rank 32 and rank 33
        assert names == {
            "memory/rank_min_peak_gib": 0.0,
            "memory/rank_median_peak_gib": (32**2 + 33**2) / 2,
            "memory/rank_max_peak_gib": 65.0**2,
        }


def test_each_group_is_a_section() -> None:
    assert tuple(section.name for section in layout()) == GROUPS
    for section in layout():
        for panel in section.panels:
            assert all(
                name.startswith(f"{section.name}/") for name in panel.names if "/" in name
            ), panel
    assert {f"memory/{phase}_peak_gib" for phase in PHASES} < set(BEST)


def test_the_ranks_share_one_panel() -> None:
    panels = [panel for section in layout() for panel in section.panels]
    for name in grouped({"memory/peak_gib_per_rank": [1.0, 2.0, 3.0]}):
        (panel,) = [panel for panel in panels if panel.shows(name)]
        assert panel.title == "peak by rank (GiB)"
    assert [panel.title for panel in panels if panel.smoothed] == ["loss"]


def test_what_a_gpu_says_has_panels_too() -> None:
    """A whole run on the CPU is looked at in tests/recipes."""
    panels = [panel for section in layout() for panel in section.panels]
    for name in memory_record([Readings(1.0, 2.0, 3.0, 4.0)], [1.5]):
        assert sum(panel.shows(name) for panel in panels) == 1, name


def test_the_layout_as_wandb_gets_it() -> None:
    pytest.importorskip(
        "wandb_workspaces", reason="not installed: pip install 'gemtune[dashboard]'"
    )
    workspace = make_workspace("us", "ours")
    view = workspace._to_model().model_dump(by_alias=True, exclude_none=True)
    assert (view["entity"], view["project"], view["displayName"]) == ("us", "ours", "gemtune")
    section_items = view["spec"]["section"]["panelBankConfig"]["sections"]
    panels = {item["name"]: item["panels"] for item in section_items}
    assert tuple(panels) == GROUPS
    lines = [
        p for each in panels.values() for p in each if p["viewType"] == "Run History Line Plot"
    ]
    assert {line["config"]["xAxis"] for line in lines} == {"step"}
    smoothed = [p["config"]["metrics"] for p in lines if p["config"]["smoothingType"] != "none"]
    assert smoothed == [["train/loss"]]
    (ranks,) = [p["config"] for p in panels["memory"] if p["config"].get("useMetricRegex")]
    assert (ranks["metricRegex"], ranks["metrics"]) == (RANK_PEAKS.pattern, [])
    kinds = {name: [p["viewType"] for p in each] for name, each in panels.items()}
    assert [kinds[name].count("Weave") for name in GROUPS] == [0, 1, 1, 1, 1]


def test_saving_the_layout_needs_a_key(no_keys: None) -> None:
    pytest.importorskip(
        "wandb_workspaces", reason="not installed: pip install 'gemtune[dashboard]'"
    )
    with pytest.raises(ConfigError, match=r"no key.*`wandb login`.*`wandb sync`"):
        save_workspace(TrackerConfig())


def test_the_view_is_of_the_default_entity(no_keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(
        "wandb_workspaces", reason="not installed: pip install 'gemtune[dashboard]'"
    )
    from wandb_workspaces.workspaces import internal

    saved = []

    def upsert(view: Any) -> dict[str, Any]:
        saved.append((view.entity, view.project))
        if view.project == "absent":
            raise ValueError("project not found")
        return {"upsertView": {"view": {"name": "nw-abc-v", "id": "1"}}}

    client = SimpleNamespace(app_url="https://wandb.example/")
    api = SimpleNamespace(default_entity="me", client=client)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(wandb, "Api", lambda: api)
    monkeypatch.setattr(internal, "upsert_view2", upsert)
    assert save_workspace(TrackerConfig(project="ours")) == "https://wandb.example/me/ours?nw=abc"
    with pytest.raises(ConfigError, match=r"panels of absent: project not found\n.*upload a run"):
        save_workspace(TrackerConfig(project="absent", entity="us"))
    assert saved == [("me", "ours"), ("us", "absent")]


def test_without_the_extra_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ConfigError, match=r"pip install 'gemtune\[dashboard\]'"):
        save_workspace(TrackerConfig())
