"""Which classes of the name relative_position_lookup replaces, and which it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from relative_positions import C_Z, Features, features, make, one_hot_forward, one_hots
from torch import nn

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches import relative_position_lookup
from gemtune.patches.relative_position_lookup import RelativePositionLookup


def apply(module: nn.Module) -> Any:
    return patches.apply(module, [RelativePositionLookup()])


def chain_by_asym(self: Any, input_feature_dict: Features) -> torch.Tensor:
    """AlphaFold3's paper: the copy's distance counts between chains, not inside an entity."""
    changed = dict(input_feature_dict)
    hots = one_hots(changed, self.r_max, self.s_max)
    asym = changed["asym_id"]
    other = asym[..., :, None] != asym[..., None, :]
    i, j = changed["sym_id"][..., :, None], changed["sym_id"][..., None, :]
    bins = torch.where(
        other, (i - j).clamp(-self.s_max, self.s_max) + self.s_max, 2 * self.s_max + 1
    )
    hots = torch.cat([hots[..., : -2 * self.s_max - 2], F.one_hot(bins, 2 * self.s_max + 2)], -1)
    return self.linear_no_bias(hots.float())


def token_in_chain(self: Any, input_feature_dict: Features) -> torch.Tensor:
    """The token distance counts in the whole chain, not in one residue only."""
    same = {**input_feature_dict, "residue_index": torch.zeros_like(input_feature_dict["sym_id"])}
    hots = one_hots(input_feature_dict, self.r_max, self.s_max)
    token = slice(2 * self.r_max + 2, 4 * self.r_max + 4)
    hots[..., token] = one_hots(same, self.r_max, self.s_max)[..., token]
    return self.linear_no_bias(hots.float())


def only_in_eval(self: Any, input_feature_dict: Features) -> torch.Tensor:
    value = one_hot_forward(self, input_feature_dict)
    return value if self.training else value.flip(-2)


def transposed(self: Any, input_feature_dict: Features) -> torch.Tensor:
    return one_hot_forward(self, input_feature_dict).transpose(-3, -2)


def needs_more(self: Any, input_feature_dict: Features) -> torch.Tensor:
    return one_hot_forward(self, input_feature_dict) * input_feature_dict["mask"]


def other_dtype(self: Any, input_feature_dict: Features) -> torch.Tensor:
    return one_hot_forward(self, input_feature_dict).double()


@pytest.mark.parametrize(
    "forward", [chain_by_asym, token_in_chain, only_in_eval, transposed, other_dtype]
)
def test_a_variant_that_computes_something_else_is_refused(forward: Callable[..., Any]) -> None:
    module = make(forward)
    with torch.no_grad():
        module.linear_no_bias.weight.zero_()  # the weight that a run begins with hides it
    with pytest.raises(PatchError, match="something else"):
        apply(module)
    assert "forward" not in vars(module)


def test_a_variant_that_needs_other_features_is_refused() -> None:
    with pytest.raises(PatchError, match=r"fails on a probe .*KeyError: 'mask'"):
        apply(make(needs_more))


def further_argument(self: Any, input_feature_dict: Features, cyclic: Any = None) -> None: ...
def separate(self: Any, asym_id: Any, residue_index: Any) -> None: ...
def nothing(self: Any) -> None: ...


@pytest.mark.parametrize("forward", [further_argument, separate, nothing])
def test_an_unknown_signature_is_refused(forward: Callable[..., Any]) -> None:
    with pytest.raises(PatchError, match=r"a forward\(.*\) that is not known"):
        apply(make(forward))


def _with_bias(module: Any) -> None:
    module.linear_no_bias = nn.Linear(module.linear_no_bias.in_features, C_Z)


def _with_adapter(module: Any) -> None:
    module.linear_no_bias.lora_a = nn.Parameter(torch.zeros(2, 3))


def _with_a_second_table(module: Any) -> None:
    module.extra = nn.Parameter(torch.zeros(3))


def _with_another_shape(module: Any) -> None:
    module.linear_no_bias = nn.Linear(7, C_Z, bias=False)


def _with_a_hook(module: Any) -> None:
    module.linear_no_bias.register_forward_hook(lambda *_: None)


def _with_its_forward_replaced(module: Any) -> None:
    module.forward = lambda *_: None


def _on_meta(module: Any) -> None:
    module.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_bias, "a weight and nothing else"),
        (_with_adapter, "a weight and nothing else"),
        (_with_a_second_table, "not only linear_no_bias.weight"),
        (_with_another_shape, "not only linear_no_bias.weight"),
        (_with_a_hook, "hooks on linear_no_bias"),
        (_with_its_forward_replaced, "forward replaced before"),
        (_on_meta, "no values yet"),
    ],
)
def test_a_module_with_more_than_a_weight_is_refused(
    change: Callable[[Any], None], message: str
) -> None:
    module = make()
    change(module)
    with pytest.raises(PatchError, match=message):
        apply(module)


def test_an_adapter_put_on_later_is_not_left_out_silently() -> None:
    module = make()
    apply(module)
    _with_adapter(module)
    with pytest.raises(PatchError, match="a weight and nothing else"):
        module(features(5))


def test_planning_changes_nothing() -> None:
    def drawing_forward(self: Any, input_feature_dict: Features) -> torch.Tensor:
        torch.rand(3)
        self.called = True
        input_feature_dict["seen"] = 1
        return one_hot_forward(self, input_feature_dict)

    model = nn.ModuleList([make(drawing_forward)]).train()
    module = model[0]
    before = copy.deepcopy(module.state_dict())
    keys, random_state = set(vars(module)), torch.get_rng_state()
    plan = RelativePositionLookup().plan(model)
    assert plan.status == "applied"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert set(vars(module)) == keys
    assert module.training
    assert module.linear_no_bias.weight.grad is None
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)


def test_the_probe_shows_every_row_of_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    probe = relative_position_lookup._probe_features(32, 2, generator)
    assert one_hots(probe, 32, 2).flatten(0, 1).sum(0).min() > 0
