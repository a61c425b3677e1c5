"""A run in trackio, on this machine."""

from __future__ import annotations

from typing import Any

from gemtune.errors import ConfigError
from gemtune.tracking.config import TrackerConfig
from gemtune.tracking.groups import grouped


class TrackioRun:
    """A `Dashboard`; `trackio show` draws it while the run goes on.

    Raises:
        ConfigError: trackio is not installed.
    """

    def __init__(
        self, config: TrackerConfig, run_name: str, run_id: str, settings: dict[str, Any]
    ) -> None:
        try:
            import trackio
        except ImportError as error:
            raise ConfigError(
                "tracker=trackio needs the trackio package: pip install 'gemtune[trackio]'"
            ) from error
        self._trackio = trackio
        # trackio goes by the name alone; with the id in it a run that starts anew is another one.
        name = f"{run_name}-{run_id}"
        trackio.init(project=config.project, name=name, config=settings, resume="allow")
        self.notice = f"trackio; look with: trackio show --project {config.project}"

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._trackio.log(grouped(metrics), step=step)

    def log_table(
        self, name: str, columns: list[str], rows: list[list[Any]], step: int | None = None
    ) -> None:
        self._trackio.log({name: self._trackio.Table(columns=columns, data=rows)}, step=step or 0)

    def log_summary(self, values: dict[str, float]) -> None:
        pass  # trackio shows records and tables alone

    def finish(self) -> None:
        self._trackio.finish()
