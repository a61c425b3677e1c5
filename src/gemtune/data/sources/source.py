"""Rows of conversations from any source, brought to `messages` as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gemtune.data.sources.filters import RowFilter, read_filter
from gemtune.data.sources.formats import Format, check_mapping, find_format, renamed_columns
from gemtune.data.sources.mixture import MixEntry, describe_mix, interleave
from gemtune.data.sources.tables import Table, open_table, resolve_path
from gemtune.errors import DataError

__all__ = ["Part", "Source", "join_sources", "mixed_order", "read_source", "resolve_path"]

_MEDIA = ("images", "videos", "audios")


@dataclass
class Part:
    """One source of several: rows [first, end) are its."""

    name: str
    first: int
    end: int
    weight: float | None


@dataclass
class Source:
    """Rows with `messages`, and what to call one of them in a message."""

    rows: ReadRows | JoinedRows
    name: str
    media_root: Path | None
    """Folder that media paths start from and may not leave; rows with media name their own."""
    notes: list[str] = field(default_factory=list)
    """What was understood, one line each, to be shown before anything is trained."""
    parts: list[Part] = field(default_factory=list)
    """More than one source: which rows are whose."""
    is_sequential: bool = False
    """Rows come one after another; going back means beginning again."""

    def describe(self, index: int) -> str:
        """`file.jsonl line 12`, or `file.parquet row 11` (rows count from 0)."""
        return self.rows.describe(index)


class ReadRows(Sequence):
    """Rows of a table as conversations: renamed, converted, filtered; each when it is asked for."""

    def __init__(
        self,
        table: Table,
        found: Format,
        mapping: Mapping[str, str],
        media_root: Path | None,
    ) -> None:
        self.table = table
        self._format = found
        self._mapping = dict(mapping)
        self._media_root = None if media_root is None else str(media_root)
        self.chosen: np.ndarray | None = None
        """Numbers of the rows that a filter takes; None: all."""
        self.faults: dict[int, str] = {}
        """What is wrong with a row of the table beside its own content."""

    def __len__(self) -> int:
        return len(self.table.rows) if self.chosen is None else len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self._number(index)
        if number in self.faults:
            raise DataError(f"{self.table.describe(number)}: {self.faults[number]}")
        row = self.table.rows[number]
        if self._mapping:
            names = renamed_columns(row, self._mapping)
            row = {ours: row.get(theirs) for ours, theirs in names.items()}
        try:
            read = self._format.read(row, drops_nulls=self.table.is_columnar)
        except DataError as error:
            raise DataError(f"{self.table.describe(number)}: {error}") from error
        read.pop("media_root", None)  # the data must not choose where its paths lead
        if self._media_root is not None and _has_media(read):
            read["media_root"] = self._media_root
        return read

    def identity(self) -> list[Any]:
        """What was done to the table's rows: two with the same one, of one table, have the same."""
        chosen = None
        if self.chosen is not None:
            chosen = hashlib.sha256(self.chosen.tobytes()).hexdigest()
        faults = sorted(self.faults.items())
        return [self._format.name, self._mapping, self._media_root, chosen, faults]

    def keep_first(self, num_rows: int) -> None:
        """Leave out all rows but the first."""
        if num_rows < len(self):
            chosen = np.arange(len(self)) if self.chosen is None else self.chosen
            self.chosen = chosen[:num_rows]

    def _number(self, index: int) -> int:
        return index if self.chosen is None else int(self.chosen[index])

    def describe(self, index: int) -> str:
        return self.table.describe(self._number(index))


def _has_media(row: Mapping[str, Any]) -> bool:
    if any(row.get(column) for column in _MEDIA):
        return True
    return any(
        isinstance(message, dict) and isinstance(message.get("content"), list)
        for message in row["messages"]
    )


class JoinedRows(Sequence):
    """The rows of several sources, one after another."""

    def __init__(self, several: Sequence[ReadRows]) -> None:
        self.several = list(several)
        self._ends = np.cumsum([len(rows) for rows in several])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[ReadRows, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.several[number], index - (int(self._ends[number - 1]) if number else 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows, inner = self._find(index)
        return rows[inner]

    def describe(self, index: int) -> str:
        rows, inner = self._find(index)
        return rows.describe(inner)


def read_source(
    path: str,
    split: str,
    key: str,
    *,
    subset: str | None = None,
    columns: Mapping[str, str] | None = None,
    columns_key: str = "data.columns",
    filter: Mapping[str, Any] | None = None,
    filter_key: str = "data.filter",
    media_root: str | None = None,
    id_column: str | None = "id",
    streaming: bool = False,
) -> Source:
    """Every row of one source, by the format that its columns tell.

    Nothing but the first rows is converted here; a bad row is said when it is read.

    Args:
        path, split, key, subset, streaming: as for `tables.open_table`.
        columns: our name of a column -> the data's.
        filter: as for `filters.read_filter`, on the data's own names.
        media_root: folder of media paths; None: that of the file.
        id_column: where the data have it, an id that stands twice is a fault of the second row;
            None: ids are not looked at.

    Raises:
        DataError: missing, unreadable, empty, or of no format that is known.
        ConfigError: a mapping or filter that cannot be.
    """
    mapping = check_mapping(columns or {}, columns_key)
    row_filter = read_filter(filter or {}, filter_key)
    table = open_table(path, split, key, subset, streaming)
    if not len(table.rows):
        raise DataError(f"{key}={path} holds no rows.")
    found = find_format(table.columns, mapping, f"{key}={path}", columns_key)
    root = table.folder if media_root is None else _folder(media_root)
    rows = ReadRows(table, found, mapping, root)
    notes = [
        f"{table.name} read as {found.name}: {len(table.rows):,} rows, columns "
        f"{', '.join(table.columns)}"
    ]
    if table.is_sequential:
        if row_filter is not None:
            raise DataError(
                f"{filter_key} cannot be used on a streamed hub dataset: how many rows it leaves "
                "is known at the end only. Set data.streaming=false."
            )
        notes.append(
            f"{table.name} is streamed: no row is checked before its turn, ids are not compared, "
            "and every process reads all of it"
        )
    else:
        if row_filter is not None:
            notes.append(_apply(row_filter, rows, f"{key}={path}", filter_key))
        theirs = mapping.get("id", id_column)
        if theirs is not None and theirs in table.columns:
            _find_repeated_ids(rows, theirs)
    return Source(rows, table.name, root, notes, is_sequential=table.is_sequential)


def _folder(media_root: str) -> Path:
    folder = Path(media_root).expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"data.media_root={media_root} is no folder.")
    return folder


def _apply(row_filter: RowFilter, rows: ReadRows, given: str, key: str) -> str:
    """Choose the rows that pass; one that cannot be read or compared stays, and is said later."""
    table = rows.table
    for column in row_filter.columns:
        if column not in table.columns:
            raise DataError(
                f"{given} has no column '{column}', which {key} names. Its columns are: "
                f"{', '.join(table.columns)}."
            )
    chosen = []
    for number, row in enumerate(table.scan(row_filter.columns)):
        try:
            if row is not None and not row_filter.takes(row):
                continue
        except TypeError as error:
            rows.faults[number] = f"{key} cannot compare it ({error}). Mend the value."
        chosen.append(number)
    rows.chosen = np.array(chosen, dtype=np.int64)
    if not chosen:
        raise DataError(f"{given}: none of its {len(table.rows):,} rows passes {key}.")
    return f"{table.name}: {len(chosen):,} of {len(table.rows):,} rows pass {key}"


def _find_repeated_ids(rows: ReadRows, column: str) -> None:
    table = rows.table
    chosen = None if rows.chosen is None else set(rows.chosen.tolist())
    first: dict[str, int] = {}
    for number, row in enumerate(table.scan([column])):
        value = None if row is None else row.get(column)
        if not isinstance(value, str | int) or (chosen is not None and number not in chosen):
            continue
        # 1 and "1" are one id: which type it has is an accident of how it was written.
        earlier = first.setdefault(str(value), number)
        if earlier != number and number not in rows.faults:
            rows.faults[number] = (
                f"its {column} {value!r} stands already at {table.describe(earlier)}. Remove one "
                "of them, or set data.id_column=null where ids may repeat."
            )


def join_sources(
    entries: Sequence[MixEntry],
    key: str = "data.mix",
    max_rows: int | None = None,
    **options: Any,
) -> Source:
    """The sources of a mix one after another; each row stands there once.

    How often it comes is decided after the rows were checked and some held out (`mixed_order`), so
    that no row is both learned and judged by.

    Args:
        max_rows: only the first rows of each.
        options: keywords of `read_source`.
    """
    sources = []
    for number, entry in enumerate(entries):
        place = f"{key}[{number}]"
        sources.append(
            read_source(
                entry.path,
                entry.split,
                f"{place}.path",
                subset=entry.subset,
                columns=entry.columns,
                columns_key=f"{place}.columns",
                filter=entry.filter,
                filter_key=f"{place}.filter",
                **options | {"media_root": entry.media_root or options.get("media_root")},
            )
        )
    if any(source.is_sequential for source in sources):
        raise DataError(
            f"{key} cannot stream from the hub: a mix asks for rows out of order. Set "
            "data.streaming=false, or stream one source by data.path."
        )
    parts, first = [], 0
    for source, entry in zip(sources, entries, strict=True):
        if max_rows is not None:
            source.rows.keep_first(max_rows)  # type: ignore[union-attr]
        parts.append(Part(source.name, first, first + len(source.rows), entry.weight))
        first += len(source.rows)
    notes = [note for source in sources for note in source.notes]
    rows = JoinedRows([source.rows for source in sources])  # type: ignore[misc]
    return Source(rows, " + ".join(source.name for source in sources), None, notes, parts)


def mixed_order(
    source: Source, rows: Sequence[int] | np.ndarray, seed: int, epoch: str
) -> tuple[np.ndarray, str]:
    """One epoch of a mix: [N] positions in `rows`, and the line that says how often each comes.

    Args:
        rows: the rows of `source` to learn from, in growing order.

    Raises:
        DataError: a source of which none is left.
    """
    kept = np.asarray(rows, dtype=np.int64)
    begins = np.searchsorted(kept, [part.first for part in source.parts])
    ends = np.searchsorted(kept, [part.end for part in source.parts])
    counts = (ends - begins).tolist()
    names = [part.name for part in source.parts]
    weights = [part.weight for part in source.parts]
    for number, count in enumerate(counts):
        if not count:
            raise DataError(
                f"data.mix[{number}] ({names[number]}): none of its rows is left to learn from."
            )
    sources, inner = interleave(counts, weights, seed, epoch)
    return begins[sources] + inner, describe_mix(names, counts, weights, epoch)
