"""`runs/<name>`: what stands there, and whether this configuration may go on in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemtune.checkpoint import CheckpointFolder, find_resume_point
from gemtune.config import RunConfig, load_yaml, save_yaml
from gemtune.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.yaml"

# What may change between two starts of a run: it decides how the run is watched, kept and spread,
# not what is learned.
_FREE = (
    "run.dir",
    "run.resume",
    "tracker.",
    "checkpoint.",
    "parallel.timeout_seconds",
    "loop.micro_batch_size",
    "loop.log_every_steps",
    "loop.eval_every_steps",
    "loop.eval_micro_batch_size",
    "loop.max_nonfinite_steps",
    "data.num_workers",
    "data.eval_generate_rows",
    "data.eval_max_new_tokens",
)


def resume_point(config: RunConfig) -> Path | None:
    """The checkpoint this start goes on from, or None for a new run. Changes nothing on disk.

    Raises:
        ConfigError: the folder belongs to another configuration; the differences are listed.
        CheckpointError: `run.resume` names no checkpoint, or one of another run although this one
            has its own.
    """
    folder = config.run.folder
    own = CheckpointFolder(folder / "checkpoints")
    point = find_resume_point(config.run.resume, own)
    if point is None or own.newest() is None:
        return point
    if folder.resolve() not in point.resolve().parents:
        raise CheckpointError(
            f"run.resume={config.run.resume} belongs to another run, but {folder} has checkpoints "
            "of its own. Leave run.resume out to go on from those, or choose another run.name."
        )
    if (folder / CONFIG_FILE).is_file():
        before = load_yaml(folder / CONFIG_FILE)
        if changes := list(differences(before, config.as_dict())):
            raise ConfigError(
                f"{folder} holds a run of another configuration:\n"
                + "\n".join(f"  {key}: {old} there, {new} now" for key, old, new in changes)
                + "\nGo on with the old values, choose another run.name=, or start anew with "
                f"run.resume=never (the old folder is kept, as {folder.name}.1). To train on from "
                f"its newest checkpoint with the new values: run.name=NEW run.resume={folder}"
            )
    return point


def open_folder(config: RunConfig, point: Path | None) -> None:
    """Make the run folder and write `config.yaml`; `run.resume=never` moves an old one aside."""
    folder = config.run.folder
    if point is None and config.run.resume == "never" and folder.exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)
    folder.mkdir(parents=True, exist_ok=True)
    save_yaml(config.as_dict(), folder / CONFIG_FILE)


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
