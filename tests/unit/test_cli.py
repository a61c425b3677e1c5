"""train.py as a person meets it: one clear message, no traceback, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def train(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["optim.lrr=1"], "error: optim.lrr is not a field of AdamW. Did you mean 'lr'?"),
        (["model=tinyy"], "error: model=tinyy: there is no such model. Did you mean 'tiny'?"),
        (["data=chat", "data.path=nope.jsonl"], "error: data.path=nope.jsonl: there is no such"),
        (["model=e2b"], "3. give a local copy of the checkpoint: model.path=FOLDER"),
    ],
)
def test_a_mistake_is_one_message_and_changes_nothing(
    arguments: list[str], expected: str, tmp_path: Path
) -> None:
    result = train(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_lists_groups_keys_and_examples(tmp_path: Path) -> None:
    result = train("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "model: 26b_a4b, 31b, e2b, e4b, tiny" in result.stdout
    assert "loop.max_steps = null" in result.stdout
    assert "accelerate launch train.py recipe=gemma4_sft" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_cfg_shows_what_would_run_from_any_folder(tmp_path: Path) -> None:
    result = train("--cfg", "job", "--resolve", "recipe=gemma4_lora", "optim.lr=5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "name: gemma4_lora-tiny-digits" in result.stdout
    assert "lr: 5" in result.stdout
    assert "_target_: gemtune.adapters.Lora" in result.stdout
