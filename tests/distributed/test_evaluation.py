"""Several ranks judge together: they share the rows, agree on the figures, and stop at one step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import load_file
from sharded_runs import COMMON, Case, trains
from whole_runs import RunFolder, TrainRun, train_in_process

from gemtune.checkpoint.tensors import read_tensors
from gemtune.errors import TrainingError

JUDGED = (
    "loop.max_steps=6",
    "loop.eval_every_steps=2",
    "eval.generate_every_steps=2",
    "eval.metrics=[exact_match,rank_metrics.alone]",
    "eval.best_metric=eval/alone",
    "eval.best_mode=max",
    "eval.early_stopping_patience=1",
    "eval.export_best=true",
    "checkpoint.save_best=true",
    "checkpoint.every_steps=null",
    "data.eval_generate_rows=5",  # 3 of one rank, 2 of the other
)
OWN = """
import os

def alone(answers):
    # Differs between ranks and between calls: what one says must hold for all.
    alone.calls = getattr(alone, "calls", 0) + 1
    assert os.environ.get("RANK", "0") == "0" or answers[0].where.startswith("made-up")
    return -float(alone.calls)

def fails(answers):
    if not answers[0].where.startswith("made-up"):
        raise ValueError("no word for it")
    return 1.0
"""


def judges(rank: int, folder: str) -> None:
    """The worker: under DDP and sharded, and with a metric that fails on rank 0."""
    sys.path.insert(0, folder)
    cases = {kind: Case((*JUDGED, f"parallel={kind}")) for kind in ("ddp", "fsdp2")}
    for kind, case in cases.items():
        import rank_metrics  # type: ignore[import-not-found]

        rank_metrics.alone.calls = 0
        trains(rank, {kind: case}, folder)
    failing = ("loop.max_steps=1", "eval.metrics=[rank_metrics.fails]", "parallel=ddp")
    with pytest.raises(TrainingError, match=r"rank_metrics\.fails failed on .*no word for it"):
        train_in_process(*COMMON, *failing, run_dir=Path(folder) / "failing")
    dist.barrier()


def test_ranks_judge_as_one_process_does(
    train_run: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rank_metrics.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rank_metrics", raising=False)
    alone = train_run(*COMMON, *JUDGED)
    assert list(alone.losses()) == [1, 2, 3, 4]  # worse with each call: stopped at the second
    run_ranks(judges, 2, str(tmp_path), limit_seconds=150)
    for kind in ("ddp", "fsdp2"):
        run = RunFolder(tmp_path / kind / "run", 0)
        assert run.losses() == pytest.approx(alone.losses(), rel=1e-4)
        assert [p.name for p in run.checkpoints()] == ["step_00000002", "step_00000004"]
        for ours, theirs in zip(run.metrics(), alone.metrics(), strict=True):
            keys = {key for key in theirs if key.startswith("eval/")}
            assert keys == {key for key in ours if key.startswith("eval/")}
            for key in keys:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
        lines = [(r.path / "answers.jsonl").read_text().splitlines() for r in (run, alone)]
        assert lines[0] == lines[1] and len(lines[0]) == 5  # in the order of the rows
        status = json.loads((run.path / "status.json").read_text())
        assert (status["status"], status["step"]) == ("finished", 4)
        assert "the best was -2 after step 2" in status["reason"]
        exported = load_file(str(run.path / "model" / "model.safetensors"))
        best, last = map(read_tensors, run.checkpoints())
        for name in (
            "model.language_model.norm.weight",
            "model.language_model.embed_tokens.weight",
        ):
            assert torch.equal(exported[name], best[f"model|{name}"])
            assert not torch.equal(exported[name], last[f"model|{name}"])
