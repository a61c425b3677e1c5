"""What `auto` decides, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gemtune.errors import ConfigError
from gemtune.optim import AdamW, AdamW8bit, Muon
from gemtune.parallel import (
    ParallelConfig,
    Strategy,
    decide,
    refuse_foreign_sharding,
    refuse_sharding,
    smallest_device_bytes,
    training_bytes,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("asked", "processes", "copy_gib", "device_gib", "expected", "said"),
    [
        ("auto", 8, 47, 80, "ddp", "47.0 GiB"),
        ("auto", 8, 49, 80, "fsdp2", "60% of the smallest GPU are 48.0 GiB"),
        ("auto", 1, 49, 80, "ddp", "a single process"),
        ("auto", 2, 49, None, "ddp", "not on GPUs"),
        ("ddp", 8, 49, 80, "ddp", "as asked for"),
        ("fsdp2", 2, 0, None, "fsdp2", "as asked for"),
    ],
)
def test_the_rule(
    asked: str, processes: int, copy_gib: int, device_gib: int | None, expected: str, said: str
) -> None:
    device_bytes = None if device_gib is None else device_gib * GIB
    strategy = decide(
        asked, num_processes=processes, copy_bytes=copy_gib * GIB, device_bytes=device_bytes
    )
    assert strategy.name == expected and said in strategy.reason
    line = strategy.describe(processes)
    assert str(processes) in line or "one process" in line
    assert processes == 1 or expected in line


def test_bytes_of_a_copy() -> None:
    trained = nn.Parameter(torch.empty(10, 3, device="meta"))
    frozen = nn.Parameter(torch.empty(7, dtype=torch.bfloat16, device="meta"), requires_grad=False)
    # Weight, gradient and two moments of 30 numbers in float32; 7 numbers in bfloat16.
    assert training_bytes([trained, frozen], AdamW().device_bytes) == 4 * 30 * 4 + 14
    offloaded = AdamW(offload_state=True)
    assert training_bytes([trained, frozen], offloaded.device_bytes) == 2 * 30 * 4 + 14


def test_shares_are_refused_where_the_optimizer_wants_whole_parameters() -> None:
    auto = Strategy("fsdp2", "auto: 49 of 80 GiB")
    refuse_sharding(auto, AdamW.name, AdamW.whole_only)
    refuse_sharding(auto, Muon.name, Muon.whole_only)
    with pytest.raises(ConfigError, match=r"8 bits cannot .* \(auto: 49 of 80 GiB\): its blocks"):
        refuse_sharding(auto, AdamW8bit.name, AdamW8bit.whole_only)
    refuse_sharding(Strategy("ddp"), AdamW8bit.name, AdamW8bit.whole_only)


def test_a_cpu_has_no_device_memory() -> None:
    assert smallest_device_bytes(torch.device("cpu")) is None


def test_a_misspelt_strategy_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'fsdp2'"):
        ParallelConfig(strategy="fsdp")


def test_a_launcher_that_shards_by_itself_is_refused() -> None:
    refuse_foreign_sharding("MULTI_GPU")
    with pytest.raises(ConfigError, match="configured for FSDP"):
        refuse_foreign_sharding("FSDP")
