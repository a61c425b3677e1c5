"""Every bit of a checkpoint is vouched for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from sealed import seal

from gemtune.checkpoint.manifest import (
    MANIFEST_FILE,
    MARKER_FILE,
    is_complete,
    shares,
    verified_content,
    verify,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "state.json").write_text('{"step": 1}')
    (tmp_path / "__0_0.distcp").write_bytes(bytes(range(256)))
    (tmp_path / "empty").write_bytes(b"")
    return seal(tmp_path)


def test_the_hashes_are_those_of_sha256sum(folder: Path) -> None:
    entries = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    assert list(entries) == ["__0_0.distcp", "empty", "state.json"]
    assert entries["__0_0.distcp"] == {
        "bytes": 256,
        "sha256": hashlib.sha256(bytes(range(256))).hexdigest(),
    }
    assert verify(folder) == [] and is_complete(folder)


def test_any_bit_of_any_file(folder: Path) -> None:
    for file in list(folder.iterdir()):
        content = file.read_bytes()
        for position in range(len(content) * 8):
            flipped = bytearray(content)
            flipped[position // 8] ^= 1 << position % 8
            file.write_bytes(flipped)
            assert verify(folder), (file.name, position)
        file.write_bytes(content)
    assert verify(folder) == []


def test_what_is_wrong_is_named(folder: Path) -> None:
    (folder / "empty").write_bytes(b"1")
    (folder / "state.json").unlink()
    problems = "; ".join(verify(folder))
    assert "empty has 1 bytes, not 0" in problems and "state.json: No such file" in problems
    (folder / MARKER_FILE).unlink()
    assert verify(folder) == [f"{MARKER_FILE}: No such file or directory"]
    (folder / MANIFEST_FILE).unlink()
    assert verify(folder) == [f"{MANIFEST_FILE}: No such file or directory"]


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        '{"files": []}',
        '{"files": {"state.json": {}}}',
        '{"files": {"state.json": {"bytes": "1", "sha256": "00"}}}',
        '{"files": {"../state.json": {"bytes": 1, "sha256": "' + "0" * 64 + '"}}}',
        '{"files": {"/etc/passwd": {"bytes": 1, "sha256": "' + "0" * 64 + '"}}}',
    ],
)
def test_a_manifest_that_is_none(folder: Path, manifest: str) -> None:
    """With a marker that fits it: written by hand, not damaged."""
    (folder / MANIFEST_FILE).write_text(manifest)
    (folder / MARKER_FILE).write_text(hashlib.sha256(manifest.encode()).hexdigest() + "\n")
    (problem,) = verify(folder)
    assert problem.startswith(MANIFEST_FILE)


def test_content_is_hashed_before_it_is_handed_out(folder: Path) -> None:
    assert verified_content(folder, "state.json") == b'{"step": 1}'
    (folder / "state.json").write_text('{"step": 2}')
    with pytest.raises(ValueError, match=r"state\.json is not what was written"):
        verified_content(folder, "state.json")
    (folder / "more.json").write_text("{}")
    with pytest.raises(ValueError, match=r"more\.json is not in manifest\.json"):
        verified_content(folder, "more.json")


def test_ranks_read_about_as_much_each() -> None:
    entries = {f"f{i}": {"bytes": size} for i, size in enumerate([70, 10, 20, 30, 5, 5])}
    dealt = shares(entries, 2)
    assert sorted(name for share in dealt for name in share) == sorted(entries)
    assert sorted(sum(entries[n]["bytes"] for n in share) for share in dealt) == [70, 70]
    assert shares({}, 3) == [[], [], []]
