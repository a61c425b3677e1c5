"""The memory that a run will take, from its configuration: no weights, no GPU, no download."""

from __future__ import annotations

import copy
import importlib.resources
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemtune import adapters, patches
from gemtune.attention import separate_documents
from gemtune.data import Batch
from gemtune.errors import ConfigError
from gemtune.losses import HostLabels
from gemtune.losses.budgets import accelerator_budgets
from gemtune.models import (
    EmbeddingNoise,
    Processing,
    StandIns,
    base_model,
    has_audio_tower,
    load_model,
    load_processing,
    trained_modalities,
)
from gemtune.options import option, require_choice, require_range
from gemtune.parallel import AUTO, DDP, Strategy, decide, refuse_sharding
from gemtune.parallel.construction import bytes_of_copy
from gemtune.parallel.fsdp import shard_model
from gemtune.patches.host_memory import host_parameters
from gemtune.patches.vision_streaming import buffer_bytes, streamed_modules
from gemtune.planning.batch import largest_batch
from gemtune.planning.host_state import host_bytes, rest_on_host
from gemtune.planning.shadow import Shadow
from gemtune.planning.step import StepPlan, follow_step
from gemtune.planning.storages import GATHERED
from gemtune.planning.world import first_of

if TYPE_CHECKING:  # it needs OmegaConf, which a plan does not
    from gemtune.config import RunConfig

_BUNDLED = {
    "google/gemma-4-E2B-it": "gemma-4-e2b.json",
    "google/gemma-4-E4B-it": "gemma-4-e4b.json",
    "google/gemma-4-26B-A4B-it": "gemma-4-26b-a4b.json",
    "google/gemma-4-31B-it": "gemma-4-31b.json",
}
_AUTOCAST = {"no": None, "bf16": torch.bfloat16}


@dataclass
class PlanConfig:
    """The keys of the plan itself."""

    from_data: bool = option(False, "read the data: rows are as long and as full as its largest")
    row_tokens: int | None = option(None, "tokens of each row; null: data.max_length")
    images_per_row: int = option(0, "images in each row")
    image_tokens: int | None = option(None, "soft tokens of each image; null: of full size")
    learned_fraction: float = option(1.0, "share of a row that is learned; less text, less memory")
    world_size: int = option(1, "processes: copies of the model (ddp) or shards of it (fsdp2)")
    device_memory_gib: float | None = option(None, "say whether it fits, and what would make it")
    alternatives: int = option(0, "changes to plan where it fits as well")
    device: str = option("cuda", "cuda, or cpu: the loss takes smaller chunks there")
    output: str = option("", "write the plan to this JSON file as well")

    def __post_init__(self) -> None:
        require_range("plan.images_per_row", self.images_per_row, at_least=0)
        require_range("plan.row_tokens", self.row_tokens, at_least=2)
        require_range("plan.image_tokens", self.image_tokens, at_least=1)
        require_range("plan.alternatives", self.alternatives, at_least=0)
        require_choice("plan.device", self.device, ["cuda", "cpu"])
        require_range("plan.world_size", self.world_size, at_least=1)
        require_range("plan.device_memory_gib", self.device_memory_gib, above=0)
        if not 0 < self.learned_fraction <= 1:
            raise ConfigError(f"plan.learned_fraction={self.learned_fraction} must be in (0, 1].")


@dataclass(frozen=True)
class MemoryPlan:
    """What one process of a run takes on its device; of several the first, which has the most."""

    step: StepPlan
    bucket_bytes: int
    """Of DDP: a second copy of all gradients, from the first step on."""
    host_bytes: int
    """Of weights that patches keep in host memory."""
    host_state_bytes: int
    """Of optimizer state that lies in host memory between steps."""
    num_trained: int
    """Parameters, of all shards together."""
    num_parameters: int
    batch: str
    """What was planned for."""
    report: str
    """The patches."""
    hears: bool
    """Whether an audio tower is among the parameters. None is used: batches are of text and images.
    """
    strategy: Strategy
    """How the processes share the model."""
    world_size: int
    """Processes."""

    @property
    def peak_bytes(self) -> int:
        """The most that tensors take at once."""
        return self.step.peak.total_bytes + self.bucket_bytes

    @property
    def is_sharded(self) -> bool:
        """A single process holds the whole model, whatever was asked for."""
        return self.strategy.is_sharded and self.world_size > 1


def plan_memory(
    config: RunConfig, plan: PlanConfig, progress: Callable[[str], None] = lambda said: None
) -> MemoryPlan:
    """Follow one step of the run on the largest batch that it can meet.

    The model, its patches, its adapter and its shards are those of the run; tensors of floating
    point have no values. Batches count with `data.max_length` tokens in every row. Under
    `parallel=fsdp2` it is the step of rank 0, every other rank taken to be as it is.

    Raises:
        UserError: as the run would; ConfigError: a plan of shards where this process belongs to a
            process group.
    """
    config = copy.deepcopy(config)  # building decides some of its keys
    config.loop.check_world_size(plan.world_size)
    processing = processing_for_plan(config)
    strategy = planned_strategy(config, plan, processing)
    is_sharded = strategy.is_sharded and plan.world_size > 1
    if is_sharded:
        refuse_sharding(strategy, config.optim.name, config.optim.whole_only)
    with first_of(plan.world_size) if is_sharded else nullcontext():
        return _follow(config, plan, processing, strategy, is_sharded, progress)


def _follow(
    config: RunConfig,
    plan: PlanConfig,
    processing: Processing,
    strategy: Strategy,
    is_sharded: bool,
    progress: Callable[[str], None],
) -> MemoryPlan:
    progress("building the model")
    shadow = Shadow()
    base = load_model(config.model, processing, config.run.seed, without_weights=True)
    report = patches.apply(base, config.patches)
    if config.data.packing:
        separate_documents(base)
    if config.model.neftune_alpha is not None:
        EmbeddingNoise(base, config.model.neftune_alpha)
    model = shadow.without_values(adapters.attach(base, config.adapter))
    shadow.leave_out(model.get_parameter(name) for name in host_parameters(model))
    after_backward = distribute(config, plan.world_size, is_sharded, model, base)
    optimizer = config.optim.build(model)
    if plan.device == "cuda":
        rest_on_host(optimizer, shadow, shadow.empty)
    batch, inputs = largest_inputs(config, plan, processing, shadow.empty)
    with as_on_gpu(shadow, base) if plan.device == "cuda" else nullcontext():
        step = follow_step(
            shadow,
            model,
            optimizer,
            inputs,
            loss_begins_after=base_model(base),
            max_grad_norm=config.loop.max_grad_norm,
            autocast_dtype=_AUTOCAST[config.parallel.mixed_precision],
            after_backward=after_backward,
            progress=progress,
        )
    parameters = list(model.parameters())
    hosted = [model.get_parameter(name) for name in host_parameters(model)]
    trained_bytes = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    tokens = f"{batch.labels.numel():,} tokens"
    images = plan.images_per_row * config.loop.micro_batch_size
    return MemoryPlan(
        step=step,
        bucket_bytes=trained_bytes if plan.world_size > 1 and not is_sharded else 0,
        host_bytes=sum(p.numel() * p.element_size() for p in hosted),
        host_state_bytes=host_bytes(optimizer),
        num_trained=sum(p.numel() for p in parameters if p.requires_grad),
        num_parameters=sum(p.numel() for p in parameters),
        batch=f"{len(batch.labels)} rows, {tokens}, {batch.num_supervised_tokens:,} of them "
        f"learned, {images} images",
        report=str(report),
        hears=has_audio_tower(base.config),
        strategy=strategy,
        world_size=plan.world_size,
    )


@contextmanager
def as_on_gpu(shadow: Shadow, base: nn.Module) -> Iterator[None]:
    """What differs there: the budgets of the loss, and the buffers of a tower that is streamed."""
    modules = streamed_modules(base)
    held: list[Tensor] = []

    def begin(*_: Any) -> None:
        held.append(shadow.empty((buffer_bytes(modules),), torch.uint8))
        shadow.add(held, GATHERED)

    handles = []
    if modules:
        handles.append(modules[0].register_forward_pre_hook(begin))
        handles.append(modules[-1].register_forward_hook(lambda *_: held.clear()))
    try:
        with accelerator_budgets():
            yield
    finally:
        for handle in handles:
            handle.remove()


def planned_strategy(config: RunConfig, plan: PlanConfig, processing: Processing) -> Strategy:
    """What `parallel.strategy` stands for on `plan.world_size` devices of the plan's memory."""
    asked, device_bytes = config.parallel.strategy, None
    if asked == AUTO and plan.world_size > 1 and plan.device == "cuda":
        if plan.device_memory_gib is None:
            return Strategy(DDP, "auto: plan.device_memory_gib does not say what the GPUs have")
        device_bytes = int(plan.device_memory_gib * 2**30)
    return decide(
        asked,
        num_processes=plan.world_size,
        copy_bytes=0 if device_bytes is None else bytes_of_copy(config, processing),
        device_bytes=device_bytes,
    )


def distribute(
    config: RunConfig, world_size: int, is_sharded: bool, model: nn.Module, base: nn.Module
) -> Callable[[], None]:
    """Shards and stand-ins for media as a run makes them; returns what follows its backward passes.

    Buckets of DDP are not made.
    """
    trained = trained_modalities(model)
    if is_sharded:
        mixed_precision = config.parallel.mixed_precision
        on_host = host_parameters(model)
        shard_model(
            model, base, torch.device("cpu"), on_host=on_host, mixed_precision=mixed_precision
        )
    if not trained or world_size == 1:
        return lambda: None
    kinds = {"audio"} & trained | ({"image"} if "vision" in trained else set())
    stand_ins = StandIns(base, kinds, without_autograd=is_sharded)
    return lambda: stand_ins.forget_unfed(lambda fed: fed)


def processing_for_plan(config: RunConfig) -> Processing:
    """The model's configuration: bundled for the released sizes, read where it is another one."""
    name = _BUNDLED.get(config.model.path)
    if name is None:
        return load_processing(config.model)
    from transformers import Gemma4Config

    folder = Path(str(importlib.resources.files("gemtune"))) / "assets" / "configs"
    model_config = Gemma4Config.from_dict(json.loads((folder / name).read_text()))
    # The folder, so that nothing is looked for on the hub.
    return Processing(None, None, model_config, str(folder), {}, None, {})


def largest_inputs(
    config: RunConfig,
    plan: PlanConfig,
    processing: Processing,
    empty: Callable[[torch.Size, torch.dtype], Tensor],
) -> tuple[Batch, list[tuple[dict[str, Tensor], dict[str, Any]]]]:
    """The largest batch, and what the loop gives the model of it for each micro-batch.

    Args:
        empty: makes pixels; nothing looks at their values.
    """
    model_config, images = processing.model_config, processing.image_processor
    # The bundled configurations come without a processor.
    full_size = images.max_soft_tokens if images else model_config.vision_soft_tokens_per_image
    batch = largest_batch(
        model_config,
        soft_tokens=plan.image_tokens or full_size,
        num_rows=config.loop.micro_batch_size,
        row_tokens=plan.row_tokens or config.data.max_length,
        images_per_row=plan.images_per_row,
        learned_fraction=plan.learned_fraction,
        packed=config.data.packing,
    )
    # Gradients of earlier micro-batches are there when the last one begins.
    rows_of_rank = config.loop.global_batch_size // plan.world_size
    num_micro_batches = 1 if rows_of_rank <= config.loop.micro_batch_size else 2
    options: dict[str, Any] = {"use_cache": False}
    if not {"linear_cross_entropy", "supervised_positions"}.isdisjoint(config.patches):
        options |= {"skip_logits": True, "host_labels": HostLabels(batch.labels)}

    def inputs() -> dict[str, Tensor]:
        values = {
            name: empty(v.shape, v.dtype) if v.is_floating_point() else v.clone()
            for name, v in batch.inputs.items()
        }
        return values | {"labels": batch.labels.clone()}

    return batch, [(inputs(), options) for _ in range(num_micro_batches)]
