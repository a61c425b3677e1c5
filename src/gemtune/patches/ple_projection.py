"""Per-layer inputs handed out by one unbind, so that their gradient is one stack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from gemtune.patches.base import APPLIED, NOT_APPLICABLE, Plan, Wrap, modules_of_class
from gemtune.patches.fingerprint import require_known

# The projection is called as it is. What is relied on is how its result is read.
_KNOWN_TEXT_MODEL = {
    "07acee1e788f",  # 5.5.2
    "69d73fe20c87",  # 5.5.3-5.7.0
    "ab36b885ee85",  # 5.8.0-5.8.1
    "38840acc30c7",  # 5.9.0-5.22.2
    "9ba2b2351ccd",  # 5.23.0
}
_KNOWN_PROJECTION = {"49b5d8db4165"}  # 5.5.2-5.23.0
_KNOWN_SLICE = {"8528f72c0dcc"}  # 5.23.0, the first release that has it

_EVERY = slice(None)


class PerLayerInputs:
    """[B, S, L, D] as L tensors [B, S, D], read in the two ways in which Gemma 4 reads it.

    `[:, :, i, :]` is the input of layer i, and `[:, positions, :, :]` the inputs of all layers at
    a slice of the positions. TypeError for any other index.
    """

    def __init__(self, layers: tuple[torch.Tensor, ...]) -> None:
        self._layers = layers

    def __getitem__(self, index: Any) -> torch.Tensor | PerLayerInputs:
        if isinstance(index, tuple) and len(index) == 4:
            batch, positions, layer, features = index
            if batch == _EVERY and features == _EVERY and isinstance(positions, slice):
                if type(layer) is int and positions == _EVERY:
                    return self._layers[layer]
                if layer == _EVERY:
                    return self._at(positions)
        raise TypeError(
            f"ple_projection: per-layer inputs are read as [:, :, i, :] or [:, positions, :, :], "
            f"not as {index!r}. Leave ple_projection out of patches=[...], and report it."
        )

    def _at(self, positions: slice) -> PerLayerInputs:
        length = self._layers[0].shape[1]
        if positions.indices(length) == (0, length, 1):
            # A slice of everything would still fill zeros in the backward pass.
            return self
        return PerLayerInputs(tuple(layer[:, positions] for layer in self._layers))


def _project(
    self: nn.Module, inner: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor | PerLayerInputs:
    per_layer_inputs = inner(*args, **kwargs)
    if not (torch.is_grad_enabled() and per_layer_inputs.requires_grad):
        return per_layer_inputs
    return PerLayerInputs(per_layer_inputs.unbind(dim=2))


@dataclass(frozen=True)
class PleProjection:
    """The gradient of the per-layer inputs is built in one piece.

    Each layer of E2B and E4B reads its slice of [B, S, L, D]. The gradient of such a slice is a
    tensor of the full size, zero but for one layer: for E2B at 8192 tokens 147 MB in bfloat16,
    filled and added 35 times.
    """

    name: ClassVar[str] = "ple_projection"

    def plan(self, model: nn.Module) -> Plan:
        """One wrap: the `project_per_layer_inputs` of the text model."""
        decoders = modules_of_class(model, "Gemma4TextModel")
        if not decoders:
            return Plan(NOT_APPLICABLE, "the model has no Gemma 4 decoder")
        with_ple = [(s, module) for s, module in decoders if module.hidden_size_per_layer_input]
        if not with_ple:
            return Plan(NOT_APPLICABLE, "the model has no per-layer embeddings")
        stock = type(with_ple[0][1])
        require_known(self.name, stock.forward, _KNOWN_TEXT_MODEL)
        require_known(self.name, stock.project_per_layer_inputs, _KNOWN_PROJECTION)
        if hasattr(stock, "_maybe_slice_kv_shared_inputs"):
            require_known(self.name, stock._maybe_slice_kv_shared_inputs, _KNOWN_SLICE)
        changes = tuple(
            Wrap(module, "project_per_layer_inputs", _project, site) for site, module in with_ple
        )
        return Plan(APPLIED, "one gradient for all layers", changes)
