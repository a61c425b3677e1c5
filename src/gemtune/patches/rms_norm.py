"""RMSNorm that keeps its input for the backward pass, and no float32 copies (Zhang 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from gemtune.patches.base import APPLIED, NOT_APPLICABLE, Edit, Plan, modules_of_class
from gemtune.patches.fingerprint import require_known

# transformers 5.5.2-5.23.0
_KNOWN_FORWARD = {"54187bf13eff"}
_KNOWN_NORM = {"16f3b7042999"}


class _RmsNorm(torch.autograd.Function):
    """Saves the input as it came, 1/rms of each row, and the weight, which exists anyway."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        # The operations of the stock forward in the same order: the same bits come out.
        wide = torch.promote_types(x.dtype, torch.float32)
        x_wide = x.to(wide)
        rstd = x_wide.pow(2).mean(-1, keepdim=True).add_(eps).pow_(-0.5)
        y = x_wide * rstd
        if weight is not None:
            y.mul_(weight.to(wide))
        ctx.save_for_backward(x, weight, rstd)
        return y.to(x.dtype)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "rms_norm has no second derivative. Leave the patch out of patches=[...]."
            )
        # With n = x / rms(x) and h = grad * weight:
        #   d/d weight = sum over rows of grad * n,   d/d x = (h - n * mean(h * n)) / rms(x)
        x, weight, rstd = ctx.saved_tensors
        wide, dim = rstd.dtype, x.shape[-1]
        normed = x.to(wide) * rstd
        grad_wide = grad.to(wide)
        product = grad_wide * normed
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = product.reshape(-1, dim).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            if weight is not None:
                product.mul_(weight.to(wide))
            mean = product.mean(-1, keepdim=True)
            # `product` has done its work, and its memory takes the result.
            h = grad_wide
            if weight is not None:
                h = torch.mul(grad_wide, weight.to(wide), out=product)
            grad_x = torch.addcmul(h, normed, mean, value=-1, out=product).mul_(rstd).to(x.dtype)
        return grad_x, grad_weight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, computed in float32 or wider and rounded once.

    For the backward pass it keeps `x` and 4 bytes a row (8 in float64). It cannot be differentiated
    twice.

    Args:
        x: [..., D].
        weight: [D], or None for no weight. Its dtype may differ from that of `x`.
        eps: added to the mean of squares.

    Returns:
        [..., D] in the dtype of `x`.
    """
    if _has_fused_kernel(x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return _RmsNorm.apply(x, weight, eps)


def _has_fused_kernel(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether F.rms_norm is one kernel here that keeps its input, and returns the dtype of `x`.

    Elsewhere (CPU, mixed dtypes, MPS in training) it is a chain of operations that keeps float32
    copies, as torch 2.11-2.13 have it. Autocast would have it compute and return float32.
    """
    if x.device.type != "cuda" or (weight is not None and weight.dtype != x.dtype):
        return False
    return x.dtype in (torch.float32, torch.float64) or not torch.is_autocast_enabled("cuda")


def _forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, self.weight if self.with_scale else None, self.eps)


@dataclass(frozen=True)
class RmsNorm:
    """Every RMSNorm keeps its input in its own dtype instead of float32 copies of it.

    Stock Gemma 4 keeps the input in float32 and, where the weight is trained, the normalised input
    in float32 as well: 8 bytes an element (4 with a frozen weight) in bfloat16, against 2 here.
    """

    name: ClassVar[str] = "rms_norm"

    def plan(self, model: nn.Module) -> Plan:
        """One edit for each Gemma4RMSNorm of the model: decoder, towers and projectors."""
        norms = modules_of_class(model, "Gemma4RMSNorm")
        if not norms:
            return Plan(NOT_APPLICABLE, "the model has no Gemma4RMSNorm")
        stock = type(norms[0][1])
        require_known(self.name, stock.forward, _KNOWN_FORWARD)
        require_known(self.name, stock._norm, _KNOWN_NORM)
        changes = tuple(
            Edit(module, "forward", MethodType(_forward, module), site) for site, module in norms
        )
        return Plan(APPLIED, "keeps inputs as they are, no float32 copies", changes)
