"""Rows of conversations from a local file, a folder, or the hub."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemtune.errors import DataError

_BUNDLED = "bundled:"
_SUFFIXES = (".jsonl", ".parquet")


@dataclass
class Source:
    """Rows, and what to call one of them in a message."""

    rows: Sequence[dict[str, Any]]
    name: str
    media_root: Path | None
    """Folder that relative image paths start from."""
    line_numbers: list[int] | None = None

    def describe(self, index: int) -> str:
        """`file.jsonl line 12`, or `file.parquet row 11` (rows count from 0)."""
        if self.line_numbers is not None:
            return f"{self.name} line {self.line_numbers[index]}"
        return f"{self.name} row {index}"


def resolve_path(path: str) -> str:
    """`bundled:NAME/FILE` -> the file inside the package; anything else as it is."""
    if path.startswith(_BUNDLED):
        assets = Path(str(importlib.resources.files("gemtune"))) / "assets"
        return str(assets / path.removeprefix(_BUNDLED))
    return str(Path(path).expanduser()) if path.startswith("~") else path


def read_source(path: str, split: str, key: str) -> Source:
    """Every row of a JSONL or Parquet file, or of one split of a hub dataset.

    Args:
        path: a file ending in .jsonl or .parquet, `bundled:...`, or a hub dataset id.
        split: which split of a hub dataset.
        key: the configuration key that gave `path`, for messages.

    Raises:
        DataError: missing, unreadable, empty, or without a `messages` column.
    """
    resolved = resolve_path(path)
    local = Path(resolved)
    if local.is_dir():
        raise DataError(
            f"{key}={path} is a folder. Give one file ({' or '.join(_SUFFIXES)}) inside it."
        )
    if local.suffix == ".jsonl" and local.is_file():
        source = _read_jsonl(local)
    elif local.suffix == ".parquet" and local.is_file():
        source = _read_parquet(local)
    elif local.is_file():
        raise DataError(
            f"{key}={path}: files ending in '{local.suffix}' are not read. "
            f"Give {' or '.join(_SUFFIXES)}."
        )
    elif _looks_like_hub_id(path):
        source = _read_hub(path, split, key)
    else:
        raise DataError(
            f"{key}={path}: there is no such file (looked in {Path.cwd()}). Give a .jsonl or "
            ".parquet file, or a hub dataset id such as HuggingFaceH4/no_robots."
        )
    if not len(source.rows):
        raise DataError(f"{key}={path} holds no rows.")
    columns = source.rows[0].keys()
    if "messages" not in columns:
        raise DataError(
            f"{key}={path} has no 'messages' column; its columns are: {', '.join(columns)}. "
            'A row is {"messages": [{"role": "user", "content": "..."}, '
            '{"role": "assistant", "content": "..."}], "images": [...]}.'
        )
    return source


def _looks_like_hub_id(path: str) -> bool:
    if path.startswith((".", "/", "~")) or path.endswith(_SUFFIXES):
        return False
    return path.count("/") == 1 and not Path(path).parent.is_dir()


def _read_jsonl(path: Path) -> Source:
    rows: list[dict[str, Any]] = []
    line_numbers: list[int] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"{path} line {number}: a row must be a JSON object {{...}}.")
                rows.append(row)
                line_numbers.append(number)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {number}: not valid JSON ({error.msg}).") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 after line {len(line_numbers)} ({error.reason}). "
            "Convert it: iconv -f LATIN1 -t UTF-8 FILE."
        ) from error
    return Source(rows, str(path), path.parent, line_numbers)


def _read_parquet(path: Path) -> Source:
    import datasets

    shows_progress = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # a local file is mapped, not read
    try:
        table = _without_decoding(datasets.Dataset.from_parquet(str(path)))
    except Exception as error:  # datasets wraps what pyarrow raises in its own generic error
        cause = error.__cause__ or error
        raise DataError(f"{path} cannot be read as Parquet: {cause}") from error
    finally:
        if shows_progress:
            datasets.enable_progress_bars()
    return Source(table, str(path), path.parent)


def _read_hub(path: str, split: str, key: str) -> Source:
    import datasets

    try:
        table = datasets.load_dataset(path, split=split)
    except Exception as error:  # network, access, missing dataset or split: all end here
        raise DataError(
            f"{key}={path}, split {split}, cannot be read from the Hugging Face hub: "
            f"{str(error).splitlines()[0] if str(error) else error!r}\n"
            "Check the name and the network, run `hf auth login` if it is gated, or give a local "
            f"file: {key}=FILE.jsonl"
        ) from error
    return Source(_without_decoding(table), f"{path}[{split}]", None)


def _without_decoding(table: Any) -> Any:
    """Images stay {bytes, path}: they are decoded when a batch needs them, and by our own code."""
    import datasets

    images = table.features.get("images")
    if images is None:
        return table
    inner = getattr(images, "feature", images[0] if isinstance(images, list) else images)
    if isinstance(inner, datasets.Image):
        table = table.cast_column("images", datasets.List(datasets.Image(decode=False)))
    return table
