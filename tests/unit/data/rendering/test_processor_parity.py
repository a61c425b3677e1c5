"""Our inputs against those of `Gemma4Processor`, wherever its torchvision can be imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gemtune
from gemtune.data import ChatEncoder
from gemtune.data.batching.collate import collate
from gemtune.data.media.images import ImageEncoder

ASSETS = Path(gemtune.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="module")
def processor() -> Any:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported ({error}), so Gemma4Processor cannot be made")
    from transformers import AutoTokenizer, Gemma4Processor, Gemma4VideoProcessor
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    return Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessorPil(max_soft_tokens=70),  # resizes, as those of real checkpoints do
        AutoTokenizer.from_pretrained(ASSETS),
        Gemma4VideoProcessor(),
    )


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "sizes",
    [[], [(640, 480)], [(300, 100), (97, 411)], [(48, 48), (1000, 20), (33, 33)]],
    ids=["text", "one", "two", "three"],
)
def test_ids_types_pixels_and_positions_are_those_of_the_processor(
    processor: Any, sizes: list[tuple[int, int]]
) -> None:
    images = [picture(*size) for size in sizes]
    parts = [{"type": "image"} for _ in images]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "You are terse."}]},
        {"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A digit."}]},
    ]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    expected = processor(text=[text], images=[images] if images else None, return_tensors="pt")

    encoder = ChatEncoder(
        processor.tokenizer, ImageEncoder(processor.image_processor), max_length=1000
    )
    example = encoder.encode({"messages": messages, "images": images}, "row 0")
    tokenizer = processor.tokenizer
    ours = collate(
        [example],
        pad_id=tokenizer.pad_token_id,
        soft_ids=encoder.placeholders.soft_ids,
    ).inputs
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(ours[name], expected[name]), name
    assert ("pixel_values" in ours) == bool(images)
    if images:
        # The processor pads every image to the budget; we pad to the largest of the batch.
        num_patches = ours["pixel_values"].shape[1]
        assert torch.equal(ours["pixel_values"], expected["pixel_values"][:, :num_patches])
        padding = expected["image_position_ids"][:, num_patches:]
        assert torch.equal(padding, torch.full_like(padding, -1))
        assert torch.equal(
            ours["image_position_ids"], expected["image_position_ids"][:, :num_patches]
        )
