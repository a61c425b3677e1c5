"""The script: the keys of train.py, and its own; what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "plan_memory.py"
SMALL = ("loop.micro_batch_size=2", "data.max_length=64")


def plan_memory(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


def test_a_plan_on_the_screen_and_as_a_document(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    images = ("data.max_length=96", "plan.images_per_row=1")
    done = plan_memory("loop.micro_batch_size=2", *images, f"plan.output={path}")
    assert done.returncode == 0, done.stderr
    plan = json.loads(path.read_text())
    assert f"peak: {plan['peak_bytes'] / 2**30:.2f} GiB of tensors, in {plan['phase']}" in (
        done.stdout
    )
    assert "planned for 2 rows, 192 tokens" in done.stdout and "2 images" in done.stdout
    assert list(plan["phases"]) == ["forward", "loss", "backward", "optimizer"]
    for phase in plan["phases"].values():
        assert sum(phase["by_kind"].values()) == phase["peak_bytes"]
    highest = plan["phases"][plan["phase"]]
    assert highest["peak_bytes"] == plan["peak_bytes"] > 2**24
    assert any("language_model.layers.*." in name for name in highest["by_module"])
    assert "forward" in done.stderr, "it says where it is"


def test_the_rows_of_the_data_and_changes_where_it_fits(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    wanted = ("plan.from_data=true", "plan.alternatives=2", "plan.device_memory_gib=4")
    done = plan_memory(
        "loop.micro_batch_size=2", "data.max_rows=40", "data.max_length=64", *wanted,
        f"plan.output={path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(path.read_text())
    # The longest of these rows have two images of four tokens.
    assert plan["batch"] == "2 rows, 104 tokens, 10 of them learned, 4 images"
    assert next(iter(plan)) == "peak_gib"
    assert plan["peak_gib"] == round(plan["peak_bytes"] / 2**30, 3)
    assert plan["device_memory_gib"] == 4
    assert [p["overrides"] for p in plan["proposals"]] == [
        ["model.gradient_checkpointing=true"],
        ["model.gradient_checkpointing=true", "loop.micro_batch_size=1"],
    ]
    assert all(p["fits"] for p in plan["proposals"])
    assert "fits into 4 GiB" in done.stdout and not list(tmp_path.glob(".*"))


def test_the_plan_of_a_shard(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    done = plan_memory(*SMALL, "parallel=fsdp2", "plan.world_size=2", f"plan.output={path}")
    assert done.returncode == 0, done.stderr
    assert "first of 2 processes; fsdp2: 2 shards of the model (as asked for)" in done.stdout
    plan = json.loads(path.read_text())
    assert (plan["world_size"], plan["strategy"]) == (2, "fsdp2")
    held = plan["phases"]["forward"]
    assert sum(held["by_kind"].values()) == held["peak_bytes"]
    assert min(held["by_kind"][kind] for kind in ("gathered weights", "staging buffers")) > 0


def test_where_nothing_fits_it_says_what_was_tried() -> None:
    fixed = ("adapter=lora", "parallel.mixed_precision=bf16", "model.freeze=[]")
    done = plan_memory(*SMALL, *fixed, "plan.device_memory_gib=1.001")
    assert done.returncode == 1, done.stderr
    assert "does not fit into 1.001 GiB" in done.stdout
    assert "model.gradient_checkpointing=true" in done.stdout
    assert "loop.micro_batch_size=1" in done.stdout
    assert "nothing was found that fits" in done.stdout


def test_what_fits_can_be_typed() -> None:
    # 18.9 MB for stock transformers, 18.5 MB with the patches; 1 GiB is reserved.
    fixed = ("model.gradient_checkpointing=true", "loop.micro_batch_size=1", "model.freeze=[ple]")
    stock = plan_memory("data.max_length=64", *fixed, "patches=[]", "plan.device_memory_gib=1.0174")
    assert stock.returncode == 0, stock.stdout
    assert "more patches: vision_position_lookup, " in stock.stdout
    [line] = [each for each in stock.stdout.splitlines() if each.startswith("fits with: ")]
    overrides = shlex.split(line.removeprefix("fits with: "))
    assert overrides[0].startswith("patches=[vision_position_lookup,vision_pooler,")
    again = plan_memory("data.max_length=64", *fixed, *overrides, "plan.device_memory_gib=1.0174")
    assert again.returncode == 0 and "\nfits into 1.0174 GiB" in again.stdout


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("plan.world_sise=2", "Did you mean 'world_size'?"),
        ("plan.world_size=two", "plan.world_size wants a whole number"),
        ("plan.device=tpu", "plan.device"),
        ("plan.output=absent/plan.json", "plan.output=absent/plan.json: there is no folder"),
        ("loop.micro_batch_sise=2", "Did you mean 'micro_batch_size'?"),
        ("plan.world_size=7", "cannot be shared evenly by 7 processes"),
    ],
)
def test_a_mistake_is_one_message(argument: str, answer: str) -> None:
    done = plan_memory(argument)
    assert done.returncode == 2
    assert answer in done.stderr and "Traceback" not in done.stderr


def test_alone_it_says_what_it_takes() -> None:
    assert "plan.device_memory_gib=24" in plan_memory().stdout
