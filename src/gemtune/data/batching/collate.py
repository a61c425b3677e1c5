"""Examples -> one batch: each in a row of its own, or several packed into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gemtune.data.batching.features import media_inputs
from gemtune.data.media.encoders import MEDIA
from gemtune.data.rendering.chat import IGNORE_INDEX, Example


@dataclass
class Batch:
    """Model inputs of one micro-batch, and what the loop has to know of them.

    `inputs`: input_ids, mm_token_type_ids and attention_mask (packed: position_ids in its place)
    [B, S] int64, and those of `media_inputs` for the media that the rows have. `labels` [B, S]
    int64.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    num_tokens: int
    """Padding left out."""
    num_supervised_tokens: int
    rows: list[str]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        inputs = {k: v.to(device, non_blocking=True) for k, v in self.inputs.items()}
        labels = self.labels.to(device, non_blocking=True)
        return replace(self, inputs=inputs, labels=labels)

    def pin_memory(self) -> Batch:
        """Called by the DataLoader when it pins."""
        inputs = {k: v.pin_memory() for k, v in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels.pin_memory())


def collate(
    examples: Sequence[Example],
    *,
    pad_id: int,
    soft_ids: Mapping[str, int],
    padding_side: str = "right",
) -> Batch:
    """Pad to the longest row of the batch ("left" for generation).

    Args:
        soft_ids: kind of media -> the token that stands for one of its soft tokens.
    """
    shape = (len(examples), max(len(e.input_ids) for e in examples))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        place = slice(0, length) if padding_side == "right" else slice(shape[1] - length, None)
        input_ids[row, place] = example.input_ids
        labels[row, place] = example.labels
        attention_mask[row, place] = 1
    return _batch(examples, input_ids, labels, soft_ids, attention_mask=attention_mask)


def collate_packed(
    rows: Sequence[Sequence[Example]], *, pad_id: int, soft_ids: Mapping[str, int]
) -> Batch:
    """Documents of a row one after another, each with positions from 0; padded to the longest row.

    There is no attention mask, because one of ones would join the documents: they are told apart
    by their positions. The places behind the last document are one more, of padding. What a
    document begins with has no label: the document before it would have to predict it.
    """
    shape = (len(rows), max(sum(len(e.input_ids) for e in row) for row in rows))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            place = slice(start, start + len(example.input_ids))
            input_ids[number, place] = example.input_ids
            labels[number, place] = example.labels
            labels[number, start] = IGNORE_INDEX
            position_ids[number, place] = np.arange(len(example.input_ids))
            start = place.stop
        position_ids[number, start:] = np.arange(shape[1] - start)
    examples = [example for row in rows for example in row]
    return _batch(examples, input_ids, labels, soft_ids, position_ids=position_ids)


def _batch(
    examples: Sequence[Example],
    input_ids: np.ndarray,
    labels: np.ndarray,
    soft_ids: Mapping[str, int],
    **others: np.ndarray,
) -> Batch:
    """The arrays as tensors, with what follows from them and from the examples' media."""
    kinds = np.zeros_like(input_ids)  # 0 is text
    for number, kind in enumerate(MEDIA, start=1):
        if kind in soft_ids:
            kinds[input_ids == soft_ids[kind]] = number
    inputs = {
        "input_ids": torch.from_numpy(input_ids),
        **{name: torch.from_numpy(values) for name, values in others.items()},
        # Without it the larger sizes silently turn causal inside images (transformers#45222).
        "mm_token_type_ids": torch.from_numpy(kinds),
        **media_inputs(examples),
    }
    return Batch(
        inputs,
        torch.from_numpy(labels),
        sum(len(example.input_ids) for example in examples),
        sum(example.num_supervised_tokens for example in examples),
        [example.where for example in examples],
    )
