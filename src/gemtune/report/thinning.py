"""Curves of any length in a fixed number of points."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MAX_POINTS = 600

Points = list[tuple[int, float]]


@dataclass
class _Bucket:
    """Values of neighbouring steps."""

    first_step: int
    last_step: int
    count: int
    total: float
    lowest: tuple[float, int]
    highest: tuple[float, int]

    @property
    def num_points(self) -> int:
        return 1 if self.lowest[1] == self.highest[1] else 2

    def join(self, other: _Bucket) -> None:
        self.first_step = min(self.first_step, other.first_step)
        self.last_step = max(self.last_step, other.last_step)
        self.count += other.count
        self.total += other.total
        self.lowest = min(self.lowest, other.lowest)
        self.highest = max(self.highest, other.highest)


class Curve:
    """A curve that is read once, value by value, and kept in `MAX_POINTS` points.

    Steps fall into buckets of one width, a power of two, which doubles whenever the points are too
    many. Each bucket keeps its lowest and its highest value at their steps, so that a spike of one
    step is there in a run of a million; up to `MAX_POINTS` values all of them are kept.
    """

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self._width = 1
        self._num_points = 0
        self.first: tuple[int, float] | None = None
        self.last: tuple[int, float] | None = None

    def add(self, step: int, value: float) -> None:
        """Take a finite value. Steps come in order; of one that comes twice both values count."""
        self.first = self.first or (step, value)
        self.last = (step, value)
        number = step // self._width
        bucket = self._buckets.get(number)
        if bucket is None:
            here = (value, step)
            self._buckets[number] = _Bucket(step, step, 1, value, here, here)
            self._num_points += 1
        else:
            before = bucket.num_points
            bucket.last_step = step
            bucket.count += 1
            bucket.total += value
            if value < bucket.lowest[0]:
                bucket.lowest = (value, step)
            if value > bucket.highest[0]:
                bucket.highest = (value, step)
            self._num_points += bucket.num_points - before
        while self._num_points > MAX_POINTS:
            self._double()

    def _double(self) -> None:
        self._width *= 2
        joined: dict[int, _Bucket] = {}
        for number, bucket in self._buckets.items():
            if number // 2 in joined:
                joined[number // 2].join(bucket)
            else:
                joined[number // 2] = bucket
        self._buckets = joined
        self._num_points = sum(bucket.num_points for bucket in joined.values())

    @property
    def is_thinned(self) -> bool:
        """Whether values were left out."""
        return sum(bucket.count for bucket in self._buckets.values()) > self._num_points

    def points(self) -> Points:
        """The values that were kept, at their steps; the first and the last are among them."""
        return list(self._points())

    def _points(self) -> Iterator[tuple[int, float]]:
        if self.first is None or self.last is None:
            return
        found = {
            (step, value) for b in self._buckets.values() for value, step in (b.lowest, b.highest)
        }
        yield from sorted(found | {self.first, self.last})

    def means(self) -> Points:
        """Mean of each bucket, at its middle; the values themselves where none were left out."""
        if not self.is_thinned:
            return self.points()
        return [
            ((b.first_step + b.last_step) // 2, b.total / b.count)
            for _, b in sorted(self._buckets.items())
        ]

    def __bool__(self) -> bool:
        return self.last is not None
