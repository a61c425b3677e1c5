"""The tables of a run's page. Each is nothing where the run folder has nothing for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from gemtune.html_page import LEARNED_KEY
from gemtune.report.markup import Html, element, escaped, joined, list_of, table
from gemtune.report.metrics import is_number
from gemtune.report.panels import PHASES
from gemtune.report.run_record import RunRecord, flat, mapping
from gemtune.report.scale import figure

GIB = 2**30
# Nothing but a picture that stands here itself.
_PICTURE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+")


def memory(record: RunRecord) -> Iterator[Html]:
    """Peaks by phase, measured and planned, and what the plan is made of."""
    planned = mapping(record.plan.get("phases"))
    rows = list(_phases(record, planned))
    if not rows:
        return
    yield element("h2", "Memory by phase")
    head = ["phase", "highest peak, GiB", "at step"]
    head += ["planned, GiB"] if planned else []
    head += ["against plan"] if planned and not record.measures_process else []
    parts = [table(head, rows)]
    if source := record.start.get("memory_source"):
        beside = " It counts the whole process, the plan tensors only." * record.measures_process
        words = f"Measured from: {source}.{beside if planned else ''}"
        parts.append(element("p", words, class_="quiet"))
    if kinds := _kinds(planned):
        parts += [element("h3", "The plan, by what holds it"), kinds]
    if batch := record.plan.get("batch"):
        device = record.plan.get("device_memory_gib")
        of = f"; the device has {figure(device)} GiB" if is_number(device) and device else ""
        parts.append(element("p", f"Planned for: {batch}{of}", class_="quiet"))
    yield element("section", joined(parts))


def _phases(record: RunRecord, planned: dict[str, Any]) -> Iterator[list[str]]:
    """Phase, highest peak and its step; with a plan also that, and how far the peak is off it."""
    for phase in PHASES:
        curve = record.metrics.curves.get(f"memory/{phase}_peak_gib")
        plan = mapping(planned.get(phase)).get("peak_bytes")
        plan = plan / GIB if is_number(plan) else None
        points = curve.points() if curve else []
        highest, step = max(((v, s) for s, v in points), default=(None, None))
        if highest is None and plan is None:
            continue
        cells = [phase, _gib(highest), "" if step is None else f"{step:,}"]
        cells += [_gib(plan)] if planned else []
        if planned and not record.measures_process:
            cells.append(f"{highest / plan - 1:+.1%}" if plan and highest is not None else "")
        yield cells


def _kinds(planned: dict[str, Any]) -> Html:
    held = {phase: mapping(mapping(planned.get(phase)).get("by_kind")) for phase in PHASES}
    held = {phase: by_kind for phase, by_kind in held.items() if by_kind}
    kinds = dict.fromkeys(kind for by_kind in held.values() for kind in by_kind)
    rows = [
        [kind, *(_gib(b[kind] / GIB) if is_number(b.get(kind)) else "" for b in held.values())]
        for kind in kinds
    ]
    return table(["GiB", *held], rows) if rows else Html()


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def patches(record: RunRecord) -> Iterator[Html]:
    """Which patches the model got, and why not the others."""
    if not record.patches:
        return
    yield element("h2", "Patches")
    rows = [
        [
            element("code", _breakable(each.get("name", ""))),
            element("span", each.get("status", ""), class_="good")
            if each.get("status") == "applied"
            else str(each.get("status", "")),
            str(each.get("reason", "")),
        ]
        for each in record.patches
    ]
    yield element("section", table(["patch", "status", "why"], rows, texts=(0, 1, 2)))


def _breakable(name: Any) -> Html:
    """A name that may go on in a new line behind each underscore."""
    return Html(escaped(name).replace("_", "_<wbr>"))


def data(record: RunRecord) -> Iterator[Html]:
    """What the run said of its data, some rows as the model got them, and rows left out."""
    summary = [each for each in _lists(record.start.get("summary")) if len(each) >= 2]
    preview = [mapping(each) for each in _list(record.start.get("preview"))]
    if summary:
        yield element("h2", "Model, data and training")
        yield element("section", table([], _grouped(summary), texts=(0, 1)))
    if preview:
        yield element("h2", "Data as the model gets it")
        yield Html(LEARNED_KEY)
        yield from map(_row, preview)
    if record.rejected:
        yield element("h2", "Rows left out")
        lines = [
            " ".join(str(value) for key, value in each.items() if key != "reason")
            + f": {each.get('reason', '')}"
            for each in record.rejected
        ]
        more = record.num_rejected - len(lines)
        lines += [f"... and {more:,} more, in rejected.jsonl"] if more else []
        yield element("section", list_of(lines, class_="bad"))


def _grouped(summary: list[list[Any]]) -> list[list[str]]:
    """Lines without a label join the one above."""
    groups: list[list[str]] = []
    for label, text, *_ in summary:
        line = element("div", text)
        if label or not groups:
            groups.append([str(label), line])
        else:
            groups[-1][1] = Html(groups[-1][1] + line)
    return groups


def _row(row: dict[str, Any]) -> Html:
    spans = joined(
        element("span", text, class_=kind) if kind else escaped(text)
        for text, kind, *_ in (each for each in _lists(row.get("spans")) if len(each) >= 2)
    )
    size = f"{_count(row, 'num_tokens')} tokens, {_count(row, 'num_learned')} learned"
    pictures = joined(_medium(mapping(each)) for each in _list(row.get("media")))
    parts = [
        element("h3", row.get("where", "")),
        element("p", size, class_="quiet"),
        element("div", pictures, class_="pictures") if pictures else Html(),
        element("div", spans, class_="tokens"),
    ]
    return element("section", joined(parts))


def _medium(medium: dict[str, Any]) -> Html:
    picture = str(medium.get("picture") or "")
    shown = Html(f'<img alt="" src="{picture}">') if _PICTURE.fullmatch(picture) else Html()
    return element("figure", Html(shown + element("figcaption", medium.get("line", ""))))


def evaluation(record: RunRecord) -> Iterator[Html]:
    """Every evaluation that is kept, the best marked; exact match by kind of row."""
    metrics = record.metrics
    if metrics.first_evaluation is None:
        return
    yield element("h2", "Evaluation")
    best, first = metrics.best_evaluation, metrics.first_evaluation
    kept = list(metrics.evaluations)
    shown = kept if len(kept) <= 12 else [each for each in kept[-10:] if each is not best]
    shown = [each for each in (first, best) if each and each not in shown] + shown
    shown.sort(key=lambda each: each["step"])
    keys = ["eval/loss", "eval/perplexity", "eval/token_accuracy", "eval/exact_match"]
    keys = [key for key in keys if any(key in each for each in shown)]
    others = dict.fromkeys(key for each in shown for key in each if key.startswith("eval/"))
    by_kind = "eval/exact_match_"
    keys += [key for key in others if key not in keys and not key.startswith(by_kind)]
    rows = [
        [
            f"{each['step']:,}",
            *(
                element("span", _score(key, each.get(key)), class_="best")
                if each is best and key == "eval/loss" and len(shown) > 1
                else _score(key, each.get(key))
                for key in keys
            ),
        ]
        for each in shown
    ]
    parts = [table(["step", *(key.removeprefix("eval/").replace("_", " ") for key in keys)], rows)]
    if len(shown) < len(kept):
        parts.append(element("p", "The first, the best and the last ones.", class_="quiet"))
    if chosen := _best_checkpoint(record):
        parts.append(element("p", chosen, class_="quiet"))
    yield element("section", joined(parts))
    kinds = {k: v for k, v in metrics.latest.items() if k.startswith(by_kind) and is_number(v)}
    if kinds:
        rows = [
            [key.removeprefix(by_kind), _bar(value), f"{value:.1%}"] for key, value in kinds.items()
        ]
        yield element("section", table(["exact match of", "", ""], rows, texts=(0, 1)))


def _best_checkpoint(record: RunRecord) -> str:
    """What the newest checkpoint says of the best one."""
    state = mapping(record.checkpoint.get("state"))
    metric, step, value = (state.get(f"best_{name}") for name in ("metric", "step", "value"))
    if type(step) is not int or not is_number(value):
        return ""
    return f"Best of the evaluations between steps, by {metric}: {figure(value)} at step {step:,}."


def _score(key: str, value: Any) -> str:
    if not is_number(value):
        return "" if value is None else plain(value)
    is_share = key in ("eval/token_accuracy", "eval/exact_match")
    return f"{value:.1%}" if is_share else figure(value)


def _bar(share: float) -> Html:
    inner = element("span", style=f"width:{100 * min(1.0, max(0.0, share)):.1f}%")
    return element("span", inner, class_="bar")


def samples(record: RunRecord) -> Iterator[Html]:
    """Generated answers: one of each kind, then wrong ones before right ones."""
    answers = record.answers
    if not answers.num:
        return
    yield element("h2", "Samples")
    share = f"{answers.num_correct:,} of {answers.num:,} generated answers are exactly right"
    shown = len(answers.shown)
    of = "" if shown == answers.num else f"; {shown} are shown, wrong ones before right ones"
    rows = [
        [
            element("span", str(each.get("question", "")), class_="answer"),
            element("span", str(each.get("expected", "")), class_="answer"),
            element("span", str(each.get("generated", "")), class_="answer"),
            element("span", "right", class_="verdict good")
            if each.get("correct")
            else element("span", "wrong", class_="verdict bad"),
        ]
        for each in answers.shown
    ]
    head = ["question", "expected", "generated", ""]
    yield element(
        "section",
        joined([element("p", f"{share}{of}."), table(head, rows, texts=(0, 1, 2, 3))]),
    )


def configuration(record: RunRecord) -> Iterator[Html]:
    """Every key of config.yaml with its value."""
    if not record.config:
        return
    yield element("h2", "Configuration")
    groups = []
    for name, values in record.config.items():
        keys = list(flat(values)) if values and isinstance(values, dict) else [("", values)]
        lines = joined(
            element("dd", joined([element("span", key), element("b", plain(value))]))
            for key, value in keys
        )
        groups.append(element("dl", Html(element("dt", name) + lines)))
    yield element("section", element("div", joined(groups), class_="keys"))


def environment(record: RunRecord) -> Iterator[Html]:
    """Software and machine of the newest start, and all starts."""
    start, git = record.start, record.git
    rows = [[name, str(version)] for name, version in record.versions.items() if version]
    if commit := git.get("commit"):
        changed = " (with uncommitted changes)" if git.get("changed") else ""
        rows.insert(0, ["git", f"{commit}{changed}"])
    machine = {"gemtune": "gemtune", "device": "device", "system": "system"}
    rows = [[name, str(start[key])] for key, name in machine.items() if start.get(key)] + rows
    starts = [
        f"{moment(each.get('time', ''))}, after step {_count(each, 'after_step')}, on "
        f"{each.get('num_processes', 1)} process(es)"
        for each in map(mapping, _list(start.get("starts")))
    ]
    rows += [["starts", joined(element("div", text) for text in starts)]] if starts else []
    if rows:
        yield element("h2", "Environment")
        yield element("section", table([], rows, texts=(0, 1)))


def last_record(record: RunRecord) -> Iterator[Html]:
    """Every figure of the newest record, as it was written."""
    if not record.metrics.newest:
        return
    rows = [[key, plain(value)] for key, value in record.metrics.newest.items()]
    words = f"Every figure of the last record (step {record.metrics.last_step:,})"
    yield element("h2", "Last record")
    yield element("section", element("details", Html(element("summary", words) + table([], rows))))


def moment(text: Any) -> str:
    """A time of ISO 8601 in UTC, as a person reads it."""
    return str(text).replace("T", " ").replace("+00:00", " UTC")


def plain(value: Any) -> str:
    """A value of JSON or YAML, words without quotes."""
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def _count(values: dict[str, Any], key: str) -> str:
    number = values.get(key)
    return f"{number:,}" if is_number(number) else "?"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _lists(value: Any) -> list[list[Any]]:
    return [each for each in _list(value) if isinstance(each, list)]
