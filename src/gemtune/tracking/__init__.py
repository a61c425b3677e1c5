"""Where metrics go: metrics.jsonl always, and wandb or trackio beside it."""

from gemtune.tracking.config import TrackerConfig, wandb_mode
from gemtune.tracking.dashboards import Dashboard, NoDashboard, new_run_id, open_dashboard
from gemtune.tracking.records import MetricsFile, read_records

__all__ = [
    "Dashboard",
    "MetricsFile",
    "NoDashboard",
    "TrackerConfig",
    "new_run_id",
    "open_dashboard",
    "read_records",
    "wandb_mode",
]
