"""One flipped bit anywhere in a checkpoint of a real run is found before anything is read."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from whole_runs import RunFolder

from gemtune.checkpoint import CheckpointFolder, Ranks, first_undamaged
from gemtune.checkpoint.manifest import verify

pytestmark = pytest.mark.xdist_group("damage")

FLIPS_PER_FILE = 40


@pytest.fixture
def copied(finished_run: RunFolder, tmp_path: Path) -> CheckpointFolder:
    """The checkpoints of the finished run."""
    shutil.copytree(finished_run.path / "checkpoints", tmp_path / "checkpoints")
    return CheckpointFolder(tmp_path / "checkpoints")


def flip(file: Path, position: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(position // 8)
        byte = opened.read(1)[0] ^ 1 << position % 8
        opened.seek(position // 8)
        opened.write(bytes([byte]))


def test_every_flipped_bit_is_found(copied: CheckpointFolder) -> None:
    chance = random.Random(0)
    newest = copied.newest()
    assert newest is not None and verify(newest) == []
    files = sorted(newest.iterdir())
    assert len(files) == 6
    found = 0
    for file in files:
        for _ in range(FLIPS_PER_FILE):
            position = chance.randrange(file.stat().st_size * 8)
            flip(file, position)
            problems = verify(newest)
            assert problems and (file.name in problems[0] or "manifest.json" in problems[0])
            found += 1
            flip(file, position)
    assert verify(newest) == [] and found == 240


def test_the_one_before_is_gone_on_from(copied: CheckpointFolder) -> None:
    chance = random.Random(1)
    before, newest = copied.committed()
    for name in [file.name for file in newest.iterdir()]:
        position = chance.randrange((newest / name).stat().st_size * 8)
        flip(newest / name, position)
        assert first_undamaged(Ranks(), [newest, before], copied, print) == before, name
        aside = copied.path / f"damaged-{newest.name}"
        flip(aside / name, position)
        aside.rename(newest)
    assert first_undamaged(Ranks(), [newest, before], copied, print) == newest


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_a_file_that_was_cut(copied: CheckpointFolder, cut: int) -> None:
    newest = copied.newest()
    assert newest is not None
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[: min(cut, len(content) - 1)])
        assert verify(newest), file.name
        file.write_bytes(content)
