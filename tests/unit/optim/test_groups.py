"""Which rate and which decay each parameter gets, by name, on models with and without adapters."""

from __future__ import annotations

import re

import pytest
import torch
from gemma4_zoo import build
from torch import nn

from gemtune import adapters
from gemtune.adapters import Dora, Lora
from gemtune.errors import ConfigError
from gemtune.optim import AdamW
from gemtune.optim.groups import set_learning_rate

EVERYWHERE = ["language", "embeddings", "vision", "projector"]


def by_name(model: nn.Module, settings: AdamW) -> dict[str, tuple[float, float]]:
    """Name -> (rate, decay) as the optimizer has them; every trained parameter once."""
    optimizer = settings.build(model)
    names = {id(p): n for n, p in model.named_parameters()}
    found = [
        (names[id(p)], (group["lr"], group["weight_decay"]))
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(trained) and dict(found).keys() == trained
    return dict(found)


@pytest.mark.parametrize("family", ["e2b", "26b_a4b"])
def test_norms_scales_embeddings_and_tables_do_not_decay(family: str) -> None:
    found = by_name(build(family, hears=family == "e2b"), AdamW(weight_decay=0.1))
    exempt = {re.sub(r"\.\d+\.", ".N.", name) for name, (_, decay) in found.items() if not decay}
    spared = r".*(norm\w*\.weight|scale|bias|embed_tokens(_per_layer)?\.weight|_embedding_table)"
    spared += r"|.*norm_(pre_attn|post_attn|out)\.weight"
    wrong = [name for name in exempt if not re.fullmatch(spared, name)]
    assert not wrong
    decaying = [name for name, (_, decay) in found.items() if decay]
    assert not [name for name in decaying if re.fullmatch(spared, name)]
    layer = "model.language_model.layers.0"
    assert f"{layer}.self_attn.q_proj.weight" in decaying
    assert "model.embed_vision.embedding_projection.weight" in decaying
    if family == "e2b":
        assert "model.language_model.embed_tokens_per_layer.weight" not in decaying
        assert f"{layer}.per_layer_projection.weight" in decaying
        assert "model.audio_tower.layers.0.lconv1d.depthwise_conv1d.weight" in decaying
    else:
        assert f"{layer}.experts.gate_up_proj" in decaying


@pytest.mark.parametrize("kind", [Lora, Dora])
def test_factors_decay_where_what_they_adapt_does(kind: type[Lora]) -> None:
    parts = EVERYWHERE if kind is Lora else ["language", "vision", "projector"]
    also = ["norms", "ple_projection"]
    model = adapters.attach(build("e2b"), kind(rank=2, parts=parts, also_train=also))
    found = by_name(model, AdamW(weight_decay=0.1))
    decays = {name: decay > 0 for name, (_, decay) in found.items()}
    kinds = ("lora_A", "lora_B", "lora_embedding", "lora_magnitude", "norm", "layer_projection.w")
    counts = {k: [d for name, d in decays.items() if k in name] for k in kinds}
    assert all(counts["lora_A"]) and all(counts["lora_B"]) and counts["lora_A"]
    assert len(counts["lora_embedding"]) == (2 if kind is Lora else 0)
    assert not any(counts["lora_embedding"]) and not any(counts["norm"]) and counts["norm"]
    assert not any(counts["lora_magnitude"]) and bool(counts["lora_magnitude"]) == (kind is Dora)
    assert all(counts["layer_projection.w"]) and counts["layer_projection.w"]


def test_parts_have_their_rates() -> None:
    rates = {"vision": 1e-5, "embeddings": 3e-5, "ple": 4e-5}
    found = by_name(build("e2b"), AdamW(lr=1e-3, part_lrs=rates, weight_decay=0.1))
    expected = {
        "model.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight": (1e-5, 0.1),
        "model.vision_tower.encoder.layers.0.input_layernorm.weight": (1e-5, 0.0),
        "model.language_model.embed_tokens.weight": (3e-5, 0.0),
        "model.language_model.embed_tokens_per_layer.weight": (4e-5, 0.0),
        "model.language_model.layers.0.mlp.up_proj.weight": (1e-3, 0.1),
        "model.embed_vision.embedding_projection.weight": (1e-3, 0.1),
    }
    assert {name: found[name] for name in expected} == expected


def test_what_an_adapter_adds_counts_to_its_part() -> None:
    model = adapters.attach(build("e2b"), Lora(rank=2, parts=EVERYWHERE))
    rates = {"vision": 1e-5, "embeddings": 3e-5, "projector": 5e-5}
    found = by_name(model, AdamW(lr=1e-3, part_lrs=rates))
    for name, (rate, _) in found.items():
        where = {"vision_tower": 1e-5, "embed_tokens": 3e-5, "embed_vision": 5e-5}
        expected = next((r for word, r in where.items() if word in name), 1e-3)
        assert rate == expected, name
    assert {rate for rate, _ in found.values()} == {1e-5, 3e-5, 5e-5, 1e-3}


def test_the_schedule_applies_to_each_rate() -> None:
    model = build("e2b", dtype=torch.float32)
    optimizer = AdamW(lr=1e-3, part_lrs={"vision": 1e-5}).build(model)
    set_learning_rate(optimizer.param_groups, 0.5e-3)
    found = sorted({group["lr"] for group in optimizer.param_groups})
    assert found == [pytest.approx(0.5e-5), 0.5e-3]
    # The first step of AdamW moves every weight by its rate.
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        expected = 0.5e-5 if "vision_tower" in name else 0.5e-3
        moved = (before[name].double() - p.detach().double()).abs().mean().item()
        assert moved == pytest.approx(expected, rel=0.02), name


def test_a_rate_for_nothing_is_refused() -> None:
    model = adapters.attach(build("e2b"), Lora(rank=2))
    with pytest.raises(ConfigError, match=r"lrs\.vision=1e-05: nothing of 'vision' is trained"):
        AdamW(part_lrs={"vision": 1e-5}).build(model)
    with pytest.raises(ConfigError, match=r"optim\.part_lrs=visoin .*Did you mean 'vision'"):
        AdamW(part_lrs={"visoin": 1e-5})
    with pytest.raises(ConfigError, match=r"optim\.part_lrs\.vision=0"):
        AdamW(part_lrs={"vision": 0})
