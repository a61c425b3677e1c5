"""Several runs beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gemtune.html_page import html_page
from gemtune.report.charts import NUM_COLOURS, Line, chart, colour_class, written
from gemtune.report.look import SCRIPT, STYLE
from gemtune.report.markup import Html, element, joined, list_of, table
from gemtune.report.metrics import is_number
from gemtune.report.page import duration, footer, notices
from gemtune.report.panels import COMPARED
from gemtune.report.run_record import RunRecord, flat
from gemtune.report.sections import plain

# They are different for any two runs.
_NEVER_COMPARED = ("run.name", "run.dir")
_ABSENT = "–"


@dataclass(frozen=True)
class _Figure:
    """A row of the table."""

    name: str
    values: list[float | None]
    texts: list[str]
    best: str = ""
    """lowest, highest, or none."""


def comparison_page(records: Sequence[RunRecord]) -> str:
    """Curves on top of each other, final figures with the best marked, keys that differ."""
    names = run_names(records)
    parts = [
        element("header", element("h1", f"{len(records)} runs compared")),
        *_notices(records, names),
        element("h2", "Final figures"),
        element("section", _figures_table(records, names)),
        element("h2", "Curves, over optimizer steps"),
        _curves(records, names),
        element("h2", "Keys that differ"),
        element("section", _differences(records, names)),
        footer(),
    ]
    title = " · ".join(names)
    return html_page(title, joined(parts, "\n"), style=STYLE, script=SCRIPT)


def run_names(records: Sequence[RunRecord]) -> list[str]:
    """Folder names; with as much of their path as tells them apart."""
    paths = [record.folder.resolve() for record in records]
    names = [path.name for path in paths]
    depth = 1
    while len(set(names)) < len(set(paths)):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in paths]
    return names


def _notices(records: Sequence[RunRecord], names: list[str]) -> Iterator[Html]:
    said = [
        f"{name}: {text}"
        for name, record in zip(names, records, strict=True)
        for text in notices(record)
    ]
    if said:
        yield list_of(said, class_="notices")


def _label(name: str, number: int) -> Html:
    names = colour_class(number) + " dashed" * (number >= NUM_COLOURS)
    return Html(element("i", class_=names) + element("span", name))


def _figures_table(records: Sequence[RunRecord], names: list[str]) -> Html:
    rows = []
    for each in _figures(records):
        best = _best(each)
        cells = [
            element("span", f"{text} ★", class_="best") if text == best else text
            for text in each.texts
        ]
        rows.append([each.name, *cells])
    heads = [_label(name, number) for number, name in enumerate(names)]
    return table(["", *heads], rows)


def _best(row: _Figure) -> str | None:
    """The text of the best value, which others may share; None where nothing is better."""
    known = [(v, t) for v, t in zip(row.values, row.texts, strict=True) if v is not None]
    if not row.best or len({text for _, text in known}) < 2:
        return None
    return (min(known) if row.best == "lowest" else max(known))[1]


def _figures(records: Sequence[RunRecord]) -> Iterator[_Figure]:
    status = [str(record.status.get("status") or "unknown") for record in records]
    yield _Figure("status", [None] * len(records), status)
    steps = [f"{record.metrics.last_step or 0:,}" for record in records]
    yield _Figure("steps", [None] * len(records), steps)
    for name, key, best in (
        ("evaluation loss, last", "eval/loss", "lowest"),
        ("exact match", "eval/exact_match", "highest"),
        ("evaluation token accuracy", "eval/token_accuracy", "highest"),
        ("training loss, last", "train/loss", "lowest"),
    ):
        values = [_finite(record.metrics.latest.get(key)) for record in records]
        yield _figure(name, values, best, is_percent=best == "highest")
    lowest = [_finite((r.metrics.best_evaluation or {}).get("eval/loss")) for r in records]
    yield _figure("evaluation loss, lowest", lowest, "lowest")
    speeds = [record.metrics.tokens_per_second for record in records]
    yield _figure("tokens per second, mean", speeds, "highest")
    peaks = [record.metrics.highest_peak for record in records]
    yield _figure("peak memory, GiB", [p[0] if p else None for p in peaks], "lowest")
    seconds = [record.metrics.seconds or None for record in records]
    texts = [duration(value) if value else _ABSENT for value in seconds]
    yield _Figure("time in steps", seconds, texts)
    tokens = [record.metrics.tokens for record in records]
    yield _Figure("tokens", list(tokens), [f"{value:,}" for value in tokens])


def _figure(
    name: str, values: list[float | None], best: str, *, is_percent: bool = False
) -> _Figure:
    texts = [_ABSENT if value is None else written(value, is_percent) for value in values]
    return _Figure(name, values, texts, best)


def _finite(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _curves(records: Sequence[RunRecord], names: list[str]) -> Html:
    steps = [
        step
        for record in records
        for curve in record.metrics.curves.values()
        for step in (curve.first, curve.last)
        if step is not None
    ]
    drawn = []
    for panel in COMPARED:
        (key,) = panel.lines
        lines = [
            Line(
                names[number],
                record.metrics.curves[key],
                number,
                dashed=number >= NUM_COLOURS,
                dots=key.startswith("eval/"),
            )
            for number, record in enumerate(records)
            if record.metrics.curves.get(key)
        ]
        if lines:
            span = (min(step for step, _ in steps), max(step for step, _ in steps))
            options = {"is_percent": panel.is_percent, "may_be_log": panel.may_be_log}
            drawn.append(chart(panel.title, panel.unit, lines, span, **options))
    if not drawn:
        return element("p", "Nothing to draw yet.", class_="quiet")
    return element("div", joined(drawn, "\n"), class_="charts")


def _differences(records: Sequence[RunRecord], names: list[str]) -> Html:
    configs = [dict(flat(record.config)) for record in records]
    keys = [key for config in configs for key in config if key not in _NEVER_COMPARED]
    rows = []
    for key in sorted(dict.fromkeys(keys)):
        texts = [plain(config[key]) if key in config else _ABSENT for config in configs]
        if len(set(texts)) > 1:
            rows.append([element("code", key), *texts])
    if not rows:
        return element("p", "None: the configurations are the same but for the name.")
    heads = [_label(name, number) for number, name in enumerate(names)]
    return table(["key", *heads], rows, texts=range(len(names) + 1))
