"""A plan is, to the byte, what the same step holds when it is really made."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gemma4_zoo import model_folder
from offloading import uncounted
from rich.console import Console
from whole_runs import compose

from gemtune import adapters, patches
from gemtune.config import RunConfig
from gemtune.errors import ConfigError
from gemtune.losses import budgets
from gemtune.losses.budgets import accelerator_budgets
from gemtune.models import base_model, load_model, load_processing
from gemtune.optim.groups import find_trained, group
from gemtune.patches.host_memory import host_parameters
from gemtune.planning import PlanConfig, plan_memory
from gemtune.planning.host_state import rest_on_host
from gemtune.planning.memory_plan import as_on_gpu, largest_inputs, processing_for_plan
from gemtune.planning.page import plan_document, plan_page
from gemtune.planning.shadow import Shadow
from gemtune.planning.step import StepPlan, follow_step
from gemtune.planning.storages import StorageFollower

SMALL = ("loop.micro_batch_size=2", "data.max_length=64")
WITH_IMAGE = "data.max_length=96"
CASES: dict[str, tuple[tuple[str, ...], PlanConfig]] = {
    "full": ((WITH_IMAGE,), PlanConfig(images_per_row=1, learned_fraction=0.3)),
    "full, stock": (("patches=[]",), PlanConfig()),
    "recomputed in bfloat16": (
        (WITH_IMAGE, "model.gradient_checkpointing=true", "parallel.mixed_precision=bf16"),
        PlanConfig(images_per_row=1),
    ),
    "some layers recomputed": (
        (WITH_IMAGE, "model.gradient_checkpointing=true", "model.recomputed_layers=[full,vision]"),
        PlanConfig(images_per_row=1, learned_fraction=0.3),
    ),
    "lora": (
        ("recipe=gemma4_lora", "model.freeze=[ple,vision]", "data.packing=true")
        + ("patches=[linear_cross_entropy,supervised_positions,ple_offload]",),
        PlanConfig(learned_fraction=0.2),
    ),
    # Towers that no row feeds have no state, in the groups that they share with others too.
    "state in host memory": (
        ("optim.offload_state=true", "optim.offload_group_mib=1", "loop.global_batch_size=4"),
        PlanConfig(),
    ),
    "state of muon in host memory": (
        (WITH_IMAGE, "optim=muon", "optim.offload_state=true", "optim.offload_group_mib=1"),
        PlanConfig(images_per_row=1),
    ),
}


def really(config: RunConfig, plan: PlanConfig) -> StepPlan:
    """The same step with weights that have values, followed."""
    config = copy.deepcopy(config)
    processing = load_processing(config.model)
    base = load_model(config.model, processing, seed=0)
    patches.apply(base, config.patches)
    model = adapters.attach(base, config.adapter)
    follower = StorageFollower()
    follower.leave_out([model.get_parameter(name) for name in host_parameters(model)])
    zeros = lambda shape, dtype: torch.zeros(shape, dtype=dtype)  # noqa: E731
    inputs = largest_inputs(config, plan, processing, zeros)[1]
    optimizer = config.optim.build(model)
    rest_on_host(optimizer, follower, uncounted)
    mixed = config.parallel.mixed_precision == "bf16"
    with accelerator_budgets():
        return follow_step(
            follower,
            model,
            optimizer,
            inputs,
            loss_begins_after=base_model(base),
            max_grad_norm=config.loop.max_grad_norm,
            autocast_dtype=torch.bfloat16 if mixed else None,
        )


@pytest.mark.parametrize("name", CASES)
def test_the_plan_of_a_step_is_the_step(name: str) -> None:
    overrides, settings = CASES[name]
    config = compose("model.weights=random", *SMALL, *overrides)
    planned = plan_memory(config, settings).step
    found = really(config, settings)
    assert list(planned.peaks) == list(found.peaks) == ["forward", "loss", "backward", "optimizer"]
    for phase, peak in found.peaks.items():
        assert planned.peaks[phase].total_bytes == peak.total_bytes, phase
        assert planned.peaks[phase].by_kind == peak.by_kind, phase
    assert planned.parameters_bytes == found.parameters_bytes


@pytest.mark.parametrize("recipe", ["gemma4_sft", "gemma4_lora"])
def test_the_plan_of_experts_is_their_step(tmp_path: Path, recipe: str) -> None:
    """In float32 and in bfloat16, which LoRA chooses for its base."""
    folder = model_folder("26b_a4b", tmp_path)
    keys = (f"recipe={recipe}", "model.weights=random", f"model.path={folder}", *SMALL)
    config = compose(*keys, "model.dtype=auto")
    planned, found = plan_memory(config, PlanConfig()).step, really(config, PlanConfig())
    for phase, peak in found.peaks.items():
        assert planned.peaks[phase].total_bytes == peak.total_bytes, phase
        assert planned.peaks[phase].by_kind == peak.by_kind, phase


def test_each_kind_of_layers_that_is_recomputed_takes_less() -> None:
    on = "model.gradient_checkpointing=true"

    def peak(images: int, *keys: str) -> int:
        config = compose("loop.micro_batch_size=16", WITH_IMAGE, *keys)
        return plan_memory(config, PlanConfig(images_per_row=images)).peak_bytes

    none, all_of_them = peak(0), peak(0, on)
    kinds = ("sliding", "full", "shared")
    each = {kind: peak(0, on, f"model.recomputed_layers=[{kind}]") for kind in kinds}
    assert all(all_of_them < one < none for one in each.values()), each
    # Beside what images keep, that of text is nothing here.
    assert peak(1, on) <= peak(1, on, "model.recomputed_layers=[vision]") < 0.6 * peak(1)


def test_adam_holds_two_values_for_each_parameter() -> None:
    plan = plan_memory(compose(*SMALL, WITH_IMAGE), PlanConfig(images_per_row=1))
    assert plan.num_trained == plan.num_parameters == 1_408_304
    held = plan.step.peaks["forward"].by_kind
    least = 4 * plan.num_parameters
    assert least <= held["parameters"] < 1.05 * least
    assert 2 * least <= held["optimizer state"] < 2.2 * least


def test_gradients_of_earlier_micro_batches_are_there_in_a_later_forward() -> None:
    once, twice = (
        plan_memory(compose(*SMALL, f"loop.global_batch_size={rows}"), PlanConfig()).step
        for rows in (2, 4)
    )
    assert once.peaks["forward"].by_kind.get("gradients", 0) == 0
    gradients = twice.peaks["optimizer"].by_kind["gradients"]
    assert twice.peaks["forward"].by_kind["gradients"] == gradients > 0


def test_the_loss_has_the_budget_of_the_device_that_is_planned_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budgets, "CPU_CHUNK_BYTES", 16 << 10)
    monkeypatch.setattr(budgets, "ACCELERATOR_CHUNK_BYTES", 1 << 20)
    config = compose(*SMALL, "loop.global_batch_size=2")
    on_cpu, on_gpu = (
        plan_memory(config, PlanConfig(device=device)).step.peaks["loss"].by_kind["loss"]
        for device in ("cpu", "cuda")
    )
    # 126 labels and 640 words in float32 make 315 KiB, in one piece or in many.
    assert on_gpu - on_cpu > 250 << 10


def test_what_no_row_feeds_has_no_state() -> None:
    config = compose("model.weights=random", *SMALL)
    base = load_model(config.model, load_processing(config.model), seed=0)
    optimizer = config.optim.build(base)
    ids = torch.full((1, 8), 7)
    base(input_ids=ids, labels=ids, mm_token_type_ids=torch.zeros_like(ids)).loss.backward()
    optimizer.step()
    state = [v for values in optimizer.state.values() for v in values.values()]
    unfed = {n.split(".")[1] for n, p in base.named_parameters() if p not in optimizer.state}
    assert unfed == {"vision_tower", "embed_vision"}
    expected = sum(-(-v.numel() * v.element_size() // 512) * 512 for v in state)
    for peak in plan_memory(config, PlanConfig()).step.peaks.values():
        assert peak.by_kind["optimizer state"] == expected
        assert sum(peak.by_kind.values()) == peak.total_bytes


def blocks_by_hand(config: RunConfig, group_bytes: int) -> list[int]:
    """Bytes of each group of AdamW's state in a block, parameters in the order of the optimizer."""
    base = load_model(config.model, load_processing(config.model), seed=0, without_weights=True)
    groups = group(find_trained(base), lr=1.0, part_lrs={}, weight_decay=config.optim.weight_decay)
    found, held, room = [], 0, 0
    for parameter in (p for each in groups for p in each["params"]):
        moment = 4 * parameter.numel()
        # Two moments and a count of steps; five tensors at most, of 256 bytes more than they need.
        wanted = 2 * moment + 5 * 256
        if room and room + wanted > group_bytes:
            found.append(held)
            held = room = 0
        room += wanted
        held += 2 * (-(-moment // 256) * 256) + 256
    return [*found, held]


def test_state_in_host_memory_is_on_the_device_two_groups_at_a_time() -> None:
    arguments = (*SMALL, WITH_IMAGE, "loop.global_batch_size=2")
    settings = PlanConfig(images_per_row=1)
    offloaded = ("optim.offload_state=true", "optim.offload_group_mib=1")
    without = plan_memory(compose(*arguments), settings)
    config = compose(*arguments, *offloaded)
    plan = plan_memory(config, settings)
    blocks = blocks_by_hand(config, 2**20)
    assert len(blocks) > 8 and plan.host_state_bytes == sum(blocks)
    buffers = sum(-(-max(blocks[slot::2]) // 512) * 512 for slot in (0, 1))
    assert plan.step.peaks["optimizer"].by_kind["optimizer state"] == buffers
    state = without.step.peaks["optimizer"].by_kind["optimizer state"]
    for phase, peak in plan.step.peaks.items():
        before = without.step.peaks[phase]
        there, clipping = 0, 0
        if phase == "optimizer":  # what clipping takes is gone when the first group comes
            there, clipping = buffers, before.by_kind["optimizer"]
        assert peak.total_bytes == before.total_bytes - state - clipping + there, phase
        assert peak.by_kind.get("optimizer state", 0) == there
        assert sum(peak.by_kind.values()) == peak.total_bytes
    assert without.host_state_bytes == 0
    page = Console(width=100, file=io.StringIO())
    page.print(plan_page(plan))
    assert "optimizer state: 0.01 GiB, in host memory" in page.file.getvalue()
    assert plan_document(plan, [])["host_state_bytes"] == sum(blocks)
    # For a run on the CPU it is where everything is.
    on_cpu = plan_memory(config, replace(settings, device="cpu"))
    assert on_cpu.host_state_bytes == 0
    assert on_cpu.step.peaks["forward"].by_kind["optimizer state"] == state


def test_a_streamed_tower_has_two_layers_on_the_gpu_while_it_runs() -> None:
    config = compose("model.freeze=[vision]", "patches=[vision_streaming]", *SMALL, WITH_IMAGE)
    processing = load_processing(config.model)
    base = load_model(config.model, processing, seed=0, without_weights=True)
    patches.apply(base, config.patches)
    shadow = Shadow()
    shadow.without_values(base)
    shadow.leave_out(base.get_parameter(name) for name in host_parameters(base))
    held: dict[str, int] = {}
    tower = base.model.vision_tower
    layers = tower.encoder.layers
    for name, module in (("layer", layers[1]), ("after", tower)):
        module.register_forward_hook(
            lambda *_, name=name: held.__setitem__(name, shadow._kinds["gathered weights"])
        )
    settings = PlanConfig(images_per_row=1)
    ((inputs, _),) = largest_inputs(config, settings, processing, shadow.empty)[1][:1]
    with as_on_gpu(shadow, base), shadow, torch.no_grad():
        base(**inputs)
    first, layer = (
        sum(-(-p.numel() * p.element_size() // 256) * 256 for p in module.parameters())
        for module in (tower.patch_embedder, layers[0])
    )
    # The embedder and the layers take turns in two buffers.
    assert 0 <= held["layer"] - (first + layer) < 512 and first > layer
    assert held["after"] == 0


def test_ddp_has_buckets_and_hosted_weights_do_not_count() -> None:
    # Towers that are trained would run in every forward, on stand-ins if need be.
    arguments = (*SMALL, "model.freeze=[ple,vision,audio,projector]", "patches=[ple_offload]")
    alone = plan_memory(compose(*arguments), PlanConfig())
    shared = plan_memory(compose(*arguments), PlanConfig(world_size=2))
    assert shared.bucket_bytes == 4 * alone.num_trained
    assert shared.peak_bytes == alone.peak_bytes + shared.bucket_bytes
    here = plan_memory(compose(*arguments[:-1], "patches=[]"), PlanConfig())
    assert here.host_bytes == 0 < alone.host_bytes
    assert here.step.parameters_bytes - alone.step.parameters_bytes == alone.host_bytes


@pytest.mark.parametrize(
    ("size", "billions"), [("e2b", 5.1), ("e4b", 8.0), ("26b_a4b", 26.0), ("31b", 31.0)]
)
def test_released_sizes_need_no_download(
    monkeypatch: pytest.MonkeyPatch, size: str, billions: float
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = compose("recipe=gemma4_lora", f"model={size}", "model.audio_tower=true")
    processing = processing_for_plan(config)
    model = load_model(config.model, processing, seed=0, without_weights=True)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == pytest.approx(billions * 1e9, rel=0.03)


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be shared evenly by 3 processes"):
        plan_memory(compose("parallel=fsdp2", "loop.global_batch_size=8"), PlanConfig(world_size=3))
    with pytest.raises(ConfigError, match=r"9 images of 70 tokens.*At most 1 do"):
        plan_memory(compose("data.max_length=128"), PlanConfig(images_per_row=9))
    with pytest.raises(ConfigError, match="learned_fraction=0 must be in"):
        PlanConfig(learned_fraction=0)


@pytest.mark.parametrize("recipe", ["gemma4_sft", "gemma4_lora"])
def test_without_its_audio_tower_a_plan_is_less_by_its_bytes(tmp_path: Path, recipe: str) -> None:
    folder = model_folder("e2b", tmp_path, hears=True)
    keys = (f"recipe={recipe}", f"model.path={folder}", "model.weights=random", *SMALL)
    keys = (*keys, "model.freeze=[audio]")
    whole, deaf = compose(*keys), compose(*keys, "model.audio_tower=false")
    base = load_model(whole.model, load_processing(whole.model), seed=0)
    modules = (base.model.audio_tower, base.model.embed_audio)
    held = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    num_bytes = sum(-(-t.numel() * t.element_size() // 512) * 512 for t in held)
    plans = [plan_memory(config, PlanConfig()) for config in (whole, deaf)]
    assert [plan.hears for plan in plans] == [True, False]
    assert plans[0].peak_bytes - plans[1].peak_bytes == num_bytes > 100_000
    for phase, peak in plans[1].step.peaks.items():
        before = plans[0].step.peaks[phase]
        assert before.total_bytes - peak.total_bytes == num_bytes
        assert before.by_kind["parameters"] - peak.by_kind["parameters"] == num_bytes
    found = really(deaf, PlanConfig())
    assert {p: v.total_bytes for p, v in found.peaks.items()} == {
        p: v.total_bytes for p, v in plans[1].step.peaks.items()
    }
