"""Frozen weights in 4 or 8 bits: the language layers' linear ones, and no others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemtune.adapters.int4_groups import require_groups
from gemtune.adapters.libraries import INT4, INT8, NF4, unusable
from gemtune.adapters.stand_ins import StandInLinear
from gemtune.adapters.targets import find_targets
from gemtune.models.parts import num_values

_INSIDE = ("absmax", "code", "offset")
"""Tensors of the state of bitsandbytes."""


@torch.no_grad()
def quantize(model: nn.Module, kind: str, device: torch.device) -> None:
    """The weights of the language layers' linear modules in few bits, each moved to `device`.

    "nf4": 4 bits and one scale for 64 values, scales in 8 bits (arXiv:2305.14314), by bitsandbytes.
    "int4": 4 bits, and one scale and zero point for 64 values of a row, by torchao's arithmetic.
    "int8": 8 bits and one scale for an output, by torchao. Products are in the dtype that the
    weights had. Embeddings, head, norms, towers, projectors, router, experts and the projections of
    per-layer embeddings stay as they are. A model on meta gets modules that stand for these.

    Raises:
        ConfigError: a library that cannot be used, or layers that int4 cannot divide into groups.
    """
    (targets,) = find_targets(model, ["language"])
    if kind == INT4:
        for name in targets.modules:
            require_groups(name, model.get_submodule(name).in_features)
    try:
        replace = {NF4: _nf4, INT4: _int4, INT8: _int8}[kind]
        for name in targets.modules:
            linear = model.get_submodule(name)
            if linear.weight.is_meta:
                model.set_submodule(name, StandInLinear(linear, kind).train(linear.training))
            else:
                replace(model, name, device)
    except ImportError as error:
        raise unusable(kind, error) from error


def _nf4(model: nn.Module, name: str, device: torch.device) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    linear = model.get_submodule(name)
    quantized = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=linear.weight.dtype,
        quant_type=NF4,
        device="meta",
    )
    # Else a forward in evaluation on a CPU would pack the weights in another way, for good.
    quantized.support_avx512bf16_for_cpu = False
    quantized.bias = linear.bias
    quantized.weight = Params4bit(
        linear.weight.data, requires_grad=False, quant_type=NF4, module=quantized
    ).to(device)
    model.set_submodule(name, quantized.train(linear.training))


def _int4(model: nn.Module, name: str, device: torch.device) -> None:
    from gemtune.adapters.int4_weight import Int4Weight

    linear = model.get_submodule(name).to(device)
    few_bits = Int4Weight.of(linear.weight.detach())
    linear.weight = nn.Parameter(few_bits, requires_grad=False)
    model.set_submodule(name, FewBitsLinear(linear).train(linear.training))


def _int8(model: nn.Module, name: str, device: torch.device) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = model.get_submodule(name).to(device)
    linear.weight.requires_grad_(False)
    quantize_(linear, Int8WeightOnlyConfig(version=2))
    model.set_submodule(name, FewBitsLinear(linear).train(linear.training))


class FewBitsLinear(nn.Linear):
    """A linear module that keeps the few bits of torchao's tensor for its backward pass, not 16.

    The tensor's product is made of plain operators: autograd keeps the weight that they made in the
    dtype of the inputs, of every layer, which is what the few bits were to save.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        product = _Product.apply(inputs, self.weight)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight  # frozen: nothing changes it before the backward pass
        return F.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.weight.dequantize().to(gradient.dtype), None


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Those whose weights are in few bits, by path; inside an adapter's layers too."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_quantized(module.weight):
            yield name, module


def is_quantized(weight: Tensor) -> bool:
    """Whether a library keeps it in few bits."""
    return getattr(weight, "quant_state", None) is not None or _is_of_torchao(weight)


def _is_of_torchao(weight: Tensor) -> bool:
    """Of a class of its own, or of one that is made of them."""
    return any(kind.__module__.startswith("torchao.") for kind in type(weight).__mro__)


def dequantized(linear: nn.Linear) -> Tensor:
    """[out, in] in the dtype that it is computed with, on its device."""
    if _is_of_torchao(linear.weight):
        return linear.weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight.data, linear.weight.quant_state)


def dequantized_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name of each weight in few bits -> what it stands for, as `dequantized`, on the CPU."""
    return {f"{name}.weight": dequantized(each).cpu() for name, each in quantized_linears(model)}


def stored_bytes(weight: Tensor) -> int:
    """What a weight takes, its scales included."""
    if _is_of_torchao(weight):
        return sum(_bytes(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])
    state = getattr(weight, "quant_state", None)
    total = _bytes(weight)
    while state is not None:
        parts = (getattr(state, name, None) for name in _INSIDE)
        total += sum(_bytes(part) for part in parts if part is not None)
        state = getattr(state, "state2", None)
    return total


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def quantization_row(model: nn.Module) -> str:
    """For people: what is in few bits and what is not, with sizes; empty where nothing is."""
    weights = {name: linear.weight for name, linear in quantized_linears(model)}
    if not weights:
        return ""
    few = {id(weight) for weight in weights.values()}
    rest = {name: p for name, p in model.named_parameters() if id(p) not in few}
    experts = [p for name, p in rest.items() if ".experts." in name and not p.requires_grad]
    text = (
        f"{len(weights)} linear layers of the language part in {_gib(weights.values())} instead of "
        f"{_gib_of(2 * sum(num_values(w) for w in weights.values()))} (16 bits); "
        f"{_gib(p for p in rest.values() if not p.requires_grad)} are not quantised"
    )
    if experts:
        text += f", {_gib(experts)} of them experts, which stay in {_dtype(experts[0])}"
    return text


def _gib(weights: Iterable[Tensor]) -> str:
    return _gib_of(sum(stored_bytes(weight) for weight in weights))


def _gib_of(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
