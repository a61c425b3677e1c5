"""AdamW as published, over what is trained, and learning-rate schedules."""

from __future__ import annotations

import math

import pytest
import torch
from gemma4_zoo import build
from torch import nn

from gemtune.errors import ConfigError
from gemtune.optim import AdamW, Schedule


def test_matrices_decay_and_vectors_and_tables_do_not() -> None:
    model = build("e2b")
    optimizer = AdamW(weight_decay=0.1).build(model)
    names = {id(p): n for n, p in model.named_parameters()}
    decays, rest = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert decays | rest == set(names.values())
    assert not decays & rest
    assert all("norm" in n or "embed_tokens" in n or "embedding_table" in n for n in rest), rest
    assert "model.language_model.layers.0.mlp.down_proj.weight" in decays
    assert not any("embed_tokens" in n for n in decays)


def test_a_tied_table_is_stepped_once() -> None:
    model = build("e2b")
    optimizer = AdamW().build(model)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert ids.count(id(model.lm_head.weight)) == 1


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_an_error() -> None:
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    optimizer = AdamW().build(model)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    model.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="No parameter is left to train"):
        AdamW().build(model)


def test_one_step_is_adamw_as_published() -> None:
    settings = AdamW(lr=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9, eps=1e-6)
    model = nn.Linear(2, 2, bias=False).double()
    before = model.weight.detach().clone()
    gradient = torch.tensor([[1.0, -2.0], [0.5, 4.0]], dtype=torch.float64)
    model.weight.grad = gradient.clone()
    settings.build(model).step()
    m, v = 0.2 * gradient / (1 - 0.8), 0.1 * gradient**2 / (1 - 0.9)
    expected = before * (1 - 0.1 * 0.5) - 0.1 * m / (v.sqrt() + 1e-6)
    torch.testing.assert_close(model.weight.detach(), expected)


def test_cosine_warms_up_to_one_and_falls_to_the_minimum() -> None:
    schedule = Schedule("cosine", warmup_steps=4, min_ratio=0.1)
    ratios = [schedule.ratio(step, 100) for step in range(101)]
    assert ratios[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert ratios[4] == 1.0
    assert ratios[4:] == sorted(set(ratios[4:]), reverse=True)
    assert ratios[100] == pytest.approx(0.1)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))
    assert ratios[52] == pytest.approx(middle)


def test_linear_and_constant() -> None:
    linear = Schedule("linear", min_ratio=0.0)
    assert [linear.ratio(step, 4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    constant = Schedule("constant", warmup_steps=1)
    assert [constant.ratio(step, 4) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
