"""Weights in 4 bits by torchao's arithmetic, two of them in a byte. Importing this imports torchao.

torchao 0.18 has no class for them that does both directions on CPUs and GPUs: `Int4Tensor` and its
kin need kernels of one device, `IntxUnpackedToInt8Tensor` spends a byte on each value. Numbers are
chosen and brought back by its primitives; only where two codes lie in a byte is decided here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)
from torchao.utils import TorchAOBaseTensor

from gemtune.adapters.int4_groups import GROUP

_BLOCK = (1, GROUP)
_LARGEST = 15
_VALUES_AT_ONCE = 2**24
"""As many are brought back at a time: more only costs memory (5 bytes each, for a moment)."""


class Int4Weight(TorchAOBaseTensor):
    """[out, in] numbers (code - zero point) * scale, with codes from 0 to 15.

    Values of the same bits on every device: each step of the arithmetic is exact or rounds once, in
    float32 when it is made, in its own dtype when it is brought back.

    codes: [out, in / 2] uint8, the even column in the low half.
    scale: [out, in / GROUP] in the dtype that the weight had.
    zero_point: [out, in / GROUP] uint8.
    """

    tensor_data_names = ["codes", "scale", "zero_point"]  # noqa: RUF012 - torchao wants lists
    tensor_attribute_names = ["dtype"]  # noqa: RUF012

    def __new__(
        cls, codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype
    ) -> Int4Weight:
        shape = (codes.shape[0], 2 * codes.shape[1])
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=codes.device, requires_grad=False
        )

    def __init__(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.codes, self.scale, self.zero_point = codes, scale, zero_point

    @classmethod
    def of(cls, weight: Tensor) -> Int4Weight:
        """The nearest codes to an [out, in] weight; groups are from their least value, or zero, to
        their greatest."""
        values = weight.float()
        scale, zero_point = choose_qparams_affine(
            values,
            MappingType.ASYMMETRIC,
            _BLOCK,
            torch.uint8,
            0,
            _LARGEST,
            scale_dtype=weight.dtype,
            zero_point_dtype=torch.uint8,
            keepdim=True,
        )
        # By the scales as they are kept.
        codes = quantize_affine(values, _BLOCK, scale.float(), zero_point, torch.uint8, 0, _LARGEST)
        return cls(codes[:, ::2] | codes[:, 1::2] << 4, scale, zero_point, weight.dtype)

    def dequantize(self) -> Tensor:
        """[out, in] in the dtype that it was made from."""
        values = torch.empty(self.shape, dtype=self.dtype, device=self.codes.device)
        num_rows = max(1, _VALUES_AT_ONCE // self.shape[1])
        for first in range(0, self.shape[0], num_rows):
            rows = slice(first, first + num_rows)
            packed = self.codes[rows]
            values[rows] = dequantize_affine(
                torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2),
                _BLOCK,
                self.scale[rows],
                self.zero_point[rows],
                torch.uint8,
                0,
                _LARGEST,
                output_dtype=self.dtype,
            )
        return values


@Int4Weight.implements_torch_function(F.linear)
def _linear(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    inputs, weight, *bias = args
    return F.linear(inputs, weight.dequantize(), *bias, **kwargs)
