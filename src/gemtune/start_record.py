"""`runs/<name>/run.json`: what only a start knows, for the report."""

from __future__ import annotations

import base64
import io
import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import gemtune
from gemtune.checkpoint import software
from gemtune.patches import PatchReport
from gemtune.preview import Medium, PreviewRow, Token, printable
from gemtune.run_files import START_FILE
from gemtune.runtime import Runtime

_THUMBNAIL = 160
_IN_OTHER_SECTIONS = ("patches", "run folder", "dashboard", "memory")


def write_start(
    runtime: Runtime,
    page: tuple[str, Sequence[tuple[str, str, str]]],
    report: PatchReport,
    rows: Sequence[PreviewRow],
    *,
    num_steps: int,
    after_step: int,
    memory_source: str,
) -> None:
    """Write `run.json`, and add this start to those that went on in the same folder.

    Neither the machine's name nor absolute paths are in it: a report is made to be shown.

    Args:
        page: title and rows of the start-up page.
        rows: of the data, as the model gets them.

    Raises:
        OSError: the file cannot be written.
    """
    path = runtime.run_dir / START_FILE
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "after_step": after_step,
        "num_processes": runtime.world_size,
    }
    title, lines = page
    document = {
        "title": title,
        "num_steps": num_steps,
        "starts": [*(_earlier_starts(path) if after_step else []), start],
        "summary": _summary(lines),
        "patches": [
            {"name": row.name, "status": row.status, "reason": row.reason} for row in report.rows
        ],
        "preview": [_row(row) for row in rows],
        "memory_source": memory_source,
        "gemtune": gemtune.__version__,
        "device": _device(runtime.device),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        **software(),
    }
    staging = path.with_name(f".{path.name}.staging")
    staging.write_text(json.dumps(document) + "\n", encoding="utf-8")
    staging.replace(path)


def _earlier_starts(path: Path) -> list[Any]:
    try:
        starts = json.loads(path.read_bytes())["starts"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return starts if isinstance(starts, list) else []


def _summary(lines: Sequence[tuple[str, str, str]]) -> list[list[str]]:
    """Label and text of the lines that no other section shows; a line without label belongs to the
    one above."""
    kept, label = [], ""
    for given, text, _ in lines:
        label = given or label
        if label not in _IN_OTHER_SECTIONS:
            kept.append([given, text])
    return kept


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _row(row: PreviewRow) -> dict[str, Any]:
    """Tokens that look alike become one text."""
    spans: list[list[str]] = []
    for token in row.tokens:
        text, kind = printable(token), _kind(token)
        if spans and spans[-1][1] == kind:
            spans[-1][0] += text
        else:
            spans.append([text, kind])
    return {
        # Of an absolute path the folder and the file.
        "where": "/".join(row.where.split("/")[-2:]) if row.where[:1] == "/" else row.where,
        "num_tokens": row.num_tokens,
        "num_learned": row.num_learned,
        "spans": spans,
        "media": [{"line": medium.line, "picture": _picture(medium)} for medium in row.media],
    }


def _kind(token: Token) -> str:
    """CSS classes of the pages."""
    names = ["learned"] if token.learned else ["medium"] if token.count > 1 else []
    return " ".join([*names, *(["control"] if token.is_control else [])])


def _picture(medium: Medium) -> str:
    """A small one, as a data URL; of audio none."""
    if medium.image is None:
        return ""
    small = medium.image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
