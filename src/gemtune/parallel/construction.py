"""The model of a run that is spread over processes: what to build where, and in one piece again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from gemtune.adapters import Adapter, Dora, Qlora, attach
from gemtune.errors import ModelError
from gemtune.models import Processing, load_model, part_of
from gemtune.models.gemma4 import reading_errors
from gemtune.models.stored import StoredTensor, mark_of, weight_files
from gemtune.models.unread import UnreadModel, load_unread, needs_transformers
from gemtune.parallel.config import (
    AUTO,
    DDP,
    Strategy,
    decide,
    refuse_sharding,
    smallest_device_bytes,
    training_bytes,
)
from gemtune.parallel.reading import Collect, in_name_only, read_whole, together
from gemtune.parallel.weights import give_memory, whole_on_first

if TYPE_CHECKING:
    from gemtune.config import RunConfig
    from gemtune.runtime import Runtime

# Patch -> the part whose weights it keeps in host memory.
_HOSTED = {"vision_streaming": "vision", "ple_offload": "ple"}


@dataclass(frozen=True)
class Base:
    """The Gemma 4 of a run, where this process has it before the processes meet."""

    model: nn.Module
    stored: Mapping[nn.Parameter, StoredTensor] = field(default_factory=dict)
    """Of the parameters that no process sends: where every process reads its part of them."""
    reading: str = ""
    """How the weights come to the processes, for people; empty where each has all of them."""

    def attach(self, adapter: Adapter, device: torch.device) -> nn.Module:
        """`adapters.attach`; the factors have values wherever the weights around them have none.

        Those of the embeddings and the tied head are views of each other for a moment, and could
        not get memory later on.
        """
        with in_name_only(self.model.parameters()):
            return attach(self.model, adapter, device)


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


def build_base(config: RunConfig, runtime: Runtime, processing: Processing) -> Base:
    """The model on the CPU; where it will be sharded, on meta, for every rank to read its part.

    The weights that patches keep in host memory have memory on every rank, and are read. Where a
    checkpoint cannot be read in parts, and for random weights, rank 0 has the model and will send
    it; on the other ranks there is memory, without values, for what is in host memory.

    Raises:
        ModelError: the checkpoint cannot be read; on all ranks, if it would be by parts.
    """
    unread: UnreadModel | str = ""
    if runtime.is_sharded and config.model.weights == "pretrained":
        unread = load_in_parts(config, runtime, processing)
    if not isinstance(unread, str):
        hosted = _hosted_parameters(unread.model, config)
        together(runtime.collect, lambda: [read_whole(p, unread.stored[p]) for p in hosted])
        return Base(unread.model, unread.stored, "each process reads its part of them")
    is_sent = runtime.is_sharded and not runtime.is_main
    base = load_model(config.model, processing, config.run.seed, without_weights=is_sent)
    if is_sent:
        for parameter in _hosted_parameters(base, config):
            give_memory(parameter, parameter.dtype, torch.device("cpu"))
    return Base(base, reading=f"the first process reads and sends them: {unread}" if unread else "")


def load_in_parts(config: RunConfig, runtime: Runtime, processing: Processing) -> UnreadModel | str:
    """The model of the checkpoint, unread on every rank; or why rank 0 has to read it, for people.

    A checkpoint on the hub is downloaded once for each machine. All ranks must call it.

    Raises:
        ModelError: on all ranks, where one of them finds no checkpoint for this configuration, or
            another one than rank 0.
    """
    collect, source = runtime.collect, processing.source
    if isinstance(config.adapter, Dora):
        return "adapter=dora starts from the norms of whole weights"

    def find() -> tuple[list[Path], str | None]:
        if reason := needs_transformers(processing):
            return [], reason
        with reading_errors(source):
            files = weight_files(source, processing.hub_options)
        return files, None if files else "the checkpoint has no safetensors"

    found = together(collect, lambda: find() if runtime.is_first_on_machine else None)
    files, reason = together(collect, lambda: found or find())
    _refuse_others(source, collect, together(collect, lambda: mark_of(files)))
    if reason is not None:
        return reason

    def load() -> UnreadModel | str:
        return load_unread(config.model, processing, files)

    # transformers makes up the weights that it misses before it says so: let one rank ask first.
    first = together(collect, lambda: load() if runtime.is_main else None)
    reason = collect([first if isinstance(first, str) else None])[0]
    return reason or together(collect, lambda: first or load())


def _refuse_others(source: str, collect: Collect, mark: str) -> None:
    """Parts of two checkpoints would make a model that nobody has trained."""
    found = collect([(source, mark)])
    others = [(rank, place) for rank, (place, mark) in enumerate(found) if mark != found[0][1]]
    if others:
        rank, place = others[0]
        raise ModelError(
            f"rank {rank} has another checkpoint in {place} than rank 0 in {found[0][0]}. Copy the "
            "same one to all machines, or name a commit of the hub: model.revision=COMMIT."
        )


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
