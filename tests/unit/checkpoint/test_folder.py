"""Nothing that was committed is lost, whenever the process dies."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from gemtune.checkpoint import CheckpointFolder, find_resume_point
from gemtune.checkpoint.folder import check_space, replace, staging_beside
from gemtune.errors import CheckpointError

FILES = ("state.json", "model.safetensors", "optimizer.safetensors")


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


def save(folder: CheckpointFolder, step: int, keep_last: int = 2) -> None:
    folder.begin(step)
    write(folder.staging_path(step), f"of step {step}")
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


def test_a_folder_without_state_is_no_checkpoint(folder: CheckpointFolder) -> None:
    save(folder, 1)
    folder.final_path(2).mkdir()
    assert names(folder) == ["step_00000001"]
    save(folder, 2)  # and is replaced by one
    assert is_whole(folder.final_path(2), "of step 2")


def test_a_committed_checkpoint_is_never_replaced(folder: CheckpointFolder) -> None:
    save(folder, 1)
    folder.begin(1)
    write(folder.staging_path(1), "of another process")
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
    assert find_resume_point("auto", folder) is None
    for step in (1, 2):
        save(folder, step)
    first, second = folder.committed()
    other = CheckpointFolder(tmp_path / "other")
    assert find_resume_point("auto", folder) == second
    assert find_resume_point("never", folder) is None
    assert find_resume_point(str(first), other) == first
    assert find_resume_point(str(folder.path), other) == second
    assert find_resume_point(str(folder.path.parent), other) == second
    with pytest.raises(CheckpointError, match="does not exist"):
        find_resume_point(str(tmp_path / "nowhere"), folder)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint .*state\.json"):
        find_resume_point(str(tmp_path), folder)


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 3 * 2**20))
    check_space(tmp_path, 3 * 2**20)
    with pytest.raises(CheckpointError, match=r"1\.5 GiB needed, 3\.0 MiB free.*keep_last"):
        check_space(tmp_path, 3 * 2**29)
