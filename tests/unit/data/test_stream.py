"""The stream of batches is the same however it is read."""

import random

import numpy as np
import pytest
import torch

from gemtune.data import BatchStream, DataConfig, prepare
from gemtune.data.order import sample_at
from gemtune.errors import DataError


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
        due = [dataset[sample_at(step * 4 + i, 10, seed=1)].where for i in range(4)]
        assert [batch.rows for batch in batches] == [due[:3], due[3:]]
    assert len({row for step in steps for batch in step for row in batch.rows}) == 10


def test_workers_change_nothing(dataset):
    assert_same(list(stream(dataset)(0, 5)), list(stream(dataset, num_workers=2)(0, 5)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_later_is_the_same_as_skipping(dataset, num_workers):
    whole = list(stream(dataset)(0, 6))
    assert_same(list(stream(dataset, num_workers=num_workers)(3, 6)), whole[3:])


def test_nothing_is_left_after_the_last_step(dataset):
    assert list(stream(dataset)(5, 5)) == list(stream(dataset)(6, 5)) == []


def test_the_ranks_together_see_the_global_batch(dataset):
    alone = next(stream(dataset)(2, 3))
    ranks = [next(stream(dataset, rank=r, world_size=2)(2, 3)) for r in (0, 1)]
    rows = [row for batches in ranks for batch in batches for row in batch.rows]
    assert sorted(rows) == sorted(row for batch in alone for row in batch.rows)


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
