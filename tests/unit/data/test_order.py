"""The order of samples depends on seed, epoch and position, and on nothing else."""

import itertools
import subprocess
import sys

import pytest

from gemtune.data.order import micro_batches, sample_at


def step_rows(step, *, world_size=1, micro_batch_size=2, **changes):
    """{rank: its micro-batches} at one step."""
    settings = {"num_samples": 10, "seed": 3, "global_batch_size": 6} | changes
    return {
        rank: micro_batches(
            step,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            **settings,
        )
        for rank in range(world_size)
    }


def flat(micro):
    return list(itertools.chain.from_iterable(micro))


@pytest.mark.parametrize("num_samples", [1, 2, 7, 100])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_each_epoch_is_a_permutation(num_samples, epoch):
    start = epoch * num_samples
    seen = [sample_at(start + i, num_samples, seed=0) for i in range(num_samples)]
    assert sorted(seen) == list(range(num_samples))


def test_epochs_and_seeds_differ():
    def epoch(number, seed):
        return tuple(sample_at(number * 50 + i, 50, seed) for i in range(50))

    orders = {epoch(number, seed) for number in range(4) for seed in range(4)}
    assert len(orders) == 16


def test_the_order_is_that_of_another_process_and_of_any_history():
    code = "from gemtune.data.order import sample_at; print([sample_at(p, 9, 5) for p in (30, 2)])"
    for position in range(100):
        sample_at(position, 9, seed=6)
    here = [sample_at(2, 9, seed=5), sample_at(30, 9, seed=5)]
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here[::-1])


def test_without_shuffling_the_order_is_that_of_the_file():
    assert [sample_at(i, 4, seed=9, shuffle=False) for i in range(9)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 100])
@pytest.mark.parametrize("step", [0, 1, 2, 7])
def test_the_ranks_share_the_same_global_batch(world_size, micro_batch_size, step):
    shares = step_rows(step, world_size=world_size, micro_batch_size=micro_batch_size)
    together = sorted(row for share in shares.values() for row in flat(share))
    due = sorted(sample_at(step * 6 + i, 10, seed=3) for i in range(6))
    assert together == due
    for share in shares.values():
        assert len(flat(share)) == 6 // world_size or 6 % world_size
        assert all(len(micro) == micro_batch_size for micro in share[:-1])
        assert 1 <= len(share[-1]) <= micro_batch_size


def test_every_rank_has_as_many_micro_batches_where_the_batch_divides():
    shares = step_rows(4, world_size=3, micro_batch_size=1)
    assert {len(share) for share in shares.values()} == {2}


def test_a_batch_across_the_end_of_an_epoch_takes_from_both():
    first_epoch = [sample_at(i, 10, seed=3) for i in range(10)]
    second_epoch = [sample_at(10 + i, 10, seed=3) for i in range(10)]
    assert flat(step_rows(1)[0]) == first_epoch[6:] + second_epoch[:2]


def test_a_batch_larger_than_the_data_goes_round():
    rows = flat(step_rows(0, num_samples=4, global_batch_size=10)[0])
    assert sorted(rows[:4]) == sorted(rows[4:8]) == [0, 1, 2, 3]
    assert len(rows) == 10
