"""Optimizers with their keys, the groups of parameters they step, and learning-rate schedules."""

from gemtune.optim.adamw import AdamW
from gemtune.optim.schedule import Schedule

__all__ = ["AdamW", "Schedule"]
