"""When checkpoints are written, how, and how many are kept."""

from __future__ import annotations

from dataclasses import dataclass

from gemtune.options import option, require_range


@dataclass
class CheckpointConfig:
    """Cadence and retention."""

    every_steps: int | None = option(500, "steps between checkpoints; null: at the end only")
    keep_last: int = option(
        2, "how many are kept, and the best one (eval.best_metric) besides; older ones go"
    )
    save_best: bool = option(
        False, "also write one after each evaluation that is the best so far, whatever the cadence"
    )
    async_save: bool = option(
        False, "train on while a copy in host memory is written (as large as what is trained)"
    )

    def __post_init__(self) -> None:
        require_range("checkpoint.every_steps", self.every_steps, at_least=1)
        require_range("checkpoint.keep_last", self.keep_last, at_least=1)
