"""`runs/<name>`: what stands there, and whether this configuration may go on in it."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from gemtune.checkpoint import CheckpointFolder, resume_candidates
from gemtune.checkpoint.manifest import MANIFEST_FILE
from gemtune.checkpoint.state import read_document
from gemtune.config import RunConfig, save_yaml
from gemtune.errors import CheckpointError, ConfigError
from gemtune.memory import remove_reports
from gemtune.run_files import CONFIG_FILE, METRICS_FILE, MODEL_FOLDER

# What may change between two starts of a run: it decides how the run is watched, kept and spread,
# not what is learned.
_FREE = (
    "run.name",
    "run.dir",
    "run.resume",
    "run.grace_seconds",
    "model.gradient_checkpointing",
    "optim.offload_",
    "model.recomputed_layers",
    "tracker.",
    "checkpoint.",
    "memory.",
    "parallel.strategy",
    "parallel.timeout_seconds",
    "parallel.heartbeat_seconds",
    "loop.micro_batch_size",
    "loop.log_every_steps",
    "loop.profile_at_step",
    "loop.eval_every_steps",
    "loop.eval_micro_batch_size",
    "loop.max_nonfinite_steps",
    "loop.max_spike_steps",
    "eval.metrics",
    "eval.generate_every_steps",
    "eval.samples",
    "eval.best_",
    "eval.export_best",
    "data.num_workers",
    "data.num_prepare_workers",
    "data.prepared",
    "data.cache_dir",
    "data.max_bad_rows",
    "data.eval_generate_rows",
    "data.eval_max_new_tokens",
)


def resume_points(config: RunConfig) -> list[Path]:
    """The checkpoints this start may go on from, the newest first; none: a new run.

    Nothing on disk is changed, and no tensor is read: whether one is damaged shows later.
    `run.resume=PATH` says where a run begins: once it has checkpoints of its own, the same command
    goes on from those.

    Raises:
        ConfigError: the folder belongs to another configuration; the differences are listed.
        CheckpointError: `run.resume` names no checkpoint, or one that this run cannot go on from
            without losing its own.
    """
    folder = config.run.folder
    if config.run.resume == "never":
        return []
    own = CheckpointFolder(folder / "checkpoints").committed()[::-1]
    if not own:
        _refuse_remains(folder)
        return resume_candidates(config.run.resume, CheckpointFolder(folder / "checkpoints"))

    before = _newest_readable(own)["config"]
    if before["run"]["resume"] != config.run.resume:
        named = resume_candidates(config.run.resume, CheckpointFolder(folder / "checkpoints"))
        if not named or named[0].resolve() != own[0].resolve():
            raise CheckpointError(
                f"run.resume={config.run.resume} is not the newest checkpoint of {folder}, which "
                f"is {own[0].name}. Leave run.resume out to go on from that one, or go on from "
                "the other one in a new folder with run.name=NEW."
            )
    if changes := list(differences(before, config.as_dict())):
        raise ConfigError(
            f"{folder} holds a run of another configuration:\n"
            + "\n".join(f"  {key}: {old} there, {new} now" for key, old, new in changes)
            + "\nGo on with the old values, choose another run.name=, or start anew with "
            f"run.resume=never (the old folder is kept, as {_aside(folder).name}). To train on "
            f"from its newest checkpoint with the new values: run.name=NEW run.resume={folder}"
        )
    return own


def _newest_readable(checkpoints: list[Path]) -> dict[str, Any]:
    """`state.json` of the newest one whose own is undamaged; the error of the newest if none is."""
    first_error = None
    for checkpoint in checkpoints:
        try:
            return read_document(checkpoint)
        except CheckpointError as error:
            first_error = first_error or error
    assert first_error is not None
    raise CheckpointError(
        f"{first_error}\nNone of the checkpoints in {checkpoints[0].parent} can be read. Start "
        "anew with run.resume=never."
    )


def _refuse_remains(folder: Path) -> None:
    """What is left of a run without a checkpoint to go on from is not replaced by a new one."""
    anew = (
        "Choose another run.name=, or start anew with run.resume=never (the old folder is kept, as "
        f"{_aside(folder).name})."
    )
    if (folder / MODEL_FOLDER).exists():
        raise CheckpointError(
            f"{folder} holds a finished model but no checkpoint, so this command would train it "
            f"again from the start and replace it. {anew}"
        )
    damaged = sorted(path.name for path in (folder / "checkpoints").glob("damaged-*"))
    if damaged:
        raise CheckpointError(
            f"Every checkpoint of {folder} was found damaged and set aside ({', '.join(damaged)}). "
            f"{anew}"
        )
    # With a manifest it is a first checkpoint whose commit was cut, and nothing was lost.
    unknown = [
        path.name
        for path in (folder / "checkpoints").glob("step_*")
        if not (path / MANIFEST_FILE).exists()
    ]
    if unknown:
        raise CheckpointError(
            f"{folder}/checkpoints holds {', '.join(sorted(unknown))} of another gemtune: this one "
            f"cannot read it. {anew}"
        )


class FolderLock:
    """Keeps every other launch out of a run folder for as long as this process lives.

    A record lock (fcntl.lockf) on a file beside the folder: the system drops it with the process,
    however that ends, forked loader workers do not inherit it, and it works over NFS.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: TextIO | None = None

    def take(self) -> None:
        """Take the lock, unless this object has it.

        Raises:
            CheckpointError: another process has it; says which.
        """
        if self._file is not None:
            return
        path = self._folder.with_name(f".{self._folder.name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise CheckpointError(
                f"{self._folder} is in use by {holder}. Wait for it, stop it, or train in another "
                "folder with run.name=NEW."
            ) from error
        file.truncate(0)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def claim(config: RunConfig, points: list[Path], lock: FolderLock) -> None:
    """Take the folder for this launch, before anything in it is changed.

    Raises:
        CheckpointError: another launch has it, or had it since `points` were looked up.
    """
    lock.take()
    if [path for path in resume_points(config) if path not in points]:
        raise CheckpointError(
            f"Another process trained in {config.run.folder} meanwhile. Run the same command again."
        )


def open_folder(config: RunConfig, point: Path | None) -> None:
    """Make the run folder and write `config.yaml`; `run.resume=never` moves an old one aside."""
    folder = config.run.folder
    if config.run.resume == "never" and folder.exists():
        folder.rename(_aside(folder))
    folder.mkdir(parents=True, exist_ok=True)
    if point is None or folder.resolve() not in point.resolve().parents:
        # Of an attempt that ended before its first checkpoint: not of this run.
        (folder / METRICS_FILE).unlink(missing_ok=True)
    remove_reports(folder)
    save_yaml(config.as_dict(), folder / CONFIG_FILE)


def _aside(folder: Path) -> Path:
    """The first of NAME.1, NAME.2 ... that is free."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return aside


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(key, value before, value now) of every key that differs and must not."""
    for key in sorted({*before, *now}):
        path = f"{prefix}{key}"
        if path.startswith(_FREE):
            continue
        if key == "_target_" and key not in before:
            continue  # written by a gemtune that left the kind of an adapter out
        old, new = before.get(key, "(nothing)"), now.get(key, "(nothing)")
        # A section that an older gemtune did not have: its keys one by one.
        old = {} if key not in before and isinstance(new, Mapping) else old
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{path}.")
        elif old != new:
            yield path, old, new
