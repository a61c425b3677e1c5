"""Every byte that Python refers to stands under one owner, and once."""

from __future__ import annotations

import torch
from torch import nn

from gemtune.memory.holdings import holdings

CPU = torch.device("cpu")


def test_owners_of_a_step() -> None:
    layers = nn.ModuleList([nn.Linear(100, 200, bias=False) for _ in range(3)])
    model = nn.ModuleDict({"layers": layers, "head": nn.Linear(200, 100, bias=False)})
    model["head"].weight = nn.Parameter(layers[0].weight.detach().view(100, 200))  # tied storage
    model.register_buffer("table", torch.zeros(1234, dtype=torch.float64))
    optimizer = torch.optim.AdamW(layers.parameters())
    for parameter in layers.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    activation = torch.zeros(17, 33, 5, dtype=torch.bfloat16)
    view = activation[3:]

    found = holdings(model, optimizer, CPU)

    size = 100 * 200 * 4
    assert found["weights of layers.*"] == 3 * size
    assert "weights of head" not in found  # its storage is the first layer's
    assert found["gradients of layers.*"] == 3 * size
    # Two moments, and the count of steps.
    assert found["optimizer state of layers.*"] == 3 * (2 * size + 4)
    assert found["buffers of (root)"] == 1234 * 8
    mine = found["tensors of 17 x 33 x 5 bfloat16"] + found["tensors of 14 x 33 x 5 bfloat16"]
    assert mine == 17 * 33 * 5 * 2 and len(view)


def test_other_memory_does_not_count() -> None:
    model = nn.Linear(10, 10, device="meta")
    found = holdings(model, torch.optim.SGD(model.parameters()), CPU)
    assert not any(owner.startswith("weights") for owner in found)
