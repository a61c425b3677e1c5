"""Folders that are whole or not there: staging, commit by rename, pruning, free space.

A folder is written under another name, put on disk (fsync), and becomes visible by one rename. What
is to be deleted is first renamed, so that a half-deleted folder never looks like a whole one. A
crash at any instant therefore leaves every committed folder as it was.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gemtune.errors import CheckpointError

STATE_FILE = "state.json"
_NAME = re.compile(r"step_(\d{8})")
_STAGING, _DELETED = ".staging-", ".deleted-"


@dataclass(frozen=True)
class CheckpointFolder:
    """`runs/<name>/checkpoints`: committed checkpoints are `step_<8 digits>`."""

    path: Path

    def committed(self) -> list[Path]:
        """Whole checkpoints, oldest first. Staging folders do not count."""
        if not self.path.is_dir():
            return []
        found = [p for p in self.path.iterdir() if _NAME.fullmatch(p.name) and is_checkpoint(p)]
        return sorted(found)

    def newest(self) -> Path | None:
        committed = self.committed()
        return committed[-1] if committed else None

    def final_path(self, step: int) -> Path:
        return self.path / f"step_{step:08d}"

    def staging_path(self, step: int) -> Path:
        return self.path / f"{_STAGING}step_{step:08d}"

    def begin(self, step: int) -> None:
        """Make an empty staging folder; what an earlier crash left behind is deleted."""
        self.path.mkdir(parents=True, exist_ok=True)
        for mark in (_STAGING, _DELETED):
            for left in self.path.glob(f"{mark}*"):
                shutil.rmtree(left)
        self.staging_path(step).mkdir()

    def commit(self, step: int) -> Path:
        """Put everything on disk and make it visible by one rename.

        Raises:
            CheckpointError: a checkpoint of that step is there. It stays: another process trains
                in the same run folder.
        """
        staging, final = self.staging_path(step), self.final_path(step)
        if is_checkpoint(final):
            raise CheckpointError(
                f"{final} is there already. Does another process train in this run folder?"
            )
        sync(staging)
        if final.exists():  # not a checkpoint: somebody took its state.json away
            _delete(final)
        staging.rename(final)
        # The name is on disk once its folder is; that folder may be new as well.
        for folder in (self.path, *self.path.absolute().parents[:2]):
            _fsync(folder)
        return final

    def abandon(self, step: int) -> None:
        """Delete what was staged for that step, as far as the disk lets us."""
        shutil.rmtree(self.staging_path(step), ignore_errors=True)

    def prune(self, keep_last: int) -> None:
        """Delete the oldest until `keep_last` are left."""
        for old in self.committed()[:-keep_last]:
            try:
                _delete(old)
            except OSError as error:
                raise CheckpointError(
                    f"{old} could not be deleted (checkpoint.keep_last={keep_last}): {error}"
                ) from error


def is_checkpoint(path: Path) -> bool:
    return (path / STATE_FILE).is_file()


def find_resume_point(resume: str, folder: CheckpointFolder) -> Path | None:
    """The checkpoint that `run.resume` stands for, or None for a new run.

    Raises:
        CheckpointError: the given folder is no checkpoint.
    """
    if resume == "auto":
        return folder.newest()
    if resume == "never":
        return None
    path = Path(resume).expanduser()
    if is_checkpoint(path):
        return path
    inner = CheckpointFolder(path / "checkpoints").newest() or CheckpointFolder(path).newest()
    if inner is not None:
        return inner
    there = "is not a checkpoint (it has no state.json)" if path.exists() else "does not exist"
    raise CheckpointError(
        f"run.resume={resume}: that folder {there}. Give runs/NAME, one of "
        "runs/NAME/checkpoints/step_*, or auto or never."
    )


def staging_beside(folder: Path) -> Path:
    """A new, empty folder beside `folder`, to be filled and given to `replace`.

    First undoes a `replace` that a crash cut in two, and deletes what others left behind.
    """
    staging, aside = _beside(folder)
    if aside.exists() and not folder.exists():
        aside.rename(folder)
    for left in (staging, aside):
        if left.exists():
            shutil.rmtree(left)
    staging.mkdir(parents=True)
    return staging


def replace(folder: Path) -> None:
    """Put the staging folder of `folder` in its place.

    What stood there is renamed first and deleted last: at every instant one of the two is whole on
    disk.
    """
    staging, aside = _beside(folder)
    sync(staging)
    if folder.exists():
        folder.rename(aside)
    staging.rename(folder)
    _fsync(folder.parent)
    if aside.exists():
        shutil.rmtree(aside)


def sync(folder: Path) -> None:
    """Wait until the files in `folder` are on disk."""
    for file in folder.iterdir():
        _fsync(file)
    _fsync(folder)


def check_space(path: Path, needed_bytes: int) -> None:
    """Raise CheckpointError if the disk of `path` has less than `needed_bytes` free."""
    if shutil.disk_usage(path).free < needed_bytes:
        raise CheckpointError(no_space_message(path, needed_bytes))


def is_no_space(error: BaseException) -> bool:
    """Whether a write failed because the disk, or the user's share of it, is full."""
    texts = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
    return any(text in str(error) for text in texts)  # safetensors has no errno


def no_space_message(path: Path, needed_bytes: int) -> str:
    """What is needed, what is free, and what can be done about it."""
    free = shutil.disk_usage(path).free
    return (
        f"no space on the disk of {path}: {_size(needed_bytes)} needed, {_size(free)} free. "
        "Free some, lower checkpoint.keep_last, or move the runs with run.dir="
    )


def _beside(folder: Path) -> tuple[Path, Path]:
    return (
        folder.with_name(f"{_STAGING}{folder.name}"),
        folder.with_name(f".replaced-{folder.name}"),
    )


def _delete(folder: Path) -> None:
    """By way of another name: see the top of this file."""
    doomed = folder.with_name(f"{_DELETED}{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _size(num_bytes: int) -> str:
    units: Iterable[tuple[str, int]] = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    for unit, scale in units:
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot (some network ones)
            raise
    finally:
        os.close(descriptor)
