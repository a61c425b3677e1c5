"""The model of a checkpoint on the CPU, every number in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gemtune import adapters
from gemtune.adapters import Qlora
from gemtune.checkpoint import load_parameters
from gemtune.config import RunConfig
from gemtune.models import Processing, load_model


def read_trained(
    config: RunConfig, processing: Processing, checkpoint: Path
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model as it was trained, with its adapter; and what its base has in other values.

    A base in few bits is quantised here as it was there, which the hashes of the checkpoint are
    compared with. The model has the values that the bits stand for, in plain modules. The second
    result are the values of the same weights in the base's own files, by their names in the model,
    in the training's dtype; empty without quantisation.
    """
    model = adapters.attach(_read_base(config, processing), config.adapter)
    load_parameters(checkpoint, model)
    if not isinstance(config.adapter, Qlora):
        return model.float().eval(), {}
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    stood_for = adapters.dequantized_weights(model)
    del model
    base = _read_base(config, processing)
    model = adapters.attach(base, config.adapter.on_whole_base()).float().eval()
    put_weights(model, trained)
    dtype = getattr(torch, config.model.dtype)
    stock = {name: model.get_parameter(name).detach().to(dtype) for name in stood_for}
    put_weights(model, stood_for)
    return model, stock


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of these names."""
    for name, values in weights.items():
        model.get_parameter(name).copy_(values)


def _read_base(config: RunConfig, processing: Processing) -> nn.Module:
    """In the training's dtype, but for constants.

    transformers rounds constants too when it reads a model in bfloat16 (the scale of the
    embeddings). Those are the exact ones here, as they are when the exported model is read.
    """
    in_float32 = replace(config.model, dtype="float32")
    base = load_model(in_float32, processing, config.run.seed)
    cast(persistent(base), getattr(torch, config.model.dtype))
    return base


def persistent(model: nn.Module) -> Iterator[Tensor]:
    """What a state_dict has: parameters, and buffers but those that are computed anew."""
    yield from model.parameters()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer


def cast(tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Round them in place, those of floating point."""
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
