"""Packed images against the padded ones of stock transformers."""

from __future__ import annotations

import copy
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from gemma4_zoo import build, exact_float64, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches.vision_pooler import VisionPooler
from gemtune.patches.vision_unpadded import PackedImages, VisionUnpadded

# Patches: width, height. Two images of 36 that differ in shape, two of 9, one as large as all.
GRIDS = ((6, 6), (3, 3), (12, 6), (12, 3), (3, 3), (3, 15))
SIZES = [width * height for width, height in GRIDS]


def images(
    tower: nn.Module, grids: tuple = GRIDS, dtype: torch.dtype = torch.float64, num_patches: int = 0
) -> dict[str, torch.Tensor]:
    """Images padded to the largest of them, or to `num_patches`, padding anywhere."""
    generator = torch.Generator().manual_seed(0)
    num_patches = num_patches or max(width * height for width, height in grids)
    positions = torch.full((len(grids), num_patches, 2), -1)
    for image, (width, height) in enumerate(grids):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.randperm(num_patches, generator=generator)[: width * height]
        positions[image, places] = torch.stack([x.flatten(), y.flatten()], dim=-1)
    size = 3 * tower.config.patch_size**2
    pixels = torch.rand(*positions.shape[:2], size, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels.to(dtype), "pixel_position_ids": positions}


def tower_of(family: str = "e2b", dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    return build(family, dtype, **options).model.vision_tower


def unpadded(tower: nn.Module) -> nn.Module:
    patches.apply(tower, [VisionUnpadded()])
    return tower


def tokens_and_gradients(tower: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    tower.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(1)
    with exact_float64():
        tokens = tower(**inputs).last_hidden_state
        weights = torch.rand(tokens.shape, generator=generator, dtype=torch.float64)
        (tokens * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}
    return {"soft tokens": tokens.detach(), **gradients}


def assert_same(found: dict, expected: dict, bound: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative_error(found[name], expected[name]) < bound, name


@pytest.mark.parametrize("family", ["e2b", "26b_a4b"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_soft_tokens_and_gradients_are_those_of_stock_transformers(
    family: str, attention: str, checkpointing: bool
) -> None:
    tower = tower_of(family, attention=attention)
    inputs = images(tower)
    expected = tokens_and_gradients(tower, inputs)
    assert len(expected) > 20
    assert len(expected["soft tokens"]) == sum(SIZES) // 9
    if checkpointing:
        tower.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(tokens_and_gradients(unpadded(tower), inputs), expected)


@pytest.mark.parametrize(
    ("grids", "num_patches"),
    [
        (((6, 6),), 63),  # one image, more padding than any of its batch needs
        (((3, 3), (9, 12), (3, 3), (3, 3)), 0),  # budgets that differ by much
        (((6, 6), (12, 3), (3, 12)), 45),  # one size, padded all the same
        (((3, 3), (6, 3), (9, 3), (6, 6), (15, 3)), 0),  # every size once
    ],
    ids=["one", "budgets", "one size", "every size"],
)
def test_any_mix_of_sizes(grids: tuple, num_patches: int) -> None:
    tower = tower_of()
    inputs = images(tower, grids, num_patches=num_patches)
    expected = tokens_and_gradients(tower, inputs)
    assert_same(tokens_and_gradients(unpadded(tower), inputs), expected)


def test_with_the_pooler_patch_and_a_deep_copy() -> None:
    tower = tower_of("26b_a4b")
    inputs = images(tower)
    expected = tokens_and_gradients(tower, inputs)
    patches.apply(tower, [VisionUnpadded(), VisionPooler()])
    twin = copy.deepcopy(tower)
    assert_same(tokens_and_gradients(tower, inputs), expected)
    tower.zero_grad(set_to_none=True)
    assert_same(tokens_and_gradients(twin, inputs), expected)
    assert all(parameter.grad is None for parameter in tower.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_it_is_as_near_to_float64_as_stock(dtype: torch.dtype) -> None:
    exact = tower_of()
    with torch.no_grad(), exact_float64():
        reference = exact(**images(exact)).last_hidden_state
    tower = tower_of(dtype=dtype)
    inputs = images(tower, dtype=dtype)
    with torch.no_grad():
        stock = tower(**inputs).last_hidden_state
        found = unpadded(tower)(**inputs).last_hidden_state
    assert found.dtype == dtype
    assert relative_error(found, reference) < 1.2 * relative_error(stock, reference)


def record(module: nn.Module, calls: list) -> None:
    module.register_forward_pre_hook(lambda _, args: calls.append(args[0]))


def test_each_layer_sees_the_real_patches_once_and_no_others() -> None:
    tower = unpadded(tower_of())
    seen: list[torch.Tensor] = []
    for layer in tower.encoder.layers:
        record(layer, seen)
        record(layer.mlp, seen)
    with torch.no_grad():
        tower(**images(tower))
    assert [tuple(states.shape[:2]) for states in seen] == [(1, sum(SIZES))] * len(seen)
    assert len(seen) == 2 * len(tower.encoder.layers)


def test_attention_has_no_mask_and_one_call_for_each_size() -> None:
    tower = unpadded(tower_of())
    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention") as kernel:
        kernel.side_effect = lambda query, *args, **kwargs: query
        tower(**images(tower))
    calls = [(call.args[0].shape[0], call.args[0].shape[2]) for call in kernel.call_args_list]
    assert calls == [(2, 9), (2, 36), (1, 45), (1, 72)] * len(tower.encoder.layers)
    assert all(call.kwargs["attn_mask"] is None for call in kernel.call_args_list)


class Operations(TorchDispatchMode):
    """How many operations run, and the largest mask among their results."""

    count = mask_numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += 1
        if isinstance(result, torch.Tensor) and result.dtype == torch.bool:
            self.mask_numel = max(self.mask_numel, result.numel())
        return result


def operations(tower: nn.Module, inputs: dict) -> Operations:
    with torch.no_grad(), Operations() as counted:
        tower(**inputs)
    return counted


def test_no_mask_of_patches_by_patches_is_made() -> None:
    tower = tower_of()
    inputs = images(tower)
    assert operations(tower, inputs).mask_numel == len(SIZES) * max(SIZES) ** 2
    patches.apply(tower, [VisionUnpadded(), VisionPooler()])  # the stock pooler has a one-hot
    assert operations(tower, inputs).mask_numel == 2 * len(SIZES) * max(SIZES)  # of (x, y)


def test_more_sizes_cost_more_attention_calls_and_nothing_else() -> None:
    tower = unpadded(tower_of())
    few = operations(tower, images(tower, ((3, 3), (6, 3)) * 4))
    many = operations(tower, images(tower, tuple((3 * (1 + i), 3) for i in range(8))))
    # A call of the kernel and the views of its arguments: far below the ~90 of a layer.
    assert many.count - few.count <= 25 * (8 - 2) * len(tower.encoder.layers)


@pytest.mark.parametrize("grids", [((6, 6),), ((6, 6), (12, 3), (3, 12))])
def test_where_nothing_is_padded_the_stock_encoder_gets_the_very_same_tensor(grids: tuple) -> None:
    tower = tower_of()
    inputs = images(tower, grids)
    expected = tower(**inputs).last_hidden_state
    embedded, entered = [], []
    tower.patch_embedder.register_forward_hook(lambda _, args, out: embedded.append(out))
    record(tower.encoder.layers[0], entered)
    assert torch.equal(unpadded(tower)(**inputs).last_hidden_state, expected)
    assert len(entered) == 1
    assert entered[0] is embedded[0]


def test_hidden_states_and_attentions_are_those_of_padded_patches() -> None:
    tower = tower_of(attention="eager")
    inputs = images(tower)
    requests: list[dict] = [{"output_hidden_states": True}, {"output_attentions": True}]
    with torch.no_grad():
        expected = [tower(**inputs, **request) for request in requests]
        unpadded(tower)
        found = [tower(**inputs, **request) for request in requests]
        tower.config.output_hidden_states = True
        found.append(tower(**inputs))
    for name, i, j in (("hidden_states", 0, 0), ("attentions", 1, 1), ("hidden_states", 2, 0)):
        assert len(found[i][name]) >= len(tower.encoder.layers)
        for state, expected_state in zip(found[i][name], expected[j][name], strict=True):
            assert torch.equal(state, expected_state)


def test_an_image_of_padding_alone_changes_nothing_for_the_others() -> None:
    tower = tower_of()
    inputs = images(tower)
    inputs["pixel_position_ids"][3] = -1  # transformers gives it one soft token of zeros
    expected = tokens_and_gradients(tower, inputs)
    found = tokens_and_gradients(unpadded(tower), inputs)
    assert_same(found, expected)
    assert all(value.isfinite().all() for value in found.values())
    nothing = torch.full_like(inputs["pixel_position_ids"], -1)
    with torch.no_grad():
        assert not tower(inputs["pixel_values"], nothing).last_hidden_state.any()


def test_counts_that_are_no_whole_cells_are_treated_as_before() -> None:
    tower = tower_of()
    inputs = images(tower, ((6, 6), (5, 3), (4, 4), (1, 1)), num_patches=54)
    expected = tokens_and_gradients(tower, inputs)
    assert_same(tokens_and_gradients(unpadded(tower), inputs), expected)
    short = {name: value[:, :50] for name, value in inputs.items()}
    with pytest.raises(ValueError, match="Cannot pool"):
        tower(**short)


def test_a_frozen_tower_keeps_nothing_for_a_backward_pass() -> None:
    tower = unpadded(tower_of(frozen=("vision_tower",)))
    assert not tower(**images(tower)).last_hidden_state.requires_grad


def test_packing_sorts_images_by_size_and_keeps_the_order_within_each() -> None:
    is_real = torch.tensor(
        [[0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool
    )
    packed = PackedImages.of(is_real)
    assert packed.blocks == ((2, 2), (1, 3), (1, 4))
    assert packed.patches.tolist() == [4, 6, 13, 14, 1, 2, 3, 16, 17, 18, 19]
    states = torch.arange(20.0).view(5, 4, 1)
    restored = packed.unpack(packed.pack(states), 5, 4)
    assert torch.equal(restored, states * is_real.unsqueeze(-1))
    heads = packed.pack(states).unflatten(-1, (1, 1))
    blocks = [block.flatten().tolist() for block in packed.split(heads)]
    assert list(itertools.chain(*blocks)) == packed.patches.tolist()
    assert PackedImages.of(torch.ones(2, 3, dtype=torch.bool)) is None
    assert PackedImages.of(torch.zeros(2, 3, dtype=torch.bool)) is None


def test_not_applicable_without_a_tower() -> None:
    plan = VisionUnpadded().plan(nn.Linear(2, 2))
    assert plan.status == "not applicable"
    assert "vision tower" in plan.reason


def test_the_sites_are_the_encoder_and_the_attention_of_each_layer() -> None:
    model = build("e2b")
    sites = patches.apply(model, [VisionUnpadded()]).rows[0].sites
    assert sites[:2] == (
        "model.vision_tower.encoder",
        "model.vision_tower.encoder.layers.0.self_attn",
    )
    assert len(sites) == 1 + model.config.vision_config.num_hidden_layers


@pytest.mark.parametrize(
    "place", ["", "pooler", "encoder", "encoder.layers.1", "encoder.layers.1.self_attn"]
)
def test_an_unknown_computation_is_an_error(place: str) -> None:
    def unknown(self: nn.Module, *args: Any) -> None:
        return None

    tower = tower_of()
    module = tower.get_submodule(place)
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {"forward": unknown})
    with pytest.raises(PatchError, match="not one of the versions"):
        VisionUnpadded().plan(tower)
