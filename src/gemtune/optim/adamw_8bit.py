"""AdamW whose moments are kept in 8 bits, by torchao."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gemtune.errors import ConfigError
from gemtune.optim.adamw import AdamW

_SMALLEST, _BLOCK = 4096, 256
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Of torchao's state: whether it has a sign."""
_INSIDE = ("codes", "scale")


@dataclass
class AdamW8bit(AdamW):
    """AdamW with both moments in 8 bits (arXiv:2110.02861): 2 bytes a parameter instead of 8.

    A block of 256 values shares a scale. Tensors of fewer than 4096 values, or of a number that 256
    does not divide, keep theirs in the dtype of the weights, as torchao has it. Not sharded.
    """

    name: ClassVar[str] = "AdamW with moments in 8 bits"
    whole_only: ClassVar[str] = "its blocks of 256 values would cross the edges of the shares"

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("torchao") is None:
            raise ConfigError(
                "optim=adamw_8bit needs torchao, which is not installed: "
                "pip install 'gemtune[quant]'. Without it: optim=adamw."
            )

    def assemble(self, model: nn.Module) -> torch.optim.Optimizer:
        """torchao's AdamW8bit, with plain tensors as its state: `PREFIX.codes` and `PREFIX.scale`.

        Raises:
            ConfigError: nothing is trained, nothing of a part that has a rate, or a torchao that
                cannot be used.
        """
        groups = self.groups(model)
        return _optimizer_class()(
            groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, block_size=_BLOCK
        )

    def moment_bytes(self, parameter: Tensor) -> int:
        """What a trained parameter has of state."""
        count = parameter.numel()
        if not _is_quantized(parameter):
            return super().moment_bytes(parameter)
        return 2 * (count + 4 * count // _BLOCK)


def _is_quantized(parameter: Tensor) -> bool:
    return parameter.numel() >= _SMALLEST and parameter.numel() % _BLOCK == 0


def _optimizer_class() -> type[torch.optim.Optimizer]:
    """A subclass of torchao's optimizer; a function because torchao is imported late."""
    try:
        from torchao.optim import AdamW8bit as Base
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ConfigError(
            f"optim=adamw_8bit: this torchao cannot be used: {error}. Install the one that was "
            "tried: pip install 'gemtune[quant]'. Without it: optim=adamw."
        ) from error

    # Made here: nothing may depend on whether a first step has values (a memory plan has none).
    maps = {signed: OptimState8bit.zeros((_BLOCK,), signed).qmap for signed in _MOMENTS.values()}

    def around(codes: Tensor, scale: Tensor, signed: bool, dtype: torch.dtype) -> Tensor:
        return OptimState8bit(codes, scale, maps[signed].to(codes.device), signed, dtype)

    class PlainStateAdamW8bit(Base):
        """torchao's arithmetic over a state of plain tensors, which checkpoints can hold.

        torchao's moments are tensors of a class of its own; DCP would pickle that class, and
        checkpoints here execute nothing. They are put around the plain ones for a step.
        """

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            rates = [group["lr"] for group in self.param_groups]
            trained = [
                p for group in self.param_groups for p in group["params"] if p.grad is not None
            ]
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = torch.as_tensor(rate, dtype=torch.float32)
            for parameter in trained:
                _wrap(self.state[parameter], parameter, around)
            # torchao compiles a step for each shape; without a GPU that takes longer than it saves.
            on_gpu = any(p.is_cuda for p in trained)
            eager = contextlib.nullcontext() if on_gpu else torch.compiler.set_stance("force_eager")
            try:
                with eager:
                    return super().step(closure)
            finally:
                for parameter in trained:
                    _unwrap(self.state[parameter], OptimState8bit)
                for group, rate in zip(self.param_groups, rates, strict=True):
                    group["lr"] = rate

        @staticmethod
        def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
            codes = torch.zeros_like(p, dtype=torch.uint8, requires_grad=False)
            scale = p.new_zeros(p.numel() // block_size, dtype=torch.float32)
            return around(codes, scale, signed, p.dtype)

    return PlainStateAdamW8bit


def _wrap(state: dict[str, Tensor], parameter: Tensor, around: Callable[..., Tensor]) -> None:
    for name, signed in _MOMENTS.items():
        if f"{name}.codes" in state:
            codes, scale = (state.pop(f"{name}.{inside}") for inside in _INSIDE)
            state[name] = around(codes, scale, signed, parameter.dtype)


def _unwrap(state: dict[str, Tensor], cls: Any) -> None:
    for name in _MOMENTS:
        if isinstance(state.get(name), cls):
            moment = state.pop(name)
            for inside in _INSIDE:
                state[f"{name}.{inside}"] = getattr(moment, inside)
