"""Real steps of sharded models on several ranks, followed on each of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch.utils._pytree import tree_leaves, tree_map_only
from whole_runs import SMALL, compose

from gemtune import patches
from gemtune.attention import separate_documents
from gemtune.losses.budgets import accelerator_budgets
from gemtune.models import base_model, load_processing, trained_modalities
from gemtune.parallel import Strategy
from gemtune.parallel.construction import build_base
from gemtune.patches.host_memory import host_parameters
from gemtune.planning import PlanConfig
from gemtune.planning.memory_plan import largest_inputs
from gemtune.planning.step import StepPlan, follow_step
from gemtune.planning.storages import StorageFollower
from gemtune.runtime import start
from recipes.batches import stand_in

_LATE = (torch.ops.aten.split.Tensor, torch.ops.aten.copy_.default)


@dataclass
class WithoutGloo(StorageFollower):
    """Leaves out what gloo holds: collectives get copies, and their results are copied back.

    gloo's threads let go of tensors when they come to it, and within a reduce-scatter gloo copies
    all that goes in, from which it cuts the part of the rank when it is waited for.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _LATE and args[0].untyped_storage()._cdata not in self._entries:
            return func(*args, **(kwargs or {}))  # gloo's own: no operator has made it
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func.namespace != "c10d":
            return super()._run(func, args, kwargs)
        copies = tree_map_only(torch.Tensor, torch.clone, args)
        _, work = func(*copies, **kwargs)
        dist.Work.unbox(work).wait()
        for ours, copy in zip(tree_leaves(args), tree_leaves(copies), strict=True):
            if isinstance(ours, torch.Tensor):
                ours.copy_(copy)
        return args[0], work


Case = tuple[tuple[str, ...], PlanConfig]


def steps(rank: int, cases: dict[str, Case], folder: str) -> None:
    """The worker: of each case, by name, what this rank holds in a step."""
    found = {name: step(overrides, settings) for name, (overrides, settings) in cases.items()}
    torch.save(found, Path(folder) / f"rank{rank}.pt")


def step(overrides: tuple[str, ...], settings: PlanConfig) -> StepPlan:
    """Built as the recipe builds it, with weights that have values."""
    # accelerate keeps its state in the classes.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    config = compose(*SMALL, *overrides)
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        runtime = start(config.run, config.parallel)
    runtime.strategy = Strategy("fsdp2")
    processing = load_processing(config.model)
    loaded = build_base(config, runtime, processing)
    base = loaded.model
    patches.apply(base, config.patches)
    if config.data.packing:
        separate_documents(base)
    model = loaded.attach(config.adapter, torch.device("cpu"))
    trained = trained_modalities(model)
    on_host = host_parameters(model)
    joint = runtime.distribute(model, on_host=on_host, base=base, stored=loaded.stored)
    optimizer = config.optim.build(model)
    kinds = {"image"} if settings.images_per_row else set()
    rows = SimpleNamespace(media_kinds=kinds, media_in_every_row=kinds)
    fed = stand_in(trained, runtime, base, rows, rows) if trained else lambda: None
    follower = WithoutGloo()
    follower.leave_out([model.get_parameter(name) for name in on_host])
    zeros = lambda shape, dtype: torch.zeros(shape, dtype=dtype)  # noqa: E731
    inputs = largest_inputs(config, settings, processing, zeros)[1]
    with accelerator_budgets():
        return follow_step(
            follower,
            joint,
            optimizer,
            inputs,
            loss_begins_after=base_model(base),
            max_grad_norm=config.loop.max_grad_norm,
            after_backward=fed,
        )
