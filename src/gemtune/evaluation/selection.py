"""Which state of the model is the best so far, and when waiting for a better one ends."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gemtune.checkpoint.state import TrainState
from gemtune.evaluation.config import EvalConfig


def select_by(config: EvalConfig, state: TrainState) -> None:
    """Note in the state what the best is decided by. What an earlier start found by another
    metric is forgotten."""
    if (state.best_metric, state.best_mode) != (config.best_metric, config.mode):
        state.forget_best()
    state.best_metric, state.best_mode = config.best_metric, config.mode


def is_better(mode: str, value: float, than: float | None) -> bool:
    """Whether a value is finite, and less (mode min) or more (max) than the other, if any."""
    sign = 1 if mode == "max" else -1
    return math.isfinite(value) and (than is None or sign * (value - than) > 0)


def judge(config: EvalConfig, state: TrainState, metrics: Mapping[str, float]) -> bool:
    """Take the figures of an evaluation after step `state.step`; whether it is the best so far.

    `state.stopped_early` says why, once `early_stopping_patience` evaluations in a row were not
    better by more than `early_stopping_min_delta` than the last one that was. An evaluation that
    did not measure the metric does not count; one where it is not finite is no better.
    """
    state.eval_step, state.eval_loss = state.step, metrics.get("eval/loss")
    state.eval_metrics = dict(metrics)
    value = metrics.get(config.best_metric)
    if value is None:
        return False
    sign = 1 if config.mode == "max" else -1
    finite = math.isfinite(value)
    is_best = is_better(config.mode, value, state.best_value)
    if is_best:
        state.best_value, state.best_step = value, state.step
    reference, delta = state.awaited_from, config.early_stopping_min_delta
    if finite and (reference is None or sign * (value - reference) > delta):
        state.awaited_from, state.stale_evaluations = value, 0
    else:
        state.stale_evaluations += 1
    patience = config.early_stopping_patience
    if patience is not None and state.stale_evaluations >= patience:
        best = "it was never finite"
        if state.best_value is not None:
            best = f"the best was {state.best_value:.6g} after step {state.best_step}"
        more = f" by more than {delta:g}" if delta else ""
        state.stopped_early = (
            f"{config.best_metric} was no better{more} in {state.stale_evaluations} evaluations in "
            f"a row (eval.early_stopping_patience={patience}); {best}"
        )
    return is_best
