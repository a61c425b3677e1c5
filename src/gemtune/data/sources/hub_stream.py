"""A hub dataset read as it comes: nothing is downloaded before, and rows keep their number."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from gemtune.errors import DataError

# A row that stood in for a bad one is asked for again when its own turn comes.
_NUM_RECENT = 8


class HubStream(Sequence):
    """Row i is the i-th that the stream gives, whoever asks and whatever was asked before.

    Rows asked for in growing order are read once. Going on behind a gap reads and drops what lies
    between, and going back begins again: slow, never wrong.

    Args:
        stream: a `datasets.IterableDataset` of one split.
    """

    def __init__(self, stream: Any) -> None:
        splits = getattr(stream.info, "splits", None) or {}
        split = splits.get(str(stream.split)) if stream.split is not None else None
        self._num_rows = getattr(split, "num_examples", None)
        if not self._num_rows:
            raise DataError(
                "the hub does not say how many rows it has, so it cannot be streamed: an epoch "
                "would have no end. Set data.streaming=false."
            )
        self._stream = stream.decode(False) if stream.features else stream
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._next = 0
        self._recent: deque[tuple[int, dict[str, Any]]] = deque(maxlen=_NUM_RECENT)
        self.columns = list(stream.column_names or self[0])

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for number, row in self._recent:
            if number == index:
                return row
        if self._iterator is None or index < self._next:
            self._iterator, self._next = iter(self._stream), 0
        try:
            while self._next < index:
                next(self._iterator)
                self._next += 1
            row = next(self._iterator)
        except StopIteration:
            self._iterator = None
            raise DataError(
                f"the stream ended after {self._next:,} rows; the hub had said {len(self):,}. Set "
                "data.streaming=false."
            ) from None
        self._recent.append((self._next, row))
        self._next += 1
        return row

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_iterator": None, "_next": 0, "_recent": deque(maxlen=_NUM_RECENT)}
