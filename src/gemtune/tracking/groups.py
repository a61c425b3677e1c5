"""The names that metrics have in a dashboard: one group for each question asked there."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable
from typing import Any

GROUPS = ("train", "eval", "memory", "data", "system")
"""What is before the slash. Dashboards make a section of each."""

# In metrics.jsonl these stay what they were called first.
_RENAMED = {
    "train/tokens": "data/tokens",
    "train/supervised_tokens": "data/supervised_tokens",
    "train/data_wait_fraction": "data/wait_fraction",
    "train/tokens_per_second": "system/tokens_per_second",
    "train/step_seconds": "system/step_seconds",
    "checkpoint/stall_seconds": "system/checkpoint_stall_seconds",
}
_PER_RANK = "memory/peak_gib_per_rank"
MAX_RANKS = 64
"""Of more, a panel with a line for each shows nothing."""
RANK_PEAKS = re.compile(r"^memory/rank_.+_peak_gib$")
"""All that `grouped` makes of the peaks of the ranks."""

BEST = {
    "eval/loss": "min",
    "eval/token_accuracy": "max",
    "eval/perplexity": "min",
    "eval/exact_match": "max",
    "eval/chrf": "max",
    "eval/rouge1": "max",
    "eval/rouge2": "max",
    "eval/rougeL": "max",
    "memory/peak_gib": "max",
    "memory/forward_peak_gib": "max",
    "memory/loss_peak_gib": "max",
    "memory/backward_peak_gib": "max",
    "memory/optimizer_peak_gib": "max",
}
"""Metric -> which of its values speaks for the run; of the others the newest does."""


def grouped(metrics: dict[str, Any]) -> dict[str, Any]:
    """A record of metrics.jsonl as a dashboard shows it: single values, each in one of `GROUPS`.

    The peak of every rank is a metric of its own, `memory/rank_N_peak_gib`; of more than
    `MAX_RANKS` there are the lowest, the median and the highest instead. Other lists are left out.
    """
    shown = {
        _RENAMED.get(name, name): value
        for name, value in metrics.items()
        if not isinstance(value, list | dict)
    }
    return shown | _rank_peaks(metrics.get(_PER_RANK, []))


def _rank_peaks(peaks_gib: list[float]) -> dict[str, float]:
    named: dict[str, float] = {str(rank): peak for rank, peak in enumerate(peaks_gib)}
    if len(peaks_gib) > MAX_RANKS:
        named = {
            "min": min(peaks_gib),
            "median": statistics.median(peaks_gib),
            "max": max(peaks_gib),
        }
    return {f"memory/rank_{name}_peak_gib": peak for name, peak in named.items()}


class BestValues:
    """The best value of each metric in `BEST`, over all starts of a run.

    Args:
        past: records of the starts before this one.
    """

    def __init__(self, past: Iterable[dict[str, Any]] = ()) -> None:
        self._best: dict[str, float] = {}
        for record in past:
            self.update(record)

    def update(self, metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
        """`{"eval/loss": {"min": best so far, "last": this one}}`, of what is in `metrics`."""
        summary: dict[str, dict[str, float]] = {}
        for name in BEST.keys() & metrics.keys():
            value, better = metrics[name], min if BEST[name] == "min" else max
            if value is None or not math.isfinite(value):
                continue
            self._best[name] = better(value, self._best.get(name, value))
            summary[name] = {BEST[name]: self._best[name], "last": value}
        return summary
