"""A run that is killed again and again, at random moments, is the run that was never killed.

`make soak` does the same with more kills and writes down how many there were.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from nursery import Child, Nursery, wait_until
from whole_runs import REPOSITORY, RunFolder

from gemtune.checkpoint import CheckpointFolder
from gemtune.checkpoint.manifest import is_complete, verify

pytestmark = pytest.mark.xdist_group("kills")

NUM_KILLS = int(os.environ.get("GEMTUNE_KILLS", "25"))
SEED = int(os.environ.get("GEMTUNE_KILLS_SEED", "0"))
# Steps enough that a run is not done before it was killed as often as its share.
STEPS = NUM_KILLS + 10
COMMON = ("checkpoint.every_steps=1", f"loop.max_steps={STEPS}", "optim.lr=1e-3")
WAYS = {
    "in the way": (),
    "beside the training": (
        "checkpoint.async_save=true",
        "data.num_workers=2",
        "recipe=gemma4_lora",
        "adapter.dropout=0.1",
    ),
}


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("logs"))
    yield nursery
    nursery.close()


def is_saving(folder: Path) -> bool:
    """A checkpoint is begun and not complete."""
    if not folder.is_dir():
        return False
    return any(
        path.name.startswith(".staging-")
        or (path.name.startswith("step_") and not is_complete(path))
        for path in folder.iterdir()
    )


def kill_at_random(
    nursery: Nursery, child: Child, run_dir: Path, opened: int, chance: random.Random
) -> str:
    """Kill it; return where it was: "a save", "a step", "the start" or "" if it was done.

    `opened` is when metrics.jsonl was written last before it was started.
    """
    folder = run_dir / "checkpoints"
    in_save = chance.random() < 0.6
    if in_save:
        # Into a save, not only at its start.
        if not wait_until(lambda: is_saving(folder), child):
            return ""
        time.sleep(chance.random() * 0.1)
    elif chance.random() < 0.5:
        time.sleep(chance.random() * 4)  # wherever that is, loading included
    else:
        before = len(CheckpointFolder(folder).committed()) and CheckpointFolder(folder).newest()
        if not wait_until(lambda: CheckpointFolder(folder).newest() != before, child):
            return ""
        time.sleep(chance.random() * 0.3)
    nursery.kill(child)
    if nursery.wait(child) != -9:
        return ""
    if is_saving(folder):
        return "a save"
    return "the start" if written_at(run_dir / "metrics.jsonl") == opened else "a step"


def written_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.parametrize("way", WAYS)
def test_random_kills(nursery: Nursery, tmp_path: Path, way: str) -> None:
    overrides = (*COMMON, *WAYS[way])
    whole = nursery.start(f"run.dir={tmp_path / 'whole'}", *overrides)
    assert nursery.wait(whole) == 0, whole.log.read_text()

    chance = random.Random(f"{SEED} {way}")
    run_dir, where = tmp_path / "cut" / "run", Counter[str]()
    # Shared between the ways, the first getting what is left over.
    share = NUM_KILLS // len(WAYS)
    num_kills = NUM_KILLS - share * (len(WAYS) - 1) if way == next(iter(WAYS)) else share
    while where.total() < num_kills:
        opened = written_at(run_dir / "metrics.jsonl")
        child = nursery.start(f"run.dir={tmp_path / 'cut'}", *overrides)
        place = kill_at_random(nursery, child, run_dir, opened, chance)
        assert place, f"done after {where.total()} kills\n{child.log.read_text()}"
        where[place] += 1
        for checkpoint in CheckpointFolder(run_dir / "checkpoints").committed():
            assert verify(checkpoint) == [], checkpoint
    last = nursery.start(f"run.dir={tmp_path / 'cut'}", *overrides)
    assert nursery.wait(last) == 0, last.log.read_text()

    expected, found = RunFolder(tmp_path / "whole" / "run", 0), RunFolder(run_dir, 0)
    assert list(found.losses()) == list(range(1, STEPS + 1))
    assert found.losses() == expected.losses()
    assert found.training_state() == expected.training_state()
    assert not list((run_dir / "checkpoints").glob("damaged-*"))
    assert where["a save"] >= num_kills * 0.4
    write_down(way, where)


def write_down(way: str, where: Counter[str]) -> None:
    """Of `make soak`: how many kills there were, and into what."""
    output = os.environ.get("GEMTUNE_KILLS_OUTPUT")
    if not output:
        return
    path = Path(output)
    sys.path.append(str(REPOSITORY / "benchmarks"))
    from environment import describe

    result = json.loads(path.read_text()) if way != next(iter(WAYS)) else {"ways": {}}
    result |= describe(f"make soak KILLS={NUM_KILLS}") | {"seed": SEED}
    result["ways"][way] = dict(where)
    path.write_text(json.dumps(result, indent=1) + "\n")
