"""AdamW with moments in 8 bits: its arithmetic, its state, and what is said without torchao."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from whole_runs import SMALL, TrainRun, compose, press_ctrl_c_after

from gemtune.checkpoint.writer import named_tensors
from gemtune.errors import ConfigError
from gemtune.optim import AdamW, AdamW8bit
from gemtune.planning.memory_plan import PlanConfig, plan_memory

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install -e '.[quant]'"
)
RUN = ("optim=adamw_8bit", "optim.weight_decay=0.1", "optim.part_lrs.vision=1e-4")


def test_without_torchao_it_is_refused_before_anything_is_read_or_written(
    train_run: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else find(name, *a)
    )
    with pytest.raises(ConfigError, match=r"adamw_8bit needs torchao.*'gemtune\[quant\]'"):
        train_run("optim=adamw_8bit", "data.path=absent.jsonl", "model.path=/absent")
    assert not list(tmp_path.iterdir())


def test_a_torchao_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)  # importing it fails
    with pytest.raises(ConfigError, match=r"this torchao cannot be used.*'gemtune\[quant\]'"):
        AdamW8bit().build(nn.Linear(2, 2))


def model_of(width: int = 128) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 64), nn.LayerNorm(64))


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for seed in range(first, last):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def nearest(values: torch.Tensor, signed: bool) -> torch.Tensor:
    """To the nearest number of the dynamic map (arXiv:1511.04561) times the largest of a block.

    The map by its definition: decades 10^-6 to 1, each with twice the numbers of the one below.
    """
    numbers = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1).double()
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        numbers += middles.tolist() + (-middles).tolist() * signed
    table = torch.tensor(sorted(numbers), dtype=torch.float64)
    assert len(table) == 256 or not signed
    blocks = values.double().reshape(-1, 256)
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    chosen = (blocks / scale).unsqueeze(-1).sub(table).abs().argmin(-1)
    return (table[chosen] * scale).reshape(values.shape)


@needs_torchao
def test_three_steps_are_those_of_the_formula() -> None:
    settings = AdamW8bit(lr=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    model = model_of()
    weight = model[0].weight.detach().double()
    run_steps(model, settings.build(model), 0, 3)
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(3):
        torch.manual_seed(step)
        gradient = torch.randn(weight.shape).double()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        update = m / (1 - 0.8 ** (step + 1)) / ((v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-6)
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * update
        m, v = nearest(m, signed=True), nearest(v, signed=False)
    # A value in the middle of two numbers of the map may go to either.
    torch.testing.assert_close(model[0].weight.detach().double(), weight, atol=2e-4, rtol=0)
    differing = (model[0].weight.detach().double() - weight).abs() > 1e-6
    assert differing.double().mean() < 0.01


@needs_torchao
def test_small_tensors_take_the_step_of_adamw() -> None:
    ours, theirs = model_of(), model_of()
    run_steps(ours, AdamW8bit(lr=0.01).build(ours), 0, 3)
    run_steps(theirs, AdamW(lr=0.01).build(theirs), 0, 3)
    torch.testing.assert_close(ours[1].weight, theirs[1].weight, atol=1e-7, rtol=1e-6)


@needs_torchao
def test_state_is_plain_and_as_large_as_is_said() -> None:
    model, settings = model_of(), AdamW8bit(lr=0.01)
    optimizer = settings.build(model)
    run_steps(model, optimizer, 0, 1)
    assert all(
        type(t) in (torch.Tensor, nn.Parameter) for t in named_tensors(model, optimizer).values()
    )
    weight = model[0].weight
    slots = optimizer.state[weight]
    assert {n: t.dtype for n, t in slots.items() if "." in n} == {
        "exp_avg.codes": torch.uint8,
        "exp_avg.scale": torch.float32,
        "exp_avg_sq.codes": torch.uint8,
        "exp_avg_sq.scale": torch.float32,
    }
    for parameter in model.parameters():
        moments = [t for n, t in optimizer.state[parameter].items() if n != "step"]
        held = sum(t.numel() * t.element_size() for t in moments)
        assert held == settings.moment_bytes(parameter)
    assert settings.moment_bytes(weight) * 3.9 < AdamW().moment_bytes(weight)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01]


@needs_torchao
def test_a_run_goes_on_to_the_bit(
    train_run: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_run(*RUN, run_dir=tmp_path / "whole")
    with monkeypatch.context() as patched:
        press_ctrl_c_after(patched, step=1)
        assert train_run(*RUN).status == 130
    resumed = train_run(*RUN)
    assert resumed.losses() == whole.losses()
    assert resumed.training_state() == whole.training_state()
    assert any(".codes" in name for name in whole.training_state())


@needs_torchao
def test_a_plan_counts_eight_bits() -> None:
    plans = [
        plan_memory(compose(*SMALL, f"optim={name}"), PlanConfig(device="cpu"))
        for name in ("adamw", "adamw_8bit")
    ]
    state = [plan.step.peaks["forward"].by_kind["optimizer state"] for plan in plans]
    assert 0.2 < state[1] / state[0] < 0.3
