"""What an optimizer step came to, and its record under the names of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemtune.memory import PHASES, Readings, memory_record


@dataclass
class StepResult:
    """One optimizer step, the same on all ranks."""

    loss: float
    """Mean over the supervised tokens of the global batch."""
    grad_norm: float
    token_accuracy: float | None
    """Share of the supervised tokens that are the most likely one. None: the model does not say."""
    entropy: float | None
    """Mean over the supervised tokens, in nats. None: the model does not say."""
    supervised_tokens: int
    tokens: int
    longest_row_tokens: int
    """Of all micro-batches of all ranks, padding included."""
    peaks_gib: list[dict[str, float]]
    """Phase -> peak of each rank."""
    readings: list[Readings]
    """What each rank holds after the step."""
    updated: bool
    """False: something was not finite, or the loss was a spike, and nothing was changed."""
    suspects: list[str]
    """Then the rows, of all ranks, whose loss was so; all rows if only the gradient was."""
    stop_requested: bool
    save_failed: bool
    """On any rank."""
    spike: bool = False
    """Finite, but above the limit."""


def held_mib(readings: Sequence[Readings]) -> list[float]:
    """What each rank holds between two steps: in tensors on a GPU, else its resident set."""
    return [
        1024 * (r.host_resident_gib if math.isnan(r.allocated_gib) else r.allocated_gib)
        for r in readings
    ]


def step_record(
    result: StepResult,
    *,
    learning_rate: float,
    nonfinite_steps: int,
    spike_steps: int,
    seconds: float,
    waited: float,
) -> dict[str, Any]:
    """The metrics of a step.

    Args:
        nonfinite_steps, spike_steps: left out before this step.
        seconds: of the step, with the wait for its data.
        waited: for its data.
    """
    per_rank = [max(peaks.values()) for peaks in result.peaks_gib]
    worst = max(range(len(per_rank)), key=lambda rank: per_rank[rank])
    record: dict[str, Any] = {
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": learning_rate,
        "train/supervised_tokens": result.supervised_tokens,
        "train/tokens": result.tokens,
        "train/tokens_per_second": result.tokens / seconds,
        "train/step_seconds": seconds,
        "train/data_wait_fraction": waited / seconds,
        "train/nonfinite_steps": nonfinite_steps + (not result.updated and not result.spike),
        "train/spike_steps": spike_steps + result.spike,
    }
    for name in ("token_accuracy", "entropy"):
        if getattr(result, name) is not None:
            record[f"train/{name}"] = getattr(result, name)
    record |= {
        "data/longest_row_tokens": result.longest_row_tokens,
        "memory/peak_gib": per_rank[worst],
        "memory/peak_rank": worst,
        "memory/peak_gib_per_rank": per_rank,
    }
    for phase in PHASES:
        record[f"memory/{phase}_peak_gib"] = max(peaks[phase] for peaks in result.peaks_gib)
    return record | memory_record(result.readings, per_rank)
