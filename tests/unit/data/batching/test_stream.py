"""The stream of batches is the same however it is read."""

import random

import numpy as np
import pytest
import torch

from gemtune.data import BatchStream, DataConfig, prepare
from gemtune.data.batching.order import samples_at
from gemtune.errors import ConfigError, DataError


@pytest.fixture
def dataset(tokenizer, tiny_processor):
    config = DataConfig(path="bundled:digits/heldout.parquet", max_rows=10, eval_fraction=0)
    return prepare(config, tokenizer, tiny_processor, seed=0)[0]


def stream(dataset, **changes):
    settings = {
        "seed": 1,
        "global_batch_size": 4,
        "micro_batch_size": 3,
        "rank": 0,
        "world_size": 1,
    }
    return BatchStream(dataset, **settings | changes)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for step, other in zip(ours, theirs, strict=True):
        assert len(step) == len(other)
        for batch, twin in zip(step, other, strict=True):
            assert batch.rows == twin.rows
            assert batch.inputs.keys() == twin.inputs.keys()
            for key, value in batch.inputs.items():
                assert torch.equal(value, twin.inputs[key]), key
            assert torch.equal(batch.labels, twin.labels)
            assert batch.num_tokens == twin.num_tokens
            assert batch.num_supervised_tokens == twin.num_supervised_tokens


def test_the_rows_are_those_due(dataset):
    steps = list(stream(dataset)(0, 5))
    for step, batches in enumerate(steps):
        due = [dataset[i].where for i in samples_at(step * 4, 4, 10, seed=1)]
        assert [batch.rows for batch in batches] == [due[:3], due[3:]]
    assert len({row for step in steps for batch in step for row in batch.rows}) == 10


def arranged(dataset, way):
    """How rows are put together: as they come, sorted within a step, in buckets, packed."""
    known = {"lengths": dataset.lengths}
    return {
        "as they come": {},
        "sorted": known,
        "buckets": known | {"bucket_rows": 8, "global_batch_size": 2},
        "packed": known | {"packed_tokens": 2 * dataset.longest_row_tokens},
    }[way]


WAYS = ("as they come", "sorted", "buckets", "packed")


@pytest.mark.parametrize("way", WAYS)
def test_workers_change_nothing(dataset, way):
    options = arranged(dataset, way)
    ours, theirs = (stream(dataset, num_workers=n, **options)(0, 5) for n in (0, 2))
    assert_same(list(ours), list(theirs))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_later_is_the_same_as_skipping(dataset, num_workers, way):
    options = arranged(dataset, way)
    whole = list(stream(dataset, **options)(0, 6))
    assert_same(list(stream(dataset, num_workers=num_workers, **options)(3, 6)), whole[3:])


def test_nothing_is_left_after_the_last_step(dataset):
    assert list(stream(dataset)(5, 5)) == list(stream(dataset)(6, 5)) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_the_ranks_together_see_the_global_batch(dataset, way, micro_batch_size):
    options = arranged(dataset, way)
    for step in (0, 2, 5):
        (alone,) = stream(dataset, **options)(step, step + 1)
        shared = options | {"micro_batch_size": micro_batch_size, "world_size": 2}
        ranks = [next(stream(dataset, rank=r, **shared)(step, step + 1)) for r in (0, 1)]
        rows = [row for batches in ranks for batch in batches for row in batch.rows]
        assert sorted(rows) == sorted(row for batch in alone for row in batch.rows)


def test_packed_rows_are_those_of_the_plan(dataset):
    capacity = 2 * dataset.longest_row_tokens
    packed = stream(dataset, lengths=dataset.lengths, packed_tokens=capacity)
    assert packed.num_rows < len(dataset) == 10
    for step, batches in enumerate(packed(0, 4)):
        rows = [row for micro in packed.rows_of(step) for row in micro]
        assert rows == packed.order.step_rows(step)
        due = [dataset[i].where for row in rows for i in row]
        assert [row for batch in batches for row in batch.rows] == due
        for batch in batches:
            assert "attention_mask" not in batch.inputs
            assert batch.inputs["input_ids"].shape[1] <= capacity


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"packing": True}, r"^data\.bucket_rows=64 is for padded rows; data\.packing=true pads"),
        ({"shuffle": False}, r"^data\.bucket_rows=64 changes the order of the file"),
        ({"streaming": True}, r"^data\.bucket_rows=64 sorts by lengths that data\.streaming=true"),
        (
            {"bucket_rows": None, "packing": True, "streaming": True},
            r"^data\.packing=true needs the length of every row before the first step",
        ),
        ({"bucket_rows": -1}, r"^data\.bucket_rows=-1 is too small"),
    ],
)
def test_combinations_that_cannot_be(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        DataConfig(path="a.jsonl", **{"bucket_rows": 64} | options)


def test_packing_needs_lengths(dataset):
    with pytest.raises(
        ConfigError, match=r"^Rows whose lengths are not known before the first step cannot"
    ):
        stream(dataset, packed_tokens=100)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_random_state_is_touched(dataset, num_workers):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    list(stream(dataset, num_workers=num_workers)(0, 2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_row_surfaces_as_itself(
    tokenizer, tiny_processor, chat, png, write_parquet, num_workers
):
    """Whoever reads it: no worker number, no traceback in the message. The steps before it come."""
    rows = [chat((None, "a"), ("b",), images=[png(seed=i)]) for i in range(4)]
    rows[2]["images"] = [png(96, 96)[:300]]
    config = DataConfig(path=write_parquet(rows), eval_fraction=0)
    dataset, _ = prepare(config, tokenizer, tiny_processor, seed=0)
    steps = stream(
        dataset, global_batch_size=1, micro_batch_size=1, shuffle=False, num_workers=num_workers
    )(0, 4)
    assert [next(steps)[0].rows, next(steps)[0].rows] == [
        [f"{config.path} row 0"],
        [f"{config.path} row 1"],
    ]
    with pytest.raises(DataError) as caught:
        next(steps)
    assert type(caught.value) is DataError
    said = str(caught.value)
    assert said.startswith(f"{config.path} row 2: the image is damaged (")
    assert "Traceback" not in said and "worker" not in said and "\n" not in said


def test_other_errors_are_not_hidden(dataset, monkeypatch):
    monkeypatch.setattr(type(dataset), "batch", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(stream(dataset)(0, 1))
