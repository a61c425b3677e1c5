"""What every patch promises, whichever it is, alone and with all others."""

from __future__ import annotations

import copy

import pytest
import torch
from gemma4_zoo import batch, build, loss_and_gradients, relative_error

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches import Edit, Plan

FAMILIES = ("e2b", "26b_a4b", "31b")
CHOICES = [*[[name] for name in patches.available()], list(patches.available())]
EXACT = 1e-10


def names(choice: list[str]) -> str:
    return "+".join(choice) if len(choice) == 1 else "all"


@pytest.fixture(params=CHOICES, ids=names)
def choice(request: pytest.FixtureRequest) -> list[str]:
    return request.param


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images_per_row", [(1, 0, 2), (0, 0)], ids=["images", "text"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_loss_and_every_gradient_are_those_of_stock_transformers(
    choice: list[str], family: str, images_per_row: tuple[int, ...], checkpointing: bool
) -> None:
    model = build(family)
    inputs = batch(model, images_per_row)
    expected_loss, expected = loss_and_gradients(model, inputs, reference=True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    patches.apply(model, choice)
    # Where the loss is left to transformers, it is computed from the logits on both sides.
    stock_loss = "linear_cross_entropy" not in choice
    loss, gradients = loss_and_gradients(model, inputs, reference=stock_loss)

    assert relative_error(loss, expected_loss) < EXACT
    assert gradients.keys() == expected.keys()
    worst = max(relative_error(gradients[name], expected[name]) for name in expected)
    assert worst < EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_the_loss_is_as_near_to_float64_as_the_stock_one(
    choice: list[str], family: str
) -> None:
    reference = build(family)
    inputs = batch(reference)
    exact, _ = loss_and_gradients(reference, inputs, reference=True)
    model = reference.bfloat16()
    stock_error = relative_error(loss_and_gradients(model, inputs)[0], exact)
    patches.apply(model, choice)
    assert relative_error(loss_and_gradients(model, inputs)[0], exact) <= stock_error + 2e-3


def test_state_dict_is_the_same_object_by_object(choice: list[str]) -> None:
    model = build("e2b")
    before = model.state_dict(keep_vars=True)
    patches.apply(model, choice)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_undo_leaves_no_trace(choice: list[str]) -> None:
    model = build("e2b")
    inputs = batch(model)
    traces = {name: set(vars(module)) for name, module in model.named_modules()}
    expected_loss, expected = loss_and_gradients(model, inputs)
    report = patches.apply(model, choice)
    report.undo()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == traces
    loss, gradients = loss_and_gradients(model, inputs)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    with pytest.raises(PatchError, match="undone already"):
        report.undo()


def test_a_patched_model_is_not_patched_again(choice: list[str]) -> None:
    model = build("e2b")
    report = patches.apply(model, choice)
    with pytest.raises(PatchError, match="patched already"):
        patches.apply(model, choice)
    report.undo()
    patches.apply(model, choice).undo()


def test_generation_gives_the_same_tokens(choice: list[str]) -> None:
    model = build("e2b").eval()
    inputs = batch(model, (1,))
    del inputs["labels"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    patches.apply(model, choice)
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_a_deep_copy_works_on_its_own_parameters(choice: list[str]) -> None:
    model = build("e2b")
    inputs = batch(model)
    patches.apply(model, choice)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    changed, _ = loss_and_gradients(twin, inputs)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert relative_error(changed, loss_and_gradients(model, inputs)[0]) > 1e-4


def test_the_class_is_untouched(choice: list[str]) -> None:
    patched, stock = build("e2b"), build("e2b")
    inputs = batch(stock)
    stock_forward = type(stock).forward
    expected, _ = loss_and_gradients(stock, inputs)
    patches.apply(patched, choice)
    assert type(stock).forward is stock_forward
    assert torch.equal(loss_and_gradients(stock, inputs)[0], expected)


def test_the_report_names_status_and_sites(choice: list[str]) -> None:
    model = build("e2b")
    report = patches.apply(model, choice)
    assert [row.name for row in report.rows] == choice
    for row in report.rows:
        assert row.status in ("applied", "upstream", "not applicable")
        assert bool(row.sites) == (row.status == "applied")
        assert row.reason
        assert row.name in str(report)
        assert row.status in str(report)


class _Claims:
    """A patch that claims the same attribute as linear_cross_entropy."""

    name = "claims_forward"

    def plan(self, model: torch.nn.Module) -> Plan:
        edits = (
            Edit(model.model, "harmless", 1, "model"),
            Edit(model, "forward", model.forward, "Gemma4ForConditionalGeneration"),
        )
        return Plan("applied", "for the test", edits)


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
