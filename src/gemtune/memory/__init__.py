"""Peak memory of every step, by phase."""

from gemtune.memory.tracking import PHASES, PeakTracker

__all__ = ["PHASES", "PeakTracker"]
