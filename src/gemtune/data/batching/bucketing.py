"""Rows of like length together, so that less of a padded batch is padding."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gemtune.data.batching.order import generator_of, samples_at


@dataclass
class PaddedOrder:
    """Rows of every optimizer step: a pure function of lengths, seed, epoch and step.

    Within a step the longest row comes first. That changes which rows share a micro-batch and not
    which rows make a step: the gradient is the same sum. With `bucket_rows` above
    `global_batch_size` the shuffled epoch is cut into buckets of so many rows, each is sorted by
    length and cut into steps, and the steps of a bucket are shuffled. A row moves by less than a
    bucket and stays in its epoch; a step that reaches from one epoch into the next takes the rows
    that are due.

    Args:
        num_rows: of an epoch.
        lengths: [num_rows] tokens of each row; None where they are not known: nothing is sorted.
        bucket_rows: rows that are sorted together, rounded down to whole steps; None: those of a
            step; 0: none.
        shuffle: False keeps the order of the file from step to step; `bucket_rows` may then not be
            above a step.
    """

    num_rows: int
    lengths: np.ndarray | None
    seed: int
    global_batch_size: int
    bucket_rows: int | None = None
    shuffle: bool = True
    _buckets: dict[tuple[int, int], list[np.ndarray]] = field(
        init=False, repr=False, default_factory=dict
    )

    def step_rows(self, step: int) -> list[int]:
        """[global_batch_size] rows of an optimizer step (from 0), over all ranks."""
        first, size = step * self.global_batch_size, self.global_batch_size
        epoch = first // self.num_rows
        steps_per_bucket = (self.bucket_rows or 0) // size
        if steps_per_bucket < 2 or (first + size - 1) // self.num_rows != epoch:
            return self._sorted(first, size).tolist()
        before = -(-epoch * self.num_rows // size)  # steps that begin before this epoch does
        number, place = divmod(step - before, steps_per_bucket)
        return self._bucket(epoch, before, number, steps_per_bucket)[place].tolist()

    def _sorted(self, first: int, count: int) -> np.ndarray:
        rows = samples_at(first, count, self.num_rows, self.seed, shuffle=self.shuffle)
        if self.lengths is None or self.bucket_rows == 0:
            return rows
        # The longest first: memory that does not suffice is found out at once.
        return rows[np.argsort(-self.lengths[rows], kind="stable")]

    def _bucket(self, epoch: int, before: int, number: int, num_steps: int) -> list[np.ndarray]:
        if (epoch, number) not in self._buckets:
            size = self.global_batch_size
            whole = (epoch + 1) * self.num_rows // size - before
            begin = number * num_steps
            num_steps = min(num_steps, whole - begin)
            rows = self._sorted((before + begin) * size, num_steps * size)
            order = generator_of(self.seed, epoch, 2, number).permutation(num_steps)
            self._buckets.clear()
            self._buckets[epoch, number] = [rows[i * size : (i + 1) * size] for i in order]
        return self._buckets[epoch, number]
