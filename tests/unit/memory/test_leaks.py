"""Growth that is a leak is said, with its size and rank; noise, caches and long batches are not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from gemtune.memory.leaks import WARM_UP_STEPS, LeakWatch


def watch(
    held: Callable[[int], list[float]],
    steps: int = 200,
    shape: Callable[[int], object] = lambda step: "one",
    limit: float = 1.0,
) -> list[tuple[int, int, float]]:
    """(step, rank, MiB a step) of every time that it speaks."""
    leaks = LeakWatch(limit)
    said = []
    for step in range(1, steps + 1):
        if found := leaks.growth(step, shape(step), held(step)):
            said.append((step, *found))
    return said


def test_a_leak_is_measured_through_noise() -> None:
    noise = random.Random(0)
    said = watch(lambda step: [1000.0, 1000 + 5 * step + noise.uniform(-8, 8)])
    step, rank, slope = said[0]
    assert step <= 60 and rank == 1 and slope == pytest.approx(5, rel=0.1)
    # Then again when twice as much is lost, and not at every look.
    assert [later[0] / earlier[0] > 1.3 for earlier, later in pairwise(said)] == [True, True]


@pytest.mark.parametrize(
    "held",
    [
        lambda step: [1000.0],
        lambda step: [1000 + random.Random(step).uniform(-50, 50)],
        lambda step: [1000 + 100 * min(step, WARM_UP_STEPS)],  # caches fill
        lambda step: [1000 + 500 * (step > 100)],  # once more, and that was it
        lambda step: [1000 + 0.5 * step],  # below the limit
        lambda step: [math.nan],
        lambda step: [2000 - 3.0 * step],
    ],
    ids=["constant", "noise", "warm up", "one rise", "little", "unknown", "less"],
)
def test_what_is_no_leak(held: Callable[[int], list[float]]) -> None:
    assert watch(held) == []


def test_batches_that_get_longer_are_no_leak_and_shapes_are_apart() -> None:
    # What is held follows the length of the batch, and the lengths rise: each shape by itself is
    # constant.
    assert watch(lambda step: [1000 + step // 30 * 64.0], shape=lambda step: step // 30) == []
    # A leak is found although two shapes take turns.
    said = watch(lambda step: [1000 + 2 * step + 500 * (step % 2)], shape=lambda step: step % 2)
    assert said and said[0][2] == pytest.approx(2)


def test_many_shapes_take_little_memory() -> None:
    leaks = LeakWatch(1.0)
    for step in range(2000):
        leaks.growth(step, step, [0.0])
    assert len(leaks._series) == 256
