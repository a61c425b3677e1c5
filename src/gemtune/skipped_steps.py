"""Steps whose update is left out: values that are not finite, and sudden peaks of the loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

SPIKE_MIN_STEPS = 16
"""Losses that the guard wants to know before it judges one."""


def spike_limit(recent_losses: Sequence[float], sigma: float | None) -> float:
    """The highest loss that is not a spike: mean + sigma * standard deviation of recent ones.

    Infinity where the guard is off (`sigma` None) or knows fewer than `SPIKE_MIN_STEPS` losses. The
    deviation is that of the whole population. After OLMo-core's SkipStepOptimizer.
    """
    if sigma is None or len(recent_losses) < SPIKE_MIN_STEPS:
        return math.inf
    return statistics.fmean(recent_losses) + sigma * statistics.pstdev(recent_losses)


def remember_loss(recent_losses: list[float], loss: float, window_steps: int) -> None:
    """Add the loss of a step that was applied; the oldest ones past the window go."""
    recent_losses.append(loss)
    del recent_losses[:-window_steps]
