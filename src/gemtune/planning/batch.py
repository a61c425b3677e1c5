"""The largest batch that a configuration allows, made of nothing but its sizes."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemtune.data import Batch, Example, collate, collate_packed
from gemtune.data.media.images import EncodedImage
from gemtune.errors import ConfigError

_TEXT_ID = 100


def largest_batch(
    model_config: Any,
    *,
    soft_tokens: int,
    num_rows: int,
    row_tokens: int,
    images_per_row: int,
    learned_fraction: float,
    packed: bool,
) -> Batch:
    """Rows of `row_tokens`, the images first and at their full size, then text; the end is learned.

    Args:
        soft_tokens: of an image at its full size.

    Raises:
        ConfigError: the images alone are longer than a row.
    """
    image = full_image(model_config.vision_config, soft_tokens)
    ids = [model_config.boi_token_id]
    ids += [model_config.image_token_id] * image.num_soft_tokens + [model_config.eoi_token_id]
    ids *= images_per_row
    # One token for the text behind the images, which is learned.
    if len(ids) >= row_tokens:
        raise ConfigError(
            f"plan.images_per_row={images_per_row}: {images_per_row} images of "
            f"{image.num_soft_tokens} tokens do not fit into rows of {row_tokens} tokens "
            "(plan.row_tokens, else data.max_length). "
            f"At most {(row_tokens - 1) // (image.num_soft_tokens + 2)} do."
        )
    input_ids = np.array(ids + [_TEXT_ID] * (row_tokens - len(ids)), dtype=np.int64)
    num_learned = min(max(1, round(learned_fraction * row_tokens)), row_tokens - len(ids))
    labels = np.full(row_tokens, -100, dtype=np.int64)
    labels[-num_learned:] = input_ids[-num_learned:]
    examples = [
        Example(input_ids, labels, [image] * images_per_row, f"row {row}")
        for row in range(num_rows)
    ]
    soft_ids = {"image": model_config.image_token_id}
    if packed:
        # One document a row: no arrangement of several has larger tensors.
        return collate_packed([[e] for e in examples], pad_id=0, soft_ids=soft_ids)
    return collate(examples, pad_id=0, soft_ids=soft_ids)


def full_image(vision_config: Any, soft_tokens: int) -> EncodedImage:
    """An image of so many soft tokens, as near to a square as that goes."""
    side = vision_config.pooling_kernel_size
    rows = next(n for n in range(int(soft_tokens**0.5), 0, -1) if soft_tokens % n == 0)
    y, x = np.mgrid[: rows * side, : soft_tokens // rows * side]
    positions = np.stack([x.ravel(), y.ravel()], axis=-1).astype(np.int64)
    pixels = np.zeros((len(positions), 3 * vision_config.patch_size**2), dtype=np.float32)
    return EncodedImage(pixels, positions, soft_tokens)
