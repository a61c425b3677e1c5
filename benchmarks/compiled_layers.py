"""Decoder layers compiled one by one: what `layer_compilation.py` measures, and no part of gemtune.

A layer of Gemma 4 writes keys and values for other layers into a dict of the whole forward. A graph
without side effects has them as results; outside it they are written where the model wants them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Shared = dict[Any, tuple[Tensor, Tensor]]
"""Kind of layer -> keys and values."""

# Of the patch; which layers run where is decided outside a graph, and each batch has another one.
_NOT_FOR_LAYERS = "supervised_positions"


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile what the decoder layers of a Gemma4ForConditionalGeneration compute in training.

    In place; parameters, names and hooks stay. Each layer gets a class of its own, as FSDP2 gives
    it one, which calls the layer's forward through `torch.compile`: patches around the layer and
    the recomputation of it stay outside the graph. Layers that are built alike share one, and
    lengths are symbols in it. What has no gradients, or a cache, runs as it is.

    A graph that breaks, or more of them than torch._dynamo allows, is an error of torch.
    """
    layers = model.model.language_model.layers
    stock = type(layers[0])
    raw = inspect.unwrap(stock.forward)  # from transformers 5.18 on, recomputation is around it

    def region(
        layer: nn.Module, hidden_BSH: Tensor, read: Shared, options: dict[str, Any]
    ) -> tuple[Tensor, Shared]:
        states = dict(read)
        out_BSH = raw(layer, hidden_BSH, shared_kv_states=states, **options)
        return out_BSH, {key: states[key] for key in states if key not in read}

    compiled = torch.compile(region, dynamic=True, fullgraph=True, backend=backend)
    kind = _class_of(stock, raw, compiled)
    for layer in layers:
        layer.__class__ = kind


def _class_of(stock: type, raw: Callable[..., Tensor], compiled: Callable[..., Any]) -> type:
    def forward(
        self: Any,
        hidden_states: Tensor,
        per_layer_input: Tensor | None = None,
        shared_kv_states: Any = None,
        **options: Any,
    ) -> Tensor:
        options["per_layer_input"] = per_layer_input
        has_cache = options.get("past_key_values") is not None
        if has_cache or not (self.training and torch.is_grad_enabled()):
            return raw(self, hidden_states, shared_kv_states=shared_kv_states, **options)
        options.pop(_NOT_FOR_LAYERS, None)
        is_reader = self.self_attn.is_kv_shared_layer
        read = dict(shared_kv_states.items()) if is_reader else {}
        out_BSH, written = compiled(self, hidden_states, read, options)
        for key, value in written.items():
            shared_kv_states[key] = value
        return out_BSH

    # The name stays: patches find layers by it.
    return type(stock.__name__, (stock,), {"forward": forward, "__module__": stock.__module__})
