"""One run as a page."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from gemtune.html_page import html_page
from gemtune.report.charts import Line, chart, written
from gemtune.report.look import SCRIPT, STYLE
from gemtune.report.markup import Html, element, joined, list_of
from gemtune.report.metrics import is_number
from gemtune.report.panels import MEMORY, PANELS, PLANNED_KEY, Panel
from gemtune.report.run_record import RunRecord, mapping
from gemtune.report.scale import figure
from gemtune.report.sections import (
    configuration,
    data,
    environment,
    evaluation,
    last_record,
    memory,
    moment,
    patches,
    samples,
)

GIB = 2**30


def report_page(record: RunRecord) -> str:
    """The page: figures, curves, memory, patches, data, evaluation, samples, configuration.

    What the folder does not hold is left out, and what that means for the reader is said on top.
    """
    said = list(notices(record))
    parts = [
        _header(record),
        list_of(said, class_="notices") if said else Html(),
        _figures(record),
        element("h2", "Curves, over optimizer steps"),
        curves(record),
        *memory(record),
        *patches(record),
        *data(record),
        *evaluation(record),
        *samples(record),
        *configuration(record),
        *environment(record),
        *last_record(record),
        footer(),
    ]
    return html_page(record.name, joined(parts, "\n"), style=STYLE, script=SCRIPT)


def footer() -> Html:
    """When the page was made."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return element("footer", f"written by gemtune at {moment(now)}")


def notices(record: RunRecord) -> Iterator[str]:
    """What is unfinished, missing or out of order in this run."""
    metrics, last = record.metrics, record.metrics.last_step
    status, reason = record.status.get("status"), record.status.get("reason")
    of = f" of {record.num_steps:,}" if record.num_steps else ""
    at = "before its first record" if last is None else f"after step {last:,}{of}"
    if status == "running":
        yield f"This run has not said how it ended: it is going on, or it was killed {at}."
    elif status is None:
        yield f"Nothing says how this run ended (no status.json). Its records end {at}."
    elif status != "finished":
        yield f"This run is {status}: it ended {at}{f': {reason}' if reason else ''}."
    elif record.num_steps and last is not None and last < record.num_steps:
        yield f"This run ended {at}: {reason}." if reason else f"The records end {at}."
    if not metrics.num_train_steps:
        yield "No training step is on record, so there is nothing to draw of the training."
    if metrics.num_broken_lines:
        yield (
            f"Lines of metrics.jsonl that could not be read: {metrics.num_broken_lines:,}. "
            "A crash cuts the last one short."
        )
    if metrics.first_evaluation is None:
        yield "No evaluation is on record: nothing here says how good the model is."
    nonfinite = metrics.latest.get("train/nonfinite_steps") or 0
    spikes = metrics.latest.get("train/spike_steps") or 0
    if is_number(nonfinite) and nonfinite:
        yield f"{nonfinite:,} steps were not finite and changed nothing."
    if is_number(spikes) and spikes:
        yield f"{spikes:,} steps were spikes of the loss and changed nothing."
    if record.num_rejected:
        yield f"{record.num_rejected:,} rows of the data were left out (below)."
    yield from record.notices


def _header(record: RunRecord) -> Html:
    status = str(record.status.get("status") or "unknown")
    words = [element("h1", record.name), element("span", status, class_=f"status {status}")]
    metrics = record.metrics
    parts = [f"{metrics.last_step or 0:,}"]
    parts[0] += f" of {record.num_steps:,} steps" if record.num_steps else " steps"
    if title := record.start.get("title"):
        parts.insert(0, str(title))
    if ended := record.status.get("time"):
        parts.append(f"{'began' if status == 'running' else 'ended'} {moment(ended)}")
    return Html(element("header", joined(words)) + element("p", " · ".join(parts), class_="quiet"))


def _figures(record: RunRecord) -> Html:
    cells = joined(
        element("div", joined([element("span", name), element("b", value), element("span", more)]))
        for name, value, more in key_figures(record)
    )
    return element("div", cells, class_="figures") if cells else Html()


def key_figures(record: RunRecord) -> Iterator[tuple[str, str, str]]:
    """(name, value, what to compare it with) of what a reader looks for first."""
    metrics = record.metrics
    latest = metrics.latest
    if first := metrics.first_evaluation:
        before = first["eval/loss"]
        last = latest.get("eval/loss")
        more = ""
        if is_number(before) and first["step"] != metrics.evaluations[-1]["step"]:
            more = f"{figure(before)} at step {first['step']:,}"
        yield "evaluation loss", figure(last) if is_number(last) else "not finite", more
    if is_number(match := latest.get("eval/exact_match")):
        more = f"of {record.answers.num:,} answers" if record.answers.num else ""
        yield "exact match", written(match, True), more
    if "train/loss" in latest:
        loss, curve = latest["train/loss"], metrics.curves.get("train/loss")
        first_step = curve.first if curve else None
        more = f"{figure(first_step[1])} at step {first_step[0]:,}" if first_step else ""
        yield "training loss", figure(loss) if is_number(loss) else "not finite", more
    if (speed := metrics.tokens_per_second) is not None:
        waited = metrics.waited_seconds / metrics.seconds
        yield "tokens per second", f"{speed:,.0f}", f"{waited:.1%} of the time waiting for data"
        yield "time in steps", duration(metrics.seconds), f"{metrics.tokens:,} tokens"
    if metrics.highest_peak:
        peak, step = metrics.highest_peak
        yield "peak memory, GiB", figure(peak), _against_plan(record) or f"at step {step:,}"


def _against_plan(record: RunRecord) -> str:
    planned, error = planned_peak(record), record.metrics.latest.get("memory/plan_error")
    if planned is None:
        return ""
    off = f" ({error:+.1%})" if is_number(error) else ""
    return f"{figure(planned)} planned{' for tensors' * record.measures_process}{off}"


def planned_peak(record: RunRecord) -> float | None:
    """GiB. None: nothing was planned."""
    value = record.metrics.latest.get(PLANNED_KEY)
    if is_number(value):
        return float(value)
    value = record.plan.get("peak_bytes")
    return value / GIB if is_number(value) else None


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s`, `8.4 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def curves(record: RunRecord) -> Html:
    """The charts of all panels that have values."""
    drawn = [figure for panel in PANELS if (figure := _panel(record, panel))]
    if not drawn:
        return element("p", "Nothing to draw yet.", class_="quiet")
    return element("div", joined(drawn, "\n"), class_="charts")


def _panel(record: RunRecord, panel: Panel) -> Html | None:
    found = record.metrics.curves
    lines = [
        Line(
            name,
            found[key],
            number,
            dashed=key in panel.dashed,
            dots=key.startswith("eval/"),
        )
        for number, (key, name) in enumerate(panel.lines.items())
        if found.get(key)
    ]
    # One evaluation is a figure, not a curve.
    alone = all(key.startswith("eval/") for key in panel.lines)
    if not lines or (alone and all(line.curve.first == line.curve.last for line in lines)):
        return None
    every = [step for c in found.values() if c for step, _ in (c.first, c.last)]  # type: ignore[misc]
    is_comparable = panel is MEMORY and not record.measures_process
    planned = planned_peak(record) if is_comparable else None
    starts = record.start.get("starts")
    after = [mapping(each).get("after_step") for each in starts] if isinstance(starts, list) else []
    return chart(
        panel.title,
        panel.unit,
        lines,
        (min(every), max(every)),
        is_percent=panel.is_percent,
        may_be_log=panel.may_be_log,
        level=None if planned is None else ("planned", planned),
        marks=[step for step in after if isinstance(step, int) and step],
    )
