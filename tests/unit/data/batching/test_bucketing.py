"""Rows of like length share a micro-batch; every row still comes once in an epoch."""

import numpy as np
import pytest

from gemtune.data.batching.bucketing import PaddedOrder
from gemtune.data.batching.order import samples_at, share_of_rank

NUM_ROWS, SEED, BATCH = 203, 3, 8
LENGTHS = np.random.default_rng(0).lognormal(5, 1, NUM_ROWS).astype(int) + 1


def order(bucket_rows=None, lengths=LENGTHS, **options):
    return PaddedOrder(NUM_ROWS, lengths, SEED, BATCH, bucket_rows, **options)


def due(step):
    return samples_at(step * BATCH, BATCH, NUM_ROWS, SEED).tolist()


@pytest.mark.parametrize("step", [0, 1, 25, 26, 70])
def test_a_step_has_the_rows_that_are_due_the_longest_first(step):
    rows = order().step_rows(step)
    assert sorted(rows) == sorted(due(step))
    assert [LENGTHS[row] for row in rows] == sorted(LENGTHS[rows], reverse=True)


def test_rows_stay_as_they_come_where_that_is_asked_for_or_lengths_are_not_known():
    assert order(0).step_rows(5) == order(lengths=None).step_rows(5) == due(5)


def test_without_shuffling_the_steps_are_those_of_the_file():
    assert sorted(order(shuffle=False).step_rows(2)) == list(range(16, 24))


@pytest.mark.parametrize("bucket_rows", [16, 20, 50, 64, 203, 100_000])
@pytest.mark.parametrize("epochs", [1, 3])
def test_with_buckets_every_row_comes_once_in_an_epoch(bucket_rows, epochs):
    """Also where epochs are no multiple of a step, nor of a bucket."""
    buckets = order(bucket_rows)
    num_steps = -(-epochs * NUM_ROWS // BATCH)
    stream = [row for step in range(num_steps) for row in buckets.step_rows(step)]
    assert len(stream) == num_steps * BATCH
    counts = np.bincount(stream[: epochs * NUM_ROWS], minlength=NUM_ROWS)
    beyond = len(stream) - epochs * NUM_ROWS  # a step that reaches into the next epoch is sorted
    assert np.abs(counts - epochs).sum() <= 2 * beyond
    whole = order(0)
    for step in range(num_steps):
        if (step * BATCH) // NUM_ROWS != (step * BATCH + BATCH - 1) // NUM_ROWS:
            assert sorted(buckets.step_rows(step)) == sorted(whole.step_rows(step))
    for epoch in range(epochs):
        inside = range(-(-epoch * NUM_ROWS // BATCH), (epoch + 1) * NUM_ROWS // BATCH)
        assert sorted(r for s in inside for r in buckets.step_rows(s)) == sorted(
            r for s in inside for r in whole.step_rows(s)
        )


def test_a_row_moves_by_less_than_a_bucket():
    place = {row: i for i, row in enumerate(samples_at(0, NUM_ROWS, NUM_ROWS, SEED).tolist())}
    buckets = order(40)
    moved = [
        abs(place[row] - (step * BATCH + i))
        for step in range(NUM_ROWS // BATCH)
        for i, row in enumerate(buckets.step_rows(step))
    ]
    assert 10 < max(moved) < 40


def test_the_steps_of_a_bucket_are_shuffled():
    buckets = order(100_000)
    longest = [LENGTHS[buckets.step_rows(step)[0]] for step in range(NUM_ROWS // BATCH)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    assert (
        sorted(longest, reverse=True)[1:]
        == sorted(
            (LENGTHS[buckets.step_rows(step)].max() for step in range(NUM_ROWS // BATCH)),
            reverse=True,
        )[1:]
    )


def test_the_order_depends_on_nothing_that_was_asked_before():
    used, fresh = order(64), order(64)
    for step in (90, 1, 30, 7):
        used.step_rows(step)
    assert [used.step_rows(s) for s in range(60, 0, -9)] == [
        fresh.step_rows(s) for s in sorted(range(60, 0, -9))
    ][::-1]


def padding(bucket_rows, world_size):
    """Share of the places of padded micro-batches that are padding, over all ranks."""
    lengths = np.random.default_rng(0).lognormal(5.5, 1, 4000).astype(int) + 1
    order = PaddedOrder(4000, lengths, SEED, 32, bucket_rows)
    micro = [
        lengths[rows]
        for step in range(4000 // 32)
        for rank in range(world_size)
        for rows in share_of_rank(
            order.step_rows(step), micro_batch_size=4, rank=rank, world_size=world_size
        )
    ]
    return 1 - sum(x.sum() for x in micro) / sum(x.max() * len(x) for x in micro)


@pytest.mark.parametrize("world_size", [1, 2])
def test_padding_goes_down(world_size):
    as_they_come, by_step, by_bucket = (padding(n, world_size) for n in (0, None, 1024))
    assert as_they_come > 0.5 and by_step < 0.7 * as_they_come and by_bucket < 0.05


def test_the_ranks_have_micro_batches_of_like_length():
    rows = order().step_rows(0)
    shares = [share_of_rank(rows, micro_batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for numbered in zip(*shares, strict=True):
        together = [row for micro in numbered for row in micro]
        at = sorted(rows.index(row) for row in together)
        assert at == list(range(at[0], at[0] + 4))
