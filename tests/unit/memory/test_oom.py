"""The report of an out-of-memory error: which errors it takes, and what it says."""

from __future__ import annotations

import pytest
import torch

from gemtune.errors import TrainingError
from gemtune.memory.oom import (
    Place,
    advice,
    describe,
    is_out_of_memory,
    reported_when_out_of_memory,
)

PLACE = Place(
    rank=3,
    step=17,
    phase="backward of micro-batch 2 of 4",
    rows=["chat.jsonl line 5", "chat.jsonl line 9"],
    shapes={"input_ids": [2, 2048], "pixel_values": [3, 2520, 768]},
    num_tokens=3071,
    peaks_gib={"forward": 1.5, "loss": float("nan"), "backward": 2.25},
    device=torch.device("cpu"),
    advice=["this", "then that"],
)


def real_cpu_error() -> Exception:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    return raised.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (real_cpu_error(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyError("x"), False),
    ],
)
def test_which_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_what_it_says() -> None:
    with pytest.raises(TrainingError) as raised, reported_when_out_of_memory(lambda: PLACE):
        torch.empty(1 << 60)
    lines = str(raised.value).splitlines()
    assert lines[0] == "out of memory on rank 3 in step 17, phase backward of micro-batch 2 of 4"
    assert "can't allocate memory" in lines[1]
    assert lines[2].endswith(
        "2 rows, 3071 tokens; input_ids [2, 2048], pixel_values [3, 2520, 768]"
    )
    assert lines[3] == "  rows: chat.jsonl line 5; chat.jsonl line 9"
    assert "GiB resident now" in lines[4]
    assert lines[5].endswith("GiB: forward 1.50, backward 2.25")
    assert lines[-2:] == ["  1. this", "  2. then that"]
    assert describe(PLACE, MemoryError()).splitlines()[1] == "  MemoryError"


def test_another_error_is_left_alone() -> None:
    error = RuntimeError("shapes")
    with pytest.raises(RuntimeError) as raised, reported_when_out_of_memory(lambda: PLACE):
        raise error
    assert raised.value is error


def test_advice_depends_on_what_is_on() -> None:
    settings = {
        "micro_batch_size": 4,
        "max_length": 2048,
        "gradient_checkpointing": False,
        "patches_off": ["rms_norm"],
        "adapter": False,
        "world_size": 2,
        "sharded": False,
        "mixed_precision": False,
    }
    all_of_it = advice(**settings)
    starts = ("loop.micro", "model.gradient", "patches", "parallel=fsdp2", "data.max", "recipe=")
    assert all(line.startswith(start) for line, start in zip(all_of_it, starts, strict=True))
    assert "loop.micro_batch_size=2 (now 4)" in all_of_it[0]
    done = settings | {
        "micro_batch_size": 1,
        "gradient_checkpointing": True,
        "patches_off": [],
        "adapter": True,
        "sharded": True,
    }
    assert [line.split()[0] for line in advice(**done)] == ["data.max_length"]
