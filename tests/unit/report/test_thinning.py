"""A curve of any length in few points, and no spike of it lost."""

from __future__ import annotations

import random
import statistics

import pytest

from gemtune.report.thinning import MAX_POINTS, Curve


def curve(values: dict[int, float]) -> Curve:
    made = Curve()
    for step, value in values.items():
        made.add(step, value)
    return made


def noise(num: int, every: int = 1) -> dict[int, float]:
    source = random.Random(num)
    return {step: source.gauss(0, 1) for step in range(1, num * every, every)}


@pytest.mark.parametrize("num", [1, 2, 25, MAX_POINTS])
def test_a_short_curve_is_kept_whole(num: int) -> None:
    values = noise(num)
    kept = curve(values)
    assert kept.points() == list(values.items()) == kept.means()
    assert not kept.is_thinned


@pytest.mark.parametrize(("num", "every"), [(601, 1), (4096, 1), (30_000, 1), (5000, 250)])
def test_a_long_curve_is_small_and_keeps_its_spikes(num: int, every: int) -> None:
    values = noise(num, every)
    high, low = sorted(values)[num // 3], sorted(values)[2 * num // 3]
    values[high], values[low] = 99.0, -99.0
    kept = curve(values)
    points = kept.points()
    assert num / 100 < len(points) <= MAX_POINTS + 2
    assert {(high, 99.0), (low, -99.0)} <= set(points)
    # Nothing is made up, and the order is that of the steps.
    assert all(values[step] == value for step, value in points)
    assert [step for step, _ in points] == sorted({step for step, _ in points})
    assert points[0] == next(iter(values.items())) and points[-1] == list(values.items())[-1]


def test_means_are_those_of_all_values() -> None:
    values = {step: float(step % 7) for step in range(1, 2**13)}
    means = [value for _, value in curve(values).means()]
    assert len(means) < MAX_POINTS
    # Stretches are long, so that each mean is that of the pattern.
    assert all(abs(value - 3) < 0.8 for value in means)
    assert statistics.mean(means) == pytest.approx(3, abs=0.05)


def test_nothing_is_an_empty_curve() -> None:
    assert not Curve() and Curve().points() == [] and Curve().means() == []
