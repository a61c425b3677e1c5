"""The plan of one shard of a run, made by this process alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from whole_runs import compose

from gemtune.config import RunConfig
from gemtune.errors import ConfigError
from gemtune.planning import MemoryPlan, PlanConfig, memory_plan, plan_memory
from gemtune.planning.proposals import Proposal, propose
from gemtune.planning.storages import StorageFollower
from gemtune.planning.world import first_of

SMALL = ("loop.micro_batch_size=2", "data.max_length=64", "loop.global_batch_size=8")
SHARDED = (*SMALL, "parallel=fsdp2")


def blocks(num_bytes: int) -> int:
    return -(-num_bytes // 512) * 512


@pytest.mark.parametrize("world_size", [3, 64])
def test_a_rank_holds_the_largest_chunk_of_each_parameter(world_size: int) -> None:
    """By the rule of torch.chunk, whose first chunk is the largest; AdamW has it twice again."""
    # With an image: what no row feeds has no state.
    images = ("data.max_length=96", f"loop.global_batch_size={2 * world_size}")
    config = compose(*SHARDED, *images)
    shapes: list[torch.Size] = []
    build = config.optim.build

    def seen(model: torch.nn.Module) -> torch.optim.Optimizer:
        shapes.extend(p.shape for p in model.parameters())
        assert all(isinstance(p, DTensor) for p in model.parameters())
        return build(model)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(config.optim), "build", lambda _, model: seen(model))
        plan = plan_memory(config, PlanConfig(world_size=world_size, images_per_row=1))
    shards = sum(
        blocks(4 * math.ceil(shape[0] / world_size) * math.prod(shape[1:])) for shape in shapes
    )
    held = plan.step.peaks["optimizer"].by_kind
    steps = len(shapes) * 512  # a number of each parameter
    assert held["optimizer state"] == 2 * shards + steps
    assert shards <= held["parameters"] < shards + 2**17  # and the buffers, which all ranks have
    assert plan.num_parameters == 1_408_304 == plan.num_trained
    assert plan.bucket_bytes == 0 and plan.is_sharded


def test_one_process_is_not_sharded() -> None:
    alone = plan_memory(compose(*SMALL), PlanConfig())
    assert plan_memory(compose(*SHARDED), PlanConfig()).step == alone.step


def test_resized_storages_count_as_they_are() -> None:
    follower = StorageFollower()
    with follower:
        with follower.phase("forward"):
            storage = torch.zeros(1024).untyped_storage()
            storage.resize_(0)
            assert follower.live_bytes == 0
            storage.resize_(8192)
            assert follower.live_bytes == 8192
            storage.resize_(0)
            other = torch.zeros(256)
        assert follower.live_bytes == 1024 == 4 * other.numel()
        del storage
        assert follower.live_bytes == 1024
    assert follower.peaks()["forward"].total_bytes == 8192


def test_the_group_is_gone_afterwards_and_no_other_is_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        assert dist.get_world_size() == 2 and dist.get_rank() == 0
        raise RuntimeError("as if")

    resize = torch.UntypedStorage.resize_
    monkeypatch.setattr(memory_plan, "follow_step", fails)
    with pytest.raises(RuntimeError, match="as if"):
        plan_memory(compose(*SHARDED), PlanConfig(world_size=2))
    assert not dist.is_initialized()
    with first_of(5):
        with pytest.raises(ConfigError, match=r"belongs to one already.*scripts/plan_memory\.py"):
            plan_memory(compose(*SHARDED), PlanConfig(world_size=2))
        assert dist.get_world_size() == 5
    assert torch.UntypedStorage.resize_ is resize


@pytest.mark.parametrize(
    ("settings", "name", "reason"),
    [
        ({"world_size": 2, "device_memory_gib": 0.03}, "fsdp2", "60% of the smallest GPU"),
        ({"world_size": 2, "device_memory_gib": 24.0}, "ddp", "60% of the smallest GPU"),
        ({"world_size": 2}, "ddp", "plan.device_memory_gib does not say"),
        ({"world_size": 2, "device_memory_gib": 0.03, "device": "cpu"}, "ddp", "not on GPUs"),
        ({"device_memory_gib": 0.03}, "ddp", "a single process"),
    ],
)
def test_auto_is_decided_by_the_memory_of_the_devices(
    settings: dict[str, Any], name: str, reason: str
) -> None:
    """A copy takes 1,408,304 parameters * 4 numbers of 4 bytes: 0.021 GiB."""
    plan = PlanConfig(**settings)
    config = compose(*SMALL)
    found = memory_plan.planned_strategy(config, plan, memory_plan.processing_for_plan(config))
    assert found.name == name and reason in found.reason


def test_state_in_host_memory_is_not_counted_in_that_choice() -> None:
    """It leaves weights and gradients: 0.010 GiB of 60% of 0.03."""
    config = compose(*SMALL, "optim.offload_state=true")
    plan = PlanConfig(world_size=2, device_memory_gib=0.03)
    found = memory_plan.planned_strategy(config, plan, memory_plan.processing_for_plan(config))
    assert found.name == "ddp" and "60% of the smallest GPU" in found.reason


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_of_shares_in_host_memory(kind: str) -> None:
    keys = (*SHARDED, "data.max_length=96", f"optim={kind}")
    settings = PlanConfig(world_size=2, images_per_row=1)
    here, there = (
        plan_memory(compose(*keys, *more), settings)
        for more in ((), ("optim.offload_state=true", "optim.offload_group_mib=1"))
    )
    state = here.step.peaks["forward"].by_kind["optimizer state"]
    assert there.step.peaks["forward"].by_kind.get("optimizer state", 0) == 0
    saved = here.step.peaks["forward"].total_bytes - there.step.peaks["forward"].total_bytes
    assert saved == state
    # Padded to 256 bytes there, and to 512 here.
    assert 0.9 * state < there.host_state_bytes < state
    buffers = there.step.peaks["optimizer"].by_kind["optimizer state"]
    assert 2**19 < buffers < 2 * 2**20 < state


def test_shards_are_proposed_where_there_are_processes() -> None:
    copied = plan_memory(compose(*SMALL), PlanConfig(world_size=4))
    sharded = plan_memory(compose(*SHARDED), PlanConfig(world_size=4))

    def proposed(planned: MemoryPlan, *start: str) -> list[Proposal]:
        def replan(overrides: tuple[str, ...]) -> tuple[RunConfig, MemoryPlan]:
            # Nothing else saves anything.
            plan = sharded if "parallel=fsdp2" in overrides else planned
            return compose(*SMALL, *start, *overrides), plan

        return list(propose(compose(*SMALL, *start), 0.5, replan, planned))

    found = proposed(copied)
    [shards] = [p for p in found if p.overrides[-1] == "parallel=fsdp2"]
    assert shards.saves and shards.plan.peak_bytes == sharded.peak_bytes < copied.peak_bytes
    assert found[-1].overrides[0] == "parallel=fsdp2", "kept for those that follow"
    # Neither a single process nor one that is sharded.
    others = [*proposed(replace(copied, world_size=1)), *proposed(sharded, "parallel=fsdp2")]
    assert others and not any("parallel=fsdp2" in p.overrides for p in others)


def test_layers_are_recomputed_under_shards_as_without() -> None:
    """FSDP2 gives layers another class, whose forward recomputes; patches must call that one."""
    arguments = (*SMALL, "data.max_length=256", "model.gradient_checkpointing=true")
    arguments += ("patches=[linear_cross_entropy,supervised_positions]",)
    whole, shard = (
        plan_memory(compose(*arguments, f"parallel={how}"), PlanConfig(world_size=2)).step
        for how in ("ddp", "fsdp2")
    )
    kept = [step.peaks["loss"].by_kind["forward"] for step in (whole, shard)]
    assert kept[1] == pytest.approx(kept[0], rel=0.1)
