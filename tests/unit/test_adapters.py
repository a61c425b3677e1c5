"""LoRA targets by part, and merging."""

from __future__ import annotations

import pytest
import torch
from gemma4_zoo import batch, build, loss_and_gradients, relative_error

from gemtune import patches
from gemtune.adapters import Adapter, Lora, attach, lora_targets, merge
from gemtune.errors import ConfigError


def test_language_targets_are_the_decoder_layers_and_nothing_else() -> None:
    targets = lora_targets(build("e2b"), ["language"])
    assert all(name.startswith("model.language_model.layers.") for name in targets)
    kinds = {name.rpartition(".")[2] for name in targets}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_vision_targets_are_the_inner_linears_of_clipped_layers() -> None:
    targets = lora_targets(build("e2b"), ["vision"])
    assert targets
    assert all(name.endswith(".linear") for name in targets)
    assert all(name.startswith("model.vision_tower.encoder.") for name in targets)


def test_a_part_that_matches_nothing_is_an_error() -> None:
    model = build("e2b")
    model.model.vision_tower = None
    with pytest.raises(ConfigError, match="'vision', but this model has no such layers"):
        lora_targets(model, ["vision"])
    with pytest.raises(ConfigError, match=r"adapter\.parts=experts is not one of"):
        Lora(parts=["experts"])


def test_only_the_adapter_is_trained_and_gradients_pass_the_patches() -> None:
    base = build("e2b")
    inputs = batch(base)
    patches.apply(base)
    model = attach(base, Lora(rank=4, parts=["language", "vision"]))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    _, gradients = loss_and_gradients(model, inputs)
    assert gradients.keys() == trainable


def test_merging_gives_the_same_logits_without_the_adapter() -> None:
    base = build("e2b")
    inputs = batch(base)
    del inputs["labels"]
    keys = list(base.state_dict())
    model = attach(base, Lora(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.eval()
    adapted = model(**inputs).logits
    merged = merge(model)
    assert list(merged.state_dict()) == keys
    assert relative_error(merged(**inputs).logits, adapted) < 1e-12


def test_no_adapter_is_the_model_itself() -> None:
    model = build("e2b")
    assert attach(model, Adapter()) is model
    assert merge(model) is model
