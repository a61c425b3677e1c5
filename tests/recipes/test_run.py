"""What a run leaves behind."""

from __future__ import annotations

import json

import pytest
import yaml
from whole_runs import RunFolder, TrainRun, compose

PHASES = ("forward", "loss", "backward", "optimizer")


def test_every_step_is_one_object_in_metrics(finished_run: RunFolder) -> None:
    metrics = finished_run.metrics()
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4]
    for record in metrics[1:]:
        for key in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "step_seconds"):
            assert record[f"train/{key}"] > 0
        assert isinstance(record["train/supervised_tokens"], int)
        assert 0 < record["train/supervised_tokens"] < record["train/tokens"]
        assert record["train/nonfinite_steps"] == 0
        assert record["memory/peak_rank"] == 0
        assert record["memory/peak_gib_per_rank"] == [record["memory/peak_gib"]]
        phases = [record[f"memory/{phase}_peak_gib"] for phase in PHASES]
        assert max(phases) == record["memory/peak_gib"] > 0
    # Cosine without warm-up: the first step has the full rate, every later one less.
    rates = [m["train/learning_rate"] for m in metrics[1:]]
    assert rates[0] == 3e-3 and rates == sorted(rates, reverse=True) and rates[-1] < rates[0] / 2


def test_evaluation_is_recorded_before_and_after(finished_run: RunFolder) -> None:
    first, *between, last = finished_run.metrics()
    assert set(first) == {"step", "eval/loss", "eval/perplexity", "eval/token_accuracy"}
    assert not any("eval/loss" in m for m in between)
    for metrics in (*between, last):
        assert 0 <= metrics["train/token_accuracy"] <= 1
        assert metrics["train/entropy"] > 0
    assert last["eval/loss"] < first["eval/loss"]
    assert 0 <= last["eval/exact_match"] <= 1


def test_evaluation_in_between_changes_no_loss(
    train_run: TrainRun, finished_run: RunFolder
) -> None:
    run = train_run("loop.eval_every_steps=1")
    assert all("eval/loss" in m for m in run.metrics())
    assert run.losses() == finished_run.losses()


def test_answers_are_kept(finished_run: RunFolder) -> None:
    lines = (finished_run.path / "answers.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == 4
    for answer in answers:
        assert answer["question"] and answer["expected"] and "heldout.parquet" in answer["where"]
        assert answer["correct"] == (answer["generated"] == answer["expected"])
    share = sum(a["correct"] for a in answers) / 4
    assert finished_run.metrics()[-1]["eval/exact_match"] == share


def test_config_file_is_complete(finished_run: RunFolder) -> None:
    written = yaml.safe_load((finished_run.path / "config.yaml").read_text())
    assert written["loop"]["max_steps"] == 4 and written["optim"]["lr"] == 0.003
    # Every section, and in it every key, defaults included.
    expected = compose().as_dict()
    assert {s: set(v) for s, v in written.items()} == {s: set(v) for s, v in expected.items()}


def test_the_folder_holds_what_is_documented(finished_run: RunFolder) -> None:
    assert {p.name for p in finished_run.path.iterdir()} == {
        "answers.jsonl",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "rejected.jsonl",
        "report.html",
        "run.json",
        "status.json",
    }
    assert finished_run.status == 0
    assert [p.name for p in finished_run.checkpoints()] == ["step_00000002", "step_00000004"]
    assert {p.name for p in finished_run.checkpoints()[-1].iterdir()} == {
        ".metadata",
        "COMPLETE",
        "__0_0.distcp",
        "manifest.json",
        "rng_rank0.json",
        "state.json",
    }


def test_two_runs_of_one_seed_are_the_same(train_run: TrainRun, finished_run: RunFolder) -> None:
    again = train_run()
    assert again.losses() == finished_run.losses()
    assert again.training_state() == finished_run.training_state()


def test_a_folder_is_a_model(
    train_run: TrainRun, finished_run: RunFolder, tiny_checkpoint, capsys: pytest.CaptureFixture
) -> None:
    run = train_run(f"model.path={tiny_checkpoint}", "model.weights=pretrained", "loop.max_steps=1")
    first = run.metrics()[0]["eval/loss"]
    assert first == pytest.approx(finished_run.metrics()[-1]["eval/loss"], abs=1e-6)
    line = f"loss of the starting model on the evaluation rows: {first:.4f}"
    assert line in capsys.readouterr().out
