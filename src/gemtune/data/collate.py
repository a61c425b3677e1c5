"""Examples -> one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gemtune.data.chat import IGNORE_INDEX, Example

TEXT, IMAGE = 0, 1


@dataclass
class Batch:
    """Model inputs of one micro-batch, and what the loop has to know of them.

    `inputs`: input_ids, attention_mask, mm_token_type_ids [B, S] int64; with images also
    pixel_values [N, P, 3 * patch**2] float32 and image_position_ids [N, P, 2] int64, padded to the
    largest image of the batch only. `labels` [B, S] int64.
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
    examples: Sequence[Example], *, pad_id: int, image_id: int, padding_side: str = "right"
) -> Batch:
    """Pad to the longest row of the batch ("left" for generation)."""
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
    inputs = {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        # Without it the larger sizes silently turn causal inside images (transformers#45222).
        "mm_token_type_ids": torch.from_numpy(np.where(input_ids == image_id, IMAGE, TEXT)),
    }
    images = [image for example in examples for image in example.images]
    if images:
        num_patches = max(len(image.pixels) for image in images)
        pixels = np.zeros((len(images), num_patches, images[0].pixels.shape[1]), dtype=np.float32)
        positions = np.full((len(images), num_patches, 2), -1, dtype=np.int64)
        for i, image in enumerate(images):
            pixels[i, : len(image.pixels)] = image.pixels
            positions[i, : len(image.positions)] = image.positions
        inputs["pixel_values"] = torch.from_numpy(pixels)
        inputs["image_position_ids"] = torch.from_numpy(positions)
    return Batch(
        inputs,
        torch.from_numpy(labels),
        int(attention_mask.sum()),
        sum(example.num_supervised_tokens for example in examples),
        [example.where for example in examples],
    )
