"""Rows that are checked and encoded when their turn comes, not before the first step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemtune.data.batching.collate import Batch, collate
from gemtune.data.preparation.rejected import rejected_line
from gemtune.data.rendering.chat import ChatEncoder, Example
from gemtune.data.sources.source import Source, mixed_order
from gemtune.errors import ConfigError, DataError

# So many bad rows one after another are no accident of single rows.
_MAX_BAD_IN_A_ROW = 100


def check_streaming(source: Source, shuffle: bool, eval_fraction: float) -> None:
    """Refuse what a stream from the hub cannot do. Local files can do it: they are not streams.

    Raises:
        ConfigError: an order that is not the stream's, or rows to be held out of it.
    """
    if not source.is_sequential:
        return
    if shuffle:
        raise ConfigError(
            f"data.streaming=true reads {source.name} in its own order, and a shuffled order would "
            "need all of it. Set data.shuffle=false, or data.streaming=false."
        )
    if eval_fraction:
        raise ConfigError(
            f"data.eval_fraction={eval_fraction} would hold rows out of {source.name}, which "
            "data.streaming=true reads in its own order. Give data.eval_path (and "
            "data.eval_split), or set data.eval_fraction=0."
        )


class StreamedDataset:
    """The rows of a source by their place, as `ChatDataset` has them, none looked at before.

    Which row stands at a place is decided by the arguments alone: no buffer, nothing to restore.
    With on_bad_row="skip" the next good row stands in for a bad one, so that the places behind it
    do not move. What this cannot promise: that the rows are good before the first step, how many
    tokens an epoch has, how many rows will be left out, that ids do not repeat (hub).

    Args:
        rows: [N] rows of the source, in order.
        on_bad_row: error or skip.
    """

    def __init__(
        self, source: Source, encoder: ChatEncoder, rows: Sequence[int], on_bad_row: str
    ) -> None:
        self.source = source
        self.encoder = encoder
        self.notes: list[str] = [
            *source.notes,
            "data.streaming=true: a bad row is found at its turn, not before the first step"
            + ("; the next good row stands in for it" if on_bad_row == "skip" else ""),
        ]
        self.rejected: list[str] = []
        """Rows left out by this process; loader processes have lists of their own."""
        self.journal: Path | None = None
        """A file to which every process appends the rows that it leaves out, as JSON lines."""
        self._rows = np.asarray(rows, dtype=np.int64)
        self._skips = on_bad_row == "skip"

    def mix(self, seed: int, epoch: str) -> None:
        """Repeat the rows of a mix as its weights say."""
        order, note = mixed_order(self.source, self._rows, seed, epoch)
        self._rows = self._rows[order]
        self.notes.append(note)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Example:
        for step in range(min(_MAX_BAD_IN_A_ROW, len(self))):
            place = (i + step) % len(self)
            index = int(self._rows[place])
            try:
                return self.encoder.encode(self.source.rows[index], self.source.describe(index))
            except DataError as error:
                if not self._skips:
                    raise
                self._leave_out(error)
                last = error
        raise DataError(
            f"{min(_MAX_BAD_IN_A_ROW, len(self))} rows one after another cannot be learned from. "
            f"The last: {last}"
        ) from last

    def _leave_out(self, error: DataError) -> None:
        if str(error) in self.rejected:
            return  # in an earlier epoch, or when it stood in for another
        self.rejected.append(str(error))
        if self.journal is None:
            return
        line = rejected_line(str(error))
        # One write of one line: several processes may append at once.
        descriptor = os.open(self.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode("utf-8", "backslashreplace"))
        finally:
            os.close(descriptor)

    def row(self, i: int) -> dict[str, Any]:
        """The row as the source has it."""
        return self.source.rows[int(self._rows[i])]

    def prompt(self, i: int) -> tuple[Example, str]:
        """The row up to its last answer, and that answer."""
        return self.encoder.encode_prompt(self.row(i), self.source.describe(int(self._rows[i])))

    def batch(self, examples: Sequence[Example], padding_side: str = "right") -> Batch:
        """Collate with this tokenizer's padding."""
        return collate(
            examples,
            pad_id=self.encoder.tokenizer.pad_token_id,
            soft_ids=self.encoder.placeholders.soft_ids,
            padding_side=padding_side,
        )

    @property
    def lengths(self) -> None:
        """Not known before."""
        return None

    def kept_media(self, i: int) -> dict[str, tuple[int, int]]:
        """Of each kind (first, how many) of the media of `row(i)`; empty where it has none."""
        index = int(self._rows[i])
        return self.encoder.encode_text(self.row(i), self.source.describe(index))[1]

    @property
    def media_in_every_row(self) -> set[str]:
        """Never known before."""
        return set()

    @property
    def media_kinds(self) -> set[str]:
        """Kinds that a batch may have: all that the model takes."""
        return set(self.encoder.media.kinds)
