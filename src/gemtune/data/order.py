"""Which sample comes when: a pure function of the seed, the epoch and the position."""

from __future__ import annotations

import functools

import numpy as np


@functools.lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(num_samples)


def sample_at(position: int, num_samples: int, seed: int, *, shuffle: bool = True) -> int:
    """The sample at a position of the endless stream of shuffled epochs.

    Nothing but the arguments decides, so that a resumed run and a run on another number of
    processes go on with the very sample that was due.
    """
    epoch, offset = divmod(position, num_samples)
    return int(_permutation(num_samples, seed, epoch)[offset]) if shuffle else offset


def micro_batches(
    step: int,
    *,
    num_samples: int,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    shuffle: bool = True,
) -> list[list[int]]:
    """The sample indices of one optimizer step (from 0) for one rank, as its micro-batches.

    The ranks' shares together are positions [step * global, (step + 1) * global) of the stream,
    whatever the number of ranks or the size of a micro-batch.
    """
    first = step * global_batch_size
    mine = [
        sample_at(position, num_samples, seed, shuffle=shuffle)
        for position in range(first + rank, first + global_batch_size, world_size)
    ]
    return [mine[i : i + micro_batch_size] for i in range(0, len(mine), micro_batch_size)]
