"""Run folders written by hand, and pages read with an independent parser."""

from __future__ import annotations

import html.parser
import json
import shutil
from pathlib import Path
from typing import Any

PHASES = ("forward", "loss", "backward", "optimizer")
_VOID = {"meta", "img", "br", "input", "wbr"}


def trained(step: int, **others: Any) -> dict[str, Any]:
    """The record of a step, with every key that a run writes."""
    record: dict[str, Any] = {
        "step": step,
        "train/loss": 6.0 / step,
        "train/grad_norm": 1.25 + step / 1000,
        "train/learning_rate": 1e-3 / step,
        "train/supervised_tokens": 90,
        "train/tokens": 1000,
        "train/tokens_per_second": 2500.5 + step,
        "train/step_seconds": 0.25,
        "train/data_wait_fraction": 0.125,
        "train/nonfinite_steps": 0,
        "train/spike_steps": 0,
        "train/token_accuracy": 1 - 0.9 / step,
        "train/entropy": 3.5 / step,
        "memory/peak_gib": 1.5,
        "memory/peak_rank": 1,
        "memory/peak_gib_per_rank": [1.25, 1.5],
    }
    peaks = {f"memory/{phase}_peak_gib": 1.125 + n / 8 for n, phase in enumerate(PHASES)}
    return record | peaks | others


def judged(step: int, loss: float, **others: Any) -> dict[str, Any]:
    """The figures of an evaluation."""
    return {"step": step, "eval/loss": loss, "eval/token_accuracy": 0.5, **others}


def write_run(
    folder: Path,
    records: list[dict[str, Any]],
    *,
    end: str = "",
    config: str = "optim:\n  lr: 0.001\nloop:\n  max_steps: 4\n",
    status: dict[str, Any] | None = None,
    answers: list[dict[str, Any]] | None = None,
    **documents: Any,
) -> Path:
    """A run folder. `documents`: NAME=VALUE becomes NAME.json; `end` follows the last record."""
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + end)
    (folder / "config.yaml").write_text(config)
    if answers is not None:
        (folder / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    if status is not None:
        documents["status"] = {"reason": "", "time": "2026-01-02T03:04:05+00:00", **status}
    for name, value in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def chromium() -> str | None:
    """The browser, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if (found := shutil.which(name))), None)


class Page(html.parser.HTMLParser):
    """What a page holds: elements with their attributes, and the text that a reader sees.

    Raises:
        AssertionError: an element is not closed in its turn.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, f"</{tag}> in the wrong place"

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.texts.append(data)
            if {"td", "th"} & set(self._open):
                self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        """All texts, one after another."""
        return "".join(self.texts)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of that name."""
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, first: str) -> list[str]:
        """The table row whose first cell says this."""
        (found,) = [row for row in self.rows if row and row[0] == first]
        return found

    def curves(self, title: str) -> dict[str, dict[int, float]]:
        """Name of a line -> its values by step, as the read-out of that chart has them."""
        (area,) = [
            json.loads(area["data-curves"] or "")
            for svg, area in zip(
                self.of("svg"),
                [a for a in self.of("div") if a.get("class") == "area"],
                strict=True,
            )
            if (svg["aria-label"] or "").startswith(f"{title}: ")
        ]
        return {
            name: dict(zip(steps, values, strict=True)) for name, _, steps, values in area["lines"]
        }
