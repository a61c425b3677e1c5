"""The way of optimizer state between the memory that it rests in and the one it is stepped in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gemtune.errors import TrainingError
from gemtune.patches.host_memory import pinned_block

MakeMemory = Callable[[int], Tensor]
"""Number of bytes -> uint8 of that length."""


class Transport:
    """Copies blocks into two buffers, which take turns, and back; each when it is called.

    Turn 0 uses the one buffer, turn 1 the other, turn 2 the first again, so that one block can come
    while another is worked with. Never more than these two buffers are taken.

    Args:
        rest: makes memory where blocks rest.
        work: makes memory where they are worked with.
    """

    def __init__(self, rest: MakeMemory, work: MakeMemory) -> None:
        self.rest, self._work = rest, work
        self._buffers: list[Tensor] = []

    def open(self, sizes: Sequence[int]) -> None:
        """Make the buffers for blocks of these sizes, in the order of their turns."""
        self._buffers = [self._work(max(sizes[slot::2], default=0)) for slot in (0, 1)]

    def buffer(self, turn: int) -> Tensor:
        """The one of this turn."""
        return self._buffers[turn % 2]

    def bring(self, turn: int, block: Tensor) -> None:
        """Begin to copy a block into the buffer of its turn. The one before it has left, or will
        have before a byte of it is overwritten."""
        self.buffer(turn)[: block.numel()].copy_(block)

    def arrive(self, turn: int) -> None:
        """Whatever is computed from now on finds the block of this turn in its buffer."""

    def take_back(self, turn: int, block: Tensor) -> None:
        """Begin to copy it back, as what has been computed so far leaves it."""
        block.copy_(self.buffer(turn)[: block.numel()])

    def close(self) -> None:
        """Every block is back, and the buffers are free."""
        self._buffers = []


class CudaTransport(Transport):
    """Between pinned host memory and a GPU, beside the computation.

    One stream brings and one takes back, so that both directions of the bus are in use. They wait
    for each other and for the computation by events; the CPU waits in `close` alone.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(_pinned, lambda n: torch.empty(n, dtype=torch.uint8, device=device))
        self._device = device
        self._coming, self._going = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._arrived: list[torch.cuda.Event | None] = [None, None]
        self._emptied: list[torch.cuda.Event | None] = [None, None]

    def open(self, sizes: Sequence[int]) -> None:
        super().open(sizes)
        # The buffers may lie in memory that the computation so far is not done with.
        self._coming.wait_stream(torch.cuda.current_stream(self._device))
        self._arrived, self._emptied = [None, None], [None, None]

    def bring(self, turn: int, block: Tensor) -> None:
        emptied = self._emptied[turn % 2]
        if emptied is not None:
            self._coming.wait_event(emptied)
        with torch.cuda.stream(self._coming):
            self.buffer(turn)[: block.numel()].copy_(block, non_blocking=True)
            self._arrived[turn % 2] = self._coming.record_event()

    def arrive(self, turn: int) -> None:
        arrived = self._arrived[turn % 2]
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)

    def take_back(self, turn: int, block: Tensor) -> None:
        self._going.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._going):
            block.copy_(self.buffer(turn)[: block.numel()], non_blocking=True)
            self._emptied[turn % 2] = self._going.record_event()

    def close(self) -> None:
        # Not only for the buffers, which go back to the allocator: a checkpoint may read next.
        self._coming.synchronize()
        self._going.synchronize()
        super().close()


def _pinned(num_bytes: int) -> Tensor:
    try:
        return pinned_block(num_bytes)
    except OSError as error:
        raise TrainingError(
            f"optim.offload_state=true: {error}. Raise that limit, or train with "
            "optim.offload_state=false."
        ) from error
