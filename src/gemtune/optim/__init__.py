"""Optimizers with their keys, the groups of parameters they step, and learning-rate schedules."""

from gemtune.optim.adamw import AdamW
from gemtune.optim.adamw_8bit import AdamW8bit
from gemtune.optim.muon import Muon
from gemtune.optim.schedule import Schedule

__all__ = ["AdamW", "AdamW8bit", "Muon", "Schedule"]
