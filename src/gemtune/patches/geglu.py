"""The gated MLP of Gemma 4 that keeps gate and up for the backward pass, and nothing else."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from gemtune.errors import PatchError
from gemtune.patches.base import APPLIED, NOT_APPLICABLE, Edit, Plan, modules_of_class
from gemtune.patches.fingerprint import require_known

_MLPS = ("Gemma4TextMLP", "Gemma4VisionMLP")
_ACTIVATION = "gelu_pytorch_tanh"

# Both classes, transformers 5.5.2-5.23.0
_KNOWN_FORWARD = {"c667e32817f7"}


class _Activated:
    """gelu_tanh(gate), computed once for its two uses in a backward pass."""

    def __init__(self) -> None:
        self._value: torch.Tensor | None = None

    def first(self, gate: torch.Tensor) -> torch.Tensor:
        """Computed, and held until `last`."""
        if self._value is None:
            self._value = F.gelu(gate, approximate="tanh")
        return self._value

    def last(self, gate: torch.Tensor) -> torch.Tensor:
        """The held value, which is then let go and belongs to the caller."""
        value, self._value = self.first(gate), None
        return value


def _times(activated: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """In the memory of `activated` where the product has its dtype."""
    return activated.mul_(factor) if activated.dtype == factor.dtype else activated * factor


class _Geglu(torch.autograd.Function):
    """gelu_tanh(gate) * up. The activation is computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, activated: _Activated | None
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activated = activated
        return _times(F.gelu(gate, approximate="tanh"), up)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "geglu has no second derivative. Leave the patch out of patches=[...]."
            )
        gate, up = ctx.saved_tensors
        activated = (ctx.activated or _Activated()).last(gate)
        grad_gate = grad_up = None
        if ctx.needs_input_grad[1]:
            grad_up = _times(activated, grad).to(up.dtype)
        if ctx.needs_input_grad[0]:
            grad_activated = (grad * up).to(gate.dtype)
            grad_gate = torch.ops.aten.gelu_backward(grad_activated, gate, approximate="tanh")
        return grad_gate, grad_up, None


@dataclass(frozen=True)
class _Kept:
    """A tensor that stays as it is until the backward pass."""

    tensor: torch.Tensor
    version: int

    def value(self) -> torch.Tensor:
        # Hooks take over from autograd, and with it the duty to look for changes in place.
        if self.tensor._version != self.version:
            raise RuntimeError(
                "geglu: a tensor that down_proj needs for its gradient was modified in place "
                f"(shape {list(self.tensor.shape)}, version {self.tensor._version} instead of "
                f"{self.version})."
            )
        return self.tensor


_PLAIN = (torch.Tensor, FakeTensor)


@dataclass(frozen=True)
class _Recomputed:
    """The product of gate and up, to be computed again. It keeps what _Geglu keeps anyway."""

    gate: _Kept
    up: _Kept
    activated: _Activated
    shape: torch.Size

    def value(self) -> torch.Tensor:
        return (self.activated.first(self.gate.value()) * self.up.value()).reshape(self.shape)


def _keep(tensor: torch.Tensor) -> _Kept:
    # Detached, so that what autograd saves does not hold the graph that saves it. A leaf has no
    # graph, and a weight must stay the object whose memory FSDP or DeepSpeed swaps.
    return _Kept(tensor if tensor.is_leaf else tensor.detach(), tensor._version)


class _ProductRecomputed(saved_tensors_hooks):
    """Inside it, autograd keeps gate and up where it would keep their product.

    What is not the product, unchanged and whole, is kept as usual: weights, what LoRA adds, and
    the clamped product of a Gemma4ClippableLinear.
    """

    def __init__(
        self, product: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activated: _Activated
    ) -> None:
        # The product itself must not be held here: autograd may hold these hooks.
        place, size, dtype = _place(product), product.numel(), product.dtype
        version = product._version
        gate_kept, up_kept = _keep(gate), _keep(up)

        def pack(tensor: torch.Tensor) -> _Kept | _Recomputed:
            if (
                type(tensor) in _PLAIN  # the weights of some quantisers have no place
                and tensor.numel() == size
                and tensor.dtype == dtype
                and tensor.is_contiguous()
                and _place(tensor) == place
                and tensor._version == version
            ):
                return _Recomputed(gate_kept, up_kept, activated, tensor.shape)
            return _keep(tensor)

        super().__init__(pack, _unpack)


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Where it begins in memory, for tensors without values (of a plan) as well."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def _unpack(saved: _Kept | _Recomputed) -> torch.Tensor:
    return saved.value()


def _may_recompute(gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether it is for this patch to say how autograd keeps the product."""
    return (
        torch.is_grad_enabled()
        and (gate.requires_grad or up.requires_grad)
        and type(gate) in _PLAIN
        and type(up) in _PLAIN
        and gate.is_contiguous()  # then so is the product, whose order in memory is its own
        and not torch.compiler.is_compiling()
        # Hooks that are there already (checkpointing, offloading) must see every tensor, and
        # only the innermost hooks do. torch has no public way to ask for them.
        and torch._C._autograd._saved_tensors_hooks_is_enabled()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


def _forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    if not _may_recompute(gate, up):
        return self.down_proj(_Geglu.apply(gate, up, None))
    activated = _Activated()
    product = _Geglu.apply(gate, up, activated)
    with _ProductRecomputed(product, gate, up, activated):
        return self.down_proj(product)


@dataclass(frozen=True)
class Geglu:
    """MLPs keep gate and up: 4 bytes an element of the intermediate size in bfloat16.

    Stock MLPs keep the activated gate as well (6), and the product of both where down_proj is
    trained, by itself or by LoRA (8). Both are computed again in the backward pass, bit for bit.
    Under non-reentrant checkpointing, which keeps nothing of the product beyond one layer, and
    inside other saved-tensor hooks, the product is left to them. Experts are left as they are.
    """

    name: ClassVar[str] = "geglu"

    def plan(self, model: nn.Module) -> Plan:
        """One edit for each MLP of the decoder and of the vision tower."""
        mlps = modules_of_class(model, *_MLPS)
        if not mlps:
            return Plan(NOT_APPLICABLE, "the model has no Gemma 4 MLP")
        with_gelu = [(s, mlp) for s, mlp in mlps if mlp.config.hidden_activation == _ACTIVATION]
        if not with_gelu:
            found = sorted({mlp.config.hidden_activation for _, mlp in mlps})
            return Plan(NOT_APPLICABLE, f"hidden_activation is {', '.join(found)}")
        for stock in {type(mlp) for _, mlp in with_gelu}:
            require_known(self.name, stock.forward, _KNOWN_FORWARD)
        for site, mlp in with_gelu:
            if not _is_gelu_tanh(mlp.act_fn):
                raise PatchError(
                    f"geglu: {site}.act_fn is {mlp.act_fn!r}, which is not known here as "
                    f"{_ACTIVATION}. Leave geglu out of patches=[...], and report it."
                )
        changes = tuple(
            Edit(mlp, "forward", MethodType(_forward, mlp), site) for site, mlp in with_gelu
        )
        return Plan(APPLIED, "keeps gate and up only", changes)


def _is_gelu_tanh(activation: nn.Module) -> bool:
    """GELUTanh of transformers with torch's own gelu in it, not the one written in Python."""
    inner = getattr(activation, "act", None)
    return (
        type(activation).__name__ == "GELUTanh"
        and isinstance(inner, functools.partial)
        and inner.func is F.gelu
        and inner.keywords == {"approximate": "tanh"}
    )
