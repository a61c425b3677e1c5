"""How much memory the loss takes in all, beside its inputs and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kept_bytes import Alive
from lm_head import IGNORE, problem

from gemtune.losses import linear_cross_entropy

MIB = 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.7])
def test_the_peak_is_the_chunk_the_gradients_and_a_tenth(
    dtype: torch.dtype, frozen: bool, ignored: float
) -> None:
    hidden, weight, labels = problem(2048, 64, 16384, ignored=ignored, dtype=dtype)
    weight.requires_grad_(not frozen)
    chunk_bytes = 64 * MIB
    with Alive() as alive:
        loss, _ = linear_cross_entropy(
            hidden, weight, labels, softcap=30.0, chunk_bytes=chunk_bytes, metrics=True
        )
        loss.backward()
    # Sums are float32, and a gradient is rounded to the dtype of its input beside its sum.
    sums = 4 * (hidden.numel() + (0 if frozen else weight.numel()))
    rounded = 0 if dtype == torch.float32 else sums // 2
    compacted = (hidden.numel() * hidden.element_size()) if ignored else 0
    assert alive.peak <= 1.1 * chunk_bytes + sums + rounded + compacted + widened(weight)
    logits = 4 * int((labels != IGNORE).sum()) * len(weight)
    assert alive.peak > min(logits, chunk_bytes)


def widened(weight: Any) -> int:
    """A half-precision weight is widened on a CPU, 16 MiB at a time."""
    return 0 if weight.dtype == torch.float32 else min(16 * MIB, 4 * weight.numel())
