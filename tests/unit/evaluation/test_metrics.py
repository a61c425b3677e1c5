"""Metrics of generated answers, against the libraries themselves and by hand."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gemtune.errors import ConfigError, TrainingError
from gemtune.evaluation import Answer, EvalConfig, load_metrics, score_together

PAIRS = [
    ("the cat sat", "the cat ran"),
    ("It is blue.", "It is blue."),
    ("drei Äpfel", "zwei Äpfel und mehr"),
    ("nothing in common", ""),
]
ANSWERS = [
    Answer(f"row {number}", None, "?", expected, generated)
    for number, (expected, generated) in enumerate(PAIRS)
]

OWN = """
import random
import numpy as np
import torch

def count(answers):
    return len(answers)

def several(answers):
    return {"first": 1, "right": sum(a.correct for a in answers) / len(answers)}

def draws(answers):
    return random.random() + np.random.rand() + float(torch.rand(()))

def fails_always(answers):
    raise KeyError("weights")

def fails_on_umlauts(answers):
    for a in answers:
        a.expected.encode("ascii")
    return 1.0

def fails_on_many(answers):
    if len(answers) > 3:
        raise ValueError("too many")
    return 1.0

def says(answers):
    return "0.5"

def says_nothing(answers):
    return None

def says_no_names(answers):
    return {}

def changes(answers):
    for a in answers:
        a.generated = a.expected
    return 1.0

loss = count
not_a_function = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`own_scores.NAME` can be named."""
    (tmp_path / "own_scores.py").write_text(OWN)
    (tmp_path / "broken_scores.py").write_text("import nothing_of_that_name")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("own_scores", "broken_scores"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def scores(*metrics: str, **keys: str) -> dict[str, float]:
    return load_metrics(EvalConfig(metrics=list(metrics), **keys)).score(ANSWERS)


def test_exact_match_by_kind() -> None:
    answers = [
        Answer("1", "sum", "", "4", "4"),
        Answer("2", "sum", "", "5", "5."),
        Answer("3", "word", "", "a", "a"),
        Answer("4", None, "", "b", "c"),
    ]
    assert load_metrics(EvalConfig()).score(answers) == {
        "eval/exact_match": 0.5,
        "eval/exact_match_sum": 0.5,
        "eval/exact_match_word": 1.0,
    }
    assert load_metrics(EvalConfig()).score([]) == {}


def test_chrf_is_sacrebleus_of_the_corpus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="not installed: 'gemtune[metrics]'")
    expected, generated = zip(*PAIRS, strict=True)
    found = scores("chrf")
    assert found == {"eval/chrf": sacrebleu.corpus_chrf(list(generated), [list(expected)]).score}
    assert 0 < found["eval/chrf"] < 100


def test_chrf_by_hand() -> None:
    pytest.importorskip("sacrebleu", reason="not installed: pip install 'gemtune[metrics]'")
    (metric,) = load_metrics(EvalConfig(metrics=["chrf"])).functions.values()
    # 1-grams: precision 2/2, recall 2/4; 2-grams: 1/1 and 1/3. Longer ones are in one text only.
    precision, recall = 1.0, (1 / 2 + 1 / 3) / 2
    expected = 100 * 5 * precision * recall / (4 * precision + recall)
    assert metric([Answer("", None, "", "abcd", "ab")])["eval/chrf"] == pytest.approx(expected)


def test_rouge_is_the_mean_of_rouge_scores_and_by_hand() -> None:
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="'gemtune[metrics]'")
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    each = [scorer.score(expected, generated) for expected, generated in PAIRS]
    found = scores("rouge")
    for kind in ("rouge1", "rouge2", "rougeL"):
        mean = sum(one[kind].fmeasure for one in each) / len(each)
        assert found[f"eval/{kind}"] == pytest.approx(mean)
    (metric,) = load_metrics(EvalConfig(metrics=["rouge"])).functions.values()
    # the cat sat, the cat ran: two words of three, one pair of two, two in order of three.
    assert metric(ANSWERS[:1]) == pytest.approx(
        {"eval/rouge1": 2 / 3, "eval/rouge2": 1 / 2, "eval/rougeL": 2 / 3}
    )


@pytest.mark.parametrize(("metric", "package"), [("chrf", "sacrebleu"), ("rouge", "rouge-score")])
def test_a_missing_package_is_named(
    metric: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sacrebleu", "sacrebleu.metrics", "rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError, match=rf"{metric} needs {package}.*pip install 'gemtune\[metrics\]'"
    ):
        scores(metric)


def test_functions_of_the_user(own: None) -> None:
    assert scores("own_scores.count", "own_scores.several", "own_scores.changes") == {
        "eval/count": 4.0,
        "eval/several_first": 1.0,
        "eval/several_right": 0.25,
        "eval/changes": 1.0,
    }
    assert ANSWERS[0].generated == "the cat ran"  # what a function changes is its copy


def test_trying_draws_no_random_number(own: None) -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    load_metrics(EvalConfig(metrics=["own_scores.draws"]))
    assert draws() == expected


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("own_scores.fails_always", r"fails_always failed on two made-up answers: KeyError"),
        ("own_scores.says", r"says failed.*TypeError: it returned '0\.5', which is no number"),
        ("own_scores.says_nothing", r"it returned None, which is no number"),
        ("own_scores.says_no_names", r"it returned an empty mapping"),
        ("own_scores.absent", r"the module own_scores has no absent"),
        ("own_scores.not_a_function", r"the module own_scores has no function not_a_function"),
        ("absent_module.score", r"cannot be imported: ModuleNotFoundError.*PYTHONPATH"),
        ("broken_scores.score", r"cannot be imported: .*nothing_of_that_name"),
    ],
)
def test_what_cannot_score_is_refused_at_once(own: None, metric: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scores(metric)


def test_a_failure_in_the_run_names_the_row(own: None) -> None:
    with pytest.raises(TrainingError) as failed:
        scores("own_scores.fails_on_umlauts")
    text = str(failed.value)
    assert "own_scores.fails_on_umlauts failed on row 2 (expected 'drei Äpfel'" in text
    assert "UnicodeEncodeError" in text and "run the same command again" in text
    with pytest.raises(TrainingError, match="fails_on_many failed on all 4 rows together: Value"):
        scores("own_scores.fails_on_many")


def test_all_ranks_have_the_figures_of_the_main_process(own: None) -> None:
    """As rank 1 sees it: what rank 0 sends is taken, figures or failure."""

    def rank_1(outcome: tuple[dict[str, float], str]) -> SimpleNamespace:
        return SimpleNamespace(is_main=False, world_size=2, collect=lambda items: [outcome, *items])

    metrics = load_metrics(EvalConfig(metrics=["own_scores.count"]))
    assert score_together(rank_1(({"eval/count": 4.0}, "")), metrics, ANSWERS) == {"eval/count": 4}
    with pytest.raises(TrainingError, match="failed there"):
        score_together(rank_1(({}, "failed there")), metrics, ANSWERS)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metrics": ["chrff"]}, r"'chrff' is not one of exact_match, chrf, rouge.*'chrf'"),
        ({"metrics": ["chrf", "chrf"]}, r"chrf would be logged as eval/chrf, which is taken"),
        ({"metrics": ["my.loss"]}, r"my\.loss would be logged as eval/loss, which is taken"),
        ({"metrics": ["a.score", "b.score"]}, r"logged as eval/score, which is taken"),
        ({"best_metric": "eval/chrf"}, r"eval/chrf is not measured.*eval\.metrics=\['exact_match"),
        ({"best_metric": "eval/los"}, r"Did you mean 'eval/loss'"),
        (
            {"metrics": ["a.score"], "best_metric": "eval/score"},
            r"eval/score is yours: .*eval\.best_mode=min or eval\.best_mode=max",
        ),
        ({"best_mode": "most"}, r"eval\.best_mode=most is not one of auto, min, max"),
        ({"early_stopping_patience": 0}, r"early_stopping_patience=0 is too small"),
        ({"samples": -1}, r"eval\.samples=-1 is too small"),
    ],
)
def test_keys_that_cannot_be(keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvalConfig(**keys)


def test_a_best_metric_that_no_function_returns(own: None) -> None:
    keys = {"best_metric": "eval/several_wrong", "best_mode": "max"}
    with pytest.raises(ConfigError, match=r"several_wrong is not measured.*eval/several_first"):
        scores("own_scores.several", **keys)


@pytest.mark.parametrize(
    ("keys", "cadence", "message"),
    [
        ({"generate_every_steps": 3}, (2, 8, True), r"must be a multiple of loop\.eval_every_st"),
        ({"generate_every_steps": 3}, (None, 8, True), r"loop\.eval_every_steps=None"),
        ({"generate_every_steps": 2}, (2, 0, True), r"data\.eval_generate_rows=0"),
        ({"early_stopping_patience": 2}, (None, 8, True), r"set loop\.eval_every_steps"),
        ({"best_metric": "eval/exact_match"}, (2, 8, True), r"set eval\.generate_every_steps"),
        ({"best_metric": "eval/token_accuracy"}, (2, 8, False), r"linear_cross_entropy"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict, cadence: tuple, message: str) -> None:
    every, rows, counts = cadence
    with pytest.raises(ConfigError, match=message):
        EvalConfig(**keys).check_cadence(every, rows, counts_tokens=counts)


def test_the_direction_of_our_metrics_is_known() -> None:
    modes = {
        "eval/loss": "min",
        "eval/perplexity": "min",
        "eval/token_accuracy": "max",
        "eval/exact_match": "max",
        "eval/exact_match_sum": "max",
        "eval/chrf": "max",
        "eval/rougeL": "max",
    }
    metrics = ["exact_match", "chrf", "rouge"]
    for key, mode in modes.items():
        assert EvalConfig(metrics=metrics, best_metric=key).mode == mode
    assert EvalConfig(best_mode="max").mode == "max"
