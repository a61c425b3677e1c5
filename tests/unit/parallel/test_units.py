"""Units are read off the modules there are."""

from __future__ import annotations

import gemma4_zoo as zoo
import pytest
import torch
from torch import nn

from gemtune import adapters
from gemtune.adapters import Lora
from gemtune.errors import ModelError
from gemtune.parallel.units import find_units

LAYERS = [f"model.language_model.layers.{i}" for i in range(6)]
TOWER = [f"model.vision_tower.encoder.layers.{i}" for i in range(3)]
TABLE = "model.language_model.embed_tokens_per_layer"


def test_layers_towers_and_the_table() -> None:
    units = find_units(zoo.build("e2b"))
    assert sorted(units.modules) == sorted([*LAYERS, *TOWER, TABLE])
    assert not units.replicated


def test_experts_stay_with_their_layer() -> None:
    assert sorted(find_units(zoo.build("26b_a4b")).modules) == sorted([*LAYERS, *TOWER])


def test_a_frozen_tower_is_replicated_and_a_frozen_table_is_not() -> None:
    model = zoo.build("e2b", frozen=("vision_tower", "embed_tokens_per_layer"))
    units = find_units(model)
    assert sorted(units.modules) == sorted([*LAYERS, TABLE])
    tower = {n for n, _ in model.named_parameters() if n.startswith("model.vision_tower.")}
    assert tower and units.replicated == tower and not units.on_host


def test_what_stays_on_the_host_is_replicated() -> None:
    model = zoo.build("e2b", frozen=("embed_tokens_per_layer",))
    units = find_units(model, [f"{TABLE}.weight"])
    assert sorted(units.modules) == sorted([*LAYERS, *TOWER])
    assert units.replicated == units.on_host == {f"{TABLE}.weight"}


def test_an_adapter_in_the_tower_makes_it_a_trained_one() -> None:
    for parts, towers in ((["language"], []), (["language", "vision"], TOWER)):
        model = zoo.build("e2b", torch.float32)
        adapters.attach(model, Lora(rank=2, parts=parts))
        assert sorted(find_units(model).modules) == sorted([*LAYERS, *towers, TABLE])


def test_a_weight_of_two_units_is_refused() -> None:
    model = zoo.build("e2b")
    layers = model.model.language_model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight .* shares its weight"):
        find_units(model)


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="parallel=ddp"):
        find_units(nn.Sequential(nn.Linear(2, 2)))
