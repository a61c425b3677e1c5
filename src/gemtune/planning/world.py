"""The first process of a run of several, alone: collectives have their shapes and no partners."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from gemtune.errors import ConfigError


@contextmanager
def first_of(num_processes: int) -> Iterator[None]:
    """Within it this process is rank 0 of so many, in a process group that moves nothing.

    Rank 0 has the largest shard: FSDP2 cuts into chunks of equal size, of which the last ones are
    smaller or empty. Every rank is as this one: where values are gathered, they are its own. The
    group is gone afterwards, whatever happens.

    Raises:
        ConfigError: this process belongs to a process group already.

    Source: torch.testing._internal.distributed.fake_pg.
    """
    if dist.is_initialized():
        raise ConfigError(
            f"The plan of a sharded run (parallel=fsdp2, plan.world_size={num_processes}) makes a "
            "process group of its own, and this process belongs to one already. Plan it in another "
            "process: python scripts/plan_memory.py."
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=num_processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
