"""What every patch promises, whichever it is: alone, with each other one, and with all of them."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from typing import Any

import pytest
import torch
from gemma4_zoo import (
    CONTINUOUS_FAMILIES,
    FAMILIES,
    SHARING_FAMILIES,
    batch,
    brings_its_loss,
    build,
    cast,
    exact_float64,
    loss_and_gradients,
    relative_error,
)

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches import Edit, Plan, fingerprint

EXACT = 1e-10

NAMES = patches.available()
ALONE = [(name,) for name in NAMES]
PAIRS = list(itertools.combinations(NAMES, 2))
ALL = tuple(NAMES)
DEFAULT = patches.default()

# Some patches are for parts that are not trained.
TRAINED = {
    "everything": (),
    "towers and PLE frozen": ("vision_tower", "embed_tokens_per_layer"),
    "norms alone": ("proj", "embed", "gate", "table", "experts", "router", "linear"),
}
BATCHES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "text": ((0, 0), ()),
    "one image": ((1,), ()),
    "several images": ((1, 0, 2), ()),
    "video": ((0, 0), (1, 0)),
    "mixed": ((0, 1, 3, 1), (0, 0, 0, 1)),
}


def name_of(choice: tuple[str, ...]) -> str:
    return {ALL: "all", DEFAULT: "default"}.get(choice, "+".join(choice))


def choices(*lists: list[tuple[str, ...]]) -> pytest.MarkDecorator:
    flat = [choice for choice_list in lists for choice in choice_list]
    return pytest.mark.parametrize("choice", flat, ids=name_of)


@cache
def model_of(family: str, dtype: torch.dtype, trained: str) -> Any:
    """One model for many tests: each patches it and undoes that, which is proven to be exact."""
    return build(family, dtype, frozen=TRAINED[trained])


@cache
def reference(family: str, trained: str, kind: str) -> tuple[torch.Tensor, dict]:
    """Loss and gradients of stock transformers in float64, without its roundings to float32."""
    model = model_of(family, torch.float64, trained)
    with exact_float64():
        return loss_and_gradients(model, batch(model, *BATCHES[kind]), reference=True)


@cache
def stock_errors(family: str, dtype: torch.dtype) -> tuple[float, float]:
    """How far stock transformers is from the reference in `dtype`: loss, all gradients."""
    model = model_of(family, dtype, "everything")
    return errors(family, loss_and_gradients(model, batch(model, *BATCHES["mixed"])))


def errors(family: str, found: tuple[torch.Tensor, dict]) -> tuple[float, float]:
    loss, gradients = found
    expected_loss, expected = reference(family, "everything", "mixed")
    assert gradients.keys() == expected.keys()
    joined = [torch.cat([g[n].double().flatten() for n in expected]) for g in (gradients, expected)]
    return relative_error(loss, expected_loss), relative_error(*joined)


def assert_exact(family: str, choice: tuple[str, ...], trained: str, kind: str, ckpt: bool) -> None:
    model = model_of(family, torch.float64, trained)
    inputs = batch(model, *BATCHES[kind])
    expected_loss, expected = reference(family, trained, kind)
    if ckpt:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    report = patches.apply(model, choice)
    try:
        with exact_float64():
            # Where the loss is left to transformers, it is computed from the logits on both sides.
            stock_loss = not brings_its_loss(choice, family)
            loss, gradients = loss_and_gradients(model, inputs, reference=stock_loss)
    finally:
        report.undo()
        model.gradient_checkpointing_disable()
    where = f"{kind}, {trained} trained, checkpointing {ckpt}"
    assert relative_error(loss, expected_loss) < EXACT, where
    assert gradients.keys() == expected.keys(), where
    worst = max(expected, key=lambda name: relative_error(gradients[name], expected[name]))
    assert relative_error(gradients[worst], expected[worst]) < EXACT, f"{where}: {worst}"


@choices(ALONE, [DEFAULT, ALL])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained", TRAINED)
def test_float64_loss_and_every_gradient_are_those_of_stock_transformers(
    choice: tuple[str, ...], family: str, trained: str
) -> None:
    for kind in BATCHES:
        for ckpt in (False, True):
            assert_exact(family, choice, trained, kind, ckpt)


@cache
def hearing() -> tuple[Any, dict[str, torch.Tensor], tuple[torch.Tensor, dict]]:
    """A model with an audio tower, rows with every kind of media, and what stock makes of them."""
    model = build("e2b", hears=True)
    inputs = batch(model, (1, 0, 0), (0, 1, 0), audios_per_row=(1, 0, 2))
    with exact_float64():
        return model, inputs, loss_and_gradients(model, inputs, reference=True)


@choices(ALONE, [DEFAULT, ALL])
def test_rows_with_audio_have_the_loss_and_gradients_of_stock(choice: tuple[str, ...]) -> None:
    model, inputs, (expected_loss, expected) = hearing()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    report = patches.apply(model, choice)
    try:
        with exact_float64():
            stock_loss = not brings_its_loss(choice, "e2b")
            loss, gradients = loss_and_gradients(model, inputs, reference=stock_loss)
    finally:
        report.undo()
        model.gradient_checkpointing_disable()
    assert relative_error(loss, expected_loss) < EXACT
    assert gradients.keys() == expected.keys()
    worst = max(expected, key=lambda name: relative_error(gradients[name], expected[name]))
    assert relative_error(gradients[worst], expected[worst]) < EXACT, worst


@choices(PAIRS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float64_pairs(choice: tuple[str, ...], family: str) -> None:
    # Each patch alone goes through every combination of both.
    assert_exact(family, choice, "everything", "mixed", ckpt=False)
    assert_exact(family, choice, "towers and PLE frozen", "mixed", ckpt=True)


# Of the norm of the reference, on top of what stock transformers is off itself.
ALLOWANCE = {torch.float32: (2e-7, 2e-6), torch.bfloat16: (2e-3, 1e-2)}


@choices(ALONE, PAIRS, [DEFAULT, ALL])
@pytest.mark.parametrize("dtype", ALLOWANCE, ids=str)
def test_in_lower_precision_it_is_as_near_to_float64_as_stock_transformers(
    choice: tuple[str, ...], dtype: torch.dtype
) -> None:
    for family in CONTINUOUS_FAMILIES:
        model = model_of(family, dtype, "everything")
        report = patches.apply(model, choice)
        try:
            found = loss_and_gradients(model, batch(model, *BATCHES["mixed"]))
        finally:
            report.undo()
        triples = zip(
            errors(family, found), stock_errors(family, dtype), ALLOWANCE[dtype], strict=True
        )
        for error, stock_error, allowance in triples:
            assert error <= 1.25 * stock_error + allowance, family


@choices(ALONE, PAIRS, [DEFAULT, ALL])
def test_generation_gives_the_same_tokens(choice: tuple[str, ...]) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for family in FAMILIES:
        for kind in ("text", "one image", "video"):
            model = model_of(family, torch.float32, "towers and PLE frozen").eval()
            images, videos = BATCHES[kind]
            inputs = batch(model, images[:1], videos[:1])
            del inputs["labels"]
            expected = generated(family, kind, model, inputs, options)
            report = patches.apply(model, choice)
            try:
                assert torch.equal(model.generate(**inputs, **options), expected), (family, kind)
            finally:
                report.undo()
                model.train()


_GENERATED: dict[tuple[str, str], torch.Tensor] = {}


def generated(
    family: str, kind: str, model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]
) -> torch.Tensor:
    if (family, kind) not in _GENERATED:
        _GENERATED[family, kind] = model.generate(**inputs, **options)
    return _GENERATED[family, kind]


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


def status_of(name: str, family: str, trained: str) -> str:
    """What the report must say, in every transformers release that is supported."""
    has_ple = family in SHARING_FAMILIES
    frozen = trained != "everything"
    applies = {
        "relative_position_lookup": False,
        "ple_projection": has_ple,
        "ple_offload": has_ple and frozen,
        "supervised_positions": family in SHARING_FAMILIES,
        "vision_streaming": frozen,
    }
    return "applied" if applies.get(name, True) else "not applicable"


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
