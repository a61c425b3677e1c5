"""Peak memory of every step, by phase, and what to do when it runs out."""

from gemtune.memory.oom import Place, advice, reported_when_out_of_memory
from gemtune.memory.tracking import PHASES, PeakTracker

__all__ = ["PHASES", "PeakTracker", "Place", "advice", "reported_when_out_of_memory"]
