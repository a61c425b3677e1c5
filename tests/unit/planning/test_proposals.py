"""What is proposed where a run does not fit, and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gemma4_zoo import model_folder
from whole_runs import compose

from gemtune.config import RunConfig
from gemtune.planning import MemoryPlan, PlanConfig, plan_memory, proposals
from gemtune.planning.proposals import fits, propose

SMALL = ("loop.micro_batch_size=2", "data.max_length=64")


@pytest.fixture(scope="module")
def planned() -> MemoryPlan:
    """Of the tiny model, which hears nothing, in one process."""
    return plan_memory(compose(*SMALL), PlanConfig())


def proposed(planned: MemoryPlan, *arguments: str) -> list[str]:
    """The overrides of the single changes that are left to a configuration."""
    return [change.override for change in proposals._changes(compose(*arguments), planned)]


def test_the_layers_that_are_left_are_proposed(planned: MemoryPlan) -> None:
    on = "model.gradient_checkpointing=true"
    assert "model.recomputed_layers=null" in proposed(planned, on, "model.recomputed_layers=[full]")
    assert "model.recomputed_layers=null" not in proposed(planned, on)


@pytest.mark.parametrize(
    ("keys", "is_offered"),
    [
        (("adapter=lora",), True),
        (("model.freeze=[audio]",), True),
        ((), False),
        (("adapter=lora", "adapter.parts=[language,audio]"), False),
        (("adapter=lora", "model.audio_tower=false"), False),
    ],
)
def test_an_idle_audio_tower_is_the_first_to_go(
    tmp_path: Path, keys: tuple[str, ...], is_offered: bool
) -> None:
    path = f"model.path={model_folder('e2b', tmp_path, hears=True)}"
    config = compose(*keys, path, "model.weights=random", *SMALL)
    planned = plan_memory(config, PlanConfig())
    changes = list(proposals._changes(config, planned))
    offered = [change.override == "model.audio_tower=false" for change in changes]
    assert offered == [is_offered] + [False] * (len(changes) - 1) and len(changes) > 1
    if is_offered:
        assert changes[0].cost == "none: what is planned for has no audio"


@pytest.mark.parametrize("installed", [True, False])
def test_fewer_bits_are_proposed_where_their_library_is(
    monkeypatch: pytest.MonkeyPatch, installed: bool, planned: MemoryPlan
) -> None:
    monkeypatch.setattr(proposals, "is_installed", lambda kind: installed)
    both = {"optim=adamw_8bit", "adapter=qlora"}

    def fewer_bits(*arguments: str) -> set[str]:
        return both & {*proposed(planned, *arguments)}

    assert fewer_bits() == ({"optim=adamw_8bit"} if installed else set())
    assert fewer_bits("adapter=lora") == (both if installed else set())
    assert fewer_bits("adapter=lora", "parallel=fsdp2") == set()


@pytest.mark.parametrize(
    ("keys", "is_offered"),
    [
        ((), True),
        (("optim=muon",), True),
        (("parallel=fsdp2",), True),
        (("optim.offload_state=true",), False),
        (("adapter=lora",), False),  # whose state is small
    ],
)
def test_state_in_host_memory_is_proposed_where_all_is_trained(
    planned: MemoryPlan, keys: tuple[str, ...], is_offered: bool
) -> None:
    assert ("optim.offload_state=true" in proposed(planned, *keys)) == is_offered


def test_changes_are_planned_until_the_run_fits() -> None:
    arguments = (
        "loop.micro_batch_size=4",
        "data.max_length=64",
        "model.gradient_checkpointing=true",
    )

    def plan(overrides: tuple[str, ...]) -> tuple[RunConfig, MemoryPlan]:
        config = compose(*arguments, *overrides)
        return config, plan_memory(config, PlanConfig())

    config, planned = plan(())
    # Room for what half the micro-batch takes, beside the GiB that is reserved.
    enough = 1 + 0.9 * planned.peak_bytes / 2**30
    found = list(propose(config, enough, plan, planned))
    assert [p.fits for p in found] == [False] * (len(found) - 1) + [True]
    assert found[-1].overrides[-1].startswith("loop.micro_batch_size=")
    assert found[-1].plan.peak_bytes == plan(found[-1].overrides)[1].peak_bytes
    assert fits(found[-1].plan, enough) and not fits(planned, enough)


def test_nothing_is_promised_where_nothing_fits(planned: MemoryPlan) -> None:
    config = compose("loop.micro_batch_size=2")
    asked: list[Any] = []

    def replan(overrides: tuple[str, ...]) -> tuple[RunConfig, MemoryPlan]:
        asked.append(overrides)
        return compose("loop.micro_batch_size=2", *overrides), planned

    found = list(propose(config, 0.5, replan, planned))
    assert [p.overrides for p in found] == asked and not any(p.fits for p in found)
    # None of them saved anything, so none is kept for the next.
    assert all(len(overrides) == 1 for overrides in asked)
    assert {o.partition("=")[0] for (o,) in asked} == {
        "model.gradient_checkpointing",
        "loop.micro_batch_size",
        "optim.offload_state",
        "parallel.mixed_precision",
        "model.freeze",
        "adapter",
    }
