"""A leak shows as growth of what is held between steps, batches being of one shape."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

WARM_UP_STEPS = 10
"""Not looked at: caches fill, kernels are loaded."""
_MIN_STEPS = 24
_KEPT_STEPS = 48
_STEPS_PER_LOOK = 8
_MAX_SHAPES = 256
# Of all pairs of steps the later one holds more. Noise without a trend gives 1/2.
_MIN_RISING = 0.9


class LeakWatch:
    """Follows what each rank holds after a step, apart for every shape of the batch.

    It speaks when the trend is plain: among the newest 24 to 48 steps of one shape nine of ten
    pairs rise, and the median slope (Theil-Sen) is at least `mib_per_step`. Once it has spoken of a
    rank, again only when twice as much has been lost.
    """

    def __init__(self, mib_per_step: float) -> None:
        self._limit = mib_per_step
        self._series: OrderedDict[Hashable, _Series] = OrderedDict()
        self._first_step: int | None = None
        # Of a rank: what it held when the growth was first seen, and what it had lost when said.
        self._lost: dict[int, tuple[float, float]] = {}

    def growth(
        self, step: int, shape: Hashable, held_mib: Sequence[float]
    ) -> tuple[int, float] | None:
        """The rank that grows the most and by how many MiB a step; None where none does.

        Args:
            held_mib: of each rank after this step; NaN: not known.
        """
        self._first_step = step if self._first_step is None else self._first_step
        if step - self._first_step < WARM_UP_STEPS:
            return None
        series = self._series.setdefault(shape, _Series())
        self._series.move_to_end(shape)
        if len(self._series) > _MAX_SHAPES:
            self._series.popitem(last=False)
        series.points.append((step, tuple(held_mib)))
        series.num_seen += 1
        if len(series.points) < _MIN_STEPS or series.num_seen % _STEPS_PER_LOOK:
            return None
        before = series.points[0][1]
        rises = [now - then for then, now in zip(before, held_mib, strict=True)]
        rank = max(range(len(rises)), key=lambda rank: rises[rank])
        slope = _trend([(at, held[rank]) for at, held in series.points])
        first, lost = self._lost.get(rank, (before[rank], 0.0))
        if slope < self._limit or held_mib[rank] - first < 2 * lost:
            return None
        self._lost[rank] = (first, held_mib[rank] - first)
        return rank, slope


@dataclass
class _Series:
    points: deque[tuple[int, tuple[float, ...]]] = field(
        default_factory=lambda: deque(maxlen=_KEPT_STEPS)
    )
    num_seen: int = 0


def _trend(points: Sequence[tuple[int, float]]) -> float:
    """The median slope where nearly all pairs rise, else 0."""
    pairs = combinations(points, 2)
    slopes = sorted((later - held) / (to - at) for (at, held), (to, later) in pairs)
    rising = sum(slope > 0 for slope in slopes) / len(slopes)
    return slopes[len(slopes) // 2] if rising >= _MIN_RISING else 0.0
