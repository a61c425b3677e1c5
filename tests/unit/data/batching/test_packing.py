"""Packed rows hold every document once and whole, are nearly full, and come in a pure order."""

import numpy as np
import pytest

from gemtune.data.batching.packing import PackedOrder, best_fit
from gemtune.errors import ConfigError


def long_tailed(num_documents, longest=2048, seed=0):
    """Lengths as those of chat data: a median near 250 tokens and a long tail."""
    values = np.random.default_rng(seed).lognormal(5.5, 1.0, num_documents)
    return np.clip(values.astype(int), 1, longest)


def order(lengths, capacity=2048, seed=3, batch=4, **options):
    return PackedOrder(np.array(lengths), capacity, seed, batch, **options)


def one_at_a_time(lengths, capacity):
    """Best-fit decreasing as the textbook has it."""
    spaces, rows = [], []
    for length in lengths:
        fitting = [row for row, space in enumerate(spaces) if space >= length]
        row = min(fitting, key=lambda row: spaces[row], default=len(spaces))
        if row == len(spaces):
            spaces.append(capacity)
        spaces[row] -= length
        rows.append(row)
    return rows, spaces


@pytest.mark.parametrize("capacity", [7, 50, 64, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_best_fit_decreasing(capacity, seed):
    generator = np.random.default_rng(seed)
    lengths = -np.sort(-generator.integers(1, generator.integers(2, capacity + 1), 300))
    rows = best_fit(lengths, capacity)
    used = np.bincount(rows, weights=lengths)
    assert used.max() <= capacity
    _, spaces = one_at_a_time(lengths.tolist(), capacity)
    # Rows of equal space are alike, so that only what the rows hold can be compared.
    assert sorted(capacity - used) == sorted(spaces)


def test_lengths_at_the_edges():
    assert best_fit(np.array([], int), 5).tolist() == []
    assert best_fit(np.array([5, 5, 1]), 5).tolist() == [0, 1, 2]
    assert best_fit(np.array([1] * 7), 3).tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert best_fit(np.array([4, 3, 2, 1]), 5).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("epoch", [0, 1, 4])
def test_an_epoch_has_every_document_once_and_no_row_is_too_long(epoch, shuffle):
    lengths = long_tailed(1000)
    packed = order(lengths, shuffle=shuffle)
    rows = [packed.documents_at(epoch * packed.num_rows + i) for i in range(packed.num_rows)]
    assert sorted(document for row in rows for document in row) == list(range(1000))
    assert max(lengths[list(row)].sum() for row in rows) <= 2048
    assert min(len(row) for row in rows) >= 1


def test_a_long_tailed_set_fills_more_than_97_percent():
    packed = order(long_tailed(20_000))
    rows = [packed.documents_at(i) for i in range(packed.num_rows)]
    filled = sum(packed.lengths[list(row)].sum() for row in rows) / (len(rows) * 2048)
    assert packed.fill == pytest.approx(filled)
    assert filled > 0.99


def test_epochs_and_seeds_put_other_documents_together():
    lengths = -(-long_tailed(300) // 64) * 64  # several of each length

    def rows_of(seed, epoch):
        packed = order(lengths, seed=seed)
        first = epoch * packed.num_rows
        return {frozenset(packed.documents_at(first + i)) for i in range(packed.num_rows)}

    for seed, epoch in ((0, 1), (1, 0), (1, 1)):
        shared = rows_of(0, 0) & rows_of(seed, epoch)
        assert len(shared) < 0.2 * len(rows_of(0, 0))


def test_rows_are_shuffled_where_every_length_is_another():
    lengths = 100 + np.arange(300)
    packed = order(lengths)
    epochs = [[packed.documents_at(e * packed.num_rows + i) for i in range(50)] for e in (0, 1)]
    assert epochs[0] != epochs[1]
    longest = [max(row) for row in epochs[0]]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_the_order_depends_on_nothing_that_was_asked_before():
    lengths = long_tailed(300)
    used, fresh = order(lengths), order(lengths)
    for position in (900, 3, 400, 0):
        used.documents_at(position)
    steps = range(0, 60, 7)
    assert [used.step_rows(s) for s in reversed(steps)][::-1] == [fresh.step_rows(s) for s in steps]


def test_a_step_takes_consecutive_rows_also_across_epochs():
    packed = order([3, 3, 3], capacity=4, batch=2)
    assert packed.num_rows == 3
    stream = [packed.documents_at(i) for i in range(12)]
    assert [row for step in range(6) for row in packed.step_rows(step)] == stream
    assert sorted(stream[:3]) == sorted(stream[3:6]) == [(0,), (1,), (2,)]


def test_without_shuffling_rows_begin_in_the_order_of_the_file():
    packed = order(long_tailed(200), shuffle=False)
    rows = [packed.documents_at(i) for i in range(2 * packed.num_rows)]
    assert rows[: packed.num_rows] == rows[packed.num_rows :]
    firsts = [row[0] for row in rows[: packed.num_rows]]
    assert firsts == sorted(firsts)
    assert all(list(row) == sorted(row) for row in rows)


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ConfigError, match=r"data\.max_length=10 is shorter than a row of 11"):
        order([3, 11], capacity=10)
