"""What patches compute is what stock transformers does: alone, in pairs, and all of them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from gemma4_zoo import (
    CONTINUOUS_FAMILIES,
    FAMILIES,
    batch,
    brings_its_loss,
    build,
    exact_float64,
    loss_and_gradients,
    relative_error,
)
from patch_choices import ALL, ALONE, DEFAULT, PAIRS, TRAINED, is_new, name_of

from gemtune import patches

EXACT = 1e-10

BATCHES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "text": ((0, 0), ()),
    "one image": ((1,), ()),
    "several images": ((1, 0, 2), ()),
    "video": ((0, 0), (1, 0)),
    "mixed": ((0, 1, 3, 1), (0, 0, 0, 1)),
}


def cases(
    lists: list[list[tuple[str, ...]]], trained: Iterable[str], families: Iterable[str] = FAMILIES
) -> pytest.MarkDecorator:
    """The choices on each family, with each part of it trained, where they are not another one."""
    flat = [
        pytest.param(choice, family, part, id=f"{name_of(choice)}-{family}-{part}")
        for choice_list in lists
        for choice in choice_list
        for family in families
        for part in trained
        if is_new(choice, family, part)
    ]
    return pytest.mark.parametrize(("choice", "family", "trained"), flat)


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


@cases([ALONE, [DEFAULT, ALL]], TRAINED)
def test_float64_loss_and_every_gradient_are_those_of_stock_transformers(
    choice: tuple[str, ...], family: str, trained: str
) -> None:
    for kind in BATCHES:
        assert_exact(family, choice, trained, kind, ckpt=False)
    for kind in ("text", "mixed"):
        assert_exact(family, choice, trained, kind, ckpt=True)


@cache
def hearing() -> tuple[Any, dict[str, torch.Tensor], tuple[torch.Tensor, dict]]:
    """A model with an audio tower, rows with every kind of media, and what stock makes of them."""
    model = build("e2b", hears=True)
    inputs = batch(model, (1, 0, 0), (0, 1, 0), audios_per_row=(1, 0, 2))
    with exact_float64():
        return model, inputs, loss_and_gradients(model, inputs, reference=True)


@pytest.mark.parametrize("choice", [*ALONE, DEFAULT, ALL], ids=name_of)
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


@cases([PAIRS], ("everything", "towers and PLE frozen"))
def test_float64_pairs(choice: tuple[str, ...], family: str, trained: str) -> None:
    # Each patch alone goes through every combination of both.
    assert_exact(family, choice, trained, "mixed", ckpt=trained != "everything")


# Of the norm of the reference, on top of what stock transformers is off itself.
ALLOWANCE = {torch.float32: (2e-7, 2e-6), torch.bfloat16: (2e-3, 1e-2)}


@cases([ALONE, PAIRS, [DEFAULT, ALL]], ["everything"], CONTINUOUS_FAMILIES)
def test_in_lower_precision_it_is_as_near_to_float64_as_stock_transformers(
    choice: tuple[str, ...], family: str, trained: str
) -> None:
    # What two patches do to each other shows in the narrower of the two.
    for dtype in (torch.bfloat16,) if choice in PAIRS else ALLOWANCE:
        assert_as_near_as_stock(family, choice, trained, dtype)


def assert_as_near_as_stock(
    family: str, choice: tuple[str, ...], trained: str, dtype: torch.dtype
) -> None:
    model = model_of(family, dtype, trained)
    report = patches.apply(model, choice)
    try:
        found = loss_and_gradients(model, batch(model, *BATCHES["mixed"]))
    finally:
        report.undo()
    triples = zip(errors(family, found), stock_errors(family, dtype), ALLOWANCE[dtype], strict=True)
    for error, stock_error, allowance in triples:
        assert error <= 1.25 * stock_error + allowance


@cases([ALONE, PAIRS, [DEFAULT, ALL]], ["towers and PLE frozen"])
def test_generation_gives_the_same_tokens(
    choice: tuple[str, ...], family: str, trained: str
) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for kind in ("image and video",) if choice in PAIRS else PROMPTS:
        model = model_of(family, torch.float32, trained).eval()
        inputs = batch(model, *PROMPTS[kind])
        del inputs["labels"]
        expected = generated(family, kind, model, inputs, options)
        report = patches.apply(model, choice)
        try:
            assert torch.equal(model.generate(**inputs, **options), expected), kind
        finally:
            report.undo()
            model.train()


PROMPTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "text": ((0,), ()),
    "one image": ((1,), ()),
    "image and video": ((1,), (1,)),
}
_GENERATED: dict[tuple[str, str], torch.Tensor] = {}


def generated(
    family: str, kind: str, model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]
) -> torch.Tensor:
    if (family, kind) not in _GENERATED:
        _GENERATED[family, kind] = model.generate(**inputs, **options)
    return _GENERATED[family, kind]
