"""Which checkpoint a start goes on from, and what it refuses; nothing is trained here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from whole_runs import compose

from gemtune.config import RunConfig
from gemtune.errors import CheckpointError, ConfigError
from gemtune.run_folder import differences, open_folder, resume_point


def configured(folder: Path, *overrides: str) -> RunConfig:
    return compose(
        "tracker=none", f"run.dir={folder.parent}", f"run.name={folder.name}", *overrides
    )


def add_checkpoint(folder: Path, step: int, config: RunConfig) -> Path:
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    state = {"run_id": "abc", "step": step}
    document = {"format": 1, "world_size": 1, "state": state, "config": config.as_dict()}
    (path / "state.json").write_text(json.dumps(document))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    folder = tmp_path / "run"
    for step in (1, 2):
        add_checkpoint(folder, step, configured(folder))
    return folder


def test_a_new_run_starts_from_nothing(tmp_path: Path) -> None:
    for resume in ("auto", "never"):
        assert resume_point(configured(tmp_path / "new", f"run.resume={resume}")) is None
    assert not (tmp_path / "new").exists()


def test_an_old_run_goes_on_from_its_newest(folder: Path) -> None:
    newest = folder / "checkpoints" / "step_00000002"
    assert resume_point(configured(folder)) == newest
    assert resume_point(configured(folder, f"run.resume={folder}")) == newest
    assert resume_point(configured(folder, f"run.resume={newest}")) == newest
    assert resume_point(configured(folder, "run.resume=never", "optim.lr=1")) is None


def test_a_path_is_where_a_run_begins(folder: Path, tmp_path: Path) -> None:
    branch = tmp_path / "branch"
    config = configured(branch, f"run.resume={folder}", "optim.lr=1")
    assert resume_point(config) == folder / "checkpoints" / "step_00000002"
    own = add_checkpoint(branch, 3, config)
    assert resume_point(config) == own
    with pytest.raises(ConfigError, match=r"optim\.lr: 1\.0 there, 0\.5 now"):
        resume_point(configured(branch, f"run.resume={folder}", "optim.lr=0.5"))


def test_the_configuration_of_the_checkpoint_counts_not_the_file(folder: Path) -> None:
    (folder / "config.yaml").write_text("optim: {lr: 7}")
    assert resume_point(configured(folder)) is not None


def test_the_name_of_the_folder_moved_aside_is_free(folder: Path) -> None:
    folder.with_name("run.1").mkdir()
    with pytest.raises(ConfigError, match=r"is kept, as run\.2"):
        resume_point(configured(folder, "run.seed=1"))
    open_folder(configured(folder, "run.resume=never"), None)
    assert (folder.with_name("run.2") / "checkpoints").is_dir()
    assert [p.name for p in folder.iterdir()] == ["config.yaml"]


def test_metrics_of_an_attempt_without_checkpoint_are_not_of_this_run(
    folder: Path, tmp_path: Path
) -> None:
    branch = tmp_path / "branch"
    for owner in (branch, folder):
        owner.mkdir(exist_ok=True)
        (owner / "metrics.jsonl").write_text('{"step": 1}\n')
    config = configured(branch, f"run.resume={folder}")
    open_folder(config, resume_point(config))
    assert not (branch / "metrics.jsonl").exists()
    open_folder(configured(folder), resume_point(configured(folder)))
    assert (folder / "metrics.jsonl").exists()
    assert yaml.safe_load((branch / "config.yaml").read_text())["run"]["name"] == "branch"


def test_a_damaged_newest_checkpoint_is_not_passed_over(folder: Path) -> None:
    (folder / "checkpoints" / "step_00000002" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"delete .*step_00000002"):
        resume_point(configured(folder))


def test_differences() -> None:
    before = {"optim": {"lr": 1.0, "eps": 1}, "tracker": {"name": "a"}, "run": {"seed": 0}, "x": 1}
    now = {"optim": {"lr": 2.0, "new": 3}, "tracker": {"name": "b"}, "run": {"seed": 0}, "x": {}}
    assert list(differences(before, now)) == [
        ("optim.eps", 1, "(nothing)"),
        ("optim.lr", 1.0, 2.0),
        ("optim.new", "(nothing)", 3),
        ("x", 1, {}),
    ]
    assert list(differences(before, before)) == []
