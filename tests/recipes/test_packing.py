"""A run on packed rows learns what the same run on padded rows does."""

from __future__ import annotations

from pathlib import Path

import pytest
from gemma4_zoo import model_folder
from whole_runs import TrainRun

NUM_ROWS = 24
# Every step has all rows, so that packed or not it has the same ones. Adam's usual eps would make
# visible steps of rounding errors.
WHOLE = (
    f"data.max_rows={NUM_ROWS}",
    "optim.eps=0.01",
    "optim.lr=1e-3",
    "loop.micro_batch_size=3",
    "loop.max_steps=3",
    "data.eval_generate_rows=0",
)
# 24 rows of 24 to 52 tokens; what is left of a row of 96 takes no other.
NUM_PACKED_ROWS = 9


@pytest.mark.parametrize(
    ("family", "patches"),
    [("e2b", ()), ("31b", ()), ("31b", ("patches=[]",))],
    ids=["e2b", "31b", "31b-stock"],
)
def test_losses_and_gradients_are_those_of_padded_rows(
    family: str, patches: tuple[str, ...], train_run: TrainRun, tmp_path: Path
) -> None:
    model = (f"model.path={model_folder(family, tmp_path)}", "model.weights=random", *patches)
    padded = train_run(
        *WHOLE, *model, f"loop.global_batch_size={NUM_ROWS}", run_dir=tmp_path / "padded"
    )
    packed = train_run(
        *WHOLE,
        *model,
        "data.packing=true",
        "data.max_length=96",
        f"loop.global_batch_size={NUM_PACKED_ROWS}",
        run_dir=tmp_path / "packed",
    )
    assert packed.losses()[3] < packed.losses()[1] - 0.1
    assert packed.losses() == pytest.approx(padded.losses(), rel=2e-6)
    for mine, other in zip(packed.metrics()[1:], padded.metrics()[1:], strict=True):
        assert mine["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-4)
        for key in ("train/supervised_tokens", "train/tokens"):
            assert mine[key] == other[key]
    assert packed.metrics()[-1]["eval/loss"] == pytest.approx(
        padded.metrics()[-1]["eval/loss"], rel=1e-5
    )


def test_an_epoch_is_counted_in_packed_rows(
    train_run: TrainRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_run(
        f"data.max_rows={NUM_ROWS}",
        "data.packing=true",
        "data.max_length=96",
        "loop.max_steps=null",
        "loop.max_epochs=2",
        "loop.global_batch_size=2",
        "data.eval_generate_rows=0",
    )
    assert max(run.losses()) == 2 * NUM_PACKED_ROWS / 2
    said = " ".join(capsys.readouterr().out.split())
    assert f"packed into {NUM_PACKED_ROWS} rows of up to 96 tokens" in said
