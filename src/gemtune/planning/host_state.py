"""Optimizer state that a run keeps in host memory, told apart from the device's in a plan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemtune.optim.offloaded import OffloadedOptimizer
from gemtune.optim.transport import Transport
from gemtune.planning.storages import OPTIMIZER_STATE, StorageFollower


def rest_on_host(
    optimizer: torch.optim.Optimizer,
    follower: StorageFollower,
    empty: Callable[[tuple[int, ...], torch.dtype], Tensor],
) -> None:
    """Have an offloaded optimizer move its state as on a GPU, although all is on the CPU here.

    The optimizer moves it itself: blocks at rest are left out of the count, and the buffers of a
    step count. Any other optimizer is left as it is.

    Args:
        empty: makes a tensor that is not counted.
    """
    if not isinstance(optimizer, OffloadedOptimizer):
        return
    blocks: list[Tensor] = []  # what is left out must not make room for what counts

    def rest(num_bytes: int) -> Tensor:
        blocks.append(empty((num_bytes,), torch.uint8))
        follower.leave_out(blocks[-1:])
        return blocks[-1]

    def work(num_bytes: int) -> Tensor:
        buffer = empty((num_bytes,), torch.uint8)
        follower.add([buffer], OPTIMIZER_STATE)
        return buffer

    optimizer.transport = Transport(rest, work)


def host_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the blocks in host memory that hold state of what has been stepped."""
    if not isinstance(optimizer, OffloadedOptimizer) or optimizer.transport is None:
        return 0
    return optimizer.resting_bytes
