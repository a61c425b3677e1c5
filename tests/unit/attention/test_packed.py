"""A packed row computes what its documents do, each in a row of its own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from gemma4_zoo import (
    CONTINUOUS_FAMILIES,
    batch,
    build,
    exact_float64,
    relative_error,
)

from gemtune import patches
from gemtune.attention import separate_documents
from gemtune.attention.packed import document_of
from gemtune.data import Example, collate_packed
from gemtune.data.media.images import EncodedImage
from gemtune.errors import ConfigError

IGNORE = -100
BIDIRECTIONAL = ("26b_a4b_all_experts", "31b")
# Images at different places, several in a row, and text alone; longer than the window of 16.
IMAGES = (1, 0, 2, 1)


def documents_of(inputs):
    """The rows of a padded batch without their padding, as the data set would give them."""
    examples, first = [], 0
    grids = (inputs["image_position_ids"] >= 0).all(-1).sum(1)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        ids, labels = (inputs[key][row, mask].numpy() for key in ("input_ids", "labels"))
        labels = np.where(np.arange(len(ids)) == 0, ids, labels)  # nothing may predict it
        images = [
            EncodedImage(
                inputs["pixel_values"][image, : grids[image]].float().numpy(),
                inputs["image_position_ids"][image, : grids[image]].numpy(),
                int(grids[image]) // 9,
            )
            for image in range(first, first + IMAGES[row])
        ]
        first += IMAGES[row]
        examples.append(Example(ids, labels, images, f"row {row}"))
    return examples


def for_model(model, packed):
    dtype = next(model.parameters()).dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in packed.inputs.items()}
    return inputs | {"use_cache": False}


def packed_of(model, rows):
    return collate_packed(rows, pad_id=0, soft_ids={"image": model.config.image_token_id})


def alone(model, example):
    """As stock transformers takes one row: no mask, no positions, no padding."""
    inputs = for_model(model, packed_of(model, [[example]]))
    del inputs["position_ids"]
    return inputs


def prepared(model, choice):
    """The model as a run with packing has it: patched, documents kept apart."""
    patches.apply(model, choice)
    separate_documents(model)
    return model


def rows_to_pack(model):
    """Two rows of a micro-batch; the shorter is padded behind its last document."""
    documents = documents_of(batch(model, IMAGES))
    return [[documents[i] for i in (2, 0, 3)], [documents[i] for i in (1, 2)]]


def largest_difference(a, b):
    return float((a - b).abs().max())


def worst_error(model, packing_model, measure):
    """Of the packed logits from those of each document in the stock model, over all documents."""
    rows = rows_to_pack(model)
    with torch.no_grad():
        expected = [[model(**alone(model, e)).logits[0] for e in row] for row in rows]
        logits = packing_model(**for_model(model, packed_of(model, rows))).logits
    worst = 0.0
    for row, (documents, found) in enumerate(zip(expected, logits, strict=True)):
        lengths = [len(document) for document in documents]
        assert [len(e.input_ids) for e in rows[row]] == lengths
        for document, part in zip(documents, found[: sum(lengths)].split(lengths), strict=True):
            worst = max(worst, measure(part, document))
    return worst


@pytest.mark.parametrize("choice", [[], None], ids=["stock", "patched"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONTINUOUS_FAMILIES)
def test_logits_are_those_of_the_separate_rows(family, attention, choice):
    model = build(family, attention=attention)
    assert set(model.config.text_config.layer_types) == {"full_attention", "sliding_attention"}
    packing_model = prepared(build(family, attention=attention), choice)
    with exact_float64():
        assert worst_error(model, packing_model, largest_difference) < 1e-10


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONTINUOUS_FAMILIES)
def test_logits_in_float32(family, attention):
    model = build(family, torch.float32, attention=attention)
    packing_model = prepared(build(family, torch.float32, attention=attention), None)
    assert worst_error(model, packing_model, relative_error) < 1e-5


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="5.5.4, 5.9.0 and 5.17.0 make these masks right",
)
@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_without_the_masks_images_behind_the_first_document_go_wrong(family):
    """What the hook is there for; it can go when transformers no longer needs it."""
    model = build(family)
    rows = rows_to_pack(model)
    first = len(rows[0][0].input_ids)
    inputs = for_model(model, packed_of(model, rows))
    with torch.no_grad(), exact_float64():
        stock = model(**inputs).logits
        handle = separate_documents(model)
        difference = (model(**inputs).logits - stock).abs()[0]
        handle.remove()
        assert torch.equal(model(**inputs).logits, stock)
    assert difference[:first].max() < 1e-10 < 1e-3 < difference[first:].max()


@pytest.mark.parametrize("choice", [[], None], ids=["stock", "patched"])
@pytest.mark.parametrize("family", CONTINUOUS_FAMILIES)
def test_loss_and_gradients_are_those_of_the_separate_rows(family, choice):
    stock, model = build(family), prepared(build(family), choice)
    rows = rows_to_pack(model)
    packed = packed_of(model, rows)
    inputs = for_model(model, packed)
    with exact_float64():
        loss, gradients = separate_loss_and_gradients(stock, rows)
        if choice is None:
            found = model(**inputs, labels=packed.labels).loss
        else:  # transformers' own loss rounds to float32
            found = mean_loss(model(**inputs).logits, packed.labels)
        found.backward()
    assert packed.num_supervised_tokens == int((packed.labels[:, 1:] != IGNORE).sum())
    assert relative_error(found, loss) < 1e-10
    trained = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert trained.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # A key that all queries see alike has no gradient but rounding.
        error = (trained[name] - gradient).norm()
        assert error < 1e-10 * gradient.norm() + 1e-15, (name, float(error))


def separate_loss_and_gradients(model, rows):
    """Of the mean over all supervised tokens, one stock forward for each document."""
    examples = [example for row in rows for example in row]
    count = sum(example.num_supervised_tokens for example in examples)
    model.zero_grad(set_to_none=True)
    total = 0.0
    for example in examples:
        logits = model(**alone(model, example)).logits
        labels = torch.from_numpy(example.labels)[None]
        loss = mean_loss(logits, labels) * example.num_supervised_tokens / count
        loss.backward()
        total = total + loss.detach()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def mean_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_with_checkpointing(family):
    model = prepared(build(family), None)
    packed = packed_of(model, rows_to_pack(model))
    inputs = for_model(model, packed) | {"labels": packed.labels}
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-9, atol=1e-15)


def test_other_calls_are_left_alone():
    model = build("31b").eval()
    inputs = batch(model, IMAGES)
    del inputs["labels"]
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits
        written = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        handle = separate_documents(model)
        assert torch.equal(model(**inputs, use_cache=False).logits, before)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), written)
        handle.remove()


@pytest.mark.parametrize("family", ["e2b", "e4b"])
def test_where_transformers_is_right_nothing_is_done(family):
    assert separate_documents(build(family)) is None


def test_other_kinds_of_attention_are_refused():
    model = build("31b")
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match=r"model\.attention=flash_attention_2 is not supported"):
        separate_documents(model)


def test_documents_are_found_by_their_positions():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]])
    assert document_of(positions).tolist() == [[0, 0, 0, 1, 2, 2, 3, 3], [0] * 8]
