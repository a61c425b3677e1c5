"""A run folder as values: what a report can say of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gemtune.errors import ReportError
from gemtune.report.metrics import Metrics, read_lines, read_metrics
from gemtune.report.panels import KEYS
from gemtune.run_files import (
    ANSWERS_FILE,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    METRICS_FILE,
    OOM_FILE,
    PLAN_FILE,
    REJECTED_FILE,
    START_FILE,
    STATUS_FILE,
)

_ANSWERS_KEPT = 40
_OF_A_KIND = 8
_REJECTED_KEPT = 50


@dataclass
class Answers:
    """Generated answers: figures of all, and some to look at."""

    shown: list[dict[str, Any]] = field(default_factory=list)
    num: int = 0
    num_correct: int = 0


@dataclass
class RunRecord:
    """What stands in a run folder. Files that are missing or unreadable are empty values here."""

    name: str
    folder: Path
    metrics: Metrics
    config: dict[str, Any]
    status: dict[str, Any]
    start: dict[str, Any]
    """`run.json`: what the run wrote down when it began (gemtune.start_record)."""
    checkpoint: dict[str, Any]
    """`state.json` of the newest checkpoint."""
    plan: dict[str, Any]
    """`plan.json`: the planned peaks."""
    answers: Answers
    rejected: list[dict[str, Any]]
    """The first rows that were left out."""
    num_rejected: int
    notices: list[str]
    """Files that could not be read, and other things that a reader should know."""

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run. None: nobody wrote it down."""
        number = self.start.get("num_steps") or _at(self.config, "loop", "max_steps")
        return number if isinstance(number, int) else None

    @property
    def measures_process(self) -> bool:
        """Whether measured memory is that of the whole process (no GPU), a plan that of tensors."""
        return str(self.start.get("memory_source")).startswith("resident")

    @property
    def patches(self) -> list[dict[str, Any]]:
        """Name, status and reason of each."""
        return _objects(self.start.get("patches") or self.checkpoint.get("patches"))

    @property
    def versions(self) -> dict[str, Any]:
        """Package -> version, of the newest start."""
        return mapping(self.start.get("versions") or self.checkpoint.get("versions"))

    @property
    def git(self) -> dict[str, Any]:
        """Commit, and whether files differed from it."""
        return mapping(self.start.get("git") or self.checkpoint.get("git"))


def read_run(folder: Path) -> RunRecord:
    """Everything a report needs. Nothing is changed, and nothing of what is read is executed.

    Raises:
        ReportError: no such folder, or one without metrics.
    """
    if not folder.is_dir():
        raise ReportError(f"there is no folder {folder}. Name a run's folder, as in runs/NAME.")
    if not (folder / METRICS_FILE).is_file():
        raise ReportError(
            f"{folder} has no {METRICS_FILE}, so it is not a run's folder, or the run ended before "
            "its first record. Name the folder that train.py said it writes to."
        )
    notices: list[str] = []
    try:
        metrics = read_metrics(folder / METRICS_FILE, KEYS)
        answers = _read_answers(folder / ANSWERS_FILE)
        rejected = list(_lines(folder / REJECTED_FILE))
    except OSError as error:
        raise ReportError(f"{folder} cannot be read: {error}") from error
    if (folder / OOM_FILE).exists():
        notices.append(f"Memory ran out in this folder's newest start; {OOM_FILE} says where.")
    return RunRecord(
        name=folder.resolve().name,
        folder=folder,
        metrics=metrics,
        config=_read_config(folder / CONFIG_FILE, notices),
        status=_read_object(folder / STATUS_FILE, notices),
        start=_read_object(folder / START_FILE, notices),
        checkpoint=_read_checkpoint(folder / CHECKPOINTS_FOLDER),
        plan=_read_object(folder / PLAN_FILE, notices),
        answers=answers,
        rejected=rejected[:_REJECTED_KEPT],
        num_rejected=len(rejected),
        notices=notices,
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is an object of JSON, else an empty one."""
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _at(values: Any, *keys: str) -> Any:
    for key in keys:
        values = mapping(values).get(key)
    return values


def _read_object(path: Path, notices: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
        reason: object = "it holds no object"
    except (OSError, ValueError, RecursionError) as error:
        reason = error
    notices.append(f"{path.name} cannot be read: {reason}")
    return {}


def _read_config(path: Path, notices: list[str]) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {str(key): value for key, value in found.items()}
    except FileNotFoundError:
        notices.append(f"there is no {path.name}")
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        notices.append(f"{path.name} cannot be read: {error}")
    return {}


def _read_checkpoint(folder: Path) -> dict[str, Any]:
    """The newest `state.json` that can be read; whether its hash holds is for others to say."""
    for checkpoint in sorted(folder.glob("step_*"), reverse=True):
        if found := _read_object(checkpoint / "state.json", []):
            return found
    return {}


def _read_answers(path: Path) -> Answers:
    """One of each kind first, then wrong ones, then right ones."""
    answers = Answers()
    right: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    seen: Counter[tuple[str, bool]] = Counter()
    for answer in _lines(path):
        correct = bool(answer.get("correct"))
        answers.num += 1
        answers.num_correct += correct
        kind = (str(answer.get("kind")), correct)
        seen[kind] += 1
        if seen[kind] <= _OF_A_KIND:
            (right if correct else wrong).append(answer)
    firsts: dict[str, dict[str, Any]] = {}
    for answer in [*right, *wrong]:
        firsts.setdefault(str(answer.get("kind")), answer)
    chosen = list(firsts.values())
    chosen += [each for each in [*wrong, *right] if not any(each is first for first in chosen)]
    answers.shown = chosen[:_ANSWERS_KEPT]
    return answers


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from (each for each in read_lines(path) if each is not None)
