"""Metrics of generated answers: our own, those of established libraries, and the user's."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gemtune.errors import ConfigError, TrainingError
from gemtune.evaluation.answers import Answer
from gemtune.evaluation.config import OF_ANSWERS, EvalConfig, name_of
from gemtune.evaluation.mode import same_random_numbers
from gemtune.runtime import Runtime

Function = Callable[[list[Answer]], Any]

_MADE_UP = (
    Answer("made-up row 1", None, "What is two and two?", "four", "four"),
    Answer("made-up row 2", None, "What colour is the sky?", "It is blue.", "It is green."),
)


@dataclass
class Metrics:
    """The metrics of a run, each of which was tried on made-up answers."""

    functions: dict[str, Function] = field(default_factory=dict)
    """Entry of `eval.metrics` -> what computes it."""

    def score(self, answers: list[Answer]) -> dict[str, float]:
        """`eval/NAME` of all answers, and `eval/NAME_KEY` where a function returns several.

        Raises:
            TrainingError: a function of the user raised, or returned no numbers; names it and,
                where it fails on one answer alone, that answer's row.
        """
        if not answers:
            return {}
        found: dict[str, float] = {}
        for metric, function in self.functions.items():
            try:
                found |= _scores(metric, function, answers)
            except Exception as error:
                row = _culprit(metric, function, answers) or f"all {len(answers)} rows together"
                raise TrainingError(
                    f"eval.metrics: {metric} failed on {row}: {_said(error)}\nMend it, and run the "
                    "same command again: it goes on from the newest checkpoint."
                ) from error
        return found


def load_metrics(config: EvalConfig) -> Metrics:
    """Import what `eval.metrics` names, and try each on two made-up answers.

    A dotted path is imported and called: it runs that code, with the rights of this process.

    Raises:
        ConfigError: a missing package, a path that does not import or is no function, or one that
            raises or returns neither a number nor a mapping of names to numbers.
    """
    functions: dict[str, Function] = {}
    keys: set[str] = set()
    for metric in config.metrics:
        try:
            with same_random_numbers():
                function = _OURS[metric]() if metric in _OURS else _import(metric)
                found = _scores(metric, function, list(_MADE_UP))
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"eval.metrics: {metric} failed on two made-up answers: {_said(error)}\nIt takes a "
                "list of gemtune.evaluation.Answer (expected, generated, question, kind, where) and"
                " returns a number, or a dict of names and numbers."
            ) from error
        functions[metric] = function
        keys |= found.keys()
    best = config.best_metric
    by_kind = best.startswith("eval/exact_match_")
    if config.is_of_answers(best) and best not in keys and not by_kind:
        raise ConfigError(
            f"eval.best_metric={best} is not measured: eval.metrics={config.metrics} returned "
            f"{', '.join(sorted(keys))} on made-up answers."
        )
    return Metrics(functions)


def score_together(runtime: Runtime, metrics: Metrics, answers: list[Answer]) -> dict[str, float]:
    """`metrics.score`, once, on the main process; the same figures, or the same error, on all."""
    outcome: tuple[dict[str, float], str] = ({}, "")
    if runtime.is_main:
        try:
            outcome = (metrics.score(answers), "")
        except TrainingError as error:
            if runtime.world_size == 1:
                raise
            outcome = ({}, str(error))
    scores, failure = runtime.collect([outcome])[0]
    if failure:
        raise TrainingError(failure)
    return scores


def exact_match(answers: Sequence[Answer]) -> dict[str, float]:
    """`eval/exact_match` over all answers, and by kind where the rows have a `kind` column."""
    if not answers:
        return {}
    metrics = {"eval/exact_match": _share_correct(answers)}
    by_kind: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.kind is not None:
            by_kind[answer.kind].append(answer)
    for kind, some in sorted(by_kind.items()):
        metrics[f"eval/exact_match_{kind}"] = _share_correct(some)
    return metrics


def _share_correct(answers: Sequence[Answer]) -> float:
    return sum(answer.correct for answer in answers) / len(answers)


def _chrf() -> Function:
    """`eval/chrf`, 0 to 100: chrF2 of the corpus (Popovic 2015) as sacrebleu computes it."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise _not_installed("chrf", "sacrebleu") from error
    metric = CHRF()

    def score(answers: list[Answer]) -> dict[str, float]:
        expected = [[answer.expected for answer in answers]]
        return {"eval/chrf": metric.corpus_score([a.generated for a in answers], expected).score}

    return score


def _rouge() -> Function:
    """`eval/rouge1`, `eval/rouge2`, `eval/rougeL`, 0 to 1: mean F-measures (Lin 2004) as
    rouge-score computes them. Its words are a-z and 0-9: for other scripts take chrf."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _not_installed("rouge", "rouge-score") from error
    kinds = [key.removeprefix("eval/") for key in OF_ANSWERS["rouge"]]
    scorer = RougeScorer(kinds)

    def score(answers: list[Answer]) -> dict[str, float]:
        each = [scorer.score(answer.expected, answer.generated) for answer in answers]
        return {
            f"eval/{kind}": sum(one[kind].fmeasure for one in each) / len(each) for kind in kinds
        }

    return score


_OURS: dict[str, Callable[[], Function]] = {
    "exact_match": lambda: exact_match,
    "chrf": _chrf,
    "rouge": _rouge,
}


def _not_installed(metric: str, package: str) -> ConfigError:
    return ConfigError(
        f"eval.metrics: {metric} needs {package}, which is not installed: "
        "pip install 'gemtune[metrics]'"
    )


def _import(path: str) -> Function:
    module_name, _, name = path.rpartition(".")
    where = "It is looked for as Python does: installed, beside train.py, or in PYTHONPATH."
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever its top level does
        raise ConfigError(
            f"eval.metrics: {path} cannot be imported: {_said(error)}. {where}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = "has no" if function is None else "has no function"
        raise ConfigError(f"eval.metrics: {path}: the module {module_name} {there} {name}.")
    return function


def _scores(metric: str, function: Function, answers: list[Answer]) -> dict[str, float]:
    """What the function says of the answers, named. Raises what it raises, or TypeError."""
    # Copies: what it does to them is not what is kept.
    found = function([replace(answer) for answer in answers])
    if metric in _OURS:
        return found
    name = f"eval/{name_of(metric)}"
    if not isinstance(found, Mapping):
        return {name: _number(found)}
    if not found:
        raise TypeError("it returned an empty mapping")
    return {f"{name}_{key}": _number(value) for key, value in found.items()}


def _number(value: Any) -> float:
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"it returned {value!r}, which is no number") from None


def _culprit(metric: str, function: Function, answers: list[Answer]) -> str:
    """The row of the first answer that it fails on alone; empty without one."""
    for answer in answers:
        try:
            _scores(metric, function, [answer])
        except Exception:
            return f"{answer.where} (expected {answer.expected!r}, generated {answer.generated!r})"
    return ""


def _said(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
