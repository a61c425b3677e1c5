"""What a dashboard can do, and which one a run has."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from gemtune.tracking.config import TrackerConfig


class Dashboard(Protocol):
    """What a tracker can do."""

    notice: str
    """One line for the person who started the run."""

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """A record of metrics.jsonl, or a part of one, under the names of `groups.grouped`."""

    def log_table(
        self, name: str, columns: list[str], rows: list[list[Any]], step: int | None = None
    ) -> None:
        """A table, after that step where it is of one; a later one may have the same name."""

    def log_summary(self, values: dict[str, float]) -> None:
        """Figures of the run as a whole."""

    def finish(self) -> None: ...


def new_run_id() -> str:
    """An id kept in the checkpoints, so that a resumed run goes on as one run in the dashboard."""
    return uuid.uuid4().hex[:12]


def open_dashboard(
    config: TrackerConfig,
    run_dir: Path,
    run_name: str,
    run_id: str,
    settings: dict[str, Any],
    past: Iterable[dict[str, Any]] = (),
) -> Dashboard:
    """Start or continue the run in the chosen tracker. Main process only.

    Args:
        past: records of the starts before this one.
    """
    if config.name == "wandb":
        from gemtune.tracking.wandb_run import WandbRun

        return WandbRun(config, run_dir, run_name, run_id, settings, past)
    if config.name == "trackio":
        from gemtune.tracking.trackio_run import TrackioRun

        return TrackioRun(config, run_name, run_id, settings)
    return NoDashboard()


class NoDashboard:
    """metrics.jsonl alone."""

    notice = "none (metrics.jsonl only)"

    def log(self, metrics: dict[str, Any], step: int) -> None:
        pass

    def log_table(
        self, name: str, columns: list[str], rows: list[list[Any]], step: int | None = None
    ) -> None:
        pass

    def log_summary(self, values: dict[str, float]) -> None:
        pass

    def finish(self) -> None:
        pass
