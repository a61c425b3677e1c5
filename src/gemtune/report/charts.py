"""Line charts as inline SVG: they fit any width, and their words stay as large as the page's."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gemtune.report.markup import Html, element, escaped, joined
from gemtune.report.scale import Axis, figure, step_axis, value_axis
from gemtune.report.thinning import Curve, Points

NUM_COLOURS = 8
_SIZE = 1000
_FEW_POINTS = 25  # up to here each gets a dot; one alone is nothing but a dot
_MORE_POINTS = 60


@dataclass
class Line:
    """A curve with its name and its colour, from 0."""

    label: str
    curve: Curve
    colour: int
    dashed: bool = False
    dots: bool = False
    """Mark every value where they are not very many, as suits evaluations."""


def colour_class(number: int) -> str:
    """The CSS class of a colour; behind the last one they begin again."""
    return f"c{number % NUM_COLOURS + 1}"


def chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    steps: tuple[int, int],
    *,
    is_percent: bool = False,
    may_be_log: bool = False,
    level: tuple[str, float] | None = None,
    marks: Sequence[int] = (),
) -> Html:
    """A figure with legend, axes and curves; complete without any script.

    Where a curve had to be thinned, its extremes are pale and the mean of each stretch is on top.

    Args:
        lines: each with at least one value.
        steps: first and last step of the axis.
        is_percent: values are fractions.
        may_be_log: where values are positive and span much.
        level: name and value of a horizontal line.
        marks: steps with a thin vertical line: starts after the first.
    """
    values = [value for line in lines for _, value in line.curve.points()]
    values += [level[1]] if level else []
    y_axis = value_axis(values, is_percent=is_percent, may_be_log=may_be_log)
    x_axis = step_axis(*steps)
    shown = [(line, line.curve.means()) for line in lines]
    upright = [_upright(x_axis.place(s)) for s in marks if x_axis.low < s < x_axis.high]
    drawing = joined(
        [
            *(_rule(y_axis.place(tick), "grid") for tick, _ in y_axis.ticks),
            *upright,
            *(
                _path(line.curve.points(), x_axis, y_axis, f"pale {colour_class(line.colour)}")
                for line in lines
                if line.curve.is_thinned
            ),
            *(_curve(line, points, x_axis, y_axis) for line, points in shown),
            *([_rule(y_axis.place(level[1]), "level")] if level else []),
        ]
    )
    scale = " (log scale)" if y_axis.is_log else ""
    caption = element("b", title) + " " + element("span", unit + scale)
    return element(
        "figure",
        joined(
            [
                element("figcaption", Html(caption)),
                _legend(lines, level, is_percent, has_marks=bool(upright)),
                _plot(title, drawing, shown, x_axis, y_axis, is_percent),
            ]
        ),
        class_="chart",
    )


def _plot(
    title: str,
    drawing: Html,
    shown: list[tuple[Line, Points]],
    x_axis: Axis,
    y_axis: Axis,
    is_percent: bool,
) -> Html:
    said = "; ".join(
        f"{line.label or title} {written(points[0][1], is_percent)} to "
        f"{written(points[-1][1], is_percent)}"
        for line, points in shown
    )
    svg = element(
        "svg",
        drawing,
        viewBox=f"0 0 {_SIZE} {_SIZE}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{title}: {said}",
    )
    data = {
        "first": x_axis.low,
        "last": x_axis.high,
        "percent": is_percent,
        "lines": [
            [line.label, colour_class(line.colour), *map(list, zip(*_rounded(points), strict=True))]
            for line, points in shown
        ],
    }
    return element(
        "div",
        joined(
            [
                element("div", _ticks(y_axis, "bottom"), class_="y"),
                element(
                    "div",
                    svg,
                    class_="area",
                    data_curves=json.dumps(data, separators=(",", ":")),
                ),
                element("div", _ticks(x_axis, "left"), class_="x"),
            ]
        ),
        class_="plot",
    )


def _ticks(axis: Axis, side: str) -> Html:
    return joined(
        element("span", text, style=f"{side}:{100 * axis.place(value):.2f}%")
        for value, text in axis.ticks
    )


def _legend(
    lines: Sequence[Line], level: tuple[str, float] | None, is_percent: bool, *, has_marks: bool
) -> Html:
    names = [
        element(
            "span",
            joined(
                [
                    element("i", class_=colour_class(line.colour) + " dashed" * line.dashed),
                    f"{line.label} ",
                    element("b", written(line.curve.last[1], is_percent)),
                ]
            ),
        )
        for line in lines
        if line.curve.last is not None
    ]
    if level:
        words = [element("i", class_="level"), f"{level[0]} ", element("b", figure(level[1]))]
        names.append(element("span", joined(words)))
    if has_marks:
        names.append(element("span", Html(element("i", class_="mark") + "went on here")))
    return element("div", joined(names), class_="legend")


def _curve(line: Line, points: Points, x_axis: Axis, y_axis: Axis) -> Html:
    names = f"curve {colour_class(line.colour)}{' dashed' * line.dashed}"
    drawn = _path(points, x_axis, y_axis, names)
    if len(points) <= (_MORE_POINTS if line.dots else _FEW_POINTS):
        # Lines of no length with round ends: dots, however the drawing is stretched.
        places = _places(points, x_axis, y_axis)
        dots = "".join(f"M{place}h0" for place in places)
        drawn = Html(drawn + element("path", d=dots, class_=f"dots {colour_class(line.colour)}"))
    return drawn


def _path(points: Points, x_axis: Axis, y_axis: Axis, names: str) -> Html:
    return element("path", d="M" + "L".join(_places(points, x_axis, y_axis)), class_=names)


def _places(points: Points, x_axis: Axis, y_axis: Axis) -> list[str]:
    return [
        f"{_SIZE * x_axis.place(step):.5g} {_SIZE * (1 - y_axis.place(value)):.5g}"
        for step, value in points
    ]


def _rule(place: float, name: str) -> Html:
    return element("path", d=f"M0 {_SIZE * (1 - place):.5g}H{_SIZE}", class_=name)


def _upright(place: float) -> Html:
    return element("path", d=f"M{_SIZE * place:.5g} 0V{_SIZE}", class_="mark")


def _rounded(points: Points) -> Points:
    return [(step, float(f"{value:.6g}")) for step, value in points]


def written(value: float, is_percent: bool) -> str:
    """A value for a legend."""
    if not math.isfinite(value):
        return escaped(value)
    return f"{100 * value:.1f}%" if is_percent else figure(value)
