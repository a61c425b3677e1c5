"""What to change so that a run fits: overrides as they would be typed, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gemtune import patches
from gemtune.adapters import Adapter, Lora
from gemtune.adapters.libraries import INT8, NF4, is_installed
from gemtune.config import RunConfig
from gemtune.models import PARTS
from gemtune.optim import AdamW
from gemtune.parallel import FSDP2
from gemtune.planning.memory_plan import MemoryPlan

GIB = 2**30
RESERVED_GIB = 1.0
"""Not for tensors: CUDA's context and libraries (about 0.5 GiB), and what the allocator cannot
use because it lies in pieces or, under FSDP2, in the pool of another stream."""


@dataclass(frozen=True)
class Proposal:
    """Changes on top of a configuration, and what a run with them takes."""

    overrides: tuple[str, ...]
    """All of them, as they would be typed."""
    change: str
    """The last of them, in short."""
    cost: str
    """Of the last one."""
    plan: MemoryPlan
    saves: bool
    """Whether it is less than before it; else it is not kept for those that follow."""
    fits: bool


def fits(plan: MemoryPlan, device_memory_gib: float) -> bool:
    """Whether its tensors find room beside what is reserved."""
    return plan.peak_bytes <= (device_memory_gib - RESERVED_GIB) * GIB


def propose(
    config: RunConfig,
    device_memory_gib: float,
    replan: Callable[[tuple[str, ...]], tuple[RunConfig, MemoryPlan]],
    planned: MemoryPlan,
    *,
    until_it_fits: bool = True,
) -> Iterator[Proposal]:
    """Change after change, each planned and kept where it saves anything, until the run fits.

    Of several processes (those of `planned`) shards are among the changes.

    Args:
        until_it_fits: False goes on to the last change that there is.
        replan: the configuration and the plan with these overrides added.
        planned: the plan without any.
    """
    chosen: tuple[str, ...] = ()
    least = planned.peak_bytes
    before = planned
    tried: set[str] = set()
    while change := next((c for c in _changes(config, before) if c.override not in tried), None):
        tried.add(change.override)
        key = change.override.partition("=")[0]
        overrides = (*(o for o in chosen if o.partition("=")[0] != key), change.override)
        changed, plan = replan(overrides)
        saves, does_fit = plan.peak_bytes < least, fits(plan, device_memory_gib)
        yield Proposal(overrides, change.name, change.cost, plan, saves, does_fit)
        if does_fit and until_it_fits:
            return
        if saves:
            config, chosen, least, before = changed, overrides, plan.peak_bytes, plan


class _Change(NamedTuple):
    override: str
    cost: str
    name: str


def _changes(config: RunConfig, planned: MemoryPlan) -> Iterator[_Change]:
    """Single changes that are left to make, from the cheapest to the dearest."""
    if planned.hears and not _trains_audio(config):
        yield _set("model.audio_tower=false", "none: what is planned for has no audio")
    missing = [name for name in patches.default() if name not in config.patches]
    if missing:
        yield _more_patches(config, missing, "none: the same gradients")
    if "ple" in config.model.freeze and "ple_offload" not in config.patches:
        cost = "rows of each batch copied from host memory"
        yield _more_patches(config, ["ple_offload"], cost)
    if "vision" in config.model.freeze and "vision_streaming" not in config.patches:
        cost = "the vision tower copied from host memory for each micro-batch"
        yield _more_patches(config, ["vision_streaming"], cost)
    if planned.world_size > 1 and not planned.is_sharded:
        cost = "weights sent between the processes in every pass"
        yield _set(f"parallel={FSDP2}", cost)
    if not config.model.gradient_checkpointing:
        yield _set("model.gradient_checkpointing=true", "layers computed twice: 1/3 more time")
    elif config.model.recomputed_layers is not None:
        yield _set("model.recomputed_layers=null", "the other layers computed twice as well")
    if config.loop.micro_batch_size > 1:
        size = config.loop.micro_batch_size // 2
        yield _set(f"loop.micro_batch_size={size}", "the same gradients, in more, smaller passes")
    is_full = type(config.adapter) is Adapter
    if is_full and not config.optim.offload_state:
        cost = "moments copied from and to host memory at every step"
        yield _set("optim.offload_state=true", cost)
    if config.parallel.mixed_precision == "no":
        yield _set("parallel.mixed_precision=bf16", "activations and matmuls in bfloat16")
    # Neither 8-bit moments nor 4-bit weights can be sharded.
    is_whole = config.parallel.strategy != FSDP2
    if type(config.optim) is AdamW and is_whole and is_installed(INT8):
        yield _set("optim=adamw_8bit", "moments of AdamW rounded to 8 bits")
    if type(config.adapter) is Lora and is_whole and is_installed(NF4):
        yield _set("adapter=qlora", "weights of the language layers rounded to 4 bits")
    if not is_full:
        return
    others = [part for part in PARTS if part != "language" and part not in config.model.freeze]
    if others:
        frozen = ",".join([*config.model.freeze, *others])
        yield _set(f"model.freeze=[{frozen}]", "only the language layers are trained")
    yield _set("adapter=lora", "another training: adapters alone, on a base in bfloat16")


def _trains_audio(config: RunConfig) -> bool:
    if isinstance(config.adapter, Lora):
        return "audio" in config.adapter.parts
    return "audio" not in config.model.freeze


def _set(override: str, cost: str) -> _Change:
    return _Change(override, cost, override)


def _more_patches(config: RunConfig, names: list[str], cost: str) -> _Change:
    override = f"patches=[{','.join([*config.patches, *names])}]"
    return _Change(override, cost, f"more patches: {', '.join(names)}")
