"""The order of samples depends on seed, epoch and position, and on nothing else."""

import itertools
import subprocess
import sys

import pytest

from gemtune.data.batching.order import samples_at, share_of_rank


def samples(first, count, num_samples=10, seed=3, **options):
    return samples_at(first, count, num_samples, seed, **options).tolist()


def flat(micro):
    return list(itertools.chain.from_iterable(micro))


@pytest.mark.parametrize("num_samples", [1, 2, 7, 100])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_each_epoch_is_a_permutation(num_samples, epoch):
    seen = samples(epoch * num_samples, num_samples, num_samples)
    assert sorted(seen) == list(range(num_samples))


def test_epochs_and_seeds_differ():
    orders = {tuple(samples(epoch * 50, 50, 50, seed)) for epoch in range(4) for seed in range(4)}
    assert len(orders) == 16


def test_the_order_is_that_of_another_process_and_of_any_history():
    code = (
        "from gemtune.data.batching.order import samples_at;"
        "print([samples_at(p, 3, 9, 5).tolist() for p in (30, 2)])"
    )
    for position in range(100):
        samples(position, 1, 9, seed=6)
    here = [samples(2, 3, 9, seed=5), samples(30, 3, 9, seed=5)]
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here[::-1])


def test_the_order_of_existing_runs():
    """A run that goes on after an update of this package must find the rows that were due."""
    assert samples(0, 12) == [9, 6, 0, 2, 1, 4, 7, 5, 3, 8, 4, 1]


def test_without_shuffling_the_order_is_that_of_the_file():
    assert samples(0, 9, 4, shuffle=False) == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_a_span_across_epochs_takes_from_all_of_them():
    assert samples(6, 24) == samples(6, 4) + samples(10, 10) + samples(20, 10)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 100])
def test_the_ranks_share_the_rows(world_size, micro_batch_size):
    rows = [5, 3, 9, 1, 7, 0]
    shares = [
        share_of_rank(rows, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert sorted(row for share in shares for row in flat(share)) == sorted(rows)
    for rank, share in enumerate(shares):
        assert flat(share) == rows[rank::world_size]
        assert all(len(micro) == micro_batch_size for micro in share[:-1])
        assert 1 <= len(share[-1]) <= micro_batch_size
