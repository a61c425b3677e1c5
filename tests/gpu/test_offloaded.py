"""Optimizer state that moves between pinned host memory and a real GPU, beside its computation."""

from __future__ import annotations

import copy
import gc
import importlib.util

import pytest
import torch
from torch import nn

from gemtune.optim import AdamW, AdamW8bit, Muon
from gemtune.optim.offloaded import OffloadedOptimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB = 2**20
SETTINGS = [
    pytest.param(AdamW, id="adamw"),
    pytest.param(Muon, id="muon"),
    pytest.param(
        AdamW8bit,
        id="adamw_8bit",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("torchao") is None,
            reason="needs torchao: pip install -e '.[quant]'",
        ),
    ),
]


def model_of(layers: int, width: int = 1024) -> nn.Module:
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(layers)]
    return nn.Sequential(*made).cuda()


def feed(model: nn.Module, step: int) -> None:
    generator = torch.Generator("cuda").manual_seed(step)
    for number, parameter in enumerate(model.parameters()):
        gradient = torch.randn(parameter.shape, device="cuda", generator=generator)
        parameter.grad = None if number % 7 == step % 7 else gradient


@pytest.mark.parametrize("kind", SETTINGS)
def test_many_steps_in_a_row_are_those_of_the_plain_optimizer(kind: type[AdamW]) -> None:
    """Nothing is waited for in between: a copy too early or too late would show."""
    ours, theirs = model_of(24), model_of(24)
    settings = {"lr": 0.01, "weight_decay": 0.1}
    optimizer = kind(**settings, offload_state=True, offload_group_mib=16).build(ours)
    plain = kind(**settings).build(theirs)
    assert isinstance(optimizer, OffloadedOptimizer) and optimizer.num_groups >= 2
    for step in range(8):
        for model, each in ((ours, optimizer), (theirs, plain)):
            for group in each.param_groups:
                group["lr"] = 0.01 / (step + 1)
            feed(model, step)
            each.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
        mine, other = optimizer.state.get(p, {}), plain.state.get(q, {})
        assert list(mine) == list(other)
        for slot, value in other.items():
            assert mine[slot].device.type == "cpu" and torch.equal(mine[slot], value.cpu()), slot
    for group in optimizer._groups or ():
        assert group.block is not None and group.block.is_pinned()


def test_the_gpu_holds_two_groups_in_a_step_and_nothing_between() -> None:
    group_mib = 32
    model = model_of(24)
    settings = AdamW(offload_state=True, offload_group_mib=group_mib)
    optimizer = settings.build(model)
    gc.collect()
    torch.cuda.synchronize()
    feed(model, 0)
    before = torch.cuda.memory_allocated()
    largest = 0
    for _ in range(4):
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        largest = max(largest, torch.cuda.max_memory_allocated() - before)
        assert torch.cuda.memory_allocated() - before < MIB
    assert group_mib * MIB < largest < 2 * group_mib * MIB + 2 * MIB
    plain = AdamW().build(model)
    plain.step()
    assert torch.cuda.memory_allocated() - before > 4 * group_mib * MIB


def test_a_state_that_was_loaded_is_pinned_by_the_next_step() -> None:
    ours, theirs = model_of(4), model_of(4)
    optimizer = AdamW(lr=0.01, offload_state=True, offload_group_mib=16).build(ours)
    plain = AdamW(lr=0.01).build(theirs)
    for step in range(2):
        feed(theirs, step)
        plain.step()
    ours.load_state_dict(theirs.state_dict())
    before = torch.cuda.memory_allocated()
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert torch.cuda.memory_allocated() - before < MIB
    for step in range(2, 4):
        for model, each in ((ours, optimizer), (theirs, plain)):
            feed(model, step)
            each.step()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
