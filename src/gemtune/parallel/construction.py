"""The model of a run that is spread over processes: what to build where, and in one piece again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from gemtune.adapters import Qlora, attach
from gemtune.models import Processing, load_model, part_of
from gemtune.parallel.config import (
    AUTO,
    DDP,
    Strategy,
    decide,
    refuse_sharding,
    smallest_device_bytes,
    training_bytes,
)
from gemtune.parallel.weights import give_memory, whole_on_first

if TYPE_CHECKING:
    from gemtune.config import RunConfig
    from gemtune.runtime import Runtime

# Patch -> the part whose weights it keeps in host memory.
_HOSTED = {"vision_streaming": "vision", "ple_offload": "ple"}


def choose_strategy(config: RunConfig, runtime: Runtime, processing: Processing) -> Strategy:
    """What `parallel.strategy` stands for here, decided before weights are read.

    Raises:
        ConfigError: the optimizer steps whole parameters only, and these would be sharded.
    """
    asked, copy_bytes = config.parallel.strategy, 0
    if asked == AUTO and isinstance(config.adapter, Qlora):
        return Strategy(DDP, "auto: a base in few bits is not sharded")
    device_bytes = smallest_device_bytes(runtime.device)
    if asked == AUTO and runtime.world_size > 1 and device_bytes is not None:
        copy_bytes = bytes_of_copy(config, processing)
        device_bytes = int(min(row[0] for row in runtime.table([float(device_bytes)])))
    strategy = decide(
        asked,
        num_processes=runtime.world_size,
        copy_bytes=copy_bytes,
        device_bytes=device_bytes,
    )
    if runtime.world_size > 1:
        refuse_sharding(strategy, config.optim.name, config.optim.whole_only)
    return strategy


def bytes_of_copy(config: RunConfig, processing: Processing) -> int:
    """What `training_bytes` says of the model that this configuration trains, on its device."""
    skeleton = load_model(config.model, processing, config.run.seed, without_weights=True)
    elsewhere = {id(p) for p in _hosted_parameters(skeleton, config)}
    parameters = attach(skeleton, config.adapter).parameters()
    here = (p for p in parameters if id(p) not in elsewhere)
    return training_bytes(here, config.optim.device_bytes)


def build_base(config: RunConfig, runtime: Runtime, processing: Processing) -> nn.Module:
    """The model on the CPU; where it will be sharded, on rank 0 only, and elsewhere on meta.

    The weights that patches keep in host memory have memory on every rank, without values there.
    """
    without_weights = runtime.is_sharded and not runtime.is_main
    base = load_model(config.model, processing, config.run.seed, without_weights=without_weights)
    if without_weights:
        for parameter in _hosted_parameters(base, config):
            give_memory(parameter, parameter.dtype, torch.device("cpu"))
    return base


def rebuild_around(model: nn.Module, config: RunConfig, processing: Processing) -> nn.Module | None:
    """On rank 0 a plain model with the trained parameters of a sharded one; None elsewhere.

    The shards stay as they are: what was trained is gathered one by one, and put into the model
    that `config` describes, built again on the CPU. All ranks must call it.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    values = {name: whole for name, whole in whole_on_first(trained) if whole is not None}
    if not values:
        return None
    plain = attach(load_model(config.model, processing, config.run.seed), config.adapter)
    with torch.no_grad():
        for name, whole in values.items():
            plain.get_parameter(name).copy_(whole)
    return plain


def _hosted_parameters(base: nn.Module, config: RunConfig) -> list[nn.Parameter]:
    """Those that the chosen patches will keep in host memory, if they are not trained."""
    parts = {part for patch, part in _HOSTED.items() if patch in config.patches}
    return [
        p for name, p in base.named_parameters() if part_of(name) in parts and not p.requires_grad
    ]
