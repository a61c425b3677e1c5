"""Ticks are round numbers within the axis, and each value is where it belongs."""

from __future__ import annotations

import math

import pytest

from gemtune.report.scale import figure, step_axis, value_axis

RANGES = [
    (0.0, 1.0),
    (0.6597, 0.6601),
    (3.9e-6, 1e-3),
    (61.2, 62.9),
    (0.0, 0.0),
    (5.0, 5.0),
    (-3.0, 4.0),
    (49_000.0, 56_000.0),
    (1e9, 3.5e9),
]


@pytest.mark.parametrize("values", RANGES)
def test_a_linear_axis_holds_the_values_with_a_few_distinct_ticks(
    values: tuple[float, float],
) -> None:
    axis = value_axis(values, may_be_log=False)
    assert axis.low <= values[0] <= values[1] <= axis.high and axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 7
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)
    assert all(axis.low <= tick <= axis.high + 1e-9 for tick, _ in axis.ticks)
    places = [axis.place(tick) for tick, _ in axis.ticks]
    assert places == sorted(places) and places[0] >= 0 and places[-1] <= 1.001
    assert max(len(text) for _, text in axis.ticks) <= 8
    if values[0] >= 0:
        assert axis.low >= 0


@pytest.mark.parametrize("values", [(0.01, 0.5), (0.4, 45.0), (1.0, 1e6)])
def test_what_spans_much_is_logarithmic(values: tuple[float, float]) -> None:
    axis = value_axis(values, may_be_log=True)
    assert axis.is_log and 2 <= len(axis.ticks) <= 8
    middle = axis.place(math.sqrt(values[0] * values[1]))
    assert middle == pytest.approx((axis.place(values[0]) + axis.place(values[1])) / 2)
    assert not value_axis(values, may_be_log=False).is_log
    assert not value_axis((0.0, values[1]), may_be_log=True).is_log


def test_fractions_stay_between_0_and_100_percent() -> None:
    axis = value_axis((0.02, 1.0), is_percent=True, may_be_log=False)
    assert axis.low >= 0 and axis.high == 1
    assert axis.ticks[-1][1] == "100%"
    assert value_axis((0.0, 0.0), is_percent=True, may_be_log=False).high == 1


@pytest.mark.parametrize(("first", "last"), [(0, 1), (0, 30), (7, 8), (1, 1_000_000), (3, 3)])
def test_steps_are_whole(first: int, last: int) -> None:
    axis = step_axis(first, last)
    assert 1 <= len(axis.ticks) <= 7
    assert all(tick == int(tick) and first <= tick <= last for tick, _ in axis.ticks)
    assert 0 <= axis.place(first) <= axis.place(last) <= 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.7434, "1.743"),
        (0.1483, "0.1483"),
        (-2.5, "-2.500"),
        (12345.6, "12,346"),
        (3.9426e-6, "3.943e-6"),
        (1e-4, "1e-4"),
        (63.96, "63.96"),
    ],
)
def test_four_digits(value: float, text: str) -> None:
    assert figure(value) == text
