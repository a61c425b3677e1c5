"""The largest batch that the rows of a run can give, read off their counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemtune.data import BatchStream, ChatDataset, StreamedDataset
from gemtune.data.batching.packing import PackedOrder
from gemtune.errors import ConfigError

_PLANNED_MEDIA = frozenset({"image"})
_ROWS_READ = 2000


@dataclass(frozen=True)
class RowBounds:
    """The most that a row has of each; no row need have all of it, and no batch such rows alone."""

    row_tokens: int
    images_per_row: int
    image_tokens: int
    """Of one image, without the two around it; 0: none."""
    learned_fraction: float
    """Of a row of `row_tokens`."""

    def as_keys(self) -> list[str]:
        """For the command line of `scripts/plan_memory.py`."""
        return [
            f"plan.row_tokens={self.row_tokens}",
            f"plan.images_per_row={self.images_per_row}",
            *([f"plan.image_tokens={self.image_tokens}"] if self.image_tokens else []),
            f"plan.learned_fraction={self.learned_fraction:.4f}",
        ]


def bounds_of(stream: BatchStream) -> RowBounds:
    """Of all rows of an epoch; of the first one where rows are packed, whose rows have in every
    epoch the same lengths.

    Raises:
        ConfigError: nothing is known of a stream before it is read, and videos and audio are not
            planned for.
    """
    rows = stream.dataset
    if isinstance(rows, StreamedDataset):
        raise ConfigError("rows that are streamed are not known before they are read")
    if others := sorted(rows.media_kinds - _PLANNED_MEDIA):
        raise ConfigError(f"{' and '.join(others)} in rows are not planned for yet")
    lengths, learned, images = rows.lengths, rows.supervised_lengths, rows.media_per_row("image")
    if isinstance(stream.order, PackedOrder):
        lengths, learned, images = (
            stream.order.sums(values, epoch=0) for values in (lengths, learned, images)
        )
    longest, most_images = int(lengths.max()), int(images.max())
    image_tokens = _image_tokens(rows) if most_images else 0
    if most_images:
        # The largest image may be in another row than the most of them: they are within a row.
        image_tokens = min(image_tokens, (longest - 1) // most_images - 2)
    return RowBounds(
        row_tokens=longest,
        images_per_row=most_images,
        image_tokens=image_tokens,
        learned_fraction=min(1.0, int(learned.max()) / longest + 5e-5),
    )


def _image_tokens(rows: ChatDataset) -> int:
    """Of the largest image, as far as the longest rows tell: reading all of them takes its time."""
    images = rows.media_per_row("image")
    with_images = images.nonzero()[0]
    longest_first = with_images[np.argsort(-rows.lengths[with_images], kind="stable")]
    found = 0
    for row in longest_first[:_ROWS_READ].tolist():
        num_tokens = int((rows.ids(row) == rows.soft_ids["image"]).sum())
        found = max(found, -(-num_tokens // int(images[row])))
    return found
