"""Prepared rows as Arrow files: written once, mapped into memory by every process that trains."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gemtune.data.media.encoders import MEDIA
from gemtune.data.rendering.fitting import EncodedText
from gemtune.errors import DataError

_SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        # Begin and end of each learned stretch, one after another.
        ("runs", pa.list_(pa.int32())),
        ("supervised", pa.int32()),
        # Of each kind, the media cut away before those that the row has, and how many these are.
        *((f"{what}_{kind}", pa.int32()) for kind in MEDIA for what in ("first", "num")),
        # Why the row cannot be learned from; null for a good one.
        ("reason", pa.string()),
    ]
)


def to_batch(rows: Sequence[EncodedText | DataError]) -> pa.RecordBatch:
    """Encoded rows, and the errors of those that are bad, as one batch."""
    good = [None if isinstance(row, DataError) else row for row in rows]
    columns = [
        _lists([[] if row is None else row.ids for row in good]),
        _lists([[] if row is None else [e for run in row.runs for e in run] for row in good]),
        pa.array([0 if row is None else row.num_supervised_tokens for row in good], pa.int32()),
        *(
            pa.array([0 if row is None else count(row, kind) for row in good], pa.int32())
            for kind in MEDIA
            for count in (_cut_before, EncodedText.num_media)
        ),
        pa.array([_storable(str(r)) if isinstance(r, DataError) else None for r in rows]).cast(
            pa.string()
        ),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _cut_before(row: EncodedText, kind: str) -> int:
    return row.cut_before.get(kind, 0)


def _storable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _lists(rows: Sequence[list[int]]) -> pa.Array:
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = array("i")  # of 32 bits wherever Python runs
    for row in rows:
        values.fromlist(row)
    flat = np.frombuffer(values, dtype=np.int32) if values else np.zeros(0, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def write_batch(batch: pa.RecordBatch, path: Path) -> None:
    """Write the file in one step: it is whole, or not there. Its SHA-256 stands at its end."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_batch(batch)
    content = sink.getvalue()
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staging.open("wb") as file:
            file.write(content)
            file.write(hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def read_batch(path: Path) -> pa.RecordBatch:
    """The batch of a file, mapped and not copied.

    Raises:
        pyarrow.ArrowException, OSError: there is no whole file.
    """
    content, _ = _parts(path)
    reader = pa.ipc.open_file(content)
    if reader.schema != _SCHEMA or reader.num_record_batches != 1:
        raise pa.ArrowInvalid(f"{path} is no file of prepared rows")
    return reader.get_batch(0)


def is_undamaged(path: Path) -> bool:
    """Whether the file is as it was written, to the bit, and has prepared rows."""
    try:
        content, digest = _parts(path)
        read_batch(path)
    except (OSError, pa.ArrowException):
        return False
    return hashlib.sha256(content).digest() == digest


def _parts(path: Path) -> tuple[pa.Buffer, bytes]:
    """What was written, and the digest behind it."""
    whole = pa.memory_map(str(path)).read_buffer()
    size = max(0, len(whole) - hashlib.sha256().digest_size)
    return whole.slice(0, size), whole.slice(size).to_pybytes()


class PreparedRows:
    """Rows [0, N) of a source as they were encoded; those of a file stay there until asked for.

    Args:
        batches: consecutive rows, all but the last batch of one length.
        paths: where the batches were read from; such rows can be handed to another process.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], paths: Sequence[Path] = ()) -> None:
        self._paths = list(paths)
        self._batches = list(batches)
        self._size = batches[0].num_rows if batches else 1
        columns: dict[str, list[np.ndarray]] = {name: [] for name in _SCHEMA.names[2:-1]}
        lengths, bad = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=bool)]
        self._ids: list[tuple[np.ndarray, np.ndarray]] = []
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in batches:
            for name, values in columns.items():
                values.append(batch.column(name).to_numpy())
            self._ids.append(_views(batch.column("ids")))
            self._runs.append(_views(batch.column("runs")))
            lengths.append(np.diff(self._ids[-1][1]))
            bad.append(batch.column("reason").is_valid().to_numpy(zero_copy_only=False))
        self.lengths = np.concatenate(lengths)
        """[N] tokens; 0 for a bad row."""
        self.is_bad = np.concatenate(bad)
        nothing = np.zeros(0, dtype=np.int32)
        found = {name: np.concatenate([nothing, *each]) for name, each in columns.items()}
        self.num_supervised_tokens = found["supervised"]
        self.first_media = {kind: found[f"first_{kind}"] for kind in MEDIA}
        self.num_media = {kind: found[f"num_{kind}"] for kind in MEDIA}
        """Of each kind [N] media of each row, and how many of the source's were cut before them."""

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, row: int) -> np.ndarray:
        """[S] int32, not to be written to."""
        return _row(self._ids[row // self._size], row % self._size)

    def runs(self, row: int) -> np.ndarray:
        """[R, 2] begin and end of each learned stretch."""
        return _row(self._runs[row // self._size], row % self._size).reshape(-1, 2)

    def kept_media(self, row: int) -> dict[str, tuple[int, int]]:
        """Of each kind (first, how many) of the source row's media; empty where it has none."""
        kept = {k: (int(self.first_media[k][row]), int(self.num_media[k][row])) for k in MEDIA}
        return kept if any(count for _, count in kept.values()) else {}

    def reason(self, row: int) -> str:
        """Why a bad row is one, beginning with its place."""
        return self._batches[row // self._size].column("reason")[row % self._size].as_py()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._paths:
            return (read_prepared, (self._paths,))
        return (PreparedRows, (self._batches,))


def read_prepared(paths: Sequence[Path]) -> PreparedRows:
    """The rows of these files, one after another."""
    return PreparedRows([read_batch(path) for path in paths], paths)


def _views(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets, not copied."""
    return column.values.to_numpy(), column.offsets.to_numpy()


def _row(views: tuple[np.ndarray, np.ndarray], row: int) -> np.ndarray:
    values, offsets = views
    return values[offsets[row] : offsets[row + 1]]
