"""The gradient depends on the rows alone, and a gradient that is not finite changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import RunFolder, TrainRun

from gemtune.checkpoint.tensors import read_tensors
from gemtune.data import BatchStream
from gemtune.errors import TrainingError


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """NaN in the images of the last micro-batch of these steps."""
    original = BatchStream.__call__

    def poisoned(self: BatchStream, first: int, last: int) -> Iterator[Any]:
        for step, micro_batches in enumerate(original(self, first, last), start=first + 1):
            if step in steps:
                micro_batches[-1].inputs["pixel_values"].fill_(math.nan)
            yield micro_batches

    monkeypatch.setattr(BatchStream, "__call__", poisoned)


# Adam divides by the size of the gradient: with its usual eps, entries that are zero but for
# rounding move as far as any other, and every rounding error becomes a visible one.
SMOOTH = ("optim.eps=0.01", "optim.lr=1e-3")


def test_micro_batch_size_decides_nothing(train_run: TrainRun, tmp_path: Path) -> None:
    first, *others = [
        train_run(*SMOOTH, f"loop.micro_batch_size={size}", run_dir=tmp_path / str(size))
        for size in (4, 2, 8)
    ]
    # Rows of different numbers of supervised tokens: a mean of means would differ.
    assert any(m["train/supervised_tokens"] % 8 for m in first.metrics()[1:])
    assert first.losses()[4] < first.losses()[1] - 0.5
    for run in others:
        assert run.losses() == pytest.approx(first.losses(), rel=2e-6)
        for mine, other in zip(run.metrics()[1:], first.metrics()[1:], strict=True):
            assert mine["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-4)
            assert mine["train/supervised_tokens"] == other["train/supervised_tokens"]


def test_patches_decide_nothing(train_run: TrainRun, tmp_path: Path) -> None:
    patched = train_run(*SMOOTH)
    stock = train_run(*SMOOTH, "patches=[]", run_dir=tmp_path / "stock")
    assert stock.losses() == pytest.approx(patched.losses(), rel=1e-5)


def test_weights_in_host_memory_decide_nothing(train_run: TrainRun, tmp_path: Path) -> None:
    frozen = "model.freeze=[ple,vision]"
    stock = train_run(*SMOOTH, frozen, "patches=[]", run_dir=tmp_path / "stock")
    chosen = "patches=[ple_offload,vision_streaming,linear_cross_entropy]"
    offloaded = train_run(*SMOOTH, frozen, chosen, run_dir=tmp_path / "offloaded")
    assert offloaded.losses() == pytest.approx(stock.losses(), rel=1e-5)


def test_a_step_that_is_not_finite_changes_nothing(
    train_run: TrainRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    poison(monkeypatch, 2)
    run = train_run("checkpoint.every_steps=1", "checkpoint.keep_last=9")
    first, second, third, _ = run.checkpoints()
    tensors = [read_tensors(checkpoint) for checkpoint in (first, second, third)]
    for name, before in tensors[0].items():
        assert torch.equal(tensors[1][name], before)
    assert any(not torch.equal(tensors[2][name], before) for name, before in tensors[0].items())
    assert [m.get("train/nonfinite_steps") for m in run.metrics()] == [None, 0, 1, 1, 1]
    assert run.metrics()[2]["train/loss"] is None
    assert all(math.isfinite(m["train/loss"]) for m in run.metrics() if m["step"] in (1, 3, 4))
    assert "step 2: loss nan" in capsys.readouterr().out


def test_too_many_such_steps_end_the_run(
    train_run: TrainRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    poison(monkeypatch, 2, 3)
    with pytest.raises(TrainingError) as stopped:
        train_run("loop.max_nonfinite_steps=1", "checkpoint.every_steps=1")
    text = str(stopped.value)
    last = RunFolder(tmp_path / "runs" / "run", 0).metrics()[-1]
    assert (last["step"], last["train/nonfinite_steps"], last["train/loss"]) == (3, 2, None)
    # The rows of the micro-batch whose loss was not finite, not those of the other one.
    assert "step 3" in text and text.count("train.parquet row ") == 4
    assert "2 such steps, 1 allowed" in text
