"""`metrics.jsonl`, which every run writes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class MetricsFile:
    """`metrics.jsonl`: one JSON object a step, flushed as it is written.

    A resumed run drops the lines of steps that it will do again, so that each step stands there
    once. Metrics that come later for the newest step join its object.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        records = [record for record in read_records(path) if record["step"] <= resume_step]
        staging = path.with_suffix(".staging")
        staging.write_bytes(b"".join(map(_line, records)))
        staging.replace(path)
        self._file = path.open("r+b", buffering=0)
        self.newest: dict[str, Any] = records[-1] if records else {}
        self._end = self._file.seek(0, os.SEEK_END)
        self._newest_at = self._end - (len(_line(self.newest)) if records else 0)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Numbers that JSON has no word for (NaN, infinity) are written as null."""
        record = {"step": step} | {k: _json_value(v) for k, v in metrics.items()}
        if self.newest.get("step") == step:
            record = self.newest | record
            self._file.seek(self._newest_at)
        else:
            self._newest_at = self._file.seek(self._end)
        # One write, and only then the cut: a crash in between leaves the new line whole, and behind
        # it at most the end of the old one, which is dropped when the run goes on.
        self.newest = record
        self._end = self._newest_at + self._file.write(_line(record))
        self._file.truncate(self._end)

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, without a line that a crash cut short; none without it."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return (record for record in map(_parse, lines) if record is not None)


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_json_value(v) for v in value]
    return value
