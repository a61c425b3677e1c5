"""`metrics.jsonl`, of any length, in one pass."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemtune.report.thinning import Curve

_EVALUATIONS_KEPT = 200
_LARGEST = 1e100


@dataclass
class Metrics:
    """What the records of a run say. Steps are optimizer steps."""

    curves: dict[str, Curve] = field(default_factory=lambda: defaultdict(Curve))
    """Of those keys that were asked for, and only finite values."""
    newest: dict[str, Any] = field(default_factory=dict)
    """The last record."""
    latest: dict[str, Any] = field(default_factory=dict)
    """Key -> its last value in any record; null where that was not finite."""
    num_train_steps: int = 0
    """Steps on record, which are fewer than were trained where a run began from another's state."""
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    """Of the steps, without evaluation and saving."""
    waited_seconds: float = 0.0
    """Of these, for data."""
    highest_peak: tuple[float, int] | None = None
    """`memory/peak_gib` and its step."""
    first_evaluation: dict[str, Any] | None = None
    best_evaluation: dict[str, Any] | None = None
    """The one with the lowest `eval/loss`."""
    evaluations: deque[dict[str, Any]] = field(
        default_factory=lambda: deque(maxlen=_EVALUATIONS_KEPT)
    )
    """The last ones: step and `eval/` figures."""
    num_broken_lines: int = 0

    @property
    def last_step(self) -> int | None:
        """None: nothing is on record."""
        return self.newest.get("step")

    @property
    def tokens_per_second(self) -> float | None:
        """Mean of the run: all tokens by all seconds."""
        return self.tokens / self.seconds if self.seconds else None

    def take(self, record: dict[str, Any], keys: frozenset[str]) -> None:
        """Count one record."""
        step = record["step"]
        self.newest = record
        self.latest.update(record)
        for key in keys & record.keys():
            if is_number(record[key]):
                self.curves[key].add(step, float(record[key]))
        if "train/loss" in record:
            self._take_step(record)
        if "eval/loss" in record:
            self._take_evaluation(record)

    def _take_step(self, record: dict[str, Any]) -> None:
        self.num_train_steps += 1
        seconds = _number(record, "train/step_seconds")
        self.tokens += int(_number(record, "train/tokens"))
        self.supervised_tokens += int(_number(record, "train/supervised_tokens"))
        self.seconds += seconds
        self.waited_seconds += seconds * _number(record, "train/data_wait_fraction")
        peak = record.get("memory/peak_gib")
        if is_number(peak) and (self.highest_peak is None or peak > self.highest_peak[0]):
            self.highest_peak = (peak, record["step"])

    def _take_evaluation(self, record: dict[str, Any]) -> None:
        found = {key: value for key, value in record.items() if key.startswith("eval/")}
        found = {"step": record["step"], **found}
        self.evaluations.append(found)
        self.first_evaluation = self.first_evaluation or found
        loss, best = found["eval/loss"], self.best_evaluation
        if is_number(loss) and (best is None or loss < best["eval/loss"]):
            self.best_evaluation = found


def read_metrics(path: Path, keys: frozenset[str]) -> Metrics:
    """Read the file without holding it; `keys` are those whose curves are wanted.

    Lines that are no record are counted and left out: a crash may cut the last one.
    """
    metrics = Metrics()
    for record in read_lines(path):
        if record is None or type(record.get("step")) is not int:
            metrics.num_broken_lines += 1
        else:
            metrics.take(record, keys)
    return metrics


def read_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSONL file; None for a line that is none."""
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            yield found if isinstance(found, dict) else None


def is_number(value: Any) -> bool:
    """A finite one that can be computed with."""
    return type(value) in (int, float) and abs(value) < _LARGEST


def _number(record: dict[str, Any], key: str) -> float:
    value = record.get(key)
    return value if is_number(value) else 0
