"""The panels of a project in wandb, made with wandb-workspaces (the extra `dashboard`)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from gemtune.errors import ConfigError
from gemtune.tracking.config import TrackerConfig, has_wandb_key
from gemtune.tracking.groups import RANK_PEAKS

NAME = "gemtune"
_SMOOTHING = 0.6
_PHASES = ("forward", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Panel:
    """One panel: lines over the steps, or a table."""

    title: str
    names: tuple[str, ...] = ()
    """Metrics, or the table."""
    pattern: str = ""
    """Instead: a regular expression for the names of metrics."""
    kind: Literal["lines", "table"] = "lines"
    smoothed: bool = False

    def shows(self, name: str) -> bool:
        """Whether the metric or table with that name is in it."""
        return name in self.names or bool(self.pattern and re.search(self.pattern, name))


@dataclass(frozen=True)
class Section:
    """The panels of a group of metrics."""

    name: str
    panels: list[Panel] = field(default_factory=list)


def layout() -> list[Section]:
    """The sections, from top to bottom: one for each of `groups.GROUPS`, in that order."""
    return [
        Section(
            "train",
            [
                Panel("loss", ("train/loss",), smoothed=True),
                Panel("token accuracy", ("train/token_accuracy",)),
                Panel("entropy (nats)", ("train/entropy",)),
                Panel("gradient norm", ("train/grad_norm",)),
                Panel("learning rate", ("train/learning_rate",)),
                Panel("steps left out", ("train/nonfinite_steps", "train/spike_steps")),
            ],
        ),
        Section(
            "eval",
            [
                Panel("loss on the evaluation rows", ("eval/loss",)),
                Panel("token accuracy on the evaluation rows", ("eval/token_accuracy",)),
                Panel("perplexity", ("eval/perplexity",)),
                Panel("answers that match", pattern="^eval/exact_match"),
                Panel("chrF of answers (0 to 100)", ("eval/chrf",)),
                Panel("ROUGE of answers", pattern="^eval/rouge"),
                Panel("samples", ("eval/samples",), kind="table"),
            ],
        ),
        Section(
            "memory",
            [
                Panel("peak and plan (GiB)", ("memory/peak_gib", "memory/planned_peak_gib")),
                Panel("peak by phase (GiB)", tuple(f"memory/{p}_peak_gib" for p in _PHASES)),
                Panel("peak by rank (GiB)", pattern=RANK_PEAKS.pattern),
                Panel("rank of the peak", ("memory/peak_rank",)),
                Panel("on the GPU (GiB)", ("memory/allocated_gib", "memory/reserved_gib")),
                Panel("share of what is reserved that lies idle", ("memory/fragmentation",)),
                Panel("resident set of a process (GiB)", ("memory/host_resident_gib",)),
                Panel("free (GiB)", ("memory/device_free_gib",)),
                Panel("growth (MiB a step)", ("memory/growth_mib_per_step",)),
                Panel("peak over plan, less one", ("memory/plan_error",)),
                Panel("plan", ("plan",), kind="table"),
            ],
        ),
        Section(
            "data",
            [
                Panel("tokens of a step", ("data/tokens", "data/supervised_tokens")),
                Panel("longest row (tokens)", ("data/longest_row_tokens",)),
                Panel("share of the time waiting for data", ("data/wait_fraction",)),
                Panel("preview", ("data/preview",), kind="table"),
            ],
        ),
        Section(
            "system",
            [
                Panel("tokens per second", ("system/tokens_per_second",)),
                Panel("seconds of a step", ("system/step_seconds",)),
                Panel("seconds waited for a checkpoint", ("system/checkpoint_stall_seconds",)),
                Panel("patches", ("patches",), kind="table"),
            ],
        ),
    ]


def make_workspace(entity: str, project: str) -> Any:
    """`layout()` as a `wandb_workspaces.workspaces.Workspace`. Connects to nothing.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ConfigError(
            "panels are laid out with wandb-workspaces, which is not installed: "
            "pip install 'gemtune[dashboard]'"
        ) from error
    return ws.Workspace(
        name=NAME,
        entity=entity,
        project=project,
        sections=[
            ws.Section(
                name=section.name,
                panels=[_panel(panel) for panel in section.panels],
                is_open=True,
                panel_settings=ws.SectionPanelSettings(x_axis="step"),
            )
            for section in layout()
        ],
        settings=ws.WorkspaceSettings(x_axis="step", group_by_prefix="first"),
    )


def _panel(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if panel.kind == "table":
        (table,) = panel.names
        return wr.WeavePanelSummaryTable(table_name=table)
    return wr.LinePlot(
        title=panel.title,
        x="step",
        y=list(panel.names),
        metric_regex=panel.pattern or None,
        smoothing_type="exponentialTimeWeighted" if panel.smoothed else "none",
        smoothing_factor=_SMOOTHING if panel.smoothed else 0,
        smoothing_show_original=panel.smoothed or None,
    )


def save_workspace(config: TrackerConfig) -> str:
    """A new view of the project, for all of its runs; returns its address.

    Raises:
        ConfigError: no wandb-workspaces, no key, or wandb did not take it.
    """
    make_workspace("any", config.project)  # the extra first: it needs no account to say so
    if not has_wandb_key():
        raise ConfigError(
            "panels are laid out in wandb itself, and there is no key in WANDB_API_KEY or "
            "~/.netrc. Run `wandb login`, upload the runs with `wandb sync`, and then this again."
        )
    import wandb

    try:
        entity = config.entity or wandb.Api().default_entity
        return make_workspace(entity, config.project).save().url
    except Exception as error:  # of wandb, its transport and its checks: many kinds
        raise ConfigError(
            f"wandb did not take the panels of {config.project}: {error}\n"
            "The project must be there: upload a run first. tracker.entity names its owner."
        ) from error
