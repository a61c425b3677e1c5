"""A run in wandb, online or as files that `wandb sync` uploads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import wandb

from gemtune.errors import ConfigError
from gemtune.tracking.config import TrackerConfig, wandb_mode
from gemtune.tracking.groups import BEST, GROUPS, BestValues, grouped


class WandbRun:
    """A `Dashboard`. What wandb adds: every 15 s, figures of the main process's machine
    (processors, memory, disk, network, GPUs), and the names of the installed packages.

    Raises:
        ConfigError: wandb did not start.
    """

    def __init__(
        self,
        config: TrackerConfig,
        run_dir: Path,
        run_name: str,
        run_id: str,
        settings: dict[str, Any],
        past: Iterable[dict[str, Any]] = (),
    ) -> None:
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
        self._best = BestValues(past)
        self._define_metrics()
        self.notice = (
            f"wandb, {self._run.url}" if mode == "online" else _notice(config, mode, run_dir)
        )

    def _define_metrics(self) -> None:
        # Our own step axis: wandb's own counter drops what a resumed run logs again.
        self._run.define_metric("step")
        # No two patterns match one name: wandb would take either.
        for group in GROUPS:
            self._run.define_metric(f"{group}/*", step_metric="step")
        for name in BEST:  # in the summary by ourselves: wandb compares within one start
            self._run.define_metric(name, step_metric="step", summary="none")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._run.log(grouped(metrics) | {"step": step})
        self._run.summary.update(self._best.update(metrics))

    def log_table(
        self, name: str, columns: list[str], rows: list[list[Any]], step: int | None = None
    ) -> None:
        of_step = {} if step is None else {"step": step}
        self._run.log({name: wandb.Table(columns=columns, data=rows)} | of_step)

    def log_summary(self, values: dict[str, float]) -> None:
        self._run.summary.update(values)

    def finish(self) -> None:
        self._run.finish()


def _notice(config: TrackerConfig, mode: str, run_dir: Path) -> str:
    if mode != "offline":
        return f"wandb, {mode} (WANDB_MODE)"
    entity = f" tracker.entity={config.entity}" if config.entity else ""
    # Every start of a run has a folder of its own, with the same id.
    return (
        f"wandb, offline; upload with: wandb sync {run_dir}/wandb/offline-run-*; then its panels: "
        f"python scripts/dashboard.py tracker.project={config.project}{entity}"
    )
