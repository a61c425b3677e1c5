"""Where metrics go: metrics.jsonl always, and wandb or trackio beside it."""

from __future__ import annotations

import json
import math
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gemtune.errors import ConfigError
from gemtune.options import option, require_choice, require_range


@dataclass
class TrackerConfig:
    """A dashboard beside metrics.jsonl."""

    name: str = option("wandb", "wandb, trackio (local, no account) or none")
    project: str = option("gemtune", "project in the dashboard")
    entity: str | None = option(None, "wandb team or user; null: your default")
    preview_rows: int = option(4, "rows of the data to show there at the start; 0: none")
    mode: str = option("auto", "wandb: auto (online where a key is found), online or offline")

    def __post_init__(self) -> None:
        require_choice("tracker.name", self.name, ["wandb", "trackio", "none"])
        require_range("tracker.preview_rows", self.preview_rows, at_least=0)
        require_choice("tracker.mode", self.mode, ["auto", "online", "offline"])


class Dashboard(Protocol):
    """What a tracker can do."""

    notice: str
    """One line for the person who started the run."""

    def log(self, metrics: dict[str, Any], step: int) -> None: ...

    def log_table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None: ...

    def finish(self) -> None: ...


class MetricsFile:
    """`metrics.jsonl`: one JSON object a step, flushed as it is written.

    A resumed run drops the lines of steps that it will do again, so that each step stands there
    once. Metrics that come later for the newest step join its object.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        lines = path.read_bytes().splitlines() if path.exists() else []
        # A line that a crash cut short is dropped as well.
        records = [r for r in map(_parse, lines) if r is not None and r["step"] <= resume_step]
        staging = path.with_suffix(".staging")
        staging.write_bytes(b"".join(map(_line, records)))
        staging.replace(path)
        self._file = path.open("r+b", buffering=0)
        self.newest: dict[str, Any] = records[-1] if records else {}
        self._end = self._file.seek(0, os.SEEK_END)
        self._newest_at = self._end - (len(_line(self.newest)) if records else 0)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Numbers that JSON has no word for (NaN, infinity) are written as null."""
        record = {"step": step} | {k: _json_value(v) for k, v in metrics.items()}
        if self.newest.get("step") == step:
            record = self.newest | record
            self._file.seek(self._newest_at)
        else:
            self._newest_at = self._file.seek(self._end)
        # One write, and only then the cut: a crash in between leaves the new line whole, and behind
        # it at most the end of the old one, which is dropped when the run goes on.
        self.newest = record
        self._end = self._newest_at + self._file.write(_line(record))
        self._file.truncate(self._end)

    def close(self) -> None:
        self._file.close()


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_json_value(v) for v in value]
    return value


def new_run_id() -> str:
    """An id kept in the checkpoints, so that a resumed run goes on as one run in the dashboard."""
    return uuid.uuid4().hex[:12]


def open_dashboard(
    config: TrackerConfig, run_dir: Path, run_name: str, run_id: str, settings: dict[str, Any]
) -> Dashboard:
    """Start or continue the run in the chosen tracker. Main process only."""
    if config.name == "wandb":
        return _Wandb(config, run_dir, run_name, run_id, settings)
    if config.name == "trackio":
        return _Trackio(config, run_name, run_id, settings)
    return NoDashboard()


class NoDashboard:
    """metrics.jsonl alone."""

    notice = "none (metrics.jsonl only)"

    def log(self, metrics: dict[str, Any], step: int) -> None:
        pass

    def log_table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        pass

    def finish(self) -> None:
        pass


class _Wandb:
    def __init__(
        self,
        config: TrackerConfig,
        run_dir: Path,
        run_name: str,
        run_id: str,
        settings: dict[str, Any],
    ) -> None:
        import wandb

        mode = wandb_mode(config)
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=run_name,
                id=run_id,
                resume="allow",
                dir=str(run_dir),
                mode=mode,
                config=settings,
                # Arguments, environment, code and the machine's name stay here.
                settings=wandb.Settings(
                    x_disable_meta=True,
                    host="",
                    console="off",
                    disable_git=True,
                    save_code=False,
                    silent=True,
                ),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"wandb did not start (mode {mode}): {error}\n"
                "Train without the network with tracker.mode=offline, or with tracker=none."
            ) from error
        # Our own step axis: wandb's own counter drops what a resumed run logs again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if mode == "online":
            self.notice = f"wandb, {self._run.url}"
        elif mode == "offline":
            # Every start of a run has a folder of its own, with the same id.
            self.notice = f"wandb, offline; upload with: wandb sync {run_dir}/wandb/offline-run-*"
        else:
            self.notice = f"wandb, {mode} (WANDB_MODE)"

    def log(self, metrics: dict[str, Any], step: int) -> None:
        flat = {k: v for k, v in metrics.items() if not isinstance(v, list | dict)}
        self._run.log(flat | {"step": step})

    def log_table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        import wandb

        self._run.log({name: wandb.Table(columns=columns, data=rows)})

    def finish(self) -> None:
        self._run.finish()


def wandb_mode(config: TrackerConfig) -> str:
    """`tracker.mode`; where that is auto, WANDB_MODE, else online only where a key is found.

    Raises:
        ConfigError: online was asked for, and there is no key.
    """
    mode = config.mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    if mode == "online" and not _has_wandb_key():
        raise ConfigError(
            "wandb online (tracker.mode or WANDB_MODE) needs a key, and there is none in "
            "WANDB_API_KEY or ~/.netrc. Run `wandb login`, or use tracker.mode=offline."
        )
    return mode


def _has_wandb_key() -> bool:
    """In the environment or in ~/.netrc, the two places where `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class _Trackio:
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
        flat = {k: v for k, v in metrics.items() if not isinstance(v, list | dict)}
        self._trackio.log(flat, step=step)

    def log_table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        self._trackio.log({name: self._trackio.Table(columns=columns, data=rows)}, step=0)

    def finish(self) -> None:
        self._trackio.finish()
