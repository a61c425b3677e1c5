"""Which documents share a row: best fit, longest first, decided by their lengths alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gemtune.data.batching.order import generator_of, permutation
from gemtune.errors import ConfigError


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: the row of each document, for documents sorted from long to short.

    Every document goes into the row with the least space that still takes it, or opens a new one.
    Documents of a length are placed together, so that the time goes with the number of lengths:
    a million documents take tenths of a second.

    Args:
        lengths: [N] tokens of each document, descending, from 1 to `capacity`.
        capacity: tokens of a row.

    Returns:
        [N] int32, rows counted from 0.
    """
    rows = np.empty(len(lengths), dtype=np.int32)
    with_space: dict[int, list[np.ndarray]] = {}
    occupied = 0  # bit s: there is a row with s tokens of space

    def put(space: int, some: np.ndarray) -> None:
        nonlocal occupied
        if space and len(some):
            with_space.setdefault(space, []).append(some)
            occupied |= 1 << space

    num_rows, done = 0, 0
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = occupied >> length
            if fitting:
                # A row that still takes a second one is the best fit for it as well.
                space = length + (fitting & -fitting).bit_length() - 1
                chosen = with_space[space].pop()
                if not with_space[space]:
                    del with_space[space]
                    occupied ^= 1 << space
            else:
                space = capacity
                chosen = np.arange(num_rows, num_rows + -(-count // (capacity // length)))
                num_rows += len(chosen)
            each = space // length
            placed = min(count, each * len(chosen))
            full, rest = divmod(placed, each)
            rows[done : done + placed] = np.repeat(chosen, each)[:placed]
            put(space - each * length, chosen[:full])
            put(space - rest * length, chosen[full : full + 1] if rest else chosen[:0])
            put(space, chosen[full + (rest > 0) :])
            done += placed
            count -= placed
    return rows


@dataclass
class _Epoch:
    documents: np.ndarray
    """[N] documents, those of a row side by side."""
    starts: np.ndarray
    """[num_rows + 1] where each row begins in it."""


@dataclass
class PackedOrder:
    """Packed rows in an order that is a pure function of lengths, seed, epoch and position.

    Every document comes once in an epoch, and never in two pieces. Each epoch has as many rows as
    any other, of the same lengths: documents of one length change places, and the rows are
    shuffled. A document whose length no other has stays with its neighbours. With shuffle=False
    documents that fit come together too, and the rows come in the order of their first documents.

    Args:
        lengths: [N] tokens of each document.
        capacity: tokens of a row at most.

    Raises:
        ConfigError: a document that is longer than a row.
    """

    lengths: np.ndarray
    capacity: int
    seed: int
    global_batch_size: int
    shuffle: bool = True
    num_rows: int = field(init=False, default=0)
    """Of an epoch."""
    _row_of_slot: np.ndarray = field(init=False, repr=False)
    _epochs: dict[int, _Epoch] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.lengths = np.asarray(self.lengths, dtype=np.int64)
        longest = int(self.lengths.max(initial=0))
        if longest > self.capacity:
            raise ConfigError(
                f"data.max_length={self.capacity} is shorter than a row of {longest} tokens, which "
                "cannot be packed whole. Raise data.max_length."
            )
        self._row_of_slot = best_fit(np.sort(self.lengths)[::-1], self.capacity)
        self.num_rows = int(self._row_of_slot.max(initial=-1)) + 1

    @property
    def fill(self) -> float:
        """Share of the places that hold a token, if every row were padded to the capacity."""
        return float(self.lengths.sum()) / max(1, self.num_rows * self.capacity)

    def step_rows(self, step: int) -> list[tuple[int, ...]]:
        """The rows of an optimizer step (from 0), over all ranks, as their documents."""
        first = step * self.global_batch_size
        return [self.documents_at(first + i) for i in range(self.global_batch_size)]

    def documents_at(self, position: int) -> tuple[int, ...]:
        """The documents of the row at a position of the endless stream of epochs, in order."""
        epoch, row = divmod(position, self.num_rows)
        plan = self._plan(epoch)
        return tuple(plan.documents[plan.starts[row] : plan.starts[row + 1]].tolist())

    def sums(self, values: np.ndarray, epoch: int) -> np.ndarray:
        """[num_rows] of each row of an epoch, the sum of `values` [N] over its documents."""
        plan = self._plan(epoch)
        return np.add.reduceat(values[plan.documents], plan.starts[:-1])

    def _plan(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:  # a step may reach into the next one
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self._arrange(epoch)
        return self._epochs[epoch]

    def _arrange(self, epoch: int) -> _Epoch:
        num_documents = len(self.lengths)
        if self.shuffle:
            documents = permutation(num_documents, self.seed, epoch)
        else:
            documents = np.arange(num_documents)
        by_length = np.argsort(-self.lengths[documents], kind="stable")
        row_of_place = np.empty(num_documents, dtype=np.int64)
        row_of_place[by_length] = self._row_of_slot
        if self.shuffle:
            # A stream of numbers of its own: the same ones would tie rows to documents.
            new_number = generator_of(self.seed, epoch, 1).permutation(self.num_rows)
        else:
            first = np.full(self.num_rows, num_documents)
            np.minimum.at(first, row_of_place, np.arange(num_documents))
            new_number = np.empty(self.num_rows, dtype=np.int64)
            new_number[np.argsort(first)] = np.arange(self.num_rows)
        row_of_place = new_number[row_of_place]
        starts = np.concatenate([[0], np.cumsum(np.bincount(row_of_place))])
        return _Epoch(documents[np.argsort(row_of_place, kind="stable")], starts)
