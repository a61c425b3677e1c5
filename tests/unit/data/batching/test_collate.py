"""A batch is its examples, padded; and padding changes nothing."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Gemma4ForConditionalGeneration

from gemtune.data import Example, collate, collate_packed
from gemtune.data.media.images import EncodedImage

PAD, IMAGE_ID = 0, 19


def image(num_patches, value):
    pixels = np.full((num_patches, 768), value, np.float32)
    positions = np.stack([np.arange(num_patches), np.zeros(num_patches, int)], axis=1)
    return EncodedImage(pixels, positions, num_patches // 9)


@pytest.fixture
def examples():
    short = Example(np.array([2, 30, 31]), np.array([-100, -100, 31]), where="row a")
    ids = [2, 17, 19, 21, 40, 41, 16]
    long = Example(np.array(ids), np.array([-100] * 4 + ids[4:]), [image(9, 0.5)], "row b")
    wide = Example(np.array(ids[:5]), np.array([-100] * 4 + [40]), [image(18, 0.25)], "row c")
    return [short, long, wide]


def test_right_padding(examples):
    batch = collate(examples, pad_id=PAD, soft_ids={"image": IMAGE_ID})
    assert batch.inputs["input_ids"].tolist() == [
        [2, 30, 31, 0, 0, 0, 0],
        [2, 17, 19, 21, 40, 41, 16],
        [2, 17, 19, 21, 40, 0, 0],
    ]
    assert batch.inputs["attention_mask"].tolist() == [
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0],
    ]
    assert batch.inputs["mm_token_type_ids"].tolist() == [
        [0] * 7,
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
    ]
    assert batch.labels.tolist() == [
        [-100, -100, 31, -100, -100, -100, -100],
        [-100, -100, -100, -100, 40, 41, 16],
        [-100, -100, -100, -100, 40, -100, -100],
    ]
    assert batch.rows == ["row a", "row b", "row c"]


def test_left_padding(examples):
    batch = collate(examples, pad_id=PAD, soft_ids={"image": IMAGE_ID}, padding_side="left")
    assert batch.inputs["input_ids"][0].tolist() == [0, 0, 0, 0, 2, 30, 31]
    assert batch.inputs["attention_mask"][0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert batch.labels[0].tolist() == [-100] * 6 + [31]
    assert batch.inputs["mm_token_type_ids"][2].tolist() == [0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_counts(examples, side):
    batch = collate(examples, pad_id=PAD, soft_ids={"image": IMAGE_ID}, padding_side=side)
    assert batch.num_tokens == 3 + 7 + 5
    assert batch.num_supervised_tokens == 1 + 3 + 1
    assert batch.num_supervised_tokens == int((batch.labels[:, 1:] != -100).sum())


def test_the_first_token_is_predicted_by_nothing():
    first = Example(np.array([5, 6, 7]), np.array([5, 6, -100]))
    assert collate([first], pad_id=PAD, soft_ids={"image": IMAGE_ID}).num_supervised_tokens == 1


def test_pixels_are_padded_to_the_largest_image_of_the_batch(examples):
    inputs = collate(examples, pad_id=PAD, soft_ids={"image": IMAGE_ID}).inputs
    assert inputs["pixel_values"].shape == (2, 18, 768)
    assert inputs["pixel_values"].dtype == torch.float32
    assert (inputs["pixel_values"][0, :9] == 0.5).all()
    assert (inputs["pixel_values"][0, 9:] == 0).all()
    assert (inputs["pixel_values"][1] == 0.25).all()
    assert (inputs["image_position_ids"][0, 9:] == -1).all()
    assert inputs["image_position_ids"][1, :, 0].tolist() == list(range(18))
    assert inputs["image_position_ids"].dtype == torch.int64


def test_text_alone_has_no_pixels(examples):
    batch = collate(examples[:1], pad_id=PAD, soft_ids={"image": IMAGE_ID})
    assert set(batch.inputs) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert all(value.dtype == torch.int64 for value in batch.inputs.values())


def pack(rows):
    return collate_packed(rows, pad_id=PAD, soft_ids={"image": IMAGE_ID})


def test_packed_rows(examples):
    short, long, wide = examples
    batch = pack([[long, short], [wide]])
    assert batch.inputs["input_ids"].tolist() == [
        [2, 17, 19, 21, 40, 41, 16, 2, 30, 31],
        [2, 17, 19, 21, 40, 0, 0, 0, 0, 0],
    ]
    assert batch.inputs["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 0, 1, 2],
        [0, 1, 2, 3, 4, 0, 1, 2, 3, 4],  # the padding is a document of its own
    ]
    assert batch.inputs["mm_token_type_ids"].tolist() == [
        [0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.labels.tolist() == [
        [-100, -100, -100, -100, 40, 41, 16, -100, -100, 31],
        [-100, -100, -100, -100, 40, -100, -100, -100, -100, -100],
    ]
    assert batch.rows == ["row b", "row a", "row c"]
    assert (batch.num_tokens, batch.num_supervised_tokens) == (15, 5)
    assert batch.inputs["pixel_values"][:, 0, 0].tolist() == [0.5, 0.25]  # order of their places


def test_an_attention_mask_would_join_the_documents(examples):
    assert set(pack([examples[:1] * 2]).inputs) == {
        "input_ids",
        "position_ids",
        "mm_token_type_ids",
    }


def test_no_document_has_to_predict_the_next_one():
    every = Example(np.array([5, 6, 7]), np.array([5, 6, 7]))
    batch = pack([[every, every]])
    assert batch.labels.tolist() == [[-100, 6, 7, -100, 6, 7]]
    assert batch.num_supervised_tokens == int((batch.labels[:, 1:] != -100).sum()) == 4


def test_moving_keeps_everything(examples):
    batch = collate(examples, pad_id=PAD, soft_ids={"image": IMAGE_ID})
    moved = batch.to(torch.device("meta"))
    assert {value.device.type for value in (*moved.inputs.values(), moved.labels)} == {"meta"}
    assert (moved.num_tokens, moved.rows) == (batch.num_tokens, batch.rows)
    assert batch.labels.device.type == "cpu"


@torch.no_grad()
def test_logits_are_those_of_the_stock_padding(
    tiny_dir, make_encoder, make_image, chat, tokenizer, tiny_processor
):
    """Trimmed pixels and a padded row against the processor's full padding, one row at a time."""
    torch.manual_seed(0)
    model = Gemma4ForConditionalGeneration(AutoConfig.from_pretrained(tiny_dir)).double().eval()
    pictures = [make_image(48, 96, 1), make_image(144, 96, 2), make_image(96, 48, 3)]
    rows = [
        chat((None, "What digit is this?"), "7", images=pictures[:1]),
        chat((None, "a", None, "Read both digits in order."), "3 and 8", images=pictures[1:]),
        chat("no image", "even"),
    ]
    encoder = make_encoder()
    examples = [encoder.encode(row, "") for row in rows]
    batch = collate(examples, pad_id=tokenizer.pad_token_id, soft_ids={"image": IMAGE_ID})
    assert batch.inputs["pixel_values"].shape[1] == 54  # of the processor's 630
    logits = model(**in_double(batch.inputs)).logits
    stock = tiny_processor(pictures, return_tensors="pt")
    first_image = 0
    for row, example in enumerate(examples):
        ids = torch.from_numpy(example.input_ids)[None]
        inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE_ID).long()}
        if example.images:
            own = slice(first_image, first_image + len(example.images))
            inputs |= {key: stock[key][own] for key in ("pixel_values", "image_position_ids")}
            first_image = own.stop
        expected = model(**in_double(inputs)).logits[0]
        torch.testing.assert_close(logits[row, : len(expected)], expected, atol=1e-9, rtol=0)


def in_double(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
