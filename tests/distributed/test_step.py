"""One optimizer step of two processes, with a module of one layer."""

from __future__ import annotations

import math
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from gemtune.data.batching.stream import BatchStream
from gemtune.loop import Session, step
from gemtune.memory import PeakTracker
from gemtune.runtime import ParallelConfig, RunSettings, start

ROWS = torch.arange(12, dtype=torch.float32).reshape(4, 3) / 10


@dataclass
class Rows:
    """A micro-batch: some rows, of which each counts as `weight` tokens."""

    values: torch.Tensor
    weight: int
    inputs: dict[str, torch.Tensor] = field(init=False)
    labels: torch.Tensor = field(init=False)
    rows: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inputs = {"values": self.values}
        self.labels = torch.zeros(len(self.values))
        self.num_supervised_tokens = self.weight * len(self.values)
        self.num_tokens = self.num_supervised_tokens + 1

    def to(self, device: torch.device) -> Rows:
        return self


@dataclass
class Output:
    """DDP looks for tensors in dataclasses and dicts."""

    loss: torch.Tensor


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2)
        # As transformers before 5.10 registers RoPE frequencies: in the order of a set, which is
        # another one in every process.
        names = ["ones", "twos"] if os.environ.get("RANK") == "1" else ["twos", "ones"]
        for name in names:
            self.register_buffer(name, torch.full((2,), 1.0 + (name == "twos")), persistent=False)

    def forward(self, values: torch.Tensor, labels: torch.Tensor) -> Output:
        return Output(self.linear(values).square().sum(1).mean())


def session_for(run_dir: Path) -> Session:
    runtime = start(RunSettings(dir=str(run_dir)), ParallelConfig(timeout_seconds=60))
    model = runtime.distribute(Layer())
    return Session(
        runtime=runtime,
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
        learning_rate=lambda step: 0.1,
        memory=PeakTracker(runtime.device),
        forward_options={},
        state=SimpleNamespace(step=0),
        num_steps=9,
        log=lambda record: None,
        evaluation_batches=list,
        save=lambda: None,
    )


def parameters(session: Session) -> list[torch.Tensor]:
    return [p.detach().clone() for p in session.model.parameters()]


def two_ranks(rank: int, port: int, run_dir: str) -> None:
    """What each of the two processes does; leaves its findings in a file."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    torch.set_num_threads(1)
    session = session_for(Path(run_dir))
    assert session.runtime.world_size == 2
    # Unequal in every way: rank 0 has one micro-batch of 3 rows, rank 1 one of a single row.
    mine = ROWS[:3] if rank == 0 else ROWS[3:]
    found: dict[str, Any] = {"start": parameters(session)}

    bad = mine.clone()
    if rank == 1:
        bad[0, 0] = math.nan
    found["bad"] = step(session, [Rows(bad, 5)], max_grad_norm=1.0)
    found["after bad"] = parameters(session)
    if rank == 1:  # the loss is finite everywhere, one rank's gradient is not
        weight = session.runtime.unwrap(session.model).linear.weight
        hook = weight.register_hook(lambda gradient: gradient * math.nan)
    found["bad gradient"] = step(session, [Rows(mine, 5)], max_grad_norm=1.0)
    found["after bad gradient"] = parameters(session)
    if rank == 1:
        hook.remove()
    found["optimizer after bad"] = len(session.optimizer.state)
    found["good"] = step(session, [Rows(mine, 5)], max_grad_norm=None)
    found["after good"] = parameters(session)
    found["buffers"] = {name.rpartition(".")[2]: b for name, b in session.model.named_buffers()}
    torch.save(found, f"{run_dir}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_nan_on_one_rank_changes_nothing_on_any(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(two_ranks, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]

    for found in ranks:
        assert not found["bad"].updated and math.isnan(found["bad"].loss)
        assert not found["bad gradient"].updated and math.isfinite(found["bad gradient"].loss)
        assert math.isnan(found["bad gradient"].grad_norm) and not found["bad gradient"].spike
        assert all(map(torch.equal, found["after bad gradient"], found["start"]))
        assert found["optimizer after bad"] == 0
        assert all(map(torch.equal, found["after bad"], found["start"]))
        assert found["good"].updated and found["good"].loss == ranks[0]["good"].loss
        assert all(map(torch.equal, found["after good"], ranks[0]["after good"]))
        assert not any(map(torch.equal, found["after good"], found["start"]))
        assert len(found["good"].peaks_gib) == len(found["good"].readings) == 2
        assert found["good"].longest_row_tokens == 3  # rank 0's labels, also on rank 1
        assert found["buffers"]["ones"].tolist() == [1.0, 1.0]
        assert found["buffers"]["twos"].tolist() == [2.0, 2.0]

    # What one process makes of all four rows in one micro-batch.
    layer = Layer()
    loss = layer(ROWS, torch.zeros(4)).loss
    loss.backward()
    norm = nn.utils.clip_grad_norm_(layer.parameters(), math.inf)
    assert abs(ranks[0]["good"].loss - float(loss.detach())) < 1e-6
    assert abs(ranks[0]["good"].grad_norm - float(norm)) < 1e-5
    assert ranks[0]["good"].supervised_tokens == 20


def test_the_order_of_samples_does_not_depend_on_the_processes() -> None:
    def rows(world_size: int, micro_batch_size: int, step: int) -> list[int]:
        shares = [
            BatchStream(
                dataset=range(21),
                seed=3,
                global_batch_size=8,
                micro_batch_size=micro_batch_size,
                rank=rank,
                world_size=world_size,
            ).rows_of(step)
            for rank in range(world_size)
        ]
        return sorted(row for share in shares for batch in share for row in batch)

    for step_number in range(6):  # more than two epochs
        assert rows(1, 8, step_number) == rows(2, 1, step_number) == rows(4, 2, step_number)
    seen = [row for step_number in range(21) for row in rows(2, 3, step_number)]
    assert sorted(seen) == sorted([*range(21)] * 8)
