"""A packed run on two ranks, some of them without an image, does what one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
from gemma4_zoo import model_folder
from ranks import run_ranks
from sharded_runs import COMMON, Case, mostly_text, trains
from whole_runs import RunFolder, TrainRun

pytestmark = pytest.mark.xdist_group("fsdp_runs")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides: images that are seen in both directions, in some of the packed rows."""
    folder = tmp_path_factory.mktemp("packed")
    path = mostly_text(folder / "rows.parquet")
    return (
        f"model.path={model_folder('31b', folder)}",
        "model.weights=random",
        f"data.path={path}",
        f"data.eval_path={path}",
        "data.packing=true",
        "data.max_length=64",
        "data.eval_generate_rows=0",
        "loop.max_steps=6",
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, packed: tuple[str, ...]) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    cases = {name: Case((*packed, f"parallel={name}")) for name in ("ddp", "fsdp2")}
    run_ranks(trains, 2, cases, str(folder), limit_seconds=200)
    return folder


def test_two_ranks_do_what_one_does(
    runs: Path, packed: tuple[str, ...], train_run: TrainRun
) -> None:
    alone = train_run(*COMMON, *packed)
    assert alone.losses()[6] < alone.losses()[1] - 0.1
    for name in ("ddp", "fsdp2"):
        run = RunFolder(runs / name / "run", 0)
        assert run.losses() == pytest.approx(alone.losses(), rel=1e-5)
        for ours, theirs in zip(run.metrics(), alone.metrics(), strict=True):
            for key in ("train/supervised_tokens", "train/tokens"):
                assert ours.get(key) == theirs.get(key)
            assert ours.get("train/grad_norm", 0) == pytest.approx(
                theirs.get("train/grad_norm", 0), rel=1e-3
            )
