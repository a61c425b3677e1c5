"""What a patched model must survive: accelerate, adapters, and a save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gemma4_zoo import (
    batch,
    brings_its_loss,
    build,
    cast,
    exact_float64,
    loss_and_gradients,
    relative_error,
)

from gemtune import patches

FROZEN = ("vision_tower", "embed_tokens_per_layer")
CHOICES = [*[(name,) for name in patches.available()], patches.available()]
EACH = pytest.mark.parametrize(
    "choice", CHOICES, ids=lambda choice: "all" if len(choice) > 1 else choice[0]
)


def model_of(choice: tuple[str, ...]) -> tuple[Any, patches.PatchReport]:
    """An E2B that every Gemma 4 patch applies to, patched."""
    model = build("e2b", frozen=FROZEN)
    return model, patches.apply(model, choice)


def results(model: Any, choice: tuple[str, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Where the loss is left to transformers, it is computed from the logits."""
    inputs = batch(build("e2b"))
    with exact_float64():
        return loss_and_gradients(model, inputs, reference=not brings_its_loss(choice, "e2b"))


def assert_same(
    found: tuple[torch.Tensor, dict[str, torch.Tensor]],
    expected: tuple[torch.Tensor, dict[str, torch.Tensor]],
) -> None:
    assert relative_error(found[0], expected[0]) < 1e-10
    assert found[1].keys() == expected[1].keys()
    assert found[1]
    for name, gradient in expected[1].items():
        assert relative_error(found[1][name], gradient) < 1e-10, name


@EACH
def test_accelerate_prepares_and_unwraps_it(choice: tuple[str, ...]) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    expected = results(build("e2b", frozen=FROZEN), ())
    model, report = model_of(choice)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    assert_same(results(prepared, choice), expected)
    accelerator.unwrap_model(prepared)
    report.undo()
    assert_same(results(model, ()), expected)


@EACH
def test_adapters_of_the_language_model_learn_the_same(choice: tuple[str, ...]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def adapted(model: Any) -> Any:
        torch.manual_seed(1)
        targets = r".*language_model\.layers.*\.(q_proj|up_proj|down_proj)"
        # Without init_lora_weights=False half of the adapters would have no gradient yet.
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        # Not .double(): it would widen the RoPE frequencies too, which transformers 5.5 cannot use.
        return cast(peft.get_peft_model(model, config), torch.float64)

    expected = results(adapted(build("e2b", frozen=FROZEN)), ())
    assert_same(results(adapted(model_of(choice)[0]), choice), expected)


@EACH
def test_it_is_saved_and_read_again(choice: tuple[str, ...], tmp_path: Path) -> None:
    model, _ = model_of(choice)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path, dtype=torch.float64).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
