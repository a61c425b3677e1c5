"""A program run for the sizes of its tensors: floating point without values, the rest as it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from gemtune.planning.storages import StorageFollower

_aten = torch.ops.aten
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)
# Numbers for positions, which masks are made from.
_COUNTING = (_aten.arange.default, _aten.arange.start, _aten.arange.start_step)


class Shadow(StorageFollower):
    """Weights and activations are fake tensors: they have shapes, and take no memory.

    Token ids, masks, positions and lengths keep their values, so that every shape that depends on
    them is the real one. Tensors of floating point become fake where they are made from nothing
    or from others that are.

    Source: torch._subclasses.fake_tensor; what is followed is in `StorageFollower`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if func in _INDEXING:
                args = (args[0], _as_positions(args[1]), *args[2:])
            if func is _aten._grouped_mm.default:
                return _grouped_product(func, args, kwargs)
            return func(*args, **kwargs)
        if tensors or func in _COUNTING or not _is_floating(kwargs):
            return func(*args, **kwargs)
        with self._fake:
            return func(*args, **kwargs)

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """A tensor without values, that is not counted."""
        with self._fake:
            return torch.empty(tuple(shape), dtype=dtype)

    def without_values(self, model: nn.Module) -> nn.Module:
        """The same model with fake tensors for those on the meta device. Shared ones stay so."""
        made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, so that its id stays its
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in made:
                        fake = self.empty(parameter.shape, parameter.dtype)
                        fake = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                        made[id(parameter)] = (parameter, fake)
                    module._parameters[name] = made[id(parameter)][1]
            for name, buffer in module._buffers.items():
                if buffer is None or not buffer.is_meta:
                    continue
                if buffer.is_floating_point():
                    module._buffers[name] = self.empty(buffer.shape, buffer.dtype)
                else:
                    module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
        return model


def _grouped_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Of experts. The operator takes every dtype; its rule for shapes (torch 2.13) bfloat16 alone.
    Nothing that is made in here counts."""
    dtype = args[0].dtype
    matrices = (matrix.to(torch.bfloat16) for matrix in args[:2])
    return func(*matrices, *args[2:], **kwargs).to(dtype)


def _is_floating(kwargs: dict[str, Any]) -> bool:
    return (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point


def _as_positions(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Masks as the positions that they choose: how many these are is then known."""
    positions: list[Tensor | None] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool and type(index) is Tensor:
            positions += index.nonzero(as_tuple=True)
        else:
            positions.append(index)
    return positions
