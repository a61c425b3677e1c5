"""Reading back the run files that wandb writes offline, without wandb's own reader."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as messages

_BLOCK, _PREAMBLE, _HEADER = 32768, 7, struct.Struct("<IHB")
_WHOLE, _LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """The messages of a run file: LevelDB's log format behind seven bytes of wandb's own."""
    content = path.read_bytes()
    assert content[:4] in (b":W&B", b"")
    at, message = _PREAMBLE, b""
    while at + _HEADER.size <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER.size:  # no header fits: the rest of a block is padding
            at += left
            continue
        _, size, kind = _HEADER.unpack_from(content, at)
        at += _HEADER.size
        if at + size > len(content):
            return  # not written yet
        message += content[at : at + size]
        at += size
        if kind in (_WHOLE, _LAST):
            yield messages.Record.FromString(message)
            message = b""


@dataclass
class WrittenStart:
    """What one start of a run left for `wandb sync`."""

    path: Path
    run_id: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of the history, without wandb's own keys."""
    summary: dict[str, Any] = field(default_factory=dict)
    definitions: dict[str, str] = field(default_factory=dict)
    """Metric or pattern -> its axis."""

    @property
    def tables(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and content of every table that was logged, in order."""
        files = self.path.parent / "files"
        return [
            (name, json.loads((files / value["path"]).read_text()))
            for row in self.rows
            for name, value in row.items()
            if isinstance(value, dict) and value.get("_type") == "table-file"
        ]

    @property
    def points(self) -> dict[tuple[str, int], Any]:
        """(metric, step) -> value; refuses a second value for one of them."""
        found: dict[tuple[str, int], Any] = {}
        for row in self.rows:
            for name, value in row.items():
                if name == "step" or isinstance(value, dict):
                    continue
                assert (name, row["step"]) not in found, f"{name} stands twice at {row['step']}"
                found[name, row["step"]] = value
        return found


def written_starts(folder: Path) -> list[WrittenStart]:
    """Every offline start below `folder`/wandb, in order: their folders are named by the second."""
    return [_read(path) for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))]


def _all_records(path: Path) -> list[Any]:
    """The records up to the last one: wandb's process may still be writing when a run has ended."""
    deadline = time.monotonic() + 30
    while True:
        found = list(records(path))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.02)


def _read(path: Path) -> WrittenStart:
    start = WrittenStart(path)
    for record in _all_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            start.run_id, start.project = record.run.run_id, record.run.project
            _put(start.config, record.run.config.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            _put(row, record.history.item)
            start.rows.append({k: v for k, v in row.items() if not k.startswith("_")})
        elif kind == "summary":
            _put(start.summary, record.summary.update)
        elif kind == "metric":
            metric = record.metric
            start.definitions[metric.name or metric.glob_name] = metric.step_metric
    return start


def _put(target: dict[str, Any], items: Any) -> None:
    for item in items:
        *outer, last = list(item.nested_key) or [item.key]
        place = target
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
