"""What to change so that a run fits: overrides as they would be typed, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gemtune import patches
from gemtune.adapters import Adapter
from gemtune.config import RunConfig
from gemtune.models import PARTS
from gemtune.planning.memory_plan import MemoryPlan

GIB = 2**30
RESERVED_GIB = 1.0
"""Not for tensors: CUDA's context and libraries (about 0.5 GiB), and what the allocator cannot
use because it lies in pieces."""


@dataclass(frozen=True)
class Proposal:
    """Changes on top of a configuration, and what a run with them takes."""

    overrides: tuple[str, ...]
    cost: str
    """Of the last of them."""
    plan: MemoryPlan
    fits: bool


def fits(plan: MemoryPlan, device_memory_gib: float) -> bool:
    """Whether its tensors find room beside what is reserved."""
    return plan.peak_bytes <= (device_memory_gib - RESERVED_GIB) * GIB


def propose(
    config: RunConfig,
    device_memory_gib: float,
    replan: Callable[[tuple[str, ...]], tuple[RunConfig, MemoryPlan]],
    planned: MemoryPlan,
) -> Iterator[Proposal]:
    """Change after change, each planned and kept where it saves anything, until the run fits.

    Args:
        replan: the configuration and the plan with these overrides added.
        planned: the plan without any.
    """
    chosen: tuple[str, ...] = ()
    least = planned.peak_bytes
    tried: set[str] = set()
    while True:
        found = next(((o, c) for o, c in _changes(config) if o not in tried), None)
        if found is None:
            return
        override, cost = found
        tried.add(override)
        key = override.partition("=")[0]
        overrides = (*(o for o in chosen if o.partition("=")[0] != key), override)
        changed, plan = replan(overrides)
        does_fit = fits(plan, device_memory_gib)
        yield Proposal(overrides, cost, plan, does_fit)
        if does_fit:
            return
        if plan.peak_bytes < least:
            config, chosen, least = changed, overrides, plan.peak_bytes


def _changes(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Single changes that are left to make, from the cheapest to the dearest."""
    chosen = list(config.patches)
    missing = [name for name in patches.default() if name not in chosen]
    if missing:
        yield _patches([*chosen, *missing]), "none: the same gradients"
    if "ple" in config.model.freeze and "ple_offload" not in chosen:
        yield _patches([*chosen, "ple_offload"]), "rows of each batch copied from host memory"
    if "vision" in config.model.freeze and "vision_streaming" not in chosen:
        yield (
            _patches([*chosen, "vision_streaming"]),
            "the vision tower copied from host memory for each micro-batch",
        )
    if not config.model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true", "layers computed twice: about 1/3 more time"
    if config.loop.micro_batch_size > 1:
        size = config.loop.micro_batch_size // 2
        yield f"loop.micro_batch_size={size}", "the same gradients, in more and smaller passes"
    if config.parallel.mixed_precision == "no":
        yield "parallel.mixed_precision=bf16", "activations and matmuls in bfloat16"
    others = [part for part in PARTS if part != "language" and part not in config.model.freeze]
    if others and type(config.adapter) is Adapter:
        frozen = ",".join([*config.model.freeze, *others])
        yield f"model.freeze=[{frozen}]", "only the language layers are trained"
    if type(config.adapter) is Adapter:
        yield "adapter=lora", "another training: adapters alone, on a base in bfloat16"


def _patches(names: list[str]) -> str:
    return f"patches=[{','.join(names)}]"
