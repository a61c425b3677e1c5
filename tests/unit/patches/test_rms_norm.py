"""RMSNorm against its formula in float64, and against stock transformers bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gemma4_zoo import batch, build, config_of, loss_and_gradients, relative_error
from kept_bytes import kept_bytes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import Gemma4ForConditionalGeneration
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches.rms_norm import RmsNorm, _has_fused_kernel, rms_norm

EPS = 1e-6
DIM = 16
LOW = (torch.float32, torch.bfloat16, torch.float16)


def formula(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    normed = x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)
    return normed if weight is None else normed * weight


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes: small ones feel eps, and their gradients are large."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator, dtype=torch.float64)
    return rows * 10 ** torch.randint(-4, 3, (*shape[:-1], 1), generator=generator)


def derivatives(
    function: Any, x: torch.Tensor, weight: torch.Tensor | None, grad: torch.Tensor
) -> list[torch.Tensor]:
    """Value, gradient of x, and of the weight where there is one."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, weight) if t is not None]
    value = function(inputs[0], inputs[1] if weight is not None else None)
    return [value.detach(), *torch.autograd.grad(value, inputs, grad)]


def norm(dtype: torch.dtype, *, with_scale: bool = True, patched: bool = True) -> nn.Module:
    module = Gemma4RMSNorm(DIM, eps=EPS, with_scale=with_scale)
    if with_scale:
        with torch.no_grad():
            module.weight.copy_(random(1, DIM, seed=3)[0].sign() * 1.5)
    if patched:
        patches.apply(module, [RmsNorm()])
    return module.to(dtype)


@pytest.mark.parametrize(
    "shape", [(DIM,), (7, DIM), (2, 5, DIM), (2, 3, 4, DIM), (0, DIM)], ids=str
)
@pytest.mark.parametrize("with_scale", [True, False], ids=["weight", "no weight"])
def test_float64_value_and_gradients_are_those_of_the_formula(
    shape: tuple[int, ...], with_scale: bool
) -> None:
    x, grad = random(*shape), random(*shape, seed=1)
    weight = random(1, DIM, seed=2)[0] if with_scale else None
    found = derivatives(lambda x, w: rms_norm(x, w, EPS), x, weight, grad)
    expected = derivatives(formula, x, weight, grad)
    assert len(found) == len(expected) == 2 + with_scale
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("with_scale", [True, False], ids=["weight", "no weight"])
def test_the_forward_has_the_bits_of_the_stock_one(dtype: torch.dtype, with_scale: bool) -> None:
    x = random(3, 5, 2, DIM).to(dtype)
    stock = norm(dtype, with_scale=with_scale, patched=False)
    patched = norm(dtype, with_scale=with_scale)
    assert torch.equal(patched(x), stock(x))
    assert patched(x).dtype == dtype
    with torch.no_grad():
        assert torch.equal(patched(x), stock(x))
    with torch.inference_mode():
        assert torch.equal(patched(x), stock(x))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_gradients_are_as_near_to_float64_as_the_stock_ones(dtype: torch.dtype) -> None:
    x = random(64, DIM).to(dtype)
    weight = norm(torch.float64).weight.detach().to(dtype)
    grad = random(64, DIM, seed=1).clamp(-50, 50).to(dtype)
    exact = derivatives(formula, x.double(), weight.double(), grad.double())

    module = norm(dtype, patched=False)

    def stock(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional_call(module, {"weight": w}, (x,))

    found = derivatives(lambda x, w: rms_norm(x, w, EPS), x, weight, grad)
    expected = derivatives(stock, x, weight, grad)
    bound = torch.finfo(dtype).eps / 8
    for value, stock_value, reference in zip(found, expected, exact, strict=True):
        assert value.dtype == dtype
        error = relative_error(value, reference)
        assert error <= relative_error(stock_value, reference) + bound


def test_what_is_not_contiguous_gives_the_same() -> None:
    x = random(4, 3, DIM, 2)[..., 0].transpose(0, 1)
    grad = random(DIM, 4, 3, seed=1).permute(2, 1, 0)
    weight = random(2, DIM)[:, ::2].flatten()
    assert not x.is_contiguous() and not grad.is_contiguous()
    x.requires_grad_()
    found = [rms_norm(x, weight, EPS), *torch.autograd.grad(rms_norm(x, weight, EPS), x, grad)]
    expected = derivatives(formula, x, weight, grad)
    for value, reference in zip(found, expected, strict=False):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        derivatives(lambda x, w: rms_norm(x, w, EPS), x, weight, grad)[2], expected[2]
    )


def test_a_float32_weight_over_bfloat16_activations_keeps_both_dtypes() -> None:
    # What autocast makes of float32 weights.
    x, weight = random(32, DIM).bfloat16(), random(1, DIM, seed=2)[0].float()
    grad = random(32, DIM, seed=1).bfloat16()
    exact = derivatives(formula, x.double(), weight.double(), grad.double())
    found = derivatives(lambda x, w: rms_norm(x, w, EPS), x, weight, grad)
    assert [value.dtype for value in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert relative_error(found[0], exact[0]) < 3e-3
    assert relative_error(found[1], exact[1]) < 3e-3
    assert relative_error(found[2], exact[2]) < 1e-6


@pytest.mark.parametrize("dtype", LOW[:2], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_it_keeps_its_input_and_one_number_a_row(dtype: torch.dtype, trained: bool) -> None:
    num_rows, size = 100, dtype.itemsize
    base = random(num_rows, DIM).to(dtype).requires_grad_()
    kept = {}
    for patched in (False, True):
        module = norm(dtype, patched=patched).requires_grad_(trained)
        # The input is an intermediate result that nobody else keeps.
        _, kept[patched] = kept_bytes(lambda module=module: module(base * 1))
    assert kept[True] == num_rows * (DIM * size + 4)
    # Stock: the float32 input, the normalised one, mean of squares and 1/rms, the float32 weight.
    weight_copy = DIM * 4 if dtype != torch.float32 else 0
    assert kept[False] == num_rows * (DIM * (8 if trained else 4) + 8) + weight_copy


def test_it_keeps_nothing_without_gradients() -> None:
    x, module = random(10, DIM), norm(torch.float64)
    with torch.no_grad():
        assert kept_bytes(lambda: module(x))[1] == 0
    module.requires_grad_(False)
    assert kept_bytes(lambda: module(x))[1] == 0


@pytest.mark.parametrize("asked", ["x", "weight"])
def test_each_gradient_comes_alone_too(asked: str) -> None:
    x, weight, grad = random(6, DIM), random(1, DIM, seed=2)[0], random(6, DIM, seed=1)
    (x if asked == "x" else weight).requires_grad_()
    rms_norm(x, weight, EPS).backward(grad)
    expected = derivatives(formula, x, weight, grad)
    assert (x.grad is None, weight.grad is None) == (asked != "x", asked == "x")
    found, reference = (x.grad, expected[1]) if asked == "x" else (weight.grad, expected[2])
    torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused() -> None:
    x = random(3, DIM).requires_grad_()
    with pytest.raises(RuntimeError, match="rms_norm has no second derivative"):
        torch.autograd.grad(rms_norm(x, None, EPS).sum(), x, create_graph=True)


def test_an_input_changed_in_place_is_noticed() -> None:
    x = random(3, DIM).requires_grad_() * 1
    y = rms_norm(x, None, EPS)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_output_may_be_changed_in_place() -> None:
    # The audio tower scales it, and adds the residual to it.
    x = random(3, DIM).requires_grad_()
    y = rms_norm(x, None, EPS)
    y *= 3
    y += 1
    expected = derivatives(lambda x, w: 3 * formula(x, w), x, None, torch.ones_like(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected[1])


def test_checkpointing_gives_the_same_gradients() -> None:
    module = norm(torch.float64)
    x = random(6, DIM).requires_grad_()
    inputs = (x, module.weight)
    plain = torch.autograd.grad(module(x).sin().sum(), inputs)
    y = checkpoint(lambda x: module(x).sin(), x, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), inputs), plain))


def test_it_compiles_without_a_graph_break() -> None:
    module = norm(torch.float32)
    x = random(6, DIM).float().requires_grad_()
    compiled = torch.compile(module.forward, fullgraph=True, backend="aot_eager")
    inputs = (x, module.weight)
    expected = torch.autograd.grad(module(x).sin().sum(), inputs)
    found = torch.autograd.grad(compiled(x).sin().sum(), inputs)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_torchs_kernel_is_used_where_it_keeps_the_dtype(autocast: bool) -> None:
    # Tensors without values: this says what would run on CUDA, on a machine without it.
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", autocast)
    try:
        with FakeTensorMode():

            def fused(x: torch.dtype, weight: torch.dtype | None, device: str = "cuda") -> bool:
                w = None if weight is None else torch.empty(DIM, dtype=weight, device=device)
                return _has_fused_kernel(torch.empty(2, DIM, dtype=x, device=device), w)

            assert fused(fp32, fp32) and fused(fp32, None) and fused(fp64, fp64)
            assert fused(bf16, bf16) == fused(bf16, None) == (not autocast)
            assert not fused(bf16, fp32) and not fused(fp32, bf16)
            assert not fused(fp32, fp32, "cpu") and not fused(bf16, None, "cpu")
    finally:
        torch.set_autocast_enabled("cuda", before)


def test_autocast_over_float32_weights_is_as_near_to_float64_as_stock() -> None:
    model = build("e2b")
    inputs = batch(model)
    exact, _ = loss_and_gradients(model, inputs, reference=True)
    model = model.float()
    found = {}
    for patched in (False, True):
        twin = copy.deepcopy(model)
        if patched:
            patches.apply(twin, [RmsNorm()])
        with torch.autocast("cpu", torch.bfloat16):
            loss, gradients = loss_and_gradients(twin, inputs)
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        found[patched] = loss
    stock_error = relative_error(found[False], exact)
    assert relative_error(found[True], exact) <= stock_error + 1e-6


def test_every_norm_of_the_model_is_patched() -> None:
    model = build("e2b")
    report = patches.apply(model, [RmsNorm()])
    norms = {n for n, m in model.named_modules() if isinstance(m, Gemma4RMSNorm)}
    assert set(report.rows[0].sites) == norms
    assert {n.split(".")[1] for n in norms} == {"language_model", "vision_tower", "embed_vision"}
    assert any(n.endswith("v_norm") for n in norms)


def test_the_norms_of_the_audio_tower_are_patched_too() -> None:
    from transformers import Gemma4AudioConfig

    config = config_of("e2b")
    config.audio_config = Gemma4AudioConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, output_proj_dims=32
    )
    with torch.device("meta"):
        model = Gemma4ForConditionalGeneration(config)
    sites = [change.site for change in RmsNorm().plan(model).changes]
    assert any("audio_tower" in site and site.endswith("norm_out") for site in sites)


def test_an_unknown_norm_is_refused() -> None:
    class Unknown(nn.Module):
        with_scale = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._norm(x) * (1 + self.weight)

        def _norm(self, x: torch.Tensor) -> torch.Tensor:
            return x

    Unknown.__name__ = "Gemma4RMSNorm"
    with pytest.raises(PatchError, match=r"rms_norm: .*not one of the versions"):
        RmsNorm().plan(Unknown())


def test_not_applicable_without_a_norm() -> None:
    plan = RmsNorm().plan(nn.Linear(2, 2))
    assert plan.status == "not applicable"
    assert "Gemma4RMSNorm" in plan.reason
