"""The pooler against averages written out as loops, the tower against stock transformers."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from gemma4_zoo import build, exact_float64, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches.vision_pooler import VisionPooler, sum_patches

SIDE = 3
GRIDS = ((6, 6), (9, 3), (3, 9), (3, 3), (12, 3))  # patches: width, height


def grid_positions(grids: tuple = GRIDS, num_patches: int = 54, seed: int = 0) -> torch.Tensor:
    """[N, P, 2] positions of whole grids, padded with (-1, -1), patches in any order."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.full((len(grids), num_patches, 2), -1)
    for image, (width, height) in enumerate(grids):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.randperm(num_patches, generator=generator)[: width * height]
        positions[image, places] = torch.stack([x.flatten(), y.flatten()], dim=-1)
    return positions


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def averages(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Soft tokens of all images, [T, H] in float64: cells row by row, patches of each averaged."""
    tokens = []
    for image, xy in zip(states.double(), positions.tolist(), strict=True):
        patch_at = {(x, y): patch for patch, (x, y) in enumerate(xy) if x >= 0}
        width, height = (max(p[axis] for p in patch_at) + 1 for axis in (0, 1))
        for top in range(0, height, SIDE):
            for left in range(0, width, SIDE):
                cell = [
                    image[patch_at[left + dx, top + dy]] for dx in range(SIDE) for dy in range(SIDE)
                ]
                tokens.append(torch.stack(cell).mean(0))
    return torch.stack(tokens)


def pooler(patched: bool = True, hidden_size: int = 8) -> nn.Module:
    """A pooler of transformers, taken from a tower so that the patch finds it."""
    tower = build("e2b").model.vision_tower
    if patched:
        patches.apply(tower, [VisionPooler()])
    tower.pooler.root_hidden_size = hidden_size**0.5
    return tower.pooler


def pool(module: nn.Module, states: torch.Tensor, positions: torch.Tensor) -> tuple:
    padding = (positions == -1).all(-1)
    return module(states, positions, padding, output_length=states.shape[1] // SIDE**2)


def images(tower: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    positions = grid_positions()
    size = 3 * tower.config.patch_size**2
    return {
        "pixel_values": random(*positions.shape[:2], size).sigmoid().to(dtype),
        "pixel_position_ids": positions,
    }


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, of all and of those in float32."""

    numel = wide_numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
                if tensor.dtype == torch.float32:
                    self.wide_numel = max(self.wide_numel, tensor.numel())
        return result


def test_averages_every_cell_of_every_aspect_ratio_and_scales_them() -> None:
    positions, states = grid_positions(), random(len(GRIDS), 54, 8)
    states[(positions == -1).all(-1)] = torch.nan  # padding is never read
    features, mask = pool(pooler(), states, positions)
    assert features.dtype == torch.float64
    assert mask.sum(-1).tolist() == [width * height // SIDE**2 for width, height in GRIDS]
    expected = averages(states, positions) * 8**0.5
    torch.testing.assert_close(features[mask], expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_rounded_to_float32_and_no_further(dtype: torch.dtype) -> None:
    positions, states = grid_positions(), random(len(GRIDS), 54, 8, dtype=dtype)
    features, mask = pool(pooler(), states, positions)
    assert features.dtype == torch.float32
    expected = averages(states, positions) * 8**0.5
    torch.testing.assert_close(features[mask].double(), expected, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pool(pooler(), states, positions)[0], features)


def test_first_and_second_derivatives_are_those_of_a_sum() -> None:
    positions = grid_positions(((6, 3), (3, 3)), 27)
    padding = (positions == -1).all(-1)

    def function(states: torch.Tensor) -> torch.Tensor:
        return sum_patches(states, positions, padding, 3, SIDE)[0] ** 2

    states = random(2, 27, 2).requires_grad_()
    assert torch.autograd.gradcheck(function, [states])
    assert torch.autograd.gradgradcheck(function, [states])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_states_is_that_of_stock_transformers(dtype: torch.dtype) -> None:
    positions, weights = grid_positions(), random(len(GRIDS), 6, 8, seed=2, dtype=torch.float32)
    gradients = []
    for patched in (False, True):
        states = random(len(GRIDS), 54, 8, dtype=dtype).requires_grad_()
        features, _ = pool(pooler(patched), states, positions)
        (features.float() * weights).sum().backward()
        gradients.append(states.grad)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=tolerance, atol=1e-7)
    assert not gradients[1][(positions == -1).all(-1)].any()


def test_positions_that_are_no_grid_are_summed_as_by_stock_transformers() -> None:
    generator = torch.Generator().manual_seed(3)
    positions = torch.randint(-1, 6, (4, 36, 2), generator=generator)  # several at one place
    positions[0] = -1
    positions[1, :, 0] = -1  # only x is: no padding
    positions[:, 0] = torch.tensor([5, 5])
    states = random(4, 36, 8, dtype=torch.float32)
    expected, expected_mask = pool(pooler(patched=False), states, positions)
    features, mask = pool(pooler(), states, positions)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(mask, expected_mask)


def test_a_patch_outside_the_output_raises_as_before() -> None:
    positions = grid_positions(((6, 6),), 36)
    positions[0, 0] = torch.tensor([0, 40])
    for patched in (False, True):
        with pytest.raises(RuntimeError):
            pool(pooler(patched), random(1, 36, 8), positions)


@pytest.mark.parametrize("patched", [False, True])
def test_lengths_that_cannot_be_are_refused_as_before(patched: bool) -> None:
    positions, states = grid_positions(), random(len(GRIDS), 54, 8)
    padding = (positions == -1).all(-1)
    module = pooler(patched)
    with pytest.raises(ValueError, match="Cannot pool"):
        module(states, positions, padding, output_length=7)
    with pytest.raises(ValueError, match="Cannot output more soft tokens"):
        module(states, positions, padding, output_length=55)


def test_as_many_tokens_as_patches_are_only_scaled() -> None:
    positions, states = grid_positions(), random(len(GRIDS), 54, 8, dtype=torch.float16)
    padding = (positions == -1).all(-1)
    features, mask = pooler()(states, positions, padding, output_length=54)
    assert torch.equal(mask, padding)
    assert torch.equal(features, states.masked_fill(padding.unsqueeze(-1), 0).float() * 8**0.5)


def test_nothing_larger_than_the_patches_and_no_float32_copy_of_them() -> None:
    grids, num_patches, hidden_size = ((30, 30), (60, 12)), 900, 8
    positions = grid_positions(grids, num_patches)
    module = pooler()
    states = random(2, num_patches, hidden_size, dtype=torch.bfloat16).requires_grad_()
    with Largest() as largest:
        features, _ = pool(module, states, positions)
        features.sum().backward()
    assert largest.numel == states.numel() < 2 * num_patches * num_patches // SIDE**2
    cells = 2 * num_patches // SIDE**2
    assert largest.wide_numel <= (cells + 1) * hidden_size


@pytest.mark.parametrize("family", ["e2b", "26b_a4b"], ids=["plain", "standardised"])
def test_soft_tokens_and_gradients_of_a_tower_in_float64(family: str) -> None:
    found = []
    for patched in (False, True):
        tower = build(family).model.vision_tower
        if patched:
            patches.apply(tower, [VisionPooler()])
        with exact_float64():
            tokens = tower(**images(tower, torch.float64)).last_hidden_state
        (tokens * random(*tokens.shape)).sum().backward()
        gradients = {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}
        found.append({"tokens": tokens, **gradients})
    assert len(found[0]) > 20
    for name, expected in found[0].items():
        assert relative_error(found[1][name], expected) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["e2b", "26b_a4b"], ids=["plain", "standardised"])
def test_the_output_is_of_the_same_class_and_dtype_and_no_less_exact(
    family: str, dtype: torch.dtype
) -> None:
    exact_tower = build(family).model.vision_tower
    with torch.no_grad(), exact_float64():
        inputs = images(exact_tower, torch.float64)
        exact = exact_tower(**inputs).last_hidden_state
    tower = build(family, dtype).model.vision_tower
    inputs = images(tower, dtype)
    with torch.no_grad():
        stock = tower(**inputs)
        patches.apply(tower, [VisionPooler()])
        patched = tower(**inputs)
    assert type(patched) is type(stock)
    assert patched.last_hidden_state.dtype == stock.last_hidden_state.dtype == dtype
    error, stock_error = (relative_error(o.last_hidden_state, exact) for o in (patched, stock))
    assert error <= 1.05 * stock_error


def test_hidden_states_and_tuples_on_request() -> None:
    tower = build("e2b").model.vision_tower
    inputs = images(tower, torch.float64)
    with torch.no_grad(), exact_float64():
        expected = tower(**inputs, output_hidden_states=True)
    patches.apply(tower, [VisionPooler()])
    with torch.no_grad(), exact_float64():
        found = tower(**inputs, output_hidden_states=True)
        as_tuple = tower(**inputs, return_dict=False)
    assert len(found.hidden_states) == len(expected.hidden_states) > 1
    for state, expected_state in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-12)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], found.last_hidden_state)


class HugeStates(nn.Module):
    """In place of the encoder: activations as large as float16 allows."""

    def forward(self, inputs_embeds: torch.Tensor, **kwargs: Any) -> types.SimpleNamespace:
        states = 40_000 + 25_000 * random(*inputs_embeds.shape).sigmoid()
        states *= random(inputs_embeds.shape[-1]).sign()
        return types.SimpleNamespace(last_hidden_state=states.to(inputs_embeds.dtype))


@pytest.mark.parametrize("family", ["e2b", "26b_a4b"], ids=["plain", "standardised"])
def test_float16_stays_finite_and_equals_the_float64_formula(family: str) -> None:
    model = build(family, torch.float16)
    tower, embedder = model.model.vision_tower, model.model.embed_vision
    inputs = images(tower, torch.float16)
    tower.encoder = HugeStates()
    with torch.no_grad():
        stock = model.model.get_image_features(*inputs.values()).pooler_output
        patches.apply(model, [VisionPooler()])
        found = model.model.get_image_features(*inputs.values()).pooler_output
    stock, found = (x if isinstance(x, torch.Tensor) else torch.cat(x) for x in (stock, found))
    assert found.dtype == torch.float16
    if family == "e2b":
        assert not stock.isfinite().all()

    embeds = random(len(GRIDS), 54, tower.config.hidden_size, dtype=torch.float16)
    states = HugeStates()(embeds).last_hidden_state
    tokens = averages(states, inputs["pixel_position_ids"]) * tower.config.hidden_size**0.5
    if tower.config.standardize:
        tokens = (tokens - tower.std_bias.double()) * tower.std_scale.double()
    assert tokens.abs().max() > 65504
    normed = tokens / (tokens.pow(2).mean(-1, keepdim=True) + embedder.eps).sqrt()
    expected = normed @ embedder.embedding_projection.weight.double().T
    assert found.isfinite().all()
    assert relative_error(found, expected) < 2e-3


def test_the_audio_embedder_is_left_alone() -> None:
    model = build("e2b")
    report = patches.apply(model, [VisionPooler()])
    assert report.rows[0].sites == (
        "model.vision_tower",
        "model.vision_tower.pooler",
        "model.embed_vision",
    )


def test_a_model_without_its_head_and_a_bare_tower_are_patched() -> None:
    model = build("e2b").model
    report = patches.apply(model, [VisionPooler()])
    assert report.rows[0].sites == ("vision_tower", "vision_tower.pooler", "embed_vision")
    report.undo()
    report = patches.apply(model.vision_tower, [VisionPooler()])
    assert report.rows[0].sites == ("Gemma4VisionModel", "pooler")


def test_not_applicable_without_a_tower() -> None:
    plan = VisionPooler().plan(nn.Linear(2, 2))
    assert plan.status == "not applicable"
    assert "vision tower" in plan.reason


@pytest.mark.parametrize(
    ("place", "method"),
    [
        ("vision_tower", "forward"),
        ("vision_tower.pooler", "forward"),
        ("vision_tower.pooler", "_avg_pool_by_positions"),
        ("embed_vision", "forward"),
    ],
)
def test_an_unknown_computation_is_an_error(place: str, method: str) -> None:
    def unknown(self: nn.Module, *args: Any) -> None:
        return None

    model = build("e2b").model
    module = model.get_submodule(place)
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {method: unknown})
    with pytest.raises(PatchError, match="not one of the versions"):
        VisionPooler().plan(model)
