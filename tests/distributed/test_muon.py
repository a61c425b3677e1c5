"""Muon on shares of matrices is Muon on the whole ones, to the bit; and its moment is resharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import findings, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gemtune.checkpoint.tensors import load_tensors, save_tensors
from gemtune.optim import Muon

pytestmark = pytest.mark.xdist_group("fsdp_runs")

SHAPES = {"wide": (16, 48), "tall": (48, 16), "uneven": (7, 33), "fewer rows than ranks": (2, 40)}


def matrices() -> nn.ParameterDict:
    torch.manual_seed(0)
    return nn.ParameterDict({name: torch.randn(shape) for name, shape in SHAPES.items()})


def gradients(step: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(step + 1)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def steps_on_shares(rank: int, num_ranks: int, folder: str, first: int, last: int) -> None:
    """Steps `first` to `last`; begins with what a group of another size left, if not at 0."""
    mesh = init_device_mesh("cpu", (num_ranks,))
    model = matrices()
    for name, p in model.items():
        model[name] = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
    optimizer = Muon(lr=0.1, weight_decay=0.5).build(model)
    checkpoint = Path(folder) / "checkpoint"
    if first > 0:
        held = {f"moment {n}": torch.zeros_like(p.detach()) for n, p in model.items()}
        load_tensors(checkpoint, held | {n: p.detach() for n, p in model.items()}, dist.group.WORLD)
        for name, p in model.items():
            optimizer.state[p]["momentum_buffer"] = held[f"moment {name}"]
    for step in range(first, last):
        for name, gradient in gradients(step).items():
            model[name].grad = distribute_tensor(gradient, mesh, [Shard(0)])
        optimizer.step()
        assert all(p.grad is not None for p in model.values())
    moments = {f"moment {n}": optimizer.state[p]["momentum_buffer"] for n, p in model.items()}
    assert all(isinstance(moment, DTensor) for moment in moments.values())
    if first == 0:
        save_tensors(
            checkpoint, moments | {n: p.detach() for n, p in model.items()}, dist.group.WORLD
        )
    whole = {name: p.full_tensor().detach() for name, p in model.items()}
    torch.save(whole, Path(folder) / f"rank{rank}.pt")


def test_shares_are_stepped_as_whole_matrices_are(tmp_path: Path) -> None:
    model = matrices()
    optimizer = Muon(lr=0.1, weight_decay=0.5).build(model)
    for num_ranks, first, last in ((2, 0, 2), (3, 2, 4)):
        run_ranks(
            steps_on_shares, num_ranks, num_ranks, str(tmp_path), first, last, limit_seconds=90
        )
        for step in range(first, last):
            for name, gradient in gradients(step).items():
                model[name].grad = gradient
            optimizer.step()
        for found in findings(tmp_path, num_ranks):
            for name, p in model.items():
                assert torch.equal(found[name], p.detach()), (num_ranks, name)
