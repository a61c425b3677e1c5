"""Nothing that was committed is lost, whenever the process dies."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from sealed import seal

from gemtune.checkpoint import CheckpointFolder, resume_candidates
from gemtune.checkpoint.disk import check_space, replace, staging_beside
from gemtune.checkpoint.manifest import entries_of, verify, write_manifest
from gemtune.errors import CheckpointError

FILES = ("state.json", "__0_0.distcp", "rng_rank0.json")


class Killed(BaseException):
    """The process died here."""


class DiesAt:
    """Lets `number` changes to the disk happen, and none after that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left = number
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync"):
            monkeypatch.setattr(os, name, self._guarded(getattr(os, name)))

    def _guarded(self, call):
        def guarded(*args, **kwargs):
            if self.left == 0:
                raise Killed
            self.left -= 1
            return call(*args, **kwargs)

        return guarded


def save(
    folder: CheckpointFolder, step: int, keep_last: int = 2, eval_loss: float | None = None
) -> None:
    folder.begin(step)
    staging = folder.staging_path(step)
    write(staging, f"of step {step}")
    if eval_loss is not None:
        state = {"step": step, "eval_step": step, "eval_loss": eval_loss}
        (staging / "state.json").write_text(json.dumps({"state": state}))
    write_manifest(staging, entries_of(staging.iterdir()))
    folder.commit(step)
    folder.prune(keep_last)


def write(folder: Path, text: str) -> None:
    for name in FILES:
        (folder / name).write_text(text)


def is_whole(folder: Path, text: str) -> bool:
    return all((folder / name).is_file() and (folder / name).read_text() == text for name in FILES)


def names(folder: CheckpointFolder) -> list[str]:
    return [path.name for path in folder.committed()]


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "run" / "checkpoints")


def test_staging_is_invisible_until_commit(folder: CheckpointFolder) -> None:
    assert folder.newest() is None
    folder.begin(1)
    write(folder.staging_path(1), "x")
    write_manifest(folder.staging_path(1), entries_of(folder.staging_path(1).iterdir()))
    assert folder.newest() is None
    assert folder.commit(1) == folder.newest() == folder.final_path(1)
    assert not folder.staging_path(1).exists()


def test_order_is_by_step(folder: CheckpointFolder) -> None:
    for step in (9, 10, 100):
        save(folder, step, keep_last=9)
    assert names(folder) == ["step_00000009", "step_00000010", "step_00000100"]


def test_prune_keeps_the_last(folder: CheckpointFolder) -> None:
    for step in range(1, 6):
        save(folder, step, keep_last=2)
    assert names(folder) == ["step_00000004", "step_00000005"]
    assert sorted(p.name for p in folder.path.iterdir()) == names(folder)


def test_a_folder_without_the_marker_is_no_checkpoint(folder: CheckpointFolder) -> None:
    save(folder, 1)
    save(folder, 2)
    (folder.final_path(2) / "COMPLETE").unlink()
    assert names(folder) == ["step_00000001"]
    save(folder, 2)  # and is replaced by one
    assert is_whole(folder.final_path(2), "of step 2")


def test_what_is_not_ours_is_not_deleted(folder: CheckpointFolder) -> None:
    save(folder, 1)
    older = folder.final_path(2)
    older.mkdir()
    write(older, "of an older gemtune")
    with pytest.raises(CheckpointError, match="is there already"):
        save(folder, 2)
    save(folder, 3)
    assert is_whole(older, "of an older gemtune")


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([3.0, 1.0, 2.0, 2.5, None], [2, 4, 5]),
        ([None, None, None, None, None], [4, 5]),
        ([3.0, 2.0, 1.5, 1.2, 1.0], [4, 5]),
        ([1.0, 1.0, 1.0, 1.0, 1.0], [1, 4, 5]),
    ],
)
def test_prune_keeps_the_best(
    folder: CheckpointFolder, losses: list[float | None], kept: list[int]
) -> None:
    for step, loss in enumerate(losses, start=1):
        save(folder, step, keep_last=2, eval_loss=loss)
    assert names(folder) == [f"step_{step:08d}" for step in kept]


@pytest.mark.parametrize(
    ("metric", "mode", "kept"),
    [
        ("eval/chrf", "max", [2, 5]),
        ("eval/chrf", "min", [1, 5]),
        ("eval/loss", "min", [3, 5]),
        ("eval/mine", "max", [4, 5]),
        ("eval/other", "max", [5]),
    ],
)
def test_prune_keeps_the_best_by_any_metric(
    folder: CheckpointFolder, metric: str, mode: str, kept: list[int]
) -> None:
    figures = [
        {"eval/loss": 3.0, "eval/chrf": 10.0},
        {"eval/loss": 2.0, "eval/chrf": 30.0},
        {"eval/loss": 1.0, "eval/chrf": 20.0},
        {"eval/loss": 4.0, "eval/chrf": math.nan, "eval/mine": -5.0},
        {"eval/loss": 5.0},
    ]
    for step, metrics in enumerate(figures, start=1):
        folder.begin(step)
        staging = folder.staging_path(step)
        write(staging, "")
        state = {"step": step, "eval_step": step, "eval_loss": metrics["eval/loss"]}
        document = {"state": state | {"eval_metrics": metrics}}
        (staging / "state.json").write_text(json.dumps(document))
        write_manifest(staging, entries_of(staging.iterdir()))
        folder.commit(step)
    folder.prune(1, metric, mode)
    assert names(folder) == [f"step_{step:08d}" for step in kept]


def test_an_evaluation_of_another_step_counts_for_nothing(folder: CheckpointFolder) -> None:
    save(folder, 1, eval_loss=1.0)
    state = {"step": 1, "eval_step": 0, "eval_loss": 0.1}
    (folder.final_path(1) / "state.json").write_text(json.dumps({"state": state}))
    seal(folder.final_path(1))
    for step in (2, 3, 4):
        save(folder, step, keep_last=1, eval_loss=2.0 + step)
    assert names(folder) == ["step_00000002", "step_00000004"]


def test_a_damaged_one_is_set_aside_under_a_free_name(folder: CheckpointFolder) -> None:
    for _ in range(2):
        save(folder, 1)
        folder.set_aside(folder.final_path(1))
    save(folder, 2)
    assert sorted(p.name for p in folder.path.iterdir()) == [
        "damaged-step_00000001",
        "damaged-step_00000001.1",
        "step_00000002",
    ]


def test_a_committed_checkpoint_is_never_replaced(folder: CheckpointFolder) -> None:
    save(folder, 1)
    folder.begin(1)
    write(folder.staging_path(1), "of another process")
    write_manifest(folder.staging_path(1), {})
    with pytest.raises(CheckpointError, match="another process"):
        folder.commit(1)
    assert is_whole(folder.final_path(1), "of step 1")


def test_a_crash_at_any_instant(tmp_path: Path) -> None:
    """Whatever is listed as committed is whole, the newest is not lost, and saving works again."""
    for number in range(1000):
        folder = CheckpointFolder(tmp_path / str(number) / "checkpoints")
        for step in (1, 2):
            save(folder, step)
        with pytest.MonkeyPatch.context() as monkeypatch:
            death = DiesAt(monkeypatch, number)
            try:
                save(folder, 3)
            except Killed:
                pass
            else:
                break
            assert death.left == 0
        committed = names(folder)
        assert committed[-1] in ("step_00000002", "step_00000003")
        assert len(committed) >= 2
        for path in folder.committed():
            assert is_whole(path, f"of step {int(path.name[5:])}"), (number, path)
            assert verify(path) == [], (number, path)
        save(folder, 4)
        assert names(folder) == [committed[-1], "step_00000004"]
        assert sorted(p.name for p in folder.path.iterdir()) == names(folder)
    assert 10 < number < 999


def test_a_crash_while_a_folder_is_replaced(tmp_path: Path) -> None:
    def put(folder: Path, text: str) -> None:
        write(staging_beside(folder), text)
        replace(folder)

    for number in range(1000):
        model = tmp_path / str(number) / "model"
        put(model, "old")
        with pytest.MonkeyPatch.context() as monkeypatch:
            DiesAt(monkeypatch, number)
            try:
                put(model, "new")
            except Killed:
                pass
            else:
                break
        whole = [p for p in model.parent.iterdir() if is_whole(p, "old") or is_whole(p, "new")]
        assert whole, number
        if model.exists():
            assert is_whole(model, "old") or is_whole(model, "new")
        else:  # the next start puts it back before it does anything else
            shutil.rmtree(staging_beside(model))
            assert is_whole(model, "old"), number
        put(model, "newer")
        assert is_whole(model, "newer")
        assert [p.name for p in model.parent.iterdir()] == ["model"]
    assert 10 < number < 999
    assert is_whole(model, "new")


def test_what_resume_stands_for(folder: CheckpointFolder, tmp_path: Path) -> None:
    assert resume_candidates("auto", folder) == []
    for step in (1, 2):
        save(folder, step)
    first, second = folder.committed()
    other = CheckpointFolder(tmp_path / "other")
    assert resume_candidates("auto", folder) == [second, first]
    assert resume_candidates("never", folder) == []
    assert resume_candidates(str(first), other) == [first]
    assert resume_candidates(str(folder.path), other) == [second, first]
    assert resume_candidates(str(folder.path.parent), other) == [second, first]
    with pytest.raises(CheckpointError, match="does not exist"):
        resume_candidates(str(tmp_path / "nowhere"), folder)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint .*COMPLETE"):
        resume_candidates(str(tmp_path), folder)


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 3 * 2**20))
    check_space(tmp_path, 3 * 2**20)
    with pytest.raises(CheckpointError, match=r"1\.5 GiB needed, 3\.0 MiB free.*keep_last"):
        check_space(tmp_path, 3 * 2**29)
