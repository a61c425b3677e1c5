"""Checkpoint folders made by hand."""

from __future__ import annotations

from pathlib import Path

from gemtune.checkpoint.manifest import (
    MANIFEST_FILE,
    MARKER_FILE,
    entries_of,
    write_manifest,
    write_marker,
)


def seal(folder: Path) -> Path:
    """Write manifest and marker for whatever files are in it."""
    written = (MANIFEST_FILE, MARKER_FILE)
    write_manifest(folder, entries_of(f for f in folder.iterdir() if f.name not in written))
    write_marker(folder)
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
