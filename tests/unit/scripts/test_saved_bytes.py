"""saved_bytes counts exactly what a forward pass keeps for the backward pass, whatever keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Load = Callable[[str], Any]


class Squared(torch.autograd.Function):
    """Keeps its input as an attribute, where saved-tensor hooks do not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.clone()
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.x * grad


class Prepared(torch.autograd.Function):
    """Computes its gradient in the forward pass; it becomes `.grad` as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(2 * x)
        return x.square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.saved_tensors[0].mul_(grad)


N, M, K = 16, 8, 4


def exp(x: Tensor, w: Tensor) -> Tensor:
    return x.exp().sum()


def scaled(x: Tensor, w: Tensor) -> Tensor:
    return (x * 2).sum()


def linear(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x + 1, w).sum()  # x + 1 for the weight's gradient; the weight was there


def linear_frozen(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x + 1, w.detach()).sum()


def matmul(x: Tensor, w: Tensor) -> Tensor:
    return ((x + 1) @ (w + 1).t()).sum()


def twice(x: Tensor, w: Tensor) -> Tensor:
    h = x + 1
    return (h * h.view(M, N).view(N, M)).sum() + h.sin().sum()


def bfloat16(x: Tensor, w: Tensor) -> Tensor:
    return x.bfloat16().sin().sum()


def packed(x: Tensor, w: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
        return (x + 1).sin().sum()


def attribute(x: Tensor, w: Tensor) -> Tensor:
    return Squared.apply(x).sum()


def becomes_gradient(x: Tensor, w: Tensor) -> Tensor:
    return Prepared.apply(x)


CACHE: list[Tensor] = []


def cached(x: Tensor, w: Tensor) -> Tensor:
    CACHE.append(torch.ones(1000))  # outlives the step
    return x.exp().sum()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (exp, 4 * N * M),
        (scaled, 0),
        (linear, 4 * N * M),
        (linear_frozen, 0),
        (matmul, 4 * (N * M + K * M)),
        (twice, 4 * N * M),
        (bfloat16, 2 * N * M),
        (packed, 2 * N * M),
        (attribute, 4 * N * M),
        (becomes_gradient, 4 * N * M),
        (cached, 4 * N * M),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_bytes_kept_are_exact(load: Load, function: Callable, expected: int) -> None:
    x, w = torch.randn(N, M, requires_grad=True), torch.randn(K, M, requires_grad=True)
    losses = []

    def release(loss: Tensor) -> None:
        losses.append(float(loss))
        assert x.grad is not None
        x.grad = w.grad = None

    saved = load("saved_bytes").saved_for_backward
    assert saved(lambda: function(x, w), release) == expected
    assert losses == [float(function(x, w).detach())]
