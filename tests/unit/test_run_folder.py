"""Which checkpoint a start goes on from, and what it refuses; nothing is trained here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from sealed import seal
from whole_runs import compose

from gemtune.config import RunConfig
from gemtune.errors import CheckpointError, ConfigError
from gemtune.run_folder import FolderLock, claim, differences, open_folder, resume_points


def configured(folder: Path, *overrides: str) -> RunConfig:
    return compose(
        "tracker=none", f"run.dir={folder.parent}", f"run.name={folder.name}", *overrides
    )


def add_checkpoint(folder: Path, step: int, config: RunConfig) -> Path:
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    state = {"run_id": "abc", "step": step}
    document = {"format": 2, "world_size": 1, "state": state, "config": config.as_dict()}
    (path / "state.json").write_text(json.dumps(document))
    return seal(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    folder = tmp_path / "run"
    for step in (1, 2):
        add_checkpoint(folder, step, configured(folder))
    return folder


def test_a_new_run_starts_from_nothing(tmp_path: Path) -> None:
    for resume in ("auto", "never"):
        assert resume_points(configured(tmp_path / "new", f"run.resume={resume}")) == []
    assert not (tmp_path / "new").exists()


def test_an_old_run_goes_on_from_its_newest(folder: Path) -> None:
    oldest, newest = sorted((folder / "checkpoints").iterdir())
    assert resume_points(configured(folder)) == [newest, oldest]
    assert resume_points(configured(folder, f"run.resume={folder}")) == [newest, oldest]
    assert resume_points(configured(folder, f"run.resume={newest}")) == [newest, oldest]
    assert resume_points(configured(folder, "run.resume=never", "optim.lr=1")) == []


def test_a_path_is_where_a_run_begins(folder: Path, tmp_path: Path) -> None:
    branch = tmp_path / "branch"
    config = configured(branch, f"run.resume={folder}", "optim.lr=1")
    assert resume_points(config)[0] == folder / "checkpoints" / "step_00000002"
    own = add_checkpoint(branch, 3, config)
    assert resume_points(config) == [own]
    with pytest.raises(ConfigError, match=r"optim\.lr: 1\.0 there, 0\.5 now"):
        resume_points(configured(branch, f"run.resume={folder}", "optim.lr=0.5"))


def test_the_configuration_of_the_checkpoint_counts_not_the_file(folder: Path) -> None:
    (folder / "config.yaml").write_text("optim: {lr: 7}")
    assert len(resume_points(configured(folder))) == 2


def test_the_name_of_the_folder_moved_aside_is_free(folder: Path) -> None:
    folder.with_name("run.1").mkdir()
    with pytest.raises(ConfigError, match=r"is kept, as run\.2"):
        resume_points(configured(folder, "run.seed=1"))
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
    open_folder(config, resume_points(config)[0])
    assert not (branch / "metrics.jsonl").exists()
    open_folder(configured(folder), resume_points(configured(folder))[0])
    assert (folder / "metrics.jsonl").exists()
    assert yaml.safe_load((branch / "config.yaml").read_text())["run"]["name"] == "branch"


def test_the_configuration_of_a_damaged_checkpoint_does_not_count(folder: Path) -> None:
    oldest, newest = sorted((folder / "checkpoints").iterdir())
    state = newest / "state.json"
    state.write_text(state.read_text().replace('"lr": 0.001', '"lr": 0.003'))
    assert resume_points(configured(folder)) == [newest, oldest]
    (oldest / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"_00000002/state\.json cannot be read.*\nNone of"):
        resume_points(configured(folder))


def test_what_an_older_gemtune_wrote_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    old = folder / "checkpoints" / "step_00000007"
    old.mkdir(parents=True)
    (old / "state.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match=r"holds step_00000007 of another gemtune"):
        resume_points(configured(folder))
    add_checkpoint(folder, 8, configured(folder))
    assert len(resume_points(configured(folder))) == 1


def test_a_first_checkpoint_that_was_cut_is_a_new_start(folder: Path) -> None:
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "COMPLETE").unlink()
    assert resume_points(configured(folder)) == []


def test_what_another_launch_did_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = configured(folder)
    points = resume_points(config)
    add_checkpoint(folder, 1, config)
    lock = FolderLock(folder)
    with pytest.raises(CheckpointError, match="meanwhile"):
        claim(config, points, lock)
    claim(config, resume_points(config), lock)
    lock.release()


def test_a_lock_is_free_again_when_it_is_released(tmp_path: Path) -> None:
    for _ in range(2):
        lock = FolderLock(tmp_path / "new" / "run")
        lock.take()
        lock.take()
        lock.release()
    assert [p.name for p in (tmp_path / "new").iterdir()] == [".run.lock"]


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


def test_where_optimizer_state_lies_may_change() -> None:
    before = configured(Path("runs/a")).as_dict()
    keys = ("optim.offload_state=true", "optim.offload_group_mib=7")
    now = configured(Path("runs/a"), *keys).as_dict()
    assert now["optim"]["offload_state"] is True and before["optim"]["offload_state"] is False
    assert list(differences(before, now)) == []


def test_an_older_run_did_not_say_which_adapter_it_has() -> None:
    lora = configured(Path("runs/a"), "adapter=lora").as_dict()
    rslora = configured(Path("runs/a"), "adapter=rslora").as_dict()
    assert [key for key, *_ in differences(lora, rslora)] == ["adapter._target_"]
    older = lora | {"adapter": {k: v for k, v in lora["adapter"].items() if k != "_target_"}}
    assert list(differences(older, lora)) == []
