"""Evaluation in whole runs: it leaves no trace in the training, and decides what is documented."""

from __future__ import annotations

import json
import math
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from whole_runs import REPOSITORY, TrainRun, compose, press_ctrl_c_after

import recipes.gemma4_sft as recipe
from gemtune.checkpoint.tensors import read_tensors
from gemtune.errors import ConfigError, TrainingError
from gemtune.loop import Session

LORA = ("recipe=gemma4_lora", "adapter.dropout=0.1")
OWN = """
import random
import numpy as np
import torch

told = []

def noisy(answers):
    return random.random() + np.random.rand() + float(torch.rand(()))

def told_to(answers):
    made_up = answers[0].where.startswith("made-up")
    return 0.0 if made_up or not told else told.pop(0)

def fails_late(answers):
    for a in answers:
        if "row 3" in a.where and "heldout" in a.where:
            raise ValueError("no word for it")
    return 1.0
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """`own_metrics.NAME` can be named; what `told_to` returns in the evaluations of a run."""
    (tmp_path / "own_metrics.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_metrics", raising=False)
    import own_metrics  # type: ignore[import-not-found]

    return own_metrics.told


def test_generating_between_steps_changes_no_bit(
    train_run: TrainRun, tmp_path: Path, own: list[float]
) -> None:
    """With dropout, which shows where random numbers or modes are not put back."""
    alone = train_run(*LORA)
    judged = train_run(
        *LORA,
        "loop.eval_every_steps=1",
        "eval.generate_every_steps=2",
        "eval.metrics=[exact_match,own_metrics.noisy]",
        run_dir=tmp_path / "judged",
    )
    assert judged.losses() == alone.losses()
    assert judged.training_state() == alone.training_state()
    measured = {m["step"]: {k for k in m if k.startswith("eval/")} for m in judged.metrics()}
    of_tokens = {"eval/loss", "eval/perplexity", "eval/token_accuracy"}
    assert measured[1] == measured[3] == of_tokens
    assert measured[2] >= of_tokens | {"eval/exact_match", "eval/noisy"}
    assert measured[4] == measured[2]
    for m in judged.metrics():
        assert m["eval/perplexity"] == pytest.approx(math.exp(m["eval/loss"]))


class Spy(TorchDispatchMode):
    """Counts tensors as large as the logits of a batch; `vocabulary` is their last dimension."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.positions, self.seen = vocabulary, 1 << 60, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        output = function(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                rows = value.numel() // max(1, value.shape[-1])
                is_large = value.shape[-1] == self.vocabulary and rows >= self.positions
                self.seen += is_large and value.is_floating_point()
        return output


@pytest.mark.parametrize(
    ("patches", "has_logits"),
    [("linear_cross_entropy", False), ("supervised_positions", False), ("", True)],
)
def test_evaluation_makes_no_logits(
    train_run: TrainRun, monkeypatch: pytest.MonkeyPatch, patches: str, has_logits: bool
) -> None:
    evaluate, seen = recipe.evaluate, []

    def watched(session: Session) -> dict[str, float]:
        model = session.runtime.unwrap(session.model)
        spy, batches = Spy(model.config.get_text_config().vocab_size), session.evaluation_batches

        def noted() -> Any:
            for batch in batches():
                spy.positions = min(spy.positions, batch.labels.numel())
                yield batch

        session.evaluation_batches = noted
        with spy:
            found = evaluate(session)
        session.evaluation_batches = batches
        seen.append(spy.seen)
        return found

    monkeypatch.setattr(recipe, "evaluate", watched)
    train_run(f"patches=[{patches}]", "loop.max_steps=1", "data.eval_generate_rows=0")
    assert [number > 0 for number in seen] == [has_logits, has_logits]


STOPPING = (
    "loop.max_steps=9",
    "loop.eval_every_steps=2",
    "eval.early_stopping_patience=2",
    "eval.early_stopping_min_delta=100",
    "checkpoint.every_steps=4",
)


def test_early_stopping(train_run: TrainRun, capsys: pytest.CaptureFixture) -> None:
    run = train_run(*STOPPING)
    said = capsys.readouterr().out
    assert run.status == 0
    assert list(run.losses()) == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in run.checkpoints()] == ["step_00000004", "step_00000006"]
    assert "exact_match" in str(run.metrics()[-1]) and (run.path / "model").is_dir()
    assert "stopped early after step 6: eval/loss was no better by more than 100" in said
    status = json.loads((run.path / "status.json").read_text())
    assert (status["status"], status["exit_code"], status["step"]) == ("finished", 0, 6)
    assert "early_stopping_patience=2" in status["reason"]
    assert "This run ended after step 6 of 9: eval/loss was no" in (
        run.path / "report.html"
    ).read_text(encoding="utf-8")

    records, model = run.metrics(), (run.path / "model" / "model.safetensors").read_bytes()
    again = train_run(*STOPPING)  # trains no further
    assert (again.status, again.metrics()) == (0, records)
    assert "it was stopped early: eval/loss" in capsys.readouterr().out
    shutil.rmtree(run.path / "model")
    again = train_run(*STOPPING)  # killed before it was written: writes it, and trains no further
    assert again.losses() == run.losses()
    assert (run.path / "model" / "model.safetensors").read_bytes() == model

    with pytest.raises(ConfigError, match=r"early_stopping_patience: 2 there, None now"):
        train_run(*STOPPING, "eval.early_stopping_patience=null")
    more = train_run(*STOPPING, "run.name=more", f"run.resume={run.path}")
    assert list(more.losses()) == [7, 8, 9]  # a run of its own: what it waits for begins anew


def test_waiting_goes_on_after_ctrl_c(
    train_run: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        press_ctrl_c_after(patched, step=4)
        cut = train_run(*STOPPING)
    assert (cut.status, max(cut.losses())) == (130, 5)
    resumed = train_run(*STOPPING)
    assert (resumed.status, max(resumed.losses())) == (0, 6)


def test_the_best_by_any_metric_is_kept(
    train_run: TrainRun,
    own: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    command = (
        "loop.max_steps=6",
        "loop.eval_every_steps=1",
        "eval.generate_every_steps=1",
        "eval.metrics=[own_metrics.told_to]",
        "eval.best_metric=eval/told_to",
        "eval.best_mode=max",
        "checkpoint.keep_last=1",
        "checkpoint.every_steps=null",
        "checkpoint.save_best=true",
    )
    own[:] = [1.0, 3.0, 2.0]
    with monkeypatch.context() as patched:
        press_ctrl_c_after(patched, step=3)
        cut = train_run(*command)
    # Evaluated after steps 1, 2, 3 and (unknown: 0) 4, where it was stopped.
    assert [p.name for p in cut.checkpoints()] == ["step_00000002", "step_00000004"]
    own[:] = [2.5]
    run = train_run(*command)
    assert [p.name for p in run.checkpoints()] == ["step_00000002", "step_00000006"]
    state = json.loads((run.checkpoints()[-1] / "state.json").read_text())["state"]
    assert (state["best_metric"], state["best_mode"]) == ("eval/told_to", "max")
    assert (state["best_step"], state["best_value"]) == (2, 3.0)
    assert "Best of the evaluations between steps, by eval/told_to: 3" in (
        run.path / "report.html"
    ).read_text(encoding="utf-8")

    capsys.readouterr()
    main = runpy.run_path(str(REPOSITORY / "scripts" / "inspect_checkpoint.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["inspect_checkpoint.py", str(run.path)])
    assert main() == 0
    said = capsys.readouterr().out
    assert "best          step 2, eval/told_to 3.0000 (the maximum until then)" in said
    assert "eval/told_to  3.0000" in said  # of the checkpoint of step 2 itself


@pytest.mark.parametrize("best", [1, 4])
def test_the_best_weights_are_exported(
    train_run: TrainRun, own: list[float], capsys: pytest.CaptureFixture, best: int
) -> None:
    own[:] = [4.0 if step == best else float(step == 3) for step in (1, 2, 3, 4)]
    run = train_run(
        "loop.eval_every_steps=1",
        "eval.generate_every_steps=1",
        "eval.metrics=[own_metrics.told_to]",
        "eval.best_metric=eval/told_to",
        "eval.best_mode=max",
        "eval.export_best=true",
        "checkpoint.keep_last=9",
        "checkpoint.save_best=true",
    )
    said = capsys.readouterr().out
    assert ("exporting the weights of step_00000001" in said) == (best == 1)
    assert ("exporting the last weights: no checkpoint is better" in said) == (best == 4)
    exported = load_file(str(run.path / "model" / "model.safetensors"))
    chosen, other = (
        read_tensors(run.path / "checkpoints" / f"step_{step:08d}") for step in (best, 5 - best)
    )
    norm = "model.language_model.norm.weight"
    assert torch.equal(exported[norm], chosen[f"model|{norm}"])
    assert not torch.equal(exported[norm], other[f"model|{norm}"])
    assert f" after {best} steps of " in (run.path / "model" / "README.md").read_text()


def test_a_metric_that_fails_is_refused_before_anything(
    tmp_path: Path, train_run: TrainRun, own: list[float]
) -> None:
    with pytest.raises(ConfigError, match=r"own_metrics\.absent: the module own_metrics has no"):
        train_run("eval.metrics=[own_metrics.absent]", f"data.path={tmp_path}/absent.jsonl")
    assert not (tmp_path / "runs").exists()


def test_a_metric_that_fails_in_the_run_names_itself_and_the_row(
    train_run: TrainRun, tmp_path: Path, own: list[float]
) -> None:
    failing = "eval.metrics=[own_metrics.fails_late]"
    with pytest.raises(TrainingError, match=r"fails_late failed on .*heldout\.parquet.*row 3"):
        train_run(failing)
    status = json.loads((tmp_path / "runs" / "run" / "status.json").read_text())
    assert status["status"] == "failed" and "no word for it" in status["reason"]
    # As the message says: all steps are saved, and another metric may judge them.
    again = train_run()
    assert again.status == 0 and "eval/exact_match" in again.metrics()[-1]


def test_stopping_early_needs_rows(train_run: TrainRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"early_stopping_patience=2 has no rows to judge by"):
        train_run(*STOPPING, "data.eval_max_rows=0")
    assert not (tmp_path / "runs").exists()


def test_keys_are_checked_against_those_of_the_loop() -> None:
    with pytest.raises(ConfigError, match=r"generate_every_steps=3 must be a multiple of loop\.ev"):
        compose("eval.generate_every_steps=3", "loop.eval_every_steps=2")
    with pytest.raises(ConfigError, match=r"eval/token_accuracy comes with the patch"):
        compose("eval.best_metric=eval/token_accuracy", "patches=[rms_norm]")
