"""Which evaluation is the best, and when waiting for a better one ends."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gemtune.checkpoint import TrainState
from gemtune.evaluation import EvalConfig, judge, select_by
from gemtune.evaluation.mode import evaluation_mode


def judged(
    values: list[float | None], patience: int | None = None, delta: float = 0.0, mode: str = "auto"
) -> tuple[TrainState, list[bool]]:
    """The state after evaluations of these losses at steps 10, 20 ..; stops where it would."""
    config = EvalConfig(
        best_mode=mode, early_stopping_patience=patience, early_stopping_min_delta=delta
    )
    state, verdicts = TrainState("abc"), []
    select_by(config, state)
    for value in values:
        state.step += 10
        metrics = {"eval/other": 1.0} | ({} if value is None else {"eval/loss": value})
        verdicts.append(judge(config, state, metrics))
        if state.stopped_early:
            break
    return state, verdicts


def test_the_best_is_remembered() -> None:
    state, verdicts = judged([3.0, 1.0, 2.0, math.nan, None, 1.0])
    assert verdicts == [True, True, False, False, False, False]
    assert (state.best_step, state.best_value, state.stopped_early) == (20, 1.0, "")
    assert (state.eval_step, state.eval_loss) == (60, 1.0)
    assert state.eval_metrics == {"eval/other": 1.0, "eval/loss": 1.0}
    state, _ = judged([3.0, 1.0, 4.0], mode="max")
    assert (state.best_step, state.best_value) == (30, 4.0)


@pytest.mark.parametrize(
    ("values", "patience", "delta", "stops_at"),
    [
        ([3.0, 2.0, 1.0, 0.5], 1, 0.0, None),
        ([3.0, 3.0], 1, 0.0, 20),
        ([3.0, 4.0, 2.0, 3.0, 3.0], 2, 0.0, 50),
        ([3.0, 2.95, 2.92, 2.88], 3, 0.1, None),  # slowly, but in all by more than delta
        ([3.0, 2.95, 2.91], 2, 0.1, 30),
        ([3.0, math.nan, math.inf], 2, 0.0, 30),
        ([math.nan, math.nan], 2, 0.0, 20),
        ([3.0, None, None, None, 2.0], 1, 0.0, None),  # not measured: does not count
    ],
)
def test_waiting_ends(
    values: list[float | None], patience: int, delta: float, stops_at: int | None
) -> None:
    state, _ = judged(values, patience, delta)
    assert bool(state.stopped_early) == (stops_at is not None)
    if stops_at is not None:
        assert state.step == stops_at
        assert f"eval.early_stopping_patience={patience}" in state.stopped_early


def test_the_reason_is_for_a_person() -> None:
    state, _ = judged([0.5, 0.75, 0.625], patience=2, delta=0.125)
    assert state.stopped_early == (
        "eval/loss was no better by more than 0.125 in 2 evaluations in a row "
        "(eval.early_stopping_patience=2); the best was 0.5 after step 10"
    )


def test_another_metric_starts_anew() -> None:
    state, _ = judged([3.0, 1.0])
    select_by(EvalConfig(), state)
    assert state.best_step == 20
    select_by(EvalConfig(best_metric="eval/perplexity"), state)
    assert (state.best_metric, state.best_mode) == ("eval/perplexity", "min")
    assert state.best_step is state.best_value is state.awaited_from is None
    assert state.stale_evaluations == 0


def test_modes_and_random_numbers_are_put_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5)), nn.Dropout(0.5))
    model[1].eval()  # a frozen part
    before = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        torch.rand(7)
        raise KeyError
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.rand(4), expected)
