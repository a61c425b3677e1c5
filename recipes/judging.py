"""What a recipe is judged by, and what follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemtune.checkpoint import CheckpointFolder, Ranks, restore_parameters
from gemtune.checkpoint.folder import evaluation_of, step_of
from gemtune.config import RunConfig
from gemtune.console import Screen
from gemtune.data import ChatDataset
from gemtune.errors import ConfigError
from gemtune.evaluation import generate_answers, is_better, judge, score_together
from gemtune.loop import Session
from gemtune.reporting import Reporter

if TYPE_CHECKING:
    from recipes.gemma4_sft import Stages


def num_generated_rows(config: RunConfig, stages: Stages) -> int:
    """How many of the evaluation rows are answered."""
    limit = config.data.eval_generate_rows
    return len(stages.eval_rows) if limit is None else min(limit, len(stages.eval_rows))


def score_answers(
    config: RunConfig, stages: Stages, session: Session, reporter: Reporter, *, on_screen: bool
) -> dict[str, float]:
    """Answer, compute `eval.metrics`, and keep the answers: a file, the dashboard, the screen."""
    answers = generate_answers(
        session.runtime,
        session.runtime.unwrap(session.model),
        stages.eval_rows,
        num_rows=num_generated_rows(config, stages),
        batch_size=config.loop.eval_micro_batch_size,
        max_new_tokens=config.data.eval_max_new_tokens,
    )
    reporter.answers(answers, on_screen=on_screen)
    return score_together(session.runtime, stages.metrics, answers)


def require_rows(config: RunConfig, eval_rows: ChatDataset) -> None:
    """Raise ConfigError for early stopping without rows to be judged by."""
    patience = config.eval.early_stopping_patience
    if patience is not None and not len(eval_rows):
        raise ConfigError(
            f"eval.early_stopping_patience={patience} has no rows to judge by. Give data.eval_path,"
            " or hold some out with data.eval_fraction."
        )


def judge_in_between(
    config: RunConfig, stages: Stages, session: Session, reporter: Reporter
) -> None:
    """From now on evaluations between steps generate where it is due, and choose the best."""

    def due_answers() -> dict[str, float]:
        if not config.eval.generates_at(session.state.step):
            return {}
        return score_answers(config, stages, session, reporter, on_screen=False)

    session.score_answers = due_answers
    session.judge = lambda metrics: (
        judge(config.eval, session.state, metrics) and config.checkpoint.save_best
    )


def put_back_best(
    config: RunConfig,
    ranks: Ranks,
    folder: CheckpointFolder,
    session: Session,
    metrics: dict[str, float],
    screen: Screen,
) -> int:
    """`eval.export_best`: give the model the weights of the best checkpoint, unless those that it
    has are as good by the figures of their evaluation. Returns the step of those that it has."""
    last_step = session.state.step
    if not config.eval.export_best:
        return last_step
    key, mode = config.eval.best_metric, config.eval.mode
    last = metrics.get(key)

    def better() -> tuple[Path, float] | None:
        best = folder.best(key, mode)
        value = None if best is None else evaluation_of(best)[key]
        return (best, value) if value is not None and is_better(mode, value, last) else None

    if (found := ranks.on_main(better)) is None:
        screen.say(f"exporting the last weights: no checkpoint is better by {key}")
        return last_step
    checkpoint, value = found
    model = session.runtime.unwrap(session.model)
    if problems := restore_parameters(ranks, checkpoint, model):
        screen.say(f"exporting the last weights: {checkpoint} is damaged: {problems[0]}")
        return last_step
    screen.say(
        f"exporting the weights of {checkpoint.name}, the best checkpoint: {key} {value:.4f}. "
        "Figures and answers are of the last weights."
    )
    return step_of(checkpoint)
