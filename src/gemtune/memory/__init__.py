"""Peak memory of every step, by phase, and what to do when it runs out."""

from gemtune.memory.config import MemoryConfig
from gemtune.memory.leaks import LeakWatch
from gemtune.memory.oom import (
    Place,
    RunFacts,
    advice,
    remove_reports,
    reported_when_out_of_memory,
)
from gemtune.memory.readings import Readings, memory_record, read_memory, resident_gib
from gemtune.memory.tracking import PHASES, PeakTracker

__all__ = [
    "PHASES",
    "LeakWatch",
    "MemoryConfig",
    "PeakTracker",
    "Place",
    "Readings",
    "RunFacts",
    "advice",
    "memory_record",
    "read_memory",
    "remove_reports",
    "reported_when_out_of_memory",
    "resident_gib",
]
