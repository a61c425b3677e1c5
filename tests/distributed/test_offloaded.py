"""Optimizer state of shares that is moved: the numbers of shares whose state stays, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from offloading import Counted, LateTransport, moved
from ranks import findings, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gemtune.checkpoint.reader import _destinations
from gemtune.checkpoint.tensors import load_tensors, save_tensors
from gemtune.checkpoint.writer import named_tensors
from gemtune.optim import AdamW, Muon
from gemtune.optim.offloaded import OffloadedOptimizer
from gemtune.optim.state_group import largest_share

pytestmark = pytest.mark.xdist_group("fsdp_runs")

SHAPES = {
    "wide": (16, 48),
    "tall": (48, 16),
    "uneven": (7, 33),
    "one row": (1, 40),  # of which the second rank has none
    "vector": (5,),
    "late": (12, 8),
}
GROUP_BYTES = 5 * 2**10


def shares(num_ranks: int) -> tuple[nn.ParameterDict, Any]:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (num_ranks,))
    model = nn.ParameterDict()
    for name, shape in SHAPES.items():
        model[name] = nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)]))
    return model, mesh


def feed(model: nn.ParameterDict, mesh: Any, step: int) -> None:
    torch.manual_seed(step + 1)
    for name, shape in SHAPES.items():
        gradient = distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
        model[name].grad = None if name == "late" and step < 2 else gradient


def same_state(ours: torch.optim.Optimizer, mine: Any, theirs: Any, plain: Any) -> bool:
    for name, parameter in mine.items():
        slots, expected = ours.state.get(parameter, {}), plain.state.get(theirs[name], {})
        if slots.keys() != expected.keys():
            return False
        for slot, value in expected.items():
            if type(slots[slot]) is not type(value) or slots[slot].shape != value.shape:
                return False
            local, other = (
                t.to_local() if isinstance(t, DTensor) else t for t in (slots[slot], value)
            )
            if not torch.equal(local, other):
                return False
    return True


def steps_on_shares(rank: int, num_ranks: int, folder: str) -> None:
    found: dict[str, bool] = {}
    for kind in (AdamW, Muon):
        settings = kind(lr=0.1, weight_decay=0.5)
        (ours, mesh), (theirs, _) = shares(num_ranks), shares(num_ranks)
        host, device = Counted(), Counted()
        optimizer = moved(settings, ours, GROUP_BYTES, LateTransport(host, device))
        plain = settings.build(theirs)
        name = kind.__name__
        found[f"{name}: several groups"] = optimizer.num_groups > 2
        is_same = True
        for step in range(4):
            for model, each in ((ours, optimizer), (theirs, plain)):
                feed(model, mesh, step)
                each.step()
            is_same &= all(torch.equal(p.to_local(), theirs[n].to_local()) for n, p in ours.items())
            is_same &= same_state(optimizer, ours, theirs, plain) and device.live == 0
        found[f"{name}: to the bit"] = is_same

        # Written with and read without, and the reverse; then on.
        pairs = {"offloaded": (ours, optimizer), "plain": (theirs, plain)}
        for which, (model, each) in pairs.items():
            path = Path(folder) / f"{name} {which}"
            path.mkdir(exist_ok=True)
            dist.barrier()
            save_tensors(path, named_tensors(model, each), dist.group.WORLD)
        for model, each in pairs.values():
            feed(model, mesh, 5)
            each.step()
        for which in pairs:
            model, _ = shares(num_ranks)
            again: torch.optim.Optimizer
            if which == "plain":
                again = moved(settings, model, GROUP_BYTES)
            else:
                again = settings.build(model)
            path = Path(folder) / f"{name} {which}"
            wanted = _destinations(path, model, again)
            load_tensors(path, wanted, dist.group.WORLD)
            for key, value in wanted.items():
                what, parameter, *slot = key.split("|")
                if what == "optimizer":
                    again.state[model[parameter]][slot[0]] = value
            feed(model, mesh, 5)
            again.step()
            found[f"{name}: on from {which}"] = same_state(again, model, theirs, plain) and all(
                torch.equal(p.to_local(), theirs[n].to_local()) for n, p in model.items()
            )
    # What a checkpoint is read into: shares on the device of the state, whatever the mesh says.
    parameter = shares(num_ranks)[0]["tall"]
    elsewhere = torch.zeros_like(parameter, dtype=torch.float64, device="meta")
    found["made elsewhere"] = (
        isinstance(elsewhere, DTensor)
        and elsewhere._local_tensor.is_meta
        and elsewhere._local_tensor.shape == parameter.to_local().shape
        and elsewhere.dtype == elsewhere._local_tensor.dtype == torch.float64
    )
    found["largest share"] = largest_share(parameter).shape == (48 // num_ranks, 16)
    torch.save(found, Path(folder) / f"rank{rank}.pt")


def test_shares_are_stepped_as_without(tmp_path: Path) -> None:
    run_ranks(steps_on_shares, 2, 2, str(tmp_path), limit_seconds=120)
    for found in findings(tmp_path, 2):
        assert len(found) == 10
        assert all(found.values()), found
    for name in ("AdamW", "Muon"):
        for file in (tmp_path / f"{name} plain").iterdir():
            assert file.read_bytes() == (tmp_path / f"{name} offloaded" / file.name).read_bytes()


def groups_of(rank: int, num_ranks: int, folder: str) -> None:
    """Which parameters each rank takes together, where shares differ."""
    model, _ = shares(num_ranks)
    optimizer = moved(Muon(), model, GROUP_BYTES)
    assert isinstance(optimizer, OffloadedOptimizer)
    names = {id(p): name for name, p in model.items()}
    groups = [[names[id(p)] for p in group.parameters] for group in optimizer._groups or ()]
    torch.save(groups, Path(folder) / f"rank{rank}.pt")


def test_groups_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    run_ranks(groups_of, 3, 3, str(tmp_path), limit_seconds=60)
    first, *others = findings(tmp_path, 3)
    assert len(first) > 2 and all(groups == first for groups in others)
    assert sorted(name for group in first for name in group) == sorted(SHAPES)
