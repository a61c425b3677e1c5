"""Linear modules that stand for quantised ones in a model without values: a plan follows them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemtune.adapters.int4_groups import int4_bytes
from gemtune.adapters.libraries import INT4, NF4

_BLOCK, _BLOCKS_OF_SCALES = 64, 256
_TABLES_BYTES = 4 * (16 + 256 + 1)
"""The numbers of 4 and of 8 bits, and the mean of the scales, in float32."""


class StandInLinear(nn.Linear):
    """Holds as many bytes as a quantised one, and makes the tensors that it makes.

    Its weight is those bytes. A forward, and its backward again, has the whole weight in the dtype
    of the inputs for the length of a product, as bitsandbytes' and torchao's have it.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        values = linear.weight.numel()
        if kind == NF4:
            blocks = -(-values // _BLOCK)
            count = values // 2 + blocks + 4 * -(-blocks // _BLOCKS_OF_SCALES) + _TABLES_BYTES
        elif kind == INT4:
            scale_bytes = linear.weight.element_size()
            count = int4_bytes(linear.out_features, linear.in_features, scale_bytes)
        else:
            count = values + (4 + 1) * linear.out_features  # a scale and a point of zero
        held = torch.empty(count, dtype=torch.uint8, device=linear.weight.device)
        self.weight = nn.Parameter(held, requires_grad=False)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        product = _Product.apply(inputs, self.out_features)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, out_features: int) -> Tensor:
        ctx.shape = (out_features, inputs.shape[-1])
        return inputs @ inputs.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.shape), None
