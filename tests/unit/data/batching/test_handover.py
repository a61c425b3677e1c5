"""What comes out of a parcel is what went in."""

import pickle
from dataclasses import fields

import torch

from gemtune.data import Batch
from gemtune.data.batching.handover import Parcel

INPUTS = {
    "input_ids": torch.arange(15).view(3, 5),
    "image_position_ids": torch.arange(14).view(1, 7, 2).transpose(1, 2),  # not contiguous
    "pixel_values": torch.rand(1, 7, 3),
    "halves": torch.rand(5).to(torch.bfloat16),  # 10 bytes: what follows begins elsewhere
    "nothing": torch.empty(0, 4),
    "mask": torch.tensor([True, False, True]),
}


def make(*names):
    inputs = {name: INPUTS[name] for name in names}
    return Batch(inputs, torch.arange(3) - 100, 12, 5, ["row a", "row b"])


def test_every_batch_comes_back():
    batches = [make(*INPUTS), make("input_ids"), make("halves", "mask")]
    parcel = Parcel.pack(batches)
    for found in (parcel.unpack(), pickle.loads(pickle.dumps(parcel)).unpack()):
        assert len(found) == 3
        for batch, twin in zip(batches, found, strict=True):
            assert list(batch.inputs) == list(twin.inputs)
            pairs = [(value, twin.inputs[name]) for name, value in batch.inputs.items()]
            for value, copy in [*pairs, (batch.labels, twin.labels)]:
                assert (value.shape, value.dtype) == (copy.shape, copy.dtype)
                assert torch.equal(value, copy)
            for field in fields(Batch):
                if field.name not in ("inputs", "labels"):
                    assert getattr(batch, field.name) == getattr(twin, field.name)


def test_one_piece_of_memory_travels():
    parcel = Parcel.pack([make(*INPUTS)] * 4)
    (first, *_) = parcel.unpack()
    assert parcel.memory.untyped_storage().data_ptr() == (first.labels.untyped_storage().data_ptr())
    assert not parcel.rest[0].inputs and parcel.rest[0].labels.is_meta
