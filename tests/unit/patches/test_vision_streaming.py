"""The streamed tower against the stock one: values, gradients, and what else moves a model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gemma4_zoo import batch, build, loss_and_gradients, relative_error
from kept_bytes import kept_bytes

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches import vision_streaming
from gemtune.patches.base import Plan
from gemtune.patches.host_memory import can_map, host_parameters
from gemtune.patches.vision_streaming import VisionStreaming

pytestmark = pytest.mark.skipif(not can_map(), reason="this system cannot give pages back")

IMAGES = ("pixel_values", "image_position_ids")


def frozen(family: str = "e2b", dtype: torch.dtype = torch.float32) -> Any:
    return build(family, dtype, frozen=("vision_tower",))


def soft_tokens(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    pixels, positions = (inputs[name] for name in IMAGES)
    return model.model.vision_tower(pixels, positions).last_hidden_state


def assert_same(found: tuple, expected: tuple) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["e2b", "31b"])
def test_soft_tokens_are_those_of_the_stock_tower(family: str, dtype: torch.dtype) -> None:
    model = frozen(family, dtype)
    inputs = batch(model)
    expected = soft_tokens(model, inputs)
    row = patches.apply(model, [VisionStreaming()]).rows[0]
    assert row.status == "applied"
    assert row.sites[0] == "model.vision_tower.patch_embedder"
    assert row.sites[1:] == tuple(
        f"model.vision_tower.encoder.layers.{i}"
        for i in range(model.config.vision_config.num_hidden_layers)
    )
    for _ in range(2):
        assert torch.equal(soft_tokens(model, inputs), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_are_those_of_the_stock_model(
    checkpointing: bool, autocast: bool
) -> None:
    model = frozen()
    inputs = batch(model, (1, 0, 2), (0, 1, 0))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = loss_and_gradients(model, inputs)
        report = patches.apply(model, [VisionStreaming()])
        assert_same(loss_and_gradients(model, inputs), expected)
        report.undo()
        assert_same(loss_and_gradients(model, inputs), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_tower_keeps_nothing_for_a_backward_pass(checkpointing: bool) -> None:
    model = frozen()
    inputs = batch(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    patches.apply(model, [VisionStreaming()])
    # As `enable_input_require_grads` does for adapters, to the embeddings that it finds.
    embedder = model.model.vision_tower.patch_embedder
    embedder.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    tokens, kept = kept_bytes(lambda: soft_tokens(model, inputs))
    assert not tokens.requires_grad
    assert kept == 0


def test_generation_gives_the_same_tokens() -> None:
    model = frozen().eval()
    inputs = batch(model, (1,))
    del inputs["labels"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    patches.apply(model, [VisionStreaming()])
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_a_trained_tower_is_left_alone() -> None:
    model = build("e2b", torch.float32)
    row = patches.apply(model, [VisionStreaming()]).rows[0]
    assert row.status == "not applicable"
    assert "model.freeze=[vision]" in row.reason
    assert VisionStreaming().plan(torch.nn.Linear(2, 2)).status == "not applicable"


def test_a_tower_that_is_trained_later_is_refused() -> None:
    model = frozen()
    inputs = batch(model)
    patches.apply(model, [VisionStreaming()])
    gate = model.model.vision_tower.encoder.layers[1].mlp.gate_proj.linear
    gate.weight.requires_grad_(True)
    with pytest.raises(PatchError, match=r"mlp\.gate_proj\.linear.*model\.freeze=\[vision\]"):
        soft_tokens(model, inputs)
    with torch.no_grad():
        soft_tokens(model, inputs)  # nobody asks for a gradient
    gate.weight.requires_grad_(False)
    inputs["pixel_values"].requires_grad_(True)
    with pytest.raises(PatchError, match="pixel_values require a gradient"):
        soft_tokens(model, inputs)


def lora(model: Any, targets: str) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))


def test_adapters_of_the_tower_are_refused() -> None:
    model = frozen()
    inputs = batch(model)
    patches.apply(model, [VisionStreaming()])
    adapted = lora(model, r".*vision_tower.*\.q_proj\.linear")
    assert any("vision" in n and p.requires_grad for n, p in adapted.named_parameters())
    with pytest.raises(PatchError, match=r"lora_A.*leave adapters off it"):
        adapted(**inputs)


def test_parameters_stay_on_the_host_and_the_first_one_tells_the_device() -> None:
    model = frozen()
    tower = model.model.vision_tower
    before = dict(tower.named_parameters())
    patches.apply(model, [VisionStreaming()])
    model.to("meta")
    elsewhere = {name for name, p in tower.named_parameters() if p.device.type != "cpu"}
    assert elsewhere == {"patch_embedder.position_embedding_table"}
    assert all(p is before[n] for n, p in tower.named_parameters() if n not in elsewhere)
    assert {b.device.type for b in tower.buffers()} == {"meta"}
    # What `generate` moves its inputs to.
    assert model.device.type == tower.device.type == "meta"
    expected = {f"model.vision_tower.{name}" for name in before} - {
        "model.vision_tower.patch_embedder.position_embedding_table"
    }
    assert set(host_parameters(model)) == expected


def test_other_weights_can_be_loaded_into_it_and_dtype_changed() -> None:
    model, other = frozen(), build("e2b", torch.float32, seed=1, frozen=("vision_tower",))
    inputs = batch(model)
    patches.apply(model, [VisionStreaming()])
    model.load_state_dict(other.state_dict())
    expected = soft_tokens(other, inputs)
    assert torch.equal(soft_tokens(model, inputs), expected)
    pixels = {"pixel_values": inputs["pixel_values"].bfloat16()}
    model.to(torch.bfloat16), other.to(torch.bfloat16)
    assert torch.equal(soft_tokens(model, inputs | pixels), soft_tokens(other, inputs | pixels))


def test_a_deep_copy_streams_its_own_weights() -> None:
    model = frozen()
    inputs = batch(model)
    expected = soft_tokens(model, inputs)
    patches.apply(model, [VisionStreaming()])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.model.vision_tower.parameters():
            parameter.mul_(1.1)
    assert relative_error(soft_tokens(twin, inputs), expected) > 1e-3
    assert torch.equal(soft_tokens(model, inputs), expected)


@pytest.fixture
def as_if_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are copied to the "device", which is the CPU as well."""
    monkeypatch.setattr(vision_streaming, "_is_elsewhere", lambda module, device: True)


@pytest.mark.usefixtures("as_if_elsewhere")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_copies_on_a_device_the_values_are_the_same(checkpointing: bool) -> None:
    model = frozen()
    inputs = batch(model)
    expected = loss_and_gradients(model, inputs)
    before = dict(model.named_parameters())
    seen: list[bool] = []
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    everything = [VisionStreaming(), *(p for p in patches.default() if p.startswith("vision"))]
    patches.apply(model, everything)
    layer = model.model.vision_tower.encoder.layers[1]
    norm, up = layer.input_layernorm, layer.mlp.up_proj.linear
    for module, name in ((norm, "1.input_layernorm"), (up, "1.mlp.up_proj.linear")):
        original = before[f"model.vision_tower.encoder.layers.{name}.weight"]
        module.register_forward_pre_hook(
            lambda m, _, p=original: seen.append(m.weight is not p and torch.equal(m.weight, p))
        )
    found = loss_and_gradients(model, inputs)
    assert relative_error(found[0], expected[0]) < 1e-6
    assert seen
    assert all(seen)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


@pytest.mark.usefixtures("as_if_elsewhere")
def test_an_interrupted_pass_leaves_the_weights_in_place() -> None:
    model = frozen()
    inputs = batch(model)
    expected = soft_tokens(model, inputs)
    before = dict(model.named_parameters())
    patches.apply(model, [VisionStreaming()])

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.vision_tower.encoder.layers[0].mlp.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        soft_tokens(model, inputs)
    hook.remove()
    assert all(p is before[name] for name, p in model.named_parameters())
    assert torch.equal(soft_tokens(model, inputs), expected)


@contextlib.contextmanager
def cuda_available(yes: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: yes)
        yield


def kinds(plan: Plan) -> set[str]:
    memories = [c.value for c in plan.changes if getattr(c, "attribute", "").endswith("_memory")]
    return {memory.kind for memory in memories}


def test_the_memory_is_pinned_with_cuda_and_mapped_without() -> None:
    model = frozen()
    with cuda_available(True):
        assert kinds(VisionStreaming().plan(model)) == {"pinned"}
        assert kinds(VisionStreaming(memory="mapped").plan(model)) == {"mapped"}
    with cuda_available(False):
        assert kinds(VisionStreaming().plan(model)) == {"mapped"}
        with pytest.raises(PatchError, match="needs CUDA"):
            VisionStreaming(memory="pinned").plan(model)
    with pytest.raises(PatchError, match=r"memory=disk is not one of pinned, mapped"):
        VisionStreaming(memory="disk").plan(model)


def test_a_tower_that_is_built_otherwise_is_refused() -> None:
    model = frozen()
    tower = model.model.vision_tower
    tower.extra = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
    with pytest.raises(PatchError, match=r"not known here: extra\.weight"):
        patches.apply(model, [VisionStreaming()])
    del tower.extra, tower.patch_embedder
    with pytest.raises(PatchError, match="no patch_embedder"):
        patches.apply(model, [VisionStreaming()])


def test_an_unknown_transformers_is_refused() -> None:
    model = frozen()

    class Gemma4VisionEncoder(type(model.model.vision_tower.encoder)):
        def forward(self, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
            return inputs_embeds + self.layers[0].mlp.up_proj.linear.weight.sum()

    model.model.vision_tower.encoder.__class__ = Gemma4VisionEncoder
    with pytest.raises(PatchError, match=r"Gemma4VisionEncoder\.forward.*not one of the versions"):
        patches.apply(model, [VisionStreaming()])
