"""int4: half a byte for a value, the products and gradients of the values, and groups that fit."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gemma4_zoo import build, config_of, relative_error
from kept_bytes import Alive, kept_bytes
from quantized import CPU, INT4, OF_TORCHAO
from torch import nn
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

import gemtune
from gemtune import adapters
from gemtune.adapters import Qlora
from gemtune.adapters.int4_groups import GROUP
from gemtune.adapters.quantization import dequantized, quantize, stored_bytes
from gemtune.checkpoint import base_identity
from gemtune.errors import ConfigError

NAME = "model.language_model.layers.0.mlp.down_proj"
WITH_TORCHAO = pytest.mark.parametrize("kind", [INT4])


def quantized_linear(
    kind: str, outputs: int, inputs: int, dtype: torch.dtype = torch.float32
) -> nn.Linear:
    """One of a small model, with a random weight of this size and a bias."""
    torch.manual_seed(0)
    model = build("e2b", dtype)
    model.set_submodule(NAME, nn.Linear(inputs, outputs).to(dtype).requires_grad_(False))
    quantize(model, kind, CPU)
    found = model.get_submodule(NAME)
    assert isinstance(found, nn.Linear)
    return found


@WITH_TORCHAO
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_values_are_in_a_byte_and_a_scale_and_a_zero_point_in_a_group(
    kind: str, dtype: torch.dtype
) -> None:
    linear = quantized_linear(kind, 5, 3 * GROUP, dtype)
    codes, scale, zero_point = linear.weight.codes, linear.weight.scale, linear.weight.zero_point
    assert (codes.shape, codes.dtype) == ((5, 3 * GROUP // 2), torch.uint8)
    assert (scale.shape, scale.dtype) == ((5, 3), dtype)
    assert (zero_point.shape, zero_point.dtype) == ((5, 3), torch.uint8)
    assert stored_bytes(linear.weight) == 5 * (96 + 3 * (dtype.itemsize + 1))
    assert (linear.weight.shape, linear.weight.dtype) == ((5, 3 * GROUP), dtype)
    # By hand: the even column is the low half.
    for row, column in ((0, 0), (2, 77), (4, 191)):
        code = int(codes[row, column // 2]) >> 4 * (column % 2) & 15
        group = column // GROUP
        value = (code - int(zero_point[row, group])) * scale[row, group]
        assert dequantized(linear)[row, column] == value


@WITH_TORCHAO
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_is_further_off_than_half_a_step(kind: str, dtype: torch.dtype) -> None:
    from gemtune.adapters.int4_weight import Int4Weight

    torch.manual_seed(1)
    weight = torch.randn(64, 4 * GROUP).to(dtype)
    weight[0] = 0
    weight[1] = weight[1].abs()  # zero stays a code
    weight[2, :GROUP] = 3.0
    found = Int4Weight.of(weight).dequantize()
    groups = weight.double().reshape(64, 4, GROUP)
    step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
    off = (found.double().reshape_as(groups) - groups).abs().amax(-1)
    # A scale in bfloat16, and a value of it, are off by 2^-9 of themselves at most.
    rounding = 1e-5 if dtype == torch.float32 else 15 * 2**-8
    assert (off <= (0.5 + rounding) * step).all()
    assert found[0].abs().max() == 0
    assert torch.equal(found[2, :GROUP], torch.full((GROUP,), 3.0, dtype=dtype))


@OF_TORCHAO
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_a_plain_linear_of_its_values(
    kind: str, dtype: torch.dtype
) -> None:
    linear = quantized_linear(kind, 96, 2 * GROUP, dtype)
    plain = nn.Linear(2 * GROUP, 96, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(dequantized(linear))
        plain.bias.copy_(linear.bias)
    inputs = torch.randn(3, 7, 2 * GROUP, dtype=dtype, requires_grad=True)
    same = inputs.detach().double().requires_grad_()
    product, expected = linear(inputs), plain(same)
    upstream = torch.randn_like(product)
    product.backward(upstream)
    expected.backward(upstream.double())
    bound = 1e-6 if dtype == torch.float32 else 8e-3
    assert relative_error(product, expected) < bound
    assert relative_error(inputs.grad, same.grad) < bound
    if kind == "int4":  # torchao's own product of int8 multiplies by its scales afterwards
        stock = F.linear(inputs, dequantized(linear)) + linear.bias
        assert torch.equal(product, stock)


@OF_TORCHAO
def test_no_16_bit_weight_waits_for_the_backward_pass(kind: str) -> None:
    linear = quantized_linear(kind, 512, 8 * GROUP, torch.bfloat16)
    inputs = torch.randn(4, 8 * GROUP, dtype=torch.bfloat16, requires_grad=True)
    product, kept = kept_bytes(lambda: linear(inputs))
    assert product.requires_grad and kept <= product.nbytes + 1024
    # The same without this module's product is what would be kept.
    _, would_be = kept_bytes(lambda: F.linear(inputs, dequantized(linear)))
    assert would_be >= 2 * 512 * 8 * GROUP


@WITH_TORCHAO
def test_values_come_back_in_pieces_whose_number_changes_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = quantized_linear(kind, 100, 4 * GROUP, torch.bfloat16)
    with Alive() as at_once:
        whole = dequantized(linear)
    monkeypatch.setattr("gemtune.adapters.int4_weight._VALUES_AT_ONCE", 7 * 4 * GROUP)
    with Alive() as in_pieces:
        pieces = dequantized(linear)
    assert torch.equal(whole, pieces)
    assert in_pieces.peak < 1.4 * whole.nbytes < at_once.peak


@WITH_TORCHAO
def test_the_bits_survive_copies_moves_and_casts(kind: str) -> None:
    model = build("e2b", torch.bfloat16).requires_grad_(False)
    quantize(model, kind, CPU)
    values, identity = dequantized(model.get_submodule(NAME)), base_identity(model)
    copied = copy.deepcopy(model)
    assert base_identity(copied) == identity == base_identity(copied.to(CPU))
    assert torch.equal(dequantized(copied.get_submodule(NAME)), values)
    copied.get_submodule(NAME).weight.scale[0, 0] *= 2
    assert torch.equal(dequantized(model.get_submodule(NAME)), values), "shares memory"
    assert torch.equal(dequantized(model.float().get_submodule(NAME)), values)


@WITH_TORCHAO
@pytest.mark.parametrize("part", ["codes", "scale"])
def test_another_base_is_another_identity(kind: str, part: str) -> None:
    found = []
    for change in (0, 1):
        model = build("e2b", torch.float32).requires_grad_(False)
        quantize(model, kind, CPU)
        getattr(model.get_submodule(NAME).weight, part).view(-1)[0] += change
        found.append(base_identity(model))
    assert found[0] != found[1]


@WITH_TORCHAO
def test_peft_takes_it_without_a_word(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapters.attach(build("e2b", torch.bfloat16), Qlora(rank=2, quantization=kind))
    adapted = model.base_model.model.get_submodule(NAME)
    assert stored_bytes(adapted.base_layer.weight) > 0 and "default" in adapted.lora_A


@pytest.mark.parametrize("on_meta", [False, True])
def test_inputs_that_are_no_whole_groups_are_refused_by_name(on_meta: bool) -> None:
    """As a plan has it, too; and without the library."""
    config = config_of("e2b")
    config.text_config.intermediate_size = GROUP + 32
    with torch.device("meta" if on_meta else "cpu"):
        model = Gemma4ForConditionalGeneration(config)
    said = r"quantization=int4: \S+\.mlp\.down_proj has 96 inputs, .* groups of 64\. Use .*nf4"
    with pytest.raises(ConfigError, match=said):
        quantize(model, "int4", CPU)


@pytest.mark.parametrize("size", ["e2b", "e4b", "26b-a4b", "31b"])
def test_every_linear_layer_of_every_gemma_has_whole_groups(size: str) -> None:
    file = Path(gemtune.__file__).parent / "assets" / "configs" / f"gemma-4-{size}.json"
    config = Gemma4Config.from_dict(json.loads(file.read_text()))
    with torch.device("meta"):
        model = Gemma4ForConditionalGeneration(config)
    before = sum(linear.weight.numel() for _, linear in language_linears(model))
    quantize(model, "int4", CPU)
    bits = 8 * sum(linear.weight.nbytes for _, linear in language_linears(model)) / before
    assert bits == 4.375  # a scale of 16 bits and a zero point of 8 for 64 values


def language_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    (targets,) = adapters.find_targets(model, ["language"])
    return [(name, model.get_submodule(name)) for name in targets.modules]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@WITH_TORCHAO
def test_a_gpu_makes_the_same_bits_and_values(kind: str) -> None:
    """So that a checkpoint of a GPU is exported on a CPU: its hashes are of these bits."""
    from gemtune.adapters.int4_weight import Int4Weight

    weight = torch.randn(256, 8 * GROUP, dtype=torch.bfloat16)
    here, there = Int4Weight.of(weight), Int4Weight.of(weight.cuda())
    for name in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name)), name
    assert torch.equal(there.dequantize().cpu(), here.dequantize())
