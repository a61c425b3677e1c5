"""The checkpoints of a run on disk: names, staging, commit by rename, pruning."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gemtune.errors import CheckpointError

STATE_FILE = "state.json"
_NAME = re.compile(r"step_(\d{8})")


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
        return self.path / f".staging-step_{step:08d}"

    def begin(self, step: int) -> None:
        """Make an empty staging folder; what an earlier crash left behind is deleted."""
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(".staging-*"):
            shutil.rmtree(left)
        self.staging_path(step).mkdir()

    def commit(self, step: int) -> Path:
        """Put everything on disk and make it visible by one rename."""
        staging, final = self.staging_path(step), self.final_path(step)
        for file in staging.iterdir():
            _fsync(file)
        _fsync(staging)
        if final.exists():
            # The same step again, after a resume from an older one: it is the same state.
            shutil.rmtree(final)
        staging.rename(final)
        _fsync(self.path)
        return final

    def prune(self, keep_last: int) -> None:
        """Delete the oldest until `keep_last` are left."""
        for old in self.committed()[:-keep_last]:
            shutil.rmtree(old)


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


def check_space(path: Path, needed_bytes: int) -> None:
    """Raise CheckpointError if the disk of `path` has less than `needed_bytes` free."""
    free = shutil.disk_usage(path).free
    if free < needed_bytes:
        raise CheckpointError(_no_space(path, needed_bytes, free))


def no_space_message(path: Path, needed_bytes: int) -> str:
    """For a write that failed although the check before it passed."""
    return _no_space(path, needed_bytes, shutil.disk_usage(path).free)


def _no_space(path: Path, needed_bytes: int, free: int) -> str:
    return (
        f"no space on the disk of {path}: {_size(needed_bytes)} needed, {_size(free)} free. "
        "Free some, lower checkpoint.keep_last, or move the runs with run.dir="
    )


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
    finally:
        os.close(descriptor)
