"""What every patch promises, whatever it computes: no trace, no double, no unknown code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gemma4_zoo import FAMILIES, batch, build, cast, loss_and_gradients, relative_error
from patch_choices import ALL, ALONE, NAMES, TRAINED, name_of, status_of

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches import Edit, Plan, fingerprint

EACH = pytest.mark.parametrize("choice", [*ALONE, ALL], ids=name_of)


def frozen_model(dtype: torch.dtype = torch.float64) -> Any:
    """An E2B that every Gemma 4 patch applies to."""
    return build("e2b", dtype, frozen=TRAINED["towers and PLE frozen"])


@EACH
def test_state_dict_is_the_same_object_by_object(choice: tuple[str, ...]) -> None:
    model = frozen_model()
    before = model.state_dict(keep_vars=True)
    values = {name: tensor.detach().clone() for name, tensor in before.items()}
    patches.apply(model, choice)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert all(torch.equal(after[name], values[name]) for name in before)


@EACH
def test_undo_leaves_no_trace(choice: tuple[str, ...]) -> None:
    model = frozen_model()
    inputs = batch(model)
    traces = {name: set(vars(module)) for name, module in model.named_modules()}
    expected_loss, expected = loss_and_gradients(model, inputs)
    report = patches.apply(model, choice)
    loss_and_gradients(model, inputs)
    report.undo()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == traces
    loss, gradients = loss_and_gradients(model, inputs)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    with pytest.raises(PatchError, match="undone already"):
        report.undo()


@EACH
def test_a_patched_model_is_not_patched_again(choice: tuple[str, ...]) -> None:
    model = frozen_model()
    report = patches.apply(model, choice)
    with pytest.raises(PatchError, match="patched already"):
        patches.apply(model, choice)
    report.undo()
    patches.apply(model, choice).undo()


@EACH
def test_a_deep_copy_works_on_its_own_parameters(choice: tuple[str, ...]) -> None:
    model = frozen_model()
    inputs = batch(model)
    patches.apply(model, choice)
    twin = copy.deepcopy(model)
    before, _ = loss_and_gradients(model, inputs)
    assert torch.equal(loss_and_gradients(twin, inputs)[0], before)
    model.zero_grad()
    for part in ("vision_tower", "embed_tokens_per_layer", "language_model.layers", "embed_tokens"):
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if part in name:
                    parameter.mul_(1.1)
        changed, _ = loss_and_gradients(twin, inputs)
        assert relative_error(changed, before) > 1e-5, part
        before = changed
    assert all(parameter.grad is None for parameter in model.parameters())


@EACH
def test_the_class_is_untouched(choice: tuple[str, ...]) -> None:
    patched, stock = frozen_model(), frozen_model()
    inputs = batch(stock)
    expected, _ = loss_and_gradients(stock, inputs)
    methods = {
        (type(module), name): value
        for module in stock.modules()
        for name, value in vars(type(module)).items()
    }
    patches.apply(patched, choice)
    assert torch.equal(loss_and_gradients(stock, inputs)[0], expected)
    assert all(vars(kind)[name] is value for (kind, name), value in methods.items())


@EACH
def test_weights_survive_a_change_of_dtype_and_a_reload(choice: tuple[str, ...]) -> None:
    model = frozen_model(torch.float32)
    inputs = batch(model)
    expected, _ = loss_and_gradients(model, inputs)
    weights = copy.deepcopy(model.state_dict())
    patches.apply(model, choice)
    cast(model, torch.float64)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    cast(model, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(weights)
    assert relative_error(loss_and_gradients(model, inputs)[0], expected) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained", ["everything", "towers and PLE frozen"])
def test_the_report_names_status_and_sites(family: str, trained: str) -> None:
    model = build(family, frozen=TRAINED[trained])
    report = patches.apply(model, ALL)
    statuses = {row.name: row.status for row in report.rows}
    assert statuses == {name: status_of(name, family, trained) for name in NAMES}
    for row in report.rows:
        assert bool(row.sites) == (row.status == "applied")
        assert row.reason
        assert any(
            line.startswith(row.name) and row.status in line and row.reason in line
            for line in str(report).splitlines()
        )


# What no method of transformers is replaced for.
_ADDS_ONLY = {"sdpa_guard", "relative_position_lookup"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in _ADDS_ONLY])
def test_an_unknown_transformers_is_refused_and_nothing_changes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = frozen_model()
    traces = {path: set(vars(module)) for path, module in model.named_modules()}
    monkeypatch.setattr(fingerprint, "fingerprint", lambda function: "of the future")
    with pytest.raises(PatchError, match=rf"{name}.*(?s:.)*of the future"):
        patches.apply(model, [name])
    assert {path: set(vars(module)) for path, module in model.named_modules()} == traces


class _Claims:
    """A patch that claims the same attribute as linear_cross_entropy."""

    name = "claims_forward"

    def plan(self, model: torch.nn.Module) -> Plan:
        changes = (
            Edit(model.model, "harmless", 1, "model"),
            Edit(model, "forward", model.forward, "Gemma4ForConditionalGeneration"),
        )
        return Plan("applied", "for the test", changes)


def test_two_patches_of_one_attribute_are_refused_before_anything_changes() -> None:
    model = build("e2b")
    traces = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(PatchError, match=r"claims_forward and linear_cross_entropy|forward"):
        patches.apply(model, [_Claims(), "linear_cross_entropy"])
    assert {name: set(vars(module)) for name, module in model.named_modules()} == traces


def test_a_change_made_on_top_is_not_undone_over() -> None:
    model = build("e2b")
    report = patches.apply(model, ["linear_cross_entropy"])
    ours = model.forward
    model.forward = lambda **inputs: ours(**inputs)
    with pytest.raises(PatchError, match="changed by someone else"):
        report.undo()


def test_an_unknown_name_is_answered_with_the_list() -> None:
    with pytest.raises(PatchError, match=r"Did you mean 'linear_cross_entropy'.*vision_position"):
        patches.apply(build("e2b"), ["linear_cross_entrop"])
