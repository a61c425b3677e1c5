"""How long a run is, how many rows a step has, and how often things happen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemtune.errors import ConfigError
from gemtune.options import option, require_range
from gemtune.skipped_steps import SPIKE_MIN_STEPS


@dataclass
class LoopConfig:
    """How long, how many rows at a time, and how often things happen."""

    max_steps: int | None = option(None, "optimizer steps; null: decided by max_epochs")
    max_epochs: float = option(1.0, "passes over the data, where max_steps is null")
    global_batch_size: int = option(32, "rows of an optimizer step, over all processes")
    micro_batch_size: int = option(4, "rows of one forward pass; no effect on the gradient")
    max_grad_norm: float | None = option(1.0, "gradients are scaled down to it; null: never")
    max_nonfinite_steps: int = option(3, "steps with a NaN or infinity before the run stops")
    spike_sigma: float | None = option(
        None, "a step whose loss is so many standard deviations above recent ones is left out"
    )
    spike_window_steps: int = option(128, "recent steps that spike_sigma compares with")
    max_spike_steps: int = option(10, "steps left out as spikes before the run stops")
    log_every_steps: int = option(10, "steps between lines and dashboard points")
    eval_every_steps: int | None = option(None, "steps between evaluations; null: start and end")
    profile_at_step: int | None = option(
        None, "the step whose trace (torch.profiler) goes to trace_step_N_rank_R.json.gz"
    )
    eval_micro_batch_size: int = option(32, "rows of one forward pass in evaluation")

    def __post_init__(self) -> None:
        require_range("loop.max_steps", self.max_steps, at_least=1)
        require_range("loop.max_epochs", self.max_epochs, above=0)
        require_range("loop.max_grad_norm", self.max_grad_norm, above=0)
        require_range("loop.max_nonfinite_steps", self.max_nonfinite_steps, at_least=0)
        require_range("loop.spike_sigma", self.spike_sigma, above=0)
        require_range("loop.spike_window_steps", self.spike_window_steps, at_least=SPIKE_MIN_STEPS)
        require_range("loop.max_spike_steps", self.max_spike_steps, at_least=0)
        require_range("loop.eval_every_steps", self.eval_every_steps, at_least=1)
        require_range("loop.profile_at_step", self.profile_at_step, at_least=1)
        for key in (
            "global_batch_size",
            "micro_batch_size",
            "log_every_steps",
            "eval_micro_batch_size",
        ):
            require_range(f"loop.{key}", getattr(self, key), at_least=1)

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps of the run for a data set of that size."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.max_epochs * num_rows / self.global_batch_size))

    def check_world_size(self, world_size: int) -> None:
        """Every rank must get the same number of rows."""
        if self.global_batch_size % world_size:
            below = self.global_batch_size // world_size * world_size
            raise ConfigError(
                f"loop.global_batch_size={self.global_batch_size} cannot be shared evenly by "
                f"{world_size} processes. Use {below or world_size} or {below + world_size}."
            )
