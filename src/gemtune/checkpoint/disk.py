"""What a disk promises: waiting for it, free space, and one folder in the place of another."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from gemtune.errors import CheckpointError

STAGING = ".staging-"


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
    sync_entry(folder.parent)
    if aside.exists():
        shutil.rmtree(aside)


def write_synced(path: Path, content: str | bytes) -> None:
    """Write a file and wait until it is on disk."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    sync_entry(path)


def sync(folder: Path) -> None:
    """Wait until the files in `folder`, and their names, are on disk."""
    for entry in folder.iterdir():
        sync_entry(entry)
    sync_entry(folder)


def sync_entry(path: Path) -> None:
    """Wait until one file, or the names in one folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot (some network ones)
            raise
    finally:
        os.close(descriptor)


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
        f"no space on the disk of {path}: {as_size(needed_bytes)} needed, {as_size(free)} free. "
        "Free some, lower checkpoint.keep_last, or move the runs with run.dir="
    )


def as_size(num_bytes: int) -> str:
    """Bytes as a person reads them: 3.2 GiB."""
    units: Iterable[tuple[str, int]] = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    for unit, scale in units:
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"


def _beside(folder: Path) -> tuple[Path, Path]:
    return (
        folder.with_name(f"{STAGING}{folder.name}"),
        folder.with_name(f".replaced-{folder.name}"),
    )
