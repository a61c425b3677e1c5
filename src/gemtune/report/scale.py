"""Axes: ranges, ticks, and how a number is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LOG_FROM = 20.0
"""Largest / smallest value from which on an axis is logarithmic."""

Format = Callable[[float], str]


@dataclass
class Axis:
    """A range of values, and the ticks on it with their words."""

    low: float
    high: float
    is_log: bool
    ticks: list[tuple[float, str]]

    def place(self, value: float) -> float:
        """Where it stands: 0 at `low`, 1 at `high`."""
        if self.is_log:
            value = math.log10(max(value, self.low))
            return (value - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def step_axis(first: int, last: int) -> Axis:
    """Optimizer steps: ticks are whole."""
    if first == last:
        return Axis(first - 1, first + 1, False, [(first, f"{first:,}")])
    step = max(1, round(nice_step((last - first) / 5)))
    ticks = list(range(-(-first // step) * step, last + 1, step))
    return Axis(first, last, False, [(tick, short_count(tick, step)) for tick in ticks])


def value_axis(values: Sequence[float], *, is_percent: bool = False, may_be_log: bool) -> Axis:
    """An axis that holds the values, with a margin; logarithmic where they span much.

    Args:
        is_percent: values are fractions; the axis stays within 0 and 1.
    """
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low >= LOG_FROM:
        return _log_axis(low, high)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    bottom, top = low - margin, high + margin
    if low >= 0:
        bottom = max(0.0, bottom)
    if is_percent:
        bottom, top = max(0.0, bottom), min(1.0, top)
        if bottom >= top:
            bottom, top = 0.0, 1.0
    step = nice_step((top - bottom) / 4)
    first, last = math.ceil(bottom / step - 1e-9), math.floor(top / step + 1e-9)
    ticks = [number * step for number in range(first, last + 1)]
    largest = max(map(abs, ticks), default=0)
    write = _percent_ticks(step) if is_percent else tick_format(step, largest)
    return Axis(bottom, top, False, [(tick, write(tick)) for tick in ticks])


def _log_axis(low: float, high: float) -> Axis:
    low, high = low / 1.15, high * 1.15
    decades = math.log10(high / low)
    digits = (1, 2, 5) if decades <= 2.2 else (1,)
    every = max(1, math.ceil(decades / 5))
    ticks = [
        digit * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digit in digits
        if low <= digit * 10.0**power <= high and power % every == 0
    ]
    return Axis(low, high, True, [(tick, figure(tick, 2)) for tick in ticks])


def nice_step(rough: float) -> float:
    """The next 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= rough * (1 - 1e-9))


def _decimals(step: float) -> int:
    """Digits that a multiple of the step needs behind the point."""
    for digits in range(12):
        if math.isclose(step, round(step, digits), rel_tol=1e-6):
            return digits
    return 12


def _percent_ticks(step: float) -> Format:
    digits = _decimals(step * 100)
    return lambda value: f"{100 * value:.{digits}f}%"


def tick_format(step: float, largest: float) -> Format:
    """How the ticks of an axis are written, all in one way."""
    if largest >= 10_000:
        return lambda value: short_count(value, step)
    if largest < 0.01:
        return lambda value: "0" if value == 0 else _scientific(value, 3)
    digits = _decimals(step)
    return lambda value: f"{value:,.{digits}f}"


def short_count(value: float, step: float) -> str:
    """`1,500`, `15k`, `1.5M`, with the digits that the distance of the ticks asks for."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit * (10 if name == "k" else 1):
            return f"{value / unit:.{_decimals(step / unit)}f}{name}"
    return f"{value:,.0f}"


def figure(value: float, digits: int = 4) -> str:
    """A number in so many significant digits, `1e-4` where it is very small."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return _scientific(value, digits)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if digits <= 3 and "." in text else text


def _scientific(value: float, digits: int) -> str:
    """`1e-3`, `2.5e-4`."""
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(power)}"
