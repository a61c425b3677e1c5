"""Checkpoints of several processes: sharded, replicated, of another world size, and failing."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gemtune.checkpoint import (
    CheckpointConfig,
    CheckpointFolder,
    CheckpointWriter,
    Ranks,
    TrainState,
    first_undamaged,
    restore,
)
from gemtune.checkpoint import writer as writer_module
from gemtune.checkpoint.tensors import read_tensors
from gemtune.errors import CheckpointError

pytestmark = pytest.mark.xdist_group("checkpoints")

ROWS = torch.arange(36, dtype=torch.float64).reshape(6, 6).sin()


class Net(nn.Module):
    """Odd sizes, a frozen layer, a scalar, and a layer smaller than the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 5)
        self.narrow = nn.Linear(5, 1)
        self.scale = nn.Parameter(torch.ones(()))
        self.second.requires_grad_(False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.second(self.first(rows).sin()).sin()) * self.scale


def build(sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Net().double()
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        # A scalar cannot be sharded: it stays whole on each rank, as frozen towers do.
        for layer in (model.first, model.second, model.narrow):
            fully_shard(layer, mesh=mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.05, eps=1e-3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """All ranks see all rows, so that any number of them does the same."""
    losses = []
    for _ in range(steps):
        loss = model(ROWS).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def writer_for(
    folder: Path, ranks: Ranks, model: nn.Module, optimizer: Any, step: int, **settings: Any
) -> CheckpointWriter:
    return CheckpointWriter(
        ranks,
        CheckpointFolder(folder),
        CheckpointConfig(**settings),
        model,
        optimizer,
        TrainState("abc", step=step),
        {"config": {}},
    )


def run_rank(rank: int, world_size: int, port: int, tmp_path: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    ranks = Ranks.meet(timeout_seconds=60)
    run_dir, found = Path(tmp_path), {}
    for name in ("sharded", "replicated"):
        model, optimizer = build(name == "sharded")
        folder = run_dir / f"{name}_by_2"
        if world_size == 2:
            train(model, optimizer, 2)
            writer_for(folder, ranks, model, optimizer, 2).save()
        else:
            checkpoint = first_undamaged(
                ranks, CheckpointFolder(folder).committed(), CheckpointFolder(folder), print
            )
            restore(ranks, checkpoint, model, optimizer, run_dir=run_dir, base=None)
        found[name] = train(model, optimizer, 3)
        writer_for(run_dir / f"{name}_after_{world_size}", ranks, model, optimizer, 5).save()
    if world_size == 2:
        found |= in_the_background(run_dir, ranks) | failing(run_dir, ranks)
        found |= damaged(run_dir, ranks)
    torch.save(found, run_dir / f"found_{rank}_of_{world_size}.pt")
    dist.destroy_process_group()


def in_the_background(run_dir: Path, ranks: Ranks) -> dict[str, Any]:
    """Saves while the training goes on, with collectives of its own."""
    model, optimizer = build(True)
    writer = writer_for(run_dir / "background", ranks, model, optimizer, 0, async_save=True)
    for step in (1, 2, 3):
        train(model, optimizer, 1)
        writer._state.step = step
        writer.save()
    train(model, optimizer, 1)
    writer.settle()
    return {"background": [p.name for p in CheckpointFolder(run_dir / "background").committed()]}


def failing(run_dir: Path, ranks: Ranks) -> dict[str, Any]:
    """Rank 1 cannot write its tensors, or its hashes; in the way or beside the training."""
    found: dict[str, Any] = {}
    model, optimizer = build(True)
    train(model, optimizer, 1)
    folder = CheckpointFolder(run_dir / "failing")
    writer_for(folder.path, ranks, model, optimizer, 1).save()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    places = {
        "tensors": (torch, "save"),
        "sidecars": (writer_module, "write_synced"),
        "hashes": (writer_module, "entries_of"),
    }
    for async_save in (False, True):
        for stage, (owner, name) in places.items():
            writer = writer_for(folder.path, ranks, model, optimizer, 2, async_save=async_save)
            with mock.patch.object(owner, name, full if ranks.rank == 1 else getattr(owner, name)):
                try:
                    writer.save()
                    writer.settle()
                    found[f"{stage} {async_save}"] = "no error"
                except CheckpointError as error:
                    found[f"{stage} {async_save}"] = str(error)
            dist.barrier()
            left = sorted(path.name for path in folder.path.iterdir())
            assert left == ["step_00000001"], (stage, left)
    return found


def damaged(run_dir: Path, ranks: Ranks) -> dict[str, Any]:
    """A bit of rank 1's file flips; all ranks agree on the one before."""
    folder = CheckpointFolder(run_dir / "damaged")
    model, optimizer = build(True)
    for step in (1, 2):
        writer_for(folder.path, ranks, model, optimizer, step).save()
    newest = folder.newest()
    assert newest is not None
    dist.barrier()
    if ranks.is_main:
        file = newest / "__1_0.distcp"
        content = bytearray(file.read_bytes())
        content[100] ^= 8
        file.write_bytes(content)
    dist.barrier()
    found = first_undamaged(ranks, folder.committed()[::-1], folder, lambda line: None)
    assert found is not None
    return {"undamaged": found.name}


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[dict]]]:
    """What two ranks wrote and did, and what three and one made of it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for world_size in (2, 3, 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(run_rank, (world_size, port, str(folder)), nprocs=world_size)
        found[world_size] = [
            torch.load(folder / f"found_{rank}_of_{world_size}.pt", weights_only=False)
            for rank in range(world_size)
        ]
    return folder, found


@pytest.mark.parametrize("name", ["sharded", "replicated"])
@pytest.mark.parametrize("world_size", [2, 3, 1])
def test_any_number_of_ranks_goes_on_exactly(findings: Any, name: str, world_size: int) -> None:
    folder, found = findings
    model, optimizer = build(False)
    expected = train(model, optimizer, 5)
    for rank in range(world_size):
        assert found[world_size][rank][name] == pytest.approx(expected[2:], rel=1e-12)
    (checkpoint,) = CheckpointFolder(folder / f"{name}_after_{world_size}").committed()
    tensors = read_tensors(checkpoint)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                tensors[f"model|{parameter_name}"], parameter.detach(), rtol=1e-12, atol=1e-14
            )
            for slot, value in optimizer.state[parameter].items():
                torch.testing.assert_close(
                    tensors[f"optimizer|{parameter_name}|{slot}"], value, rtol=1e-11, atol=1e-14
                )


def test_each_rank_writes_its_own_part(findings: Any) -> None:
    (checkpoint,) = CheckpointFolder(findings[0] / "sharded_by_2").committed()
    sizes = [(checkpoint / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
    assert min(sizes) > 0.5 * max(sizes)
    numbers = [(checkpoint / f"rng_rank{rank}.json").exists() for rank in (0, 1, 2)]
    assert numbers == [True, True, False]


def test_in_the_background(findings: Any) -> None:
    for found in findings[1][2]:
        assert found["background"] == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("stage", ["tensors", "sidecars", "hashes"])
def test_a_full_disk_of_one_rank_fails_on_all(findings: Any, stage: str, async_save: bool) -> None:
    for found in findings[1][2]:
        said = found[f"{stage} {async_save}"]
        assert "no space on the disk" in said and "needed" in said and "untouched" in said


def test_all_ranks_agree_on_what_is_damaged(findings: Any) -> None:
    assert [found["undamaged"] for found in findings[1][2]] == ["step_00000001"] * 2
