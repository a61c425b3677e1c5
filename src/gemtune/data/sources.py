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


class _PlainRows(Sequence):
    """Rows of a `datasets` table as they are stored: an image stays {bytes, path}.

    Images are decoded when a batch needs them, and by our own code, which names the row.
    """

    def __init__(self, table: Any) -> None:
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._table[index].to_pylist()[0]


def resolve_path(path: str) -> str:
    """`bundled:NAME/FILE` -> the file inside the package; anything else as it is."""
    if path.startswith(_BUNDLED):
        return str(_assets() / path.removeprefix(_BUNDLED))
    return str(Path(path).expanduser())


def _assets() -> Path:
    return Path(str(importlib.resources.files("gemtune"))) / "assets"


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
    elif path.startswith(_BUNDLED):
        bundled = sorted(f.relative_to(_assets()).as_posix() for f in _assets().rglob("*.parquet"))
        raise DataError(
            f"{key}={path}: the package holds no such file. It holds "
            f"{', '.join(_BUNDLED + name for name in bundled)}."
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
    number = 0
    try:
        with path.open("rb") as lines:  # as bytes: each is decoded where its number is known
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise DataError(f"{path} line {number}: a row must be a JSON object {{...}}.")
                rows.append(row)
                line_numbers.append(number)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} line {number}: not valid JSON ({error.msg}, column {error.colno}). Each line "
            "must hold one whole object."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} line {number}: not UTF-8 ({error.reason}). Convert the file, for example: "
            "iconv -f LATIN1 -t UTF-8 FILE > NEW"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    return Source(rows, str(path), path.parent.absolute(), line_numbers)


def _read_parquet(path: Path) -> Source:
    import datasets
    import pyarrow.parquet

    shows_progress = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # a local file is mapped, not read
    try:
        if not pyarrow.parquet.read_metadata(path).num_rows:  # `datasets` fails on such a file
            return Source([], str(path), None)
        table = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # datasets wraps what pyarrow raises in its own generic error
        cause = error.__cause__ or error
        raise DataError(f"{path} cannot be read as Parquet: {cause}") from error
    finally:
        if shows_progress:
            datasets.enable_progress_bars()
    return Source(_PlainRows(table), str(path), path.parent.absolute())


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
    return Source(_PlainRows(table), f"{path}[{split}]", None)
