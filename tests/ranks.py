"""Several processes of one group (gloo), which leave their findings in a folder."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


def run_ranks(
    work: Callable[..., None], num_ranks: int, *arguments: Any, limit_seconds: float
) -> None:
    """`work(rank, *arguments)` in as many processes, as `accelerate launch` would set them up.

    An exception in one fails the test with its traceback. None outlives this call.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.spawn(
        _enter, (work, num_ranks, port, arguments), nprocs=num_ranks, join=False
    )
    deadline = time.monotonic() + limit_seconds
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                pytest.fail(f"{work.__name__} on {num_ranks} ranks: no end in {limit_seconds} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def _enter(
    rank: int, work: Callable[..., None], num_ranks: int, port: int, arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=120))
    work(rank, *arguments)
    dist.barrier()  # gloo aborts a process whose peer leaves early
    dist.destroy_process_group()


def findings(folder: Path, num_ranks: int) -> list[dict[str, Any]]:
    """What each rank wrote with `torch.save` to rank<N>.pt."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(num_ranks)]
