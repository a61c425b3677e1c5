"""A Gemma 4 of a checkpoint that nobody has read yet: where each of its parameters is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemtune.models.gemma4 import ModelConfig, Processing, finished, from_checkpoint, reading_errors
from gemtune.models.stored import StoredTensor, cached_path, stored_tensors

_TIED = "lm_head.weight"


@dataclass(frozen=True)
class UnreadModel:
    """What `load_model` gives, with its parameters on the meta device and its buffers read."""

    model: nn.Module
    stored: Mapping[nn.Parameter, StoredTensor]
    """Where the values of each parameter are: of the same shape, in the dtype of the file."""


def needs_transformers(processing: Processing) -> str | None:
    """Why only transformers itself can make a model of this checkpoint, if it is so."""
    if getattr(processing.model_config, "quantization_config", None) is not None:
        return "the checkpoint is quantised"
    if getattr(processing.model_config, "transformers_weights", None) is not None:
        return "its config.json names the file of the weights"
    if cached_path(processing.source, "adapter_config.json", processing.hub_options) is not None:
        return "there is an adapter beside the weights"
    return None


def load_unread(
    config: ModelConfig, processing: Processing, files: list[Path]
) -> UnreadModel | str:
    """The model of `load_model`, unread; or why its tensors are not those of the files.

    Which tensor of the files belongs to which parameter is for transformers to say, and differs
    between its releases. So it loads the model, as ever, of tensors that have the shapes of those
    in the files and the memory of one value, and what it has put where is looked up afterwards.

    Raises:
        ModelError: as `load_model`.
    """
    config.resolve_dtype(frozen=False)
    with reading_errors(processing.source):
        stored = stored_tensors(files)
    if _has_tied_head(processing.model_config, stored):
        return "the tied head is in the checkpoint a second time"
    dtype = config.torch_dtype
    placeholders = {
        key: torch.zeros((), dtype=dtype).expand(tensor.shape) for key, tensor in stored.items()
    }
    keys = {_memory(tensor): key for key, tensor in placeholders.items()}
    model = from_checkpoint(config, processing, state_dict=placeholders)
    owners = {
        name: keys.get(_memory(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    made = [name for name, key in owners.items() if key is None]
    if made:
        return f"transformers computes {made[0]} from what is stored"
    found = {}
    for name, parameter in model.named_parameters():
        found[parameter] = stored[owners[name]]
        _put_on_meta(parameter)
    with reading_errors(processing.source):
        _read_buffers(model, {name: stored[key] for name, key in owners.items()})
    return UnreadModel(finished(model, config), found)


def _has_tied_head(model_config: Any, stored: Mapping[str, StoredTensor]) -> bool:
    """transformers ties it or not by comparing the values."""
    is_tied = getattr(model_config.get_text_config(), "tie_word_embeddings", False)
    return is_tied and any(key.endswith(_TIED) for key in stored)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _put_on_meta(parameter: nn.Parameter) -> None:
    """It stays the same object, so that what is tied stays tied."""
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    torch.utils.swap_tensors(parameter, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def _read_buffers(model: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Those that a checkpoint holds, such as clipping ranges. The others are constants by now."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            tensor = stored.get(f"{prefix}.{name}" if prefix else name)
            if tensor is not None:
                module._buffers[name] = tensor.whole().to(buffer.dtype, copy=True)
