"""Muon against its formula in float64; what it steps, and how the two optimizers act as one."""

from __future__ import annotations

import copy

import pytest
import torch
from gemma4_zoo import build
from torch import nn

from gemtune import adapters
from gemtune.adapters import Lora
from gemtune.errors import ConfigError
from gemtune.optim import AdamW, Muon
from gemtune.optim.combined import CombinedOptimizer
from gemtune.optim.groups import find_trained


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Five turns of the quintic iteration (Jordan 2024) on the singular values, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_matrices_take_the_step_of_the_formula(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(shape[1], shape[0], bias=False).double()
    settings = Muon(lr=0.1, weight_decay=0.5, momentum=0.8)
    optimizer = settings.build(model)
    expected, moment = model.weight.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    for _ in range(3):
        gradient = torch.randn(shape, dtype=torch.float64)
        model.weight.grad = gradient.clone()
        before = model.weight.detach().clone()
        optimizer.step()
        moment = 0.8 * moment + 0.2 * gradient
        direction = orthogonalised(0.2 * gradient + 0.8 * moment)
        update = -0.1 * 0.2 * max(shape) ** 0.5 * direction  # arXiv:2502.16982, section 2.2
        decayed = before * (1 - 0.1 * 0.5)
        # torch iterates in bfloat16, of three digits.
        assert relative_error(model.weight.detach() - decayed, update) < 0.02
        expected = expected * (1 - 0.1 * 0.5) + update
    assert relative_error(model.weight.detach(), expected) < 0.01


def test_an_update_has_the_size_of_adamws() -> None:
    torch.manual_seed(0)
    for shape in ((64, 256), (256, 64)):
        model = nn.Linear(*shape, bias=False)
        optimizer = Muon(lr=1.0).build(model)
        before = model.weight.detach().clone()
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()
        size = float((model.weight.detach() - before).square().mean().sqrt())
        assert 0.1 < size < 0.4  # AdamW's is between 0.2 and 0.4 in practice


@pytest.mark.parametrize("family", ["e2b", "26b_a4b"])
def test_what_is_a_matrix_between_hidden_states(family: str) -> None:
    model = build(family, hears=family == "e2b")
    optimizer = Muon(weight_decay=0.1, part_lrs={"vision": 1e-5}).build(model)
    by_muon = {
        id(p) for group in optimizer.param_groups for p in group["params"] if "ns_steps" in group
    }
    names = {n for n, p in model.named_parameters() if id(p) in by_muon}
    rest = {n for n, _ in model.named_parameters()} - names
    layer = "model.language_model.layers.0."
    assert {f"{layer}self_attn.q_proj.weight", f"{layer}mlp.down_proj.weight"} <= names
    assert "model.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight" in names
    assert "model.embed_vision.embedding_projection.weight" in names
    unfit = (
        "embed_tokens",
        "table",
        "norm",
        "experts",
        "patch_embedder",
        "conv.",
        "conv1d.d",
        "scale",
    )
    assert not [n for n in names if any(word in n for word in unfit)]
    assert all(any(word in n for word in (*unfit, "conv", "bias")) for n in rest), rest
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for p in model.parameters()
    )
    rates = {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rates == {(2e-5, 0.1), (2e-5, 0.0), (1e-5, 0.1), (1e-5, 0.0)}


def test_factors_of_adapters_are_stepped_by_adamw() -> None:
    model = adapters.attach(build("e2b"), Lora(rank=2, also_train=["ple_projection"]))
    optimizer = Muon().build(model)
    names = {id(p): n for n, p in model.named_parameters()}
    by_muon = [
        names[id(p)]
        for group in optimizer.param_groups
        for p in group["params"]
        if "ns_steps" in group
    ]
    assert by_muon and all("per_layer" in name for name in by_muon)
    with pytest.raises(ConfigError, match=r"no matrix between hidden states.*optim=adamw"):
        Muon().build(adapters.attach(build("e2b"), Lora(rank=2)))


def trained_model(settings: AdamW) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 6), nn.LayerNorm(6))
    return model, settings.build(model)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_the_rest_takes_the_step_of_adamw() -> None:
    ours, optimizer = trained_model(Muon(lr=0.01, weight_decay=0.1))
    theirs, adamw = trained_model(AdamW(lr=0.01, weight_decay=0.1))
    for seed in range(3):
        step(ours, optimizer, seed)
        step(theirs, adamw, seed)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q) == (name != "1.weight"), name


def test_both_are_one_optimizer() -> None:
    model, optimizer = trained_model(Muon(lr=0.01))
    assert isinstance(optimizer, CombinedOptimizer)
    step(model, optimizer, seed=1)
    trained = [each.parameter for each in find_trained(model)]
    slots = [set(optimizer.state[p]) for p in trained]
    assert slots.count({"momentum_buffer"}) == 1
    assert slots.count({"step", "exp_avg", "exp_avg_sq"}) == len(trained) - 1
    optimizer.zero_grad()
    assert all(p.grad is None for p in trained)

    other, again = trained_model(Muon(lr=0.5))
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (2, 3):
        step(model, optimizer, seed)
        step(other, again, seed)
    assert all(torch.equal(p, q) for p, q in zip(trained, other.parameters(), strict=True))
    for group in again.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(other.state_dict())
    step(other, again, seed=4)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
