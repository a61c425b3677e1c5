"""Run inside a mount namespace of its own: trains on a small disk that fills up, and goes on.

    python fill_disk.py DISK ELSEWHERE

Writes ELSEWHERE/results.json. DISK is the small one. Needs PYTHONPATH to hold tests and repository.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from whole_runs import RunFolder, train_in_process

from gemtune.checkpoint import CheckpointFolder
from gemtune.checkpoint.manifest import verify
from gemtune.errors import CheckpointError
from gemtune.reporting import Reporter

STATE_BYTES = 16_901_184  # parameters and optimizer of the small run
# Less than that is seen before anything is written; a little more runs out while it is.
FREE = {"before it is written": STATE_BYTES - 2**20, "while it is written": STATE_BYTES + 20_000}
COMMON = ("checkpoint.every_steps=1", "checkpoint.keep_last=3")


def leave_free(disk: Path, num_bytes: int) -> Path:
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - num_bytes)
    return filler


def try_one(disk: Path, free: int, *overrides: str) -> dict[str, Any]:
    """The disk fills after step 2; what is said, what is left, and how the run goes on."""
    original = Reporter.training

    def training(self: Reporter, record: dict[str, Any]) -> None:
        original(self, record)
        if self._state.step == 2:
            leave_free(disk, free)

    Reporter.training = training
    run_dir = disk / "runs"
    said = "no error"
    try:
        train_in_process(*COMMON, *overrides, run_dir=run_dir)
    except CheckpointError as error:
        said = str(error)
    finally:
        Reporter.training = original
    folder = CheckpointFolder(run_dir / "run" / "checkpoints")
    left = sorted(path.name for path in folder.path.iterdir())
    sound = all(verify(path) == [] for path in folder.committed())
    (disk / "filler").unlink()
    run = train_in_process(*COMMON, *overrides, run_dir=run_dir)
    found = {"said": said, "left": left, "sound": sound, **outcome(run)}
    shutil.rmtree(run_dir)
    return found


def outcome(run: RunFolder) -> dict[str, Any]:
    state = {name: hash(content) for name, content in run.training_state().items()}
    return {"losses": list(run.losses().items()), "state": sorted(state.items())}


def main() -> None:
    torch.set_num_threads(1)
    disk, elsewhere = map(Path, sys.argv[1:])
    results: dict[str, Any] = {"whole": outcome(train_in_process(*COMMON, run_dir=elsewhere))}
    for when, free in FREE.items():
        for mode in ("false", "true"):
            override = f"checkpoint.async_save={mode}"
            results[f"{when}, async {mode}"] = try_one(disk, free, override)
    (elsewhere / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
