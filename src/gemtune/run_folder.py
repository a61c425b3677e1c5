"""`runs/<name>`: what stands there, and whether this configuration may go on in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemtune.checkpoint import CheckpointFolder, find_resume_point
from gemtune.checkpoint.state import read_document
from gemtune.config import RunConfig, save_yaml
from gemtune.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
ANSWERS_FILE = "answers.jsonl"
MODEL_FOLDER = "model"

# What may change between two starts of a run: it decides how the run is watched, kept and spread,
# not what is learned.
_FREE = (
    "run.name",
    "run.dir",
    "run.resume",
    "run.grace_seconds",
    "model.gradient_checkpointing",
    "tracker.",
    "checkpoint.",
    "parallel.timeout_seconds",
    "parallel.heartbeat_seconds",
    "loop.micro_batch_size",
    "loop.log_every_steps",
    "loop.eval_every_steps",
    "loop.eval_micro_batch_size",
    "loop.max_nonfinite_steps",
    "loop.max_spike_steps",
    "data.num_workers",
    "data.eval_generate_rows",
    "data.eval_max_new_tokens",
)


def resume_point(config: RunConfig) -> Path | None:
    """The checkpoint this start goes on from, or None for a new run. Changes nothing on disk.

    `run.resume=PATH` says where a run begins: once it has checkpoints of its own, the same command
    goes on from those.

    Raises:
        ConfigError: the folder belongs to another configuration; the differences are listed.
        CheckpointError: `run.resume` names no checkpoint, or one that this run cannot go on from
            without losing its own.
    """
    folder = config.run.folder
    newest = CheckpointFolder(folder / "checkpoints").newest()
    if config.run.resume == "never":
        return None
    if newest is None:
        _refuse_finished(folder)
        return find_resume_point(config.run.resume, CheckpointFolder(folder / "checkpoints"))

    before = read_document(newest)["config"]
    if before["run"]["resume"] != config.run.resume:
        point = find_resume_point(config.run.resume, CheckpointFolder(folder / "checkpoints"))
        if point is None or point.resolve() != newest.resolve():
            raise CheckpointError(
                f"run.resume={config.run.resume} is not the newest checkpoint of {folder}, which "
                f"is {newest.name}. Leave run.resume out to go on from that one, or go on from "
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
    return newest


def _refuse_finished(folder: Path) -> None:
    """A model whose checkpoints somebody deleted is not trained again and replaced."""
    if (folder / MODEL_FOLDER).exists():
        raise CheckpointError(
            f"{folder} holds a finished model but no checkpoint, so this command would train it "
            "again from the start and replace it. Choose another run.name=, or start anew with "
            f"run.resume=never (the old folder is kept, as {_aside(folder).name})."
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
        old, new = before.get(key, "(nothing)"), now.get(key, "(nothing)")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{path}.")
        elif old != new:
            yield path, old, new
