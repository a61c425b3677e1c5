"""Which sample comes when: a pure function of the seed, the epoch and the position."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Row = TypeVar("Row")


def generator_of(*words: int) -> np.random.Generator:
    """Random numbers that these words decide, and nothing else."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


@functools.lru_cache(maxsize=4)
def permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """[N] the samples of an epoch in order."""
    return generator_of(seed, epoch).permutation(num_samples)


def samples_at(
    first: int, count: int, num_samples: int, seed: int, *, shuffle: bool = True
) -> np.ndarray:
    """[count] the samples from a position on, of the endless stream of shuffled epochs.

    Nothing but the arguments decides, so that a resumed run and a run on another number of
    processes go on with the very sample that was due.
    """
    epochs, offsets = np.divmod(np.arange(first, first + count), num_samples)
    if not shuffle:
        return offsets
    samples = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        samples[here] = permutation(num_samples, seed, epoch)[offsets[here]]
    return samples


def share_of_rank(
    rows: Sequence[Row], *, micro_batch_size: int, rank: int, world_size: int
) -> list[list[Row]]:
    """The micro-batches of one rank, of the rows of a step.

    Every rank takes each `world_size`-th row, so that of rows in the order of their lengths the
    ranks' micro-batches of a number are alike.
    """
    mine = rows[rank::world_size]
    return [list(mine[i : i + micro_batch_size]) for i in range(0, len(mine), micro_batch_size)]
