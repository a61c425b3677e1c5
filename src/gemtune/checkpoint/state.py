"""What a checkpoint says beside its tensors: counters, and what it was made with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemtune.checkpoint.folder import STATE_FILE
from gemtune.checkpoint.manifest import verified_content
from gemtune.errors import CheckpointError

FORMAT_VERSION = 2


@dataclass
class TrainState:
    """Counters of a run; everything else of its position follows from `step`."""

    run_id: str
    """Of the run in the dashboard."""
    step: int = 0
    """Optimizer steps done."""
    nonfinite_steps: int = 0
    spike_steps: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """Of applied steps, the oldest first: what the spike guard compares with."""
    tokens_seen: int = 0
    first_eval_loss: float | None = None
    """Loss of the starting model on the evaluation rows."""
    eval_step: int | None = None
    """Of the newest evaluation."""
    eval_loss: float | None = None
    eval_metrics: dict[str, float] = field(default_factory=dict)
    """All figures of the newest evaluation."""
    best_metric: str = "eval/loss"
    """What the best state of the model is decided by, and `best_mode` is better of it."""
    best_mode: str = "min"
    best_step: int | None = None
    best_value: float | None = None
    awaited_from: float | None = None
    """The value that early stopping waits for a better one than."""
    stale_evaluations: int = 0
    """In a row, without one."""
    stopped_early: str = ""
    """Why the run ended before its last step; empty: it did not."""

    def forget_best(self) -> None:
        """As if nothing had been evaluated yet, as far as the best is concerned."""
        self.best_step = self.best_value = self.awaited_from = None
        self.stale_evaluations, self.stopped_early = 0, ""


def state_document(
    state: TrainState, world_size: int, facts: dict[str, Any], saved_at: str
) -> dict[str, Any]:
    """The content of `state.json`. `facts` has `config` and whatever else is worth knowing."""
    return {
        "format": FORMAT_VERSION,
        "saved_at": saved_at,
        "world_size": world_size,
        "state": asdict(state),
        **facts,
    }


def read_document(checkpoint: Path) -> dict[str, Any]:
    """`state.json`, whose hash was checked.

    Raises:
        CheckpointError: damaged, or of another format.
    """
    path = checkpoint / STATE_FILE
    try:
        document = json.loads(verified_content(checkpoint, STATE_FILE))
        version = document["format"]
        if version == FORMAT_VERSION:
            TrainState(**document["state"])
            int(document["world_size"])
            dict(document["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint} has format {version}; this gemtune reads format {FORMAT_VERSION}. Go on "
            "with the version that wrote it, or start anew with run.resume=never."
        )
    return document
