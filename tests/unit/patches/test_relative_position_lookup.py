"""The look-up against algorithm 3 of AlphaFold3 written out here with one-hots."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gemma4_zoo import build
from kept_bytes import kept_bytes
from relative_positions import (
    C_Z,
    R_MAX,
    S_MAX,
    Features,
    features,
    make,
    one_hot_forward,
    one_hots,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gemtune import patches
from gemtune.patches import relative_position_lookup, table_lookup
from gemtune.patches.relative_position_lookup import RelativePositionLookup


def apply(module: nn.Module) -> Any:
    return patches.apply(module, [RelativePositionLookup()])


def value_and_gradient(
    module: Any, given: Features, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    module.zero_grad()
    value = module(given)
    value.backward(gradient.to(value.dtype))
    return value.detach(), module.linear_no_bias.weight.grad


# 10 tokens are looked up in two tables, 80 in the table of their sums.
@pytest.mark.parametrize("num_tokens", [1, 10, 80])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_one_hots(
    num_tokens: int, batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    module = make().to(dtype)
    apply(module)
    given = features(num_tokens, batch)
    exact = module.linear_no_bias.weight.detach().double().requires_grad_()
    expected = one_hots(given, R_MAX, S_MAX).double() @ exact.t()
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(gradient.to(dtype).double())
    value, found = value_and_gradient(module, given, gradient)

    # Rounded once to 16 bits; a few roundings in the wider ones.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    assert value.dtype == found.dtype == dtype
    assert value.shape == (*batch, num_tokens, num_tokens, C_Z)
    torch.testing.assert_close(
        value.double(), expected, rtol=tolerance, atol=1e-6 * (dtype != torch.float64)
    )
    scale = exact.grad.abs().max().item()
    torch.testing.assert_close(
        found.double(),
        exact.grad,
        rtol=tolerance,
        atol=1e-6 * scale if dtype != torch.float64 else 1e-12,
    )


@pytest.mark.parametrize("sizes", [(32, 2), (0, 0), (1, 3), (100, 1)], ids=str)
def test_every_combination_of_distances(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relative_position_lookup, "_PAIRS_PER_BLOCK", 1500)  # rows by sevens
    r_max, s_max = sizes
    module = make(r_max=r_max, s_max=s_max).double()
    apply(module)
    generator = torch.Generator().manual_seed(0)
    limits = {"asym_id": 2, "entity_id": 2, "sym_id": 2 * s_max + 4}
    limits |= {"residue_index": 2, "token_index": 3 * r_max + 5}
    given = {name: torch.randint(n, (200,), generator=generator) for name, n in limits.items()}
    given["residue_index"][:100] = torch.randint(3 * r_max + 5, (100,), generator=generator)
    # Dates and numbers from a file: far from zero.
    given["residue_index"] += 10**6
    hots = one_hots(given, r_max, s_max)
    assert hots.flatten(0, 1).sum(0).min() > 0, "every column of the weight is used"
    expected = hots.double() @ module.linear_no_bias.weight.t()
    torch.testing.assert_close(module(given), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_features_of_any_integer_dtype(dtype: torch.dtype) -> None:
    # Differences of uint8 wrap, in the original as well.
    module = make()
    given = {name: feature.to(dtype) for name, feature in features(40).items()}
    expected = _wrapping_forward(module, given)
    apply(module)
    torch.testing.assert_close(module(given), expected)


def _wrapping_forward(module: Any, given: Features) -> torch.Tensor:
    """Subtracted and clipped as Protenix does it: in the dtype of the features."""
    r_max, s_max = module.r_max, module.s_max

    def pairs(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return given[name][..., :, None], given[name][..., None, :]

    def clipped(name: str, limit: int) -> torch.Tensor:
        i, j = pairs(name)
        return torch.clip(i - j + limit, min=0, max=2 * limit).long()

    chain, residue, entity = (
        torch.eq(*pairs(name)).long() for name in ("asym_id", "residue_index", "entity_id")
    )
    within = chain * residue
    bins = [
        (clipped("residue_index", r_max) * chain + (1 - chain) * (2 * r_max + 1), r_max),
        (clipped("token_index", r_max) * within + (1 - within) * (2 * r_max + 1), r_max),
        (clipped("sym_id", s_max) * entity + (1 - entity) * (2 * s_max + 1), s_max),
    ]
    residues, tokens, chains = (F.one_hot(bin_, 2 * limit + 2) for bin_, limit in bins)
    hots = torch.cat([residues, tokens, entity[..., None], chains], dim=-1)
    return module.linear_no_bias(hots.float())


def test_features_that_are_no_integers_are_refused() -> None:
    module = make()
    apply(module)
    given = features(5)
    given["residue_index"] = given["residue_index"].float()
    with pytest.raises(TypeError, match=r"residue_index must be of an integer dtype"):
        module(given)


def float32_forward(self: Any, input_feature_dict: Features) -> torch.Tensor:
    """As PXDesign has it since PXDesign#17: rows of the weight in float32, outside autocast."""
    hots = one_hots(input_feature_dict, self.r_max, self.s_max)
    weight = self.linear_no_bias.weight.t().float()
    return torch.stack([weight[hot.nonzero()[:, 0]].sum(0) for hot in hots.flatten(0, -2)]).view(
        *hots.shape[:-1], -1
    )


@pytest.mark.parametrize(
    ("forward", "expected"),
    [(one_hot_forward, torch.bfloat16), (float32_forward, torch.float32)],
    ids=["matmul", "float32"],
)
def test_under_autocast_the_dtype_is_that_of_the_original(
    forward: Callable[..., Any], expected: torch.dtype
) -> None:
    module = make(forward)
    apply(module)
    given = features(60)
    for lower in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            stock = forward(module, given)
            value = module(given)
        assert value.dtype == stock.dtype == (expected if lower else torch.float32)
        torch.testing.assert_close(value, stock)
    gradient = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        _, found = value_and_gradient(module, given, gradient)
        module.zero_grad()
        stock = forward(module, given)
    stock.backward(gradient.to(stock.dtype))
    exact = module.linear_no_bias.weight.grad
    torch.testing.assert_close(found, exact, rtol=2**-7, atol=1e-3)


def test_autocast_leaves_float64_alone() -> None:
    module = make().double()
    apply(module)
    given = features(20)
    expected = module(given)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.ones(1, 2).double(), torch.ones(1, 2).double()).dtype == torch.float64
        value = module(given)
    assert value.dtype == torch.float64
    assert torch.equal(value, expected)


def chunked_forward(
    self: Any, input_feature_dict: Features, inplace_safe: bool = False, chunk_size: Any = None
) -> torch.Tensor:
    """Rows in chunks in eval mode, as older Protenix has it."""
    hots = one_hots(input_feature_dict, self.r_max, self.s_max).float()
    if self.training:
        return self.linear_no_bias(hots)
    return torch.cat([self.linear_no_bias(part) for part in hots.chunk(8, dim=-3)], dim=-3)


def test_arguments_without_effect_are_taken() -> None:
    module = make(chunked_forward)
    given = features(20)
    expected = module(given)
    apply(module)
    found = module(input_feature_dict=given, inplace_safe=True, chunk_size=4)
    torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError):
        module(given, mask=None)


def test_every_module_of_the_class_is_patched_and_undone() -> None:
    model = nn.ModuleDict({"trunk": make(), "diffusion": make(r_max=3), "other": nn.Linear(2, 2)})
    before = model.state_dict(keep_vars=True)
    report = apply(model)
    assert report.rows[0].sites == ("trunk", "diffusion")
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    report.undo()
    assert not [m for m in model.modules() if "forward" in vars(m)]
    given = features(30)
    expected = one_hots(given, R_MAX, S_MAX).float() @ model["trunk"].linear_no_bias.weight.t()
    torch.testing.assert_close(model["trunk"](given), expected)


def test_a_deep_copy_uses_its_own_weight() -> None:
    module = make()
    apply(module)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.linear_no_bias.weight.zero_()
    assert twin(features(20)).abs().max() == 0
    assert module(features(20)).abs().max() > 0


def precomputed(self: Any, relp_feature: torch.Tensor) -> torch.Tensor:
    return self.linear_no_bias(relp_feature)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: nn.Linear(2, 2), "no RelativePositionEncoding"),
        (lambda: make(precomputed), "generate_relp"),
        (lambda: type("RelativePositionEncoding", (nn.Linear,), {})(2, 2), "another one.*r_max"),
        (lambda: build("e2b"), "no RelativePositionEncoding"),
    ],
    ids=["none", "precomputed", "another", "gemma4"],
)
def test_not_applicable_with_the_reason(model: Callable[[], nn.Module], reason: str) -> None:
    report = apply(model())
    assert report.rows[0].status == "not applicable"
    assert re.search(reason, report.rows[0].reason)


def test_it_is_chosen_by_name_only() -> None:
    assert "relative_position_lookup" in patches.available()
    assert "relative_position_lookup" not in patches.default()


class _Pairwise(TorchDispatchMode):
    """Bytes of the tensors made with at least one number for each pair of tokens, views aside."""

    def __init__(self, num_pairs: int) -> None:
        super().__init__()
        self.num_pairs = num_pairs
        self.num_bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if (
            isinstance(result, torch.Tensor)
            and result.numel() >= self.num_pairs
            and result.untyped_storage().data_ptr() not in given
            and "out" not in (kwargs or {})
        ):
            self.num_bytes.append(result.numel() * result.element_size())
        return result


def test_beside_the_result_only_indices_of_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    num_tokens, c_z = 300, 32
    monkeypatch.setattr(table_lookup, "_CPU_BLOCK_BYTES", 2**14)
    monkeypatch.setattr(relative_position_lookup, "_PAIRS_PER_BLOCK", 2**12)
    module = make(r_max=32, c_z=c_z)
    apply(module)
    num_pairs = num_tokens**2
    given = features(num_tokens)
    with _Pairwise(num_pairs) as pairwise:
        module(given)
    result_bytes = num_pairs * c_z * 4
    # Two indices of one byte, their joint index of two, the result.
    assert sorted(pairwise.num_bytes) == [num_pairs, num_pairs, 2 * num_pairs, result_bytes]

    value, kept = kept_bytes(lambda: module(given))
    tables = (4 * 32 + 3) * 6 * c_z * 4
    assert kept <= 2 * num_pairs + 4 * tables
    with _Pairwise(num_pairs) as pairwise:
        value.backward(value.detach())
    assert pairwise.num_bytes == []
