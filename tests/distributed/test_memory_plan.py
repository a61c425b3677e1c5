"""The plan of a sharded run is, to the byte, what rank 0 of several holds in the step itself."""

from __future__ import annotations

import pytest
from ranks import findings, run_ranks
from sharded_plans import Case, steps
from whole_runs import SMALL, compose

from gemtune.planning import PlanConfig, plan_memory
from gemtune.planning.step import StepPlan

pytestmark = pytest.mark.xdist_group("sharded_plans")

COMMON = ("parallel=fsdp2", "loop.micro_batch_size=2", "data.max_length=64")
WITH_IMAGE = "data.max_length=96"
ON_TWO: dict[str, Case] = {
    "full": (
        (*COMMON, WITH_IMAGE),
        PlanConfig(world_size=2, images_per_row=1, learned_fraction=0.3),
    ),
    "stock, one micro-batch": (
        (*COMMON, "patches=[]", "loop.global_batch_size=4"),
        PlanConfig(world_size=2),
    ),
    "lora": (
        (*COMMON, "recipe=gemma4_lora", "model.freeze=[ple]", "data.packing=true")
        + ("adapter.parts=[language,vision]",)
        + ("patches=[linear_cross_entropy,supervised_positions,ple_offload]",),
        PlanConfig(world_size=2, learned_fraction=0.2),
    ),
}
ON_THREE: dict[str, Case] = {
    "frozen towers, recomputed in bfloat16": (
        (*COMMON, WITH_IMAGE, "loop.global_batch_size=12", "model.freeze=[vision,audio]")
        + ("model.gradient_checkpointing=true", "parallel.mixed_precision=bf16"),
        PlanConfig(world_size=3, images_per_row=1),
    ),
}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, StepPlan]]:
    found = {}
    for num_ranks, cases in ((2, ON_TWO), (3, ON_THREE)):
        folder = tmp_path_factory.mktemp("steps")
        run_ranks(steps, num_ranks, cases, str(folder), limit_seconds=200)
        found[num_ranks] = findings(folder, num_ranks)[0]
    return found


@pytest.mark.parametrize(
    ("num_ranks", "name"), [*((2, name) for name in ON_TWO), *((3, name) for name in ON_THREE)]
)
def test_the_plan_of_a_shard_is_its_step(
    num_ranks: int, name: str, real: dict[int, dict[str, StepPlan]]
) -> None:
    overrides, settings = {2: ON_TWO, 3: ON_THREE}[num_ranks][name]
    planned = plan_memory(compose("model.weights=random", *SMALL, *overrides), settings).step
    found = real[num_ranks][name]
    assert list(planned.peaks) == list(found.peaks) == ["forward", "loss", "backward", "optimizer"]
    for phase, peak in found.peaks.items():
        assert planned.peaks[phase].by_kind == peak.by_kind, phase
        assert planned.peaks[phase].total_bytes == peak.total_bytes, phase
    assert planned.parameters_bytes == found.parameters_bytes
