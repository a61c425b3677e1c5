"""Rows that were left out: where each stands, and why."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

_PLACE = re.compile(r"(?P<source>.+?) (?P<unit>line|row) (?P<number>\d+)[:,] (?P<reason>.*)", re.S)


def rejected_record(message: str) -> dict[str, str | int]:
    """`{source, line, reason}` of an error that begins with the place of its row.

    Rows of files without lines have `row` in the place of `line`, counted from 0.
    """
    found = _PLACE.fullmatch(message)
    if found is None:
        return {"source": "", "reason": message}
    return {
        "source": found["source"],
        found["unit"]: int(found["number"]),
        "reason": found["reason"],
    }


def rejected_line(message: str) -> str:
    """The record as a line of JSON, with its end."""
    return json.dumps(rejected_record(message), ensure_ascii=False) + "\n"


def write_rejected(messages: Iterable[str], path: Path) -> None:
    """Write one line for each, replacing the file in one step."""
    staging = path.with_name(f".{path.name}.staging")
    text = "".join(map(rejected_line, dict.fromkeys(messages)))
    staging.write_bytes(text.encode("utf-8", "backslashreplace"))
    staging.replace(path)
