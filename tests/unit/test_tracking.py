"""metrics.jsonl holds each step once, whatever happened; dashboards see metrics and no secrets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import wandb

from gemtune.errors import ConfigError
from gemtune.tracking import MetricsFile, TrackerConfig, open_dashboard, wandb_mode


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(x, parse_constant=refuse) for x in path.read_text().splitlines()]


def written(path: Path, steps: int) -> MetricsFile:
    file = MetricsFile(path, 0)
    for step in range(steps + 1):
        file.write(step, {"train/loss": float(step), "note": "a longer text, cut when it is gone"})
    return file


def test_each_line_is_on_disk_at_once(path: Path) -> None:
    file = written(path, 2)
    assert [r["step"] for r in read(path)] == [0, 1, 2]
    file.close()


def test_the_same_step_is_one_object(path: Path) -> None:
    file = written(path, 2)
    file.write(2, {"eval/loss": 0.5, "note": ""})  # a shorter line than before
    file.write(3, {"train/loss": 3.0})
    file.close()
    assert read(path)[2:] == [
        {"step": 2, "train/loss": 2.0, "note": "", "eval/loss": 0.5},
        {"step": 3, "train/loss": 3.0},
    ]


def test_a_resumed_run_writes_no_step_twice(path: Path) -> None:
    written(path, 5).close()
    file = MetricsFile(path, 3)
    assert [r["step"] for r in read(path)] == [0, 1, 2, 3]
    file.write(3, {"eval/loss": 0.5})  # of the newest step: joins it
    file.write(4, {"train/loss": 4.5})
    file.close()
    records = read(path)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    assert records[3]["train/loss"] == 3.0 and records[3]["eval/loss"] == 0.5
    assert records[4] == {"step": 4, "train/loss": 4.5}


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "train/lo', b'{"step": 3', b"\xff\xfe", b"12\n", b'{"loss": 1}\n', b"\n"]
)
def test_a_torn_last_line_is_dropped(path: Path, torn: bytes) -> None:
    written(path, 2).close()
    with path.open("ab") as file:
        file.write(torn)
    resumed = MetricsFile(path, 9)
    resumed.write(3, {"train/loss": 3.0})
    resumed.close()
    assert [r["step"] for r in read(path)] == [0, 1, 2, 3]


def test_a_crash_while_a_line_grows_loses_nothing(path: Path) -> None:
    file = written(path, 2)

    class Killed(BaseException):
        pass

    class Dies:
        """The file, of a process that dies before it cuts."""

        def __init__(self, real: Any) -> None:
            self.seek, self.write = real.seek, real.write

        def truncate(self, size: int) -> None:
            raise Killed

    file._file = Dies(file._file)
    with pytest.raises(Killed):
        file.write(2, {"note": ""})
    MetricsFile(path, 9).close()
    assert read(path)[-1] == {"step": 2, "train/loss": 2.0, "note": ""}


def test_what_json_cannot_say_is_null(path: Path) -> None:
    file = MetricsFile(path, 0)
    file.write(1, {"a": math.nan, "b": math.inf, "c": [1.0, -math.inf], "d": 1e-300, "e": None})
    file.close()
    assert read(path) == [
        {"step": 1, "a": None, "b": None, "c": [1.0, None], "d": 1e-300, "e": None}
    ]


def test_no_tracker(tmp_path: Path) -> None:
    dashboard = open_dashboard(TrackerConfig(name="none"), tmp_path, "run", "id", {})
    dashboard.log({"a": 1.0}, 1)
    dashboard.finish()
    assert "metrics.jsonl" in dashboard.notice
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody is logged in to wandb; returns where netrc would be."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_online_only_where_there_is_a_key(no_keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = TrackerConfig()
    assert wandb_mode(auto) == "offline"
    no_keys.write_text("machine elsewhere.example login user password x\n")
    assert wandb_mode(auto) == "offline"
    with pytest.raises(ConfigError, match=r"wandb login.*tracker\.mode=offline"):
        wandb_mode(TrackerConfig(mode="online"))

    no_keys.write_text("machine api.wandb.ai login user password x\n")
    assert wandb_mode(auto) == "online"
    no_keys.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode(auto) == wandb_mode(TrackerConfig(mode="online")) == "online"
    assert wandb_mode(TrackerConfig(mode="offline")) == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(auto) == "offline"


def test_wandb_that_does_not_start_is_said_plainly(no_keys: Path, tmp_path: Path, monkeypatch):

    def fails(**_: object) -> None:
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", fails)
    with pytest.raises(ConfigError, match=r"no network\n.*tracker\.mode=offline"):
        open_dashboard(TrackerConfig(), tmp_path, "run", "id", {})
