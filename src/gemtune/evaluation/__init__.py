"""Judging a model: by answers it generates, by metrics of them, and which state of it is best."""

from gemtune.evaluation.answers import Answer, generate_answers, rounds_of_rank
from gemtune.evaluation.config import EvalConfig
from gemtune.evaluation.metrics import Metrics, load_metrics, score_together
from gemtune.evaluation.selection import is_better, judge, select_by

__all__ = [
    "Answer",
    "EvalConfig",
    "Metrics",
    "generate_answers",
    "is_better",
    "judge",
    "load_metrics",
    "rounds_of_rank",
    "score_together",
    "select_by",
]
