"""The processes that write and read checkpoints together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from gemtune.errors import CheckpointError


@dataclass(frozen=True)
class Ranks:
    """All processes of the run, over a gloo group of their own.

    Its own, because a save in the background talks while the training does; gloo, because it says
    so when a peer has gone.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    """None: one process."""

    @classmethod
    def meet(cls, timeout_seconds: int) -> Ranks:
        """Make the group. Every rank calls it at the same point."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def collect(self, item: Any) -> list[Any]:
        """What every rank passed in, in the order of the ranks."""
        if self.world_size == 1:
            return [item]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, item, group=self.group)
        return found

    def all_or_none(self, action: Callable[[], Any]) -> Any:
        """Run `action` on every rank and wait for all; return its value.

        If it failed on one, whatever the failure, every rank raises CheckpointError: an exception
        on one rank alone would leave the others waiting for it.
        """
        value, failure = None, None
        try:
            value = action()
        except Exception as error:
            failure = error
        text = None if failure is None else str(failure) or repr(failure)
        for rank, failed in enumerate(self.collect(text)):
            if failed:
                where = f"rank {rank}: " if self.world_size > 1 else ""
                raise CheckpointError(f"{where}{failed}") from failure
        return value

    def on_main(self, action: Callable[[], Any]) -> Any:
        """`action` on rank 0 alone; every rank gets its value, or raises as `all_or_none` does."""
        return self.collect(self.all_or_none(lambda: action() if self.is_main else None))[0]
