"""The learning rate over the steps of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemtune.errors import ConfigError
from gemtune.options import option, require_choice, require_range


@dataclass
class Schedule:
    """Linear warm-up, then cosine, linear or constant."""

    name: str = option("cosine", "cosine, linear or constant")
    warmup_steps: int = option(0, "steps of linear warm-up")
    min_ratio: float = option(0.1, "final learning rate over the peak")

    def __post_init__(self) -> None:
        require_choice("schedule.name", self.name, ["cosine", "linear", "constant"])
        require_range("schedule.warmup_steps", self.warmup_steps, at_least=0)
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError(f"schedule.min_ratio={self.min_ratio} must be in [0, 1].")

    def ratio(self, step: int, max_steps: int) -> float:
        """Learning rate over its peak at a step, counted from 0. A pure function: no state."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.name == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        if self.name == "linear":
            shape = 1 - progress
        else:
            shape = 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_ratio + (1 - self.min_ratio) * max(0.0, shape)
