"""Two ranks without the audio tower, copies or shards, do what one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hearing import WITHOUT, all_tensors, hearing_checkpoint, is_audio
from ranks import run_ranks
from sharded_runs import COMMON, Case, mostly_text, trains
from whole_runs import RunFolder, TrainRun

pytestmark = pytest.mark.xdist_group("without_audio_runs")

STRATEGIES = ("ddp", "fsdp2")
# The vision tower is trained, so that it stands in where a rank has no image. Audio has none.
KEYS = (
    "recipe=gemma4_lora",
    "adapter.parts=[language,vision,projector]",
    "model.weights=pretrained",
    "model.dtype=float32",
    "loop.max_steps=5",
    "data.eval_generate_rows=0",
    WITHOUT,
)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    parent = tmp_path_factory.mktemp("hearing")
    base = hearing_checkpoint(parent, torch.float32)
    path = mostly_text(parent / "rows.parquet")
    return (*KEYS, f"model.path={base}", f"data.path={path}", f"data.eval_path={path}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, keys: tuple[str, ...]) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    cases = {name: Case((*keys, f"parallel={name}")) for name in STRATEGIES}
    run_ranks(trains, 2, cases, str(folder), limit_seconds=400)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks(runs: Path, keys: tuple[str, ...], train_run: TrainRun, strategy: str) -> None:
    run, alone = RunFolder(runs / strategy / "run", 0), train_run(*COMMON, *keys)
    assert run.losses() == pytest.approx(alone.losses(), rel=1e-4)
    ours, theirs = (all_tensors(each.path / "model") for each in (run, alone))
    base = all_tensors(Path(keys[len(KEYS)].partition("=")[2]))
    assert ours.keys() == theirs.keys() == base.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5)
        if is_audio(name):
            assert torch.equal(value, base[name])
    assert sum(map(is_audio, base)) > 40
