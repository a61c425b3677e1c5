"""How much memory the logits of a loss may take at once: a CPU's caches want less than a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MIB = 1 << 20
CPU_CHUNK_BYTES = 256 * MIB
ACCELERATOR_CHUNK_BYTES = 1024 * MIB
CPU_TILE_BYTES = 2 * MIB  # with its scratch still in cache; 64 MiB costs 1.5 times as much
ACCELERATOR_TILE_BYTES = 64 * MIB  # large enough to hide kernel launches

_as_on_accelerator = False


def default_chunk_bytes(device: torch.device) -> int:
    """Logits of a chunk, in float32."""
    return CPU_CHUNK_BYTES if _is_cpu(device) else ACCELERATOR_CHUNK_BYTES


def tile_bytes(device: torch.device) -> int:
    """Logits that are worked on at once, within a chunk."""
    return CPU_TILE_BYTES if _is_cpu(device) else ACCELERATOR_TILE_BYTES


@contextmanager
def accelerator_budgets() -> Iterator[None]:
    """Within it tensors of the CPU get the budgets of a GPU: for the planner, which follows a
    program for a GPU where there is none."""
    global _as_on_accelerator
    before, _as_on_accelerator = _as_on_accelerator, True
    try:
        yield
    finally:
        _as_on_accelerator = before


def _is_cpu(device: torch.device) -> bool:
    return device.type == "cpu" and not _as_on_accelerator
