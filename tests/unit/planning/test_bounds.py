"""The largest rows that a run can meet, beside a count over every batch that it makes."""

from __future__ import annotations

import itertools

import pytest
from whole_runs import compose

from gemtune.data import BatchStream, OtherMedia, StreamedDataset, prepare
from gemtune.errors import ConfigError
from gemtune.models import load_processing
from gemtune.planning.bounds import bounds_of


def stream_of(*overrides: str) -> BatchStream:
    config = compose("data.max_rows=60", "data.eval_max_rows=2", *overrides)
    processing = load_processing(config.model)
    rows, _ = prepare(
        config.data,
        processing.tokenizer,
        processing.image_processor,
        config.run.seed,
        others=OtherMedia(**processing.other_media),
    )
    return BatchStream(
        rows,
        seed=0,
        global_batch_size=4,
        micro_batch_size=4,
        rank=0,
        world_size=1,
        lengths=None if isinstance(rows, StreamedDataset) else rows.lengths,
        packed_tokens=config.data.max_length if config.data.packing else None,
    )


@pytest.mark.parametrize("packed", [False, True])
def test_beside_every_batch_of_an_epoch(packed: bool) -> None:
    stream = stream_of(*(["data.packing=true", "data.max_length=128"] if packed else []))
    bounds = bounds_of(stream)
    image_id = stream.dataset.soft_ids["image"]
    boi_ids = stream.dataset.encoder.tokenizer.convert_tokens_to_ids(["<|image>"])
    tokens, images, image_tokens, learned = 0, 0, 0, 0
    # A packed epoch need not end with a step.
    for batch in itertools.chain.from_iterable(stream(0, -(-stream.num_rows // 4))):
        mask = batch.inputs.get("attention_mask")
        for row, ids in enumerate(batch.inputs["input_ids"]):
            filled = ids[mask[row].bool()] if mask is not None and mask.dim() == 2 else ids
            count = sum(int((filled == i).sum()) for i in boi_ids)
            tokens = max(tokens, len(filled))
            images = max(images, count)
            image_tokens = max(image_tokens, int((filled == image_id).sum()) // max(1, count))
            learned = max(learned, int((batch.labels[row] != -100).sum()))
    assert bounds.images_per_row == images > 1
    assert bounds.image_tokens == image_tokens > 1
    assert bounds.learned_fraction * bounds.row_tokens == pytest.approx(learned, abs=0.1)
    assert bounds.row_tokens == tokens or (packed and bounds.row_tokens <= tokens)
    assert f"plan.images_per_row={images}" in bounds.as_keys()


def test_what_is_not_known_before() -> None:
    with pytest.raises(ConfigError, match="streamed"):
        bounds_of(stream_of("data.streaming=true", "data.eval_fraction=0"))
