"""Media of a row: which bytes or files may be read, and what their headers say."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from gemtune.data.media.fetching import FetchLimits, fetch
from gemtune.errors import DataError

_URL_SCHEMES = ("http://", "https://")


@dataclass(frozen=True)
class MediaPolicy:
    """What of the media named in data is read at all."""

    allow_urls: bool = False
    max_image_pixels: int = 50_000_000
    max_media_bytes: int = 200_000_000
    """Of one file, before anything in it is decoded."""
    max_video_seconds: float = 300.0
    max_video_frames: int = 20_000
    """Of the file; few of them are used, but those before them are decoded too."""
    verify_media: bool = False
    """Decode a medium when it is opened, not when a batch needs it."""
    fetch: FetchLimits = field(default_factory=FetchLimits)


def bytes_or_path(medium: Any, kind: str, where: str) -> bytes | str:
    """What a row gives: bytes, a path or URL, or `{bytes, path}` as `datasets` stores it."""
    if isinstance(medium, dict):
        medium = medium["bytes"] if medium.get("bytes") is not None else medium.get("path")
    if not isinstance(medium, bytes | str):
        article, also = ("an", " or a PIL image") if kind == "image" else ("a", "")
        article = "an" if kind == "audio" else article
        listed = "bytes, a file path" if also else "bytes or a file path"
        raise DataError(
            f"{where}: {article} {kind} must be {listed}{also}, not {type(medium).__name__}."
        )
    return medium


def open_medium(
    medium: bytes | str, kind: str, where: str, root: Path | None, policy: MediaPolicy
) -> BinaryIO:
    """The bytes, file or URL opened for reading, once it is known that it may be read.

    A path is followed to where it leads; it must be a regular file inside `root`. URLs are refused
    unless the policy allows them, and then `fetching` decides.

    Raises:
        DataError: beginning with `where`.
    """
    if isinstance(medium, bytes):
        _check_size(len(medium), kind, where, policy)
        return io.BytesIO(medium)
    if "://" in medium or medium.startswith("data:"):
        if not policy.allow_urls or not medium.lower().startswith(_URL_SCHEMES):
            remedy = (
                "Save it first, or set data.allow_urls=true."
                if medium.lower().startswith(_URL_SCHEMES)
                else "Save it first."
            )
            raise DataError(f"{where}: {kind}s are not fetched from URLs ({medium[:80]}). {remedy}")
        return io.BytesIO(fetch(medium, where, policy.fetch, policy.max_media_bytes))
    file = _open_inside(medium, kind, where, root)
    try:
        _check_size(os.fstat(file.fileno()).st_size, kind, where, policy)
    except DataError:
        file.close()
        raise
    return file


def path_of(file: BinaryIO) -> Path:
    """Where a file that is open lies, whatever has become of the name it was opened by."""
    return Path(os.path.realpath(f"/proc/self/fd/{file.fileno()}"))


def real_path(path: str, kind: str, where: str, root: Path | None) -> str:
    """Where a path leads to, once it is known to be inside `root`.

    Raises:
        DataError: beginning with `where`.
    """
    if root is None:
        raise DataError(
            f"{where}: {kind} paths are read below data.media_root only, and it is not set "
            f"({path[:200]!r}). Set it to the folder that holds the files."
        )
    named = root / os.path.expanduser(path)  # noqa: PTH111 - it must not fail for ~nobody
    try:
        real_root = os.path.realpath(root)
        real = os.path.realpath(named, strict=True)
    except FileNotFoundError as error:
        raise DataError(f"{where}: there is no {kind} file {named}.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: not a path that can be read ({error}).") from error
    if os.path.commonpath([real_root, real]) != real_root:
        leads = "" if os.path.abspath(named) == real else f", which leads to {real},"  # noqa: PTH100
        raise DataError(
            f"{where}: {kind} {path!r}{leads} is outside of {real_root}. Move it inside, or set "
            "data.media_root to a folder that holds all of them."
        )
    return real


def _open_inside(path: str, kind: str, where: str, root: Path | None) -> BinaryIO:
    real = real_path(path, kind, where, root)
    try:
        # Not through a link put there since, and not waiting for the writer of a pipe.
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{where}: {kind} file {real} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{where}: {real} is not a regular file.")
    return os.fdopen(descriptor, "rb")


def _check_size(size_bytes: int, kind: str, where: str, policy: MediaPolicy) -> None:
    if size_bytes > policy.max_media_bytes:
        raise DataError(
            f"{where}: the {kind} has {size_bytes:,} bytes; data.max_media_bytes="
            f"{policy.max_media_bytes:,} are allowed. Make it smaller, or raise the limit."
        )
