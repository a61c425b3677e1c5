"""train.py with one fault: FAULT=KIND:RANK:STEP, at the forward pass of that step on that rank."""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from gemtune import signals  # noqa: E402

signals.install()
signals.follow_launcher()

import torch  # noqa: E402
from torch import nn  # noqa: E402

import recipes.gemma4_sft as recipe  # noqa: E402
from gemtune.data.batching.stream import BatchStream  # noqa: E402

KIND, RANK, STEP = os.environ["FAULT"].split(":")


def fail() -> None:
    """What the fault is."""
    begin()
    if KIND == "oom_cuda":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 ...")
    if KIND == "oom_cpu":
        torch.empty(1 << 60)
    elif KIND == "crash":
        raise ValueError("a fault that nobody foresaw")
    elif KIND == "segfault":
        os.abort()
    elif KIND == "hang":
        time.sleep(600)
    elif KIND == "pause":
        time.sleep(5)


def begin() -> None:
    """Let the test know."""
    if flag := os.environ.get("FAULT_FLAG"):
        Path(flag).touch()


def install_fault(model: nn.Module) -> None:
    """A forward hook on the model, as a part of it that fails."""
    seen = {"forwards": 0}
    forwards_of_a_step = int(os.environ.get("FORWARDS_OF_A_STEP", "1"))

    def hook(module: nn.Module, *_: Any) -> None:
        if KIND == "pause" and not module.training and seen["forwards"]:
            fail()  # in evaluation too
        if module.training:
            seen["forwards"] += 1
            if seen["forwards"] == (int(STEP) - 1) * forwards_of_a_step + 1:
                fail()

    model.register_forward_pre_hook(hook)


if os.environ.get("RANK", "0") == RANK:
    if KIND == "slow_load":
        original_prepare = recipe.prepare

        def prepare(*arguments: Any) -> Any:
            begin()
            time.sleep(60)
            return original_prepare(*arguments)

        recipe.prepare = prepare
    elif KIND == "slow_data":
        original_rows = BatchStream.rows_of

        def rows_of(self: BatchStream, step: int) -> list[list[int]]:
            if step == int(STEP) - 1:
                begin()
                time.sleep(60)
            return original_rows(self, step)

        BatchStream.rows_of = rows_of
    else:
        original_build = recipe.build

        def build(*arguments: Any) -> Any:
            stages = original_build(*arguments)
            install_fault(stages.base)
            return stages

        recipe.build = build

sys.argv[0] = str(ROOT / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
