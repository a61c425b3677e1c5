"""Frozen weights in few bits: which, how well, and what a run with them trains and writes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from gemma4_zoo import batch, build, config_of, loss_and_gradients, relative_error
from quantized import CPU, KINDS
from torch import nn
from transformers import Gemma4ForConditionalGeneration
from whole_runs import SMALL, TrainRun, compose, press_ctrl_c_after

from gemtune import adapters, patches
from gemtune.adapters import Lora, Qlora, quantization_row
from gemtune.adapters.quantization import (
    dequantized,
    is_quantized,
    quantize,
    quantized_linears,
    stored_bytes,
)
from gemtune.errors import ConfigError
from gemtune.models import base_model, load_model, load_processing, part_parameters
from gemtune.models.parts import num_values
from gemtune.planning.memory_plan import PlanConfig, largest_inputs, plan_memory
from gemtune.planning.step import follow_step
from gemtune.planning.storages import PARAMETERS, StorageFollower


@pytest.mark.parametrize(
    ("kind", "said"), [("nf4", "bitsandbytes"), ("int4", "torchao"), ("int8", "torchao")]
)
def test_without_its_library_it_is_refused_before_anything_is_read_or_written(
    kind: str, said: str, train_run: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ConfigError, match=rf"quantization={kind} needs {said}.*pip install 'gem"):
        train_run("adapter=qlora", f"adapter.quantization={kind}", "data.path=absent.jsonl")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"quantization=int3 is not one of nf4, int4, int8"):
        compose(*SMALL, "adapter=qlora", "adapter.quantization=int3")


def test_shares_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemtune.adapters.config.require_library", lambda kind: None)
    with pytest.raises(ConfigError, match=r"adapter=qlora cannot .*parallel=fsdp2.*parallel=ddp"):
        compose(*SMALL, "adapter=qlora", "parallel=fsdp2")


@KINDS
@pytest.mark.parametrize("family", ["e2b", "26b_a4b"])
def test_linear_weights_of_language_layers_and_nothing_else(kind: str, family: str) -> None:
    model = build(family, torch.bfloat16, hears=family == "e2b")
    before = part_parameters(model)
    plain = {n: p.detach().clone() for n, p in model.named_parameters()}
    quantize(model, kind, CPU)
    names = {f"{name}.weight" for name, _ in quantized_linears(model)}
    layers = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"
    assert names == {n for n in plain if re.fullmatch(layers + r"\.weight", n)}
    for name, parameter in model.named_parameters():
        assert is_quantized(parameter) == (name in names)
        if name not in names:
            assert torch.equal(parameter, plain[name]), name
    assert {part: total for part, (total, _) in part_parameters(model).items()} == {
        part: total for part, (total, _) in before.items()
    }
    row = quantization_row(model.requires_grad_(False))
    assert row.startswith(f"{len(names)} linear layers of the language part in ")
    assert ("experts, which stay in bfloat16" in row) == (family == "26b_a4b")


def nearest(values: torch.Tensor, kind: str) -> torch.Tensor:
    """NF4 of blocks of 64 (arXiv:2305.14314, appendix E); blocks of 64 in 15 whole steps from the
    least value to the greatest; or rows in whole steps of a 127th."""
    if kind == "int8":
        step = values.abs().amax(-1, keepdim=True) / 127.5
        return (values / step).round().clamp(-128, 127) * step
    if kind == "int4":
        blocks = values.reshape(-1, 64)
        least, most = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
        step = (most - least) / 15
        zero = (-least / step).round()
        return (((blocks / step).round() + zero).clamp(0, 15) - zero).mul(step).view_as(values)
    levels = "-1 -.69619 -.52507 -.39492 -.28444 -.18477 -.09105 0 .07958 .16093 .24611 .33792 "
    levels += ".44071 .56262 .72296 1"
    table = torch.tensor([float(level) for level in levels.split()], dtype=torch.float64)
    blocks = values.reshape(-1, 64)
    scale = blocks.abs().amax(-1, keepdim=True)
    chosen = (blocks / scale).unsqueeze(-1).sub(table).abs().argmin(-1)
    return (table[chosen] * scale).reshape(values.shape)


@KINDS
def test_values_are_the_nearest_that_the_bits_allow(kind: str) -> None:
    model = build("e2b", torch.float32)
    name = "model.language_model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight.detach().double()
    quantize(model, kind, CPU)
    linear = model.get_submodule(name)
    # Scales are rounded as well by bitsandbytes, to 8 bits.
    assert relative_error(dequantized(linear), nearest(weight, kind)) < 0.01
    lost = relative_error(dequantized(linear), weight)
    assert (0.002 < lost < 0.02) if kind == "int8" else (0.05 < lost < 0.15)
    bits = 8 * stored_bytes(linear.weight) / weight.numel()
    # Of 24,576 values in float32: scales of int4 take as many bits as the weight had.
    least, most = {"nf4": (4, 5.3), "int4": (4.62, 4.63), "int8": (8, 8.6)}[kind]
    assert least < bits < most


def same_without_quantisation(model: nn.Module) -> nn.Module:
    """A plain model of the same values."""
    plain = build("e2b", torch.float32)
    with torch.no_grad():
        for name, linear in quantized_linears(model):
            plain.get_submodule(name).weight.copy_(dequantized(linear))
    return plain


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_for_it_in_a_plan_is_as_large(kind: str, dtype: torch.dtype) -> None:
    model = build("e2b", dtype)
    quantize(model, kind, CPU)
    with torch.device("meta"):
        skeleton = Gemma4ForConditionalGeneration(config_of("e2b")).to(dtype)
    quantize(skeleton, kind, CPU)
    for name, linear in quantized_linears(model):
        stand_in = skeleton.get_submodule(name)
        assert stand_in.weight.nbytes == stored_bytes(linear.weight), name


@KINDS
def test_a_plan_counts_its_bits(kind: str) -> None:
    command = (*SMALL, "recipe=gemma4_lora", "model.dtype=bfloat16")
    lora = plan_memory(compose(*command), PlanConfig(device="cpu"))
    quantized = ("adapter=qlora", f"adapter.quantization={kind}")
    plan = plan_memory(compose(*command, *quantized), PlanConfig(device="cpu"))
    config = compose(*command, *quantized)
    base = load_model(config.model, load_processing(config.model), seed=0)
    quantize(base, kind, CPU)
    weights = [linear.weight for _, linear in quantized_linears(base)]
    saved = sum(2 * num_values(w) - stored_bytes(w) for w in weights)
    # Sizes are rounded up to 512 bytes each.
    planned = lora.step.parameters_bytes - plan.step.parameters_bytes
    assert planned == pytest.approx(saved, abs=512 * len(weights)) and saved > 100_000


@KINDS
def test_a_planned_step_is_the_step_that_is_made(kind: str) -> None:
    """Peaks: what the libraries hold within a product is estimated, by one weight in 16 bits."""
    command = (*SMALL, "recipe=gemma4_lora", "model.dtype=bfloat16", "loop.micro_batch_size=8")
    command += ("adapter=qlora", f"adapter.quantization={kind}", "data.max_length=64")
    config, plan = compose(*command), PlanConfig(device="cpu")
    planned = plan_memory(config, plan).step
    base = load_model(config.model, load_processing(config.model), seed=0)
    patches.apply(base, config.patches)
    model = adapters.attach(base, config.adapter)
    zeros = lambda shape, dtype: torch.zeros(shape, dtype=dtype)  # noqa: E731
    follower = StorageFollower()
    wrappers = [p for p in model.parameters() if hasattr(p, "__tensor_flatten__")]
    follower.leave_out(wrappers)  # they have no memory, and say that they have 16 bits
    follower.add((getattr(p, n) for p in wrappers for n in p.__tensor_flatten__()[0]), PARAMETERS)
    made = follow_step(
        follower,
        model,
        config.optim.build(model),
        largest_inputs(config, plan, load_processing(config.model), zeros)[1],
        loss_begins_after=base_model(base),
        max_grad_norm=config.loop.max_grad_norm,
    )
    for phase in ("forward", "backward"):
        difference = planned.peaks[phase].total_bytes - made.peaks[phase].total_bytes
        assert abs(difference) < 0.02 * made.peaks[phase].total_bytes, phase


@KINDS
@pytest.mark.parametrize("choice", ["stock", "patched"])
def test_loss_and_gradients_are_those_of_the_values_it_stands_for(kind: str, choice: str) -> None:
    found = []
    model = build("e2b", torch.float32)
    settings = Qlora(rank=4, quantization=kind, parts=["language", "vision"])
    quantized = build("e2b", torch.float32)
    quantize(quantized, kind, CPU)
    for base, adapter in (
        (model, settings),
        (same_without_quantisation(quantized), Lora(rank=4, parts=["language", "vision"])),
    ):
        if choice == "patched":
            patches.apply(base)
        torch.manual_seed(0)
        adapted = adapters.attach(base, adapter)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        found.append(loss_and_gradients(adapted, batch(model)))
    (loss, gradients), (expected, others) = found
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert gradients.keys() == others.keys() and len(gradients) > 50
    for name, gradient in gradients.items():
        assert relative_error(gradient, others[name]) < 2e-3, name


@KINDS
def test_merging_gives_the_plain_model_that_was_trained(kind: str) -> None:
    settings = Qlora(rank=4, quantization=kind, parts=["language", "vision", "embeddings"])
    base = build("e2b", torch.float32)
    names = set(base.state_dict())
    model = adapters.attach(base, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "embedding_A" in name:
                parameter.normal_(std=0.05)
    model.eval()
    inputs = {k: v for k, v in batch(base).items() if k != "labels"}
    with torch.no_grad():
        before = model(**inputs).logits
        plain = adapters.merge(model)
        after = plain(**inputs).logits
    assert type(plain) is Gemma4ForConditionalGeneration
    assert set(plain.state_dict()) == names
    assert all(type(p) is nn.Parameter for p in plain.parameters())
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    assert relative_error(after, before) < 1e-4


@KINDS
def test_a_run_goes_on_to_the_bit_and_writes_a_stock_model(
    kind: str,
    train_run: TrainRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    command = ("recipe=gemma4_lora", "adapter=qlora", f"adapter.quantization={kind}")
    command += ("model.dtype=bfloat16",)
    whole = train_run(*command, run_dir=tmp_path / "whole")
    assert f"{kind}: " in capsys.readouterr().out
    with monkeypatch.context() as patched:
        press_ctrl_c_after(patched, step=1)
        assert train_run(*command).status == 130
    resumed = train_run(*command)
    assert resumed.losses() == whole.losses()
    assert resumed.training_state() == whole.training_state()
    model = Gemma4ForConditionalGeneration.from_pretrained(resumed.path / "model")
    assert not hasattr(model.config, "quantization_config")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
