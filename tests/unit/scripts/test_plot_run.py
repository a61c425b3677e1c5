"""plot_run draws what a run recorded, however short, and says in plain words when it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "plot_run.py"
PHASES = ("forward", "loss", "backward", "optimizer")


def plot(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def trained(step: int, peak_gib: float | None = 1.5) -> dict[str, Any]:
    record: dict[str, Any] = {"step": step, "train/loss": 6.0 / step, "train/learning_rate": 1e-3}
    record["train/tokens_per_second"] = 2500.0 + step
    return record | {f"memory/{phase}_peak_gib": peak_gib for phase in PHASES}


def write(folder: Path, *records: dict[str, Any], end: str = "") -> Path:
    folder.mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + end)
    return folder


RUNS = {
    "finished": [
        {"step": 0, "eval/loss": 6.6},
        *(trained(step) for step in range(1, 200)),
        trained(200) | {"eval/loss": 0.04, "eval/exact_match": 0.97},
    ],
    "one_step": [trained(1)],
    "not_trained_yet": [{"step": 0, "eval/loss": 6.6}],
    "resumed_without_step_0": [trained(7), trained(8) | {"eval/loss": 0.5}],
    "no_peaks_and_a_loss_of_nan": [trained(1, None), trained(2, None) | {"train/loss": None}],
    "only_a_step": [{"step": 3}],
}


@pytest.mark.parametrize("name", RUNS)
def test_draws(name: str, tmp_path: Path) -> None:
    run = write(tmp_path / name, *RUNS[name], end='{"step": 9, "train/lo')  # cut short by a crash
    done = plot(run, "-o", tmp_path / "new" / "out.png")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    with Image.open(tmp_path / "new" / "out.png") as picture:
        assert picture.width > picture.height > 500
        # Every panel has something drawn into it: many colours, no empty page.
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 20


def test_without_an_output_the_picture_is_beside_the_metrics(tmp_path: Path) -> None:
    run = write(tmp_path / "run", trained(1))
    assert plot(run).returncode == 0
    assert (run / "metrics.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no metrics.jsonl"),
        ("", "holds no record yet"),
        ("not json\n[1]\n", "holds no record yet"),
    ],
)
def test_a_folder_without_metrics_is_an_error_in_words(
    content: str | None, words: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = plot(tmp_path, "-o", tmp_path / "out.png")
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.png").exists()


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    done = plot(tmp_path / "nowhere")
    assert done.returncode == 2
    assert "nowhere is not a folder" in done.stderr


def test_without_matplotlib_it_says_how_to_get_it(tmp_path: Path) -> None:
    run = write(tmp_path / "run", trained(1))
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    done = plot(run, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "pip install matplotlib" in done.stderr
    assert "Traceback" not in done.stderr
