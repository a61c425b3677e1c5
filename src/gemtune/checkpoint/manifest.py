"""The list of a checkpoint's files with their hashes, and what proves it.

`manifest.json` names every file with its size and SHA-256 (FIPS 180-4). `COMPLETE`, written last of
all, holds the SHA-256 of the manifest. A bit that flips in any file, in the manifest or in the
marker is therefore found, and a checkpoint without the marker was never finished.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gemtune.checkpoint.disk import sync_entry, write_synced

MANIFEST_FILE = "manifest.json"
MARKER_FILE = "COMPLETE"

_CHUNK_BYTES = 2**22
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]+")

Entries = dict[str, dict[str, Any]]
"""File -> {"bytes": size, "sha256": hash}."""


def entries_of(files: Iterable[Path]) -> Entries:
    """What the manifest says of these files. Reads all of each."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}


def sha256(file: Path) -> str:
    """In hexadecimal, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path, entries: Entries) -> None:
    """Write `manifest.json` and wait until it is on disk."""
    document = {"files": dict(sorted(entries.items()))}
    write_synced(folder / MANIFEST_FILE, json.dumps(document, indent=1) + "\n")


def write_marker(folder: Path) -> None:
    """Declare the folder complete: the last thing that is written of a checkpoint."""
    write_synced(folder / MARKER_FILE, sha256(folder / MANIFEST_FILE) + "\n")
    sync_entry(folder)


def is_complete(folder: Path) -> bool:
    """Whether the marker is there. Says nothing about damage."""
    return (folder / MARKER_FILE).is_file()


def read_manifest(folder: Path) -> Entries:
    """The entries, once the marker has confirmed them.

    Raises:
        ValueError: manifest or marker is damaged or missing; says which.
    """
    try:
        content = (folder / MANIFEST_FILE).read_bytes()
    except OSError as error:
        raise ValueError(f"{MANIFEST_FILE}: {error.strerror}") from error
    try:
        promised = (folder / MARKER_FILE).read_bytes()
    except OSError as error:
        raise ValueError(f"{MARKER_FILE}: {error.strerror}") from error
    if promised != f"{hashlib.sha256(content).hexdigest()}\n".encode():
        raise ValueError(f"{MANIFEST_FILE} and {MARKER_FILE} do not belong together")
    try:
        entries = json.loads(content)["files"]
        well_formed = all(map(_is_entry, entries.items()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST_FILE} cannot be read: {error!r}") from error
    if not well_formed:
        raise ValueError(f"{MANIFEST_FILE} has entries that are none")
    return entries


def problems_of(folder: Path, entries: Entries, names: Iterable[str]) -> list[str]:
    """What is wrong with the files of these names; empty: they are what was written, to the bit."""
    problems = []
    for name in names:
        file, entry = folder / name, entries[name]
        try:
            size = file.stat().st_size
            if size != entry["bytes"]:
                problems.append(f"{name} has {size} bytes, not {entry['bytes']}")
            elif sha256(file) != entry["sha256"]:
                problems.append(f"{name} is not what was written: its SHA-256 differs")
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
    return problems


def verify(folder: Path) -> list[str]:
    """All that is wrong with a checkpoint; empty: nothing. Reads every byte."""
    try:
        entries = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    return problems_of(folder, entries, entries)


def verified_content(folder: Path, name: str) -> bytes:
    """The content of one file, hashed before it is handed out.

    Raises:
        ValueError: it is not what was written, or the manifest is damaged.
    """
    entries = read_manifest(folder)
    if name not in entries:
        raise ValueError(f"{name} is not in {MANIFEST_FILE}")
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != entries[name]["sha256"]:
        raise ValueError(f"{name} is not what was written: its SHA-256 differs")
    return content


def shares(entries: Mapping[str, Mapping[str, Any]], num_shares: int) -> list[list[str]]:
    """The files, dealt out so that each share has about as many bytes."""
    dealt: list[list[str]] = [[] for _ in range(num_shares)]
    sizes = [0] * num_shares
    for name in sorted(entries, key=lambda name: (-entries[name]["bytes"], name)):
        least = sizes.index(min(sizes))
        dealt[least].append(name)
        sizes[least] += entries[name]["bytes"]
    return dealt


def _is_entry(item: tuple[Any, Any]) -> bool:
    # Plain names only: a manifest must not lead out of its folder.
    name, entry = item
    return bool(
        _PLAIN_NAME.fullmatch(name)
        and isinstance(entry["bytes"], int)
        and _SHA256.fullmatch(entry["sha256"])
    )
