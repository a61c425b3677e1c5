"""`runs/<name>/checkpoints`: what is whole, what is not, and what may go.

A checkpoint is written into a hidden folder, put on disk (fsync), renamed once, and marked. What
is to be deleted is first renamed, so that a half-deleted folder never looks like a whole one. A
crash at any instant therefore leaves every committed checkpoint as it was.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemtune.checkpoint.disk import STAGING, sync, sync_entry
from gemtune.checkpoint.manifest import (
    MANIFEST_FILE,
    is_complete,
    verified_content,
    write_marker,
)
from gemtune.errors import CheckpointError

STATE_FILE = "state.json"
_NAME = re.compile(r"step_(\d{8})")
_DELETED, _DAMAGED = ".deleted-", "damaged-"


@dataclass(frozen=True)
class CheckpointFolder:
    """Committed checkpoints are `step_<8 digits>`; `damaged-*` are kept for whoever looks."""

    path: Path

    def committed(self) -> list[Path]:
        """Complete checkpoints, oldest first, verified or not."""
        return [path for path in self._named() if is_complete(path)]

    def newest(self) -> Path | None:
        committed = self.committed()
        return committed[-1] if committed else None

    def final_path(self, step: int) -> Path:
        return self.path / f"step_{step:08d}"

    def staging_path(self, step: int) -> Path:
        return self.path / f"{STAGING}step_{step:08d}"

    def begin(self, step: int) -> None:
        """Make an empty staging folder; what an earlier crash left behind is deleted."""
        self.path.mkdir(parents=True, exist_ok=True)
        for left in (*self.path.glob(f"{STAGING}*"), *self.path.glob(f"{_DELETED}*")):
            shutil.rmtree(left)
        for unmarked in self._named():
            # Renamed, and then killed before the marker. Without a manifest it is none of ours.
            if not is_complete(unmarked) and (unmarked / MANIFEST_FILE).exists():
                _delete(unmarked)
        self.staging_path(step).mkdir()

    def commit(self, step: int) -> Path:
        """Put everything on disk, make it visible by one rename, and mark it complete.

        Raises:
            CheckpointError: a checkpoint of that step is there. It stays: another process trains
                in the same run folder.
        """
        staging, final = self.staging_path(step), self.final_path(step)
        if final.exists():
            raise CheckpointError(
                f"{final} is there already. Does another process train in this run folder?"
            )
        sync(staging)
        staging.rename(final)
        # The name is on disk once its folder is; that folder may be new as well.
        for folder in (self.path, *self.path.absolute().parents[:2]):
            sync_entry(folder)
        write_marker(final)
        return final

    def abandon(self, step: int) -> None:
        """Delete what was staged for that step, as far as the disk lets us."""
        shutil.rmtree(self.staging_path(step), ignore_errors=True)

    def set_aside(self, checkpoint: Path) -> Path:
        """Rename a damaged checkpoint, so that no start finds it again; nothing is deleted."""
        target, number = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}"), 1
        while target.exists():
            target = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}.{number}")
            number += 1
        checkpoint.rename(target)
        sync_entry(self.path)
        return target

    def best(self, metric: str = "eval/loss", mode: str = "min") -> Path | None:
        """The committed one with the lowest (`mode` min) or highest (max) value of the metric.

        Of those alone that were saved at the step of an evaluation which measured it; of equal
        ones the oldest. None without any.
        """
        sign = -1 if mode == "max" else 1
        return min(
            (
                (sign * value, path)
                for path in self.committed()
                if (value := evaluation_of(path).get(metric)) is not None and math.isfinite(value)
            ),
            default=(None, None),
        )[1]

    def prune(self, keep_last: int, metric: str = "eval/loss", mode: str = "min") -> None:
        """Delete the oldest until `keep_last` are left, and the best one, if that is older.

        Called after a commit only.
        """
        committed, best = self.committed(), self.best(metric, mode)
        for old in committed[:-keep_last]:
            if old == best:
                continue
            try:
                _delete(old)
            except OSError as error:
                raise CheckpointError(
                    f"{old} could not be deleted (checkpoint.keep_last={keep_last}): {error}"
                ) from error

    def _named(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return sorted(path for path in self.path.iterdir() if _NAME.fullmatch(path.name))


def is_checkpoint(path: Path) -> bool:
    return is_complete(path) and (path / STATE_FILE).is_file()


def evaluation_of(checkpoint: Path) -> dict[str, float]:
    """Metric -> value, of the very parameters it holds.

    Empty where they were not evaluated, or it is damaged.
    """
    try:
        state = json.loads(verified_content(checkpoint, STATE_FILE))["state"]
        if state["eval_step"] is None or state["eval_step"] != state["step"]:
            return {}
        loss = {} if state["eval_loss"] is None else {"eval/loss": state["eval_loss"]}
        found = loss | state.get("eval_metrics", {})
        return {name: float(value) for name, value in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def resume_candidates(resume: str, folder: CheckpointFolder) -> list[Path]:
    """The checkpoints that `run.resume` may stand for, the most wanted first.

    Raises:
        CheckpointError: the given folder is no checkpoint.
    """
    if resume == "auto":
        return folder.committed()[::-1]
    if resume == "never":
        return []
    path = Path(resume).expanduser()
    if is_complete(path):
        return [path]
    found = list(_below(path))
    if found:
        return found
    there = "is not a checkpoint (nothing in it is marked COMPLETE)"
    raise CheckpointError(
        f"run.resume={resume}: that folder {there if path.exists() else 'does not exist'}. Give "
        "runs/NAME, one of runs/NAME/checkpoints/step_*, or auto or never."
    )


def _below(path: Path) -> Iterator[Path]:
    for folder in (path / "checkpoints", path):
        yield from CheckpointFolder(folder).committed()[::-1]


def _delete(folder: Path) -> None:
    """By way of another name: see the top of this file."""
    doomed = folder.with_name(f"{_DELETED}{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def step_of(checkpoint: Path) -> int:
    """The step that a committed checkpoint is named for."""
    return int(checkpoint.name.removeprefix("step_"))
