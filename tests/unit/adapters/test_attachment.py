"""Gradients of every adapter beside those of the merged weights, and merging."""

from __future__ import annotations

import math

import pytest
import torch
from gemma4_zoo import batch, build, exact_float64, loss_and_gradients, relative_error

from gemtune import patches
from gemtune.adapters import Adapter, Dora, Lora, RsLora, attach, merge
from gemtune.errors import ConfigError

# Part -> a family that has it, and the layers of each LoRA that it makes there.
PARTS = {
    "language": ("e2b", False),
    "vision": ("e2b", False),
    "projector": ("e2b", True),
    "audio": ("e2b", True),
    "experts": ("26b_a4b_all_experts", False),
    "embeddings": ("e2b", False),
}


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """With an adapter that does something; DoRA's magnitudes stay, they are not around zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" in name and "magnitude" not in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters of an adapted model under the names of the plain one."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("part", PARTS)
def test_gradients_are_those_of_the_weights_that_they_make(part: str, patched: bool) -> None:
    """W + s B A has the gradient G: then A has s B^T G, and B has s G A^T."""
    family, hears = PARTS[part]
    rank, alpha = 3, 12.0
    base = build(family, hears=hears)
    inputs = batch(base, audios_per_row=(1, 1, 0) if hears else ())
    if patched:
        patches.apply(base)
    model = moved(attach(base, Lora(rank=rank, alpha=alpha, parts=[part])))
    with exact_float64():
        loss, _ = loss_and_gradients(model, inputs)
    found = {n: (p.detach().clone(), p.grad) for n, p in named(model).items() if p.requires_grad}
    assert all(gradient is not None for _, gradient in found.values())

    plain = merge(model)
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    with exact_float64():
        merged_loss, weights = loss_and_gradients(plain, inputs)
    assert relative_error(merged_loss, loss) < 1e-12
    compared = 0
    for name, (first, of_first) in found.items():
        kind = "lora_embedding_A" if "lora_embedding_A" in name else "lora_A"
        if f".{kind}" not in name:
            continue
        second, of_second = found[name.replace("_A", "_B")]
        path = name.partition(f".{kind}")[0]
        scale = alpha / rank
        if part == "experts":
            nested = path.endswith(".base_layer")  # the wrapper of one parameter is in the other's
            path = path.removesuffix(".base_layer")
            weight = f"{path}.{'gate_up_proj' if nested else 'down_proj'}"
            gradient = weights[weight]
            num_experts = len(gradient)
            # [E, out, in]; A is [E r, in], B [out, r E].
            a = first.reshape(num_experts, rank, -1)
            b = second.reshape(second.shape[0], rank, num_experts).permute(2, 0, 1)
            expected_a = scale * torch.einsum("eor,eoi->eri", b, gradient).reshape_as(first)
            expected_b = scale * torch.einsum("eoi,eri->eor", gradient, a)
            expected_b = expected_b.permute(1, 2, 0).reshape_as(second)
        else:
            gradient = weights[f"{path}.weight"]
            gradient = gradient.T if part == "embeddings" else gradient
            expected_a, expected_b = scale * second.T @ gradient, scale * gradient @ first.T
        assert relative_error(of_first, expected_a) < 1e-10, name
        assert relative_error(of_second, expected_b) < 1e-10, name
        compared += 1
    assert compared >= 1


@pytest.mark.parametrize(
    ("adapter", "family"),
    [
        (Lora(rank=4), "e2b"),
        (Lora(rank=4, parts=["embeddings", "language"]), "e2b"),
        (Lora(rank=4, parts=["experts", "language", "vision"]), "26b_a4b"),
        (RsLora(rank=4, parts=["language", "projector"]), "31b"),
        (Dora(rank=4, parts=["language", "vision"]), "e4b"),
        (Lora(rank=4, also_train=["norms", "ple_projection"]), "e2b"),
    ],
    ids=["lora", "embeddings", "experts", "rslora", "dora", "also"],
)
def test_merging_gives_the_same_logits_without_the_adapter(adapter: Lora, family: str) -> None:
    base = build(family)
    inputs = batch(base)
    del inputs["labels"]
    keys = list(base.state_dict())
    before = base.eval()(**inputs).logits
    model = moved(attach(base, adapter)).eval()
    adapted = model(**inputs).logits
    assert relative_error(adapted, before) > 1e-3
    merged = merge(model)
    assert list(merged.state_dict()) == keys
    assert merged.lm_head.weight is merged.model.language_model.embed_tokens.weight
    assert relative_error(merged(**inputs).logits, adapted) < 1e-12


def test_scaling_of_rslora() -> None:
    model = attach(build("e2b"), RsLora(rank=9, alpha=6.0))
    layer = model.get_submodule("base_model.model.model.language_model.layers.0.mlp.up_proj")
    assert layer.scaling == {"default": 6.0 / math.sqrt(9)}


def test_ranks_of_parts() -> None:
    ranks = {"vision": 2, "experts": 3}
    adapter = Lora(rank=5, ranks=ranks, parts=["language", "vision", "experts"])
    model = attach(build("26b_a4b"), adapter)
    shapes = {n: tuple(p.shape) for n, p in named(model).items() if "lora_A" in n}
    vision = {shape[0] for name, shape in shapes.items() if "vision_tower" in name}
    experts = {shape[0] for name, shape in shapes.items() if ".experts." in name}
    rest = {s[0] for n, s in shapes.items() if "vision" not in n and ".experts." not in n}
    assert (vision, experts, rest) == ({2}, {4 * 3}, {5})


def test_what_is_trained_beside_the_adapter() -> None:
    adapter = Lora(rank=2, also_train=["router", "norms"])
    model = attach(build("26b_a4b"), adapter)
    trained = [n for n, p in named(model).items() if p.requires_grad and "lora_" not in n]
    layers = "model.language_model.layers."
    assert all(name.startswith(layers) for name in trained)
    assert {n.split(".")[4] for n in trained if "norm" not in n} == {"router"}
    assert f"{layers}0.self_attn.q_norm.weight" in trained
    assert f"{layers}0.post_feedforward_layernorm_1.weight" in trained


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


def test_no_adapter_is_the_model_itself() -> None:
    model = build("e2b")
    assert attach(model, Adapter()) is model
    assert merge(model) is model


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (Lora, {"rank": 0}, r"adapter\.rank=0"),
        (Lora, {"parts": []}, r"adapter\.parts is empty"),
        (Lora, {"parts": ["heads"]}, r"adapter\.parts=heads is not one of"),
        (Lora, {"parts": ["vison"]}, "Did you mean 'vision'"),
        (Lora, {"ranks": {"vision": 0}, "parts": ["vision"]}, r"adapter\.ranks\.vision=0"),
        (Lora, {"ranks": {"vision": 4}}, r"vision is not among adapter\.parts=\[language\]"),
        (Lora, {"dropout": 0.1, "parts": ["experts"]}, r"adapter\.dropout=0\.1 is not possible"),
        (Lora, {"also_train": ["ple"]}, r"adapter\.also_train=ple is not one of"),
        (Dora, {"parts": ["experts"]}, r"adapter=dora has no form for adapter\.parts=experts"),
        (Dora, {"parts": ["embeddings"]}, "adapter=dora has no form"),
    ],
)
def test_what_cannot_be(kind: type[Lora], options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        kind(**options)
