"""The patched MLP against stock transformers: the same bits, from fewer kept tensors."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gemma4_zoo import batch, build, config_of, loss_and_gradients
from kept_bytes import kept_bytes
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextMLP, Gemma4VisionMLP

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches.geglu import Geglu

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TOKENS = 24


def text_mlp(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    mlp = Gemma4TextMLP(config_of("e2b").text_config, layer_idx=0)
    return mlp.to(dtype)


def vision_mlp(dtype: torch.dtype = torch.float64, limit: float = 0.3) -> Any:
    """With clipped linears whose limits do clip."""
    torch.manual_seed(0)
    mlp = Gemma4VisionMLP(config_of("e2b").vision_config)
    for name, buffer in mlp.named_buffers():
        buffer.fill_(limit if name.endswith("max") else -limit)
    return mlp.to(dtype)


def patched(mlp: nn.Module) -> Any:
    twin = copy.deepcopy(mlp)
    assert patches.apply(twin, [Geglu()]).rows[0].status == "applied"
    return twin


def states(mlp: Any, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = scale * torch.randn(2, TOKENS // 2, mlp.hidden_size, generator=generator)
    return x.to(next(mlp.parameters()).dtype).requires_grad_()


def results(mlp: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the input, and those of the weights that are trained."""
    y = mlp(x)
    weights = [p for p in mlp.parameters() if p.requires_grad]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *weights], grad)]


@pytest.mark.parametrize("make", [text_mlp, vision_mlp], ids=["text", "vision"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trained", ["all", "none", "down", "gate", "up"])
def test_output_and_gradients_have_the_bits_of_the_stock_ones(
    make: Any, dtype: torch.dtype, trained: str
) -> None:
    mlp = make(dtype)
    for name, parameter in mlp.named_parameters():
        parameter.requires_grad_(trained == "all" or name.startswith(trained))
    x = states(mlp)
    expected, found = results(mlp, x), results(patched(mlp), x)
    assert len(found) == 2 + {"all": 3, "none": 0}.get(trained, 1)
    assert all(map(torch.equal, found, expected))


def test_float64_is_the_formula() -> None:
    mlp = text_mlp()
    x = states(mlp)
    gate, up, down = (m.weight for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    g = x @ gate.T
    inner = (2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)
    y = (0.5 * g * (1 + torch.tanh(inner)) * (x @ up.T)) @ down.T
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).double()
    expected = [y, *torch.autograd.grad(y, [x, gate, up, down], grad)]
    for value, reference in zip(results(patched(mlp), x), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_it_keeps_gate_and_up(dtype: torch.dtype, trained: bool) -> None:
    mlp = text_mlp(dtype).requires_grad_(trained)
    twin, x = patched(mlp), states(mlp)
    one = TOKENS * mlp.intermediate_size * dtype.itemsize
    assert kept_bytes(lambda: mlp(x))[1] == (4 if trained else 3) * one
    assert kept_bytes(lambda: twin(x))[1] == 2 * one


def test_clipped_linears_keep_what_clipping_needs_and_no_product() -> None:
    mlp = vision_mlp(torch.float32)
    x = states(mlp)
    one = TOKENS * mlp.intermediate_size * 4
    stock, ours = (kept_bytes(lambda m=m: m(x))[1] for m in (mlp, patched(mlp)))
    assert stock - ours == 2 * one


class _Lora(nn.Module):
    """A linear with an adapter whose first matrix sees the same input."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(4, base.in_features, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.randn(base.out_features, 4, dtype=base.weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


def test_an_adapter_on_down_proj_keeps_no_product() -> None:
    mlp = text_mlp(torch.float32).requires_grad_(False)
    mlp.down_proj = _Lora(mlp.down_proj)
    x = states(mlp)
    one = TOKENS * mlp.intermediate_size * 4
    twin = patched(mlp)
    assert all(map(torch.equal, results(twin, x), results(mlp, x)))
    stock, ours = (kept_bytes(lambda m=m: m(x))[1] for m in (mlp, twin))
    assert stock - ours == 2 * one
    assert ours < 2 * one + one // 4  # gate, up, and the adapter's inner state


class _InPlace(nn.Linear):
    """Saves a tensor that lies where the product lay, and is not the product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mul_(2))


class _Copy(nn.Linear):
    """Saves a tensor like the product in all but its place and values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x * 1).mul_(2))


class _Part(nn.Linear):
    """Saves the first half of the product, which lies where the product lies."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[:1]) + super().forward(x[1:])


@pytest.mark.parametrize("down", [_InPlace, _Copy, _Part])
def test_what_is_not_the_product_is_kept_as_it_is(down: type[nn.Linear]) -> None:
    mlp = text_mlp()
    mlp.down_proj.__class__ = down
    x = states(mlp)
    assert all(map(torch.equal, results(patched(mlp), x), results(mlp, x)))


class _Transposed(nn.Linear):
    """Its output lies in memory with the first two dimensions swapped."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


def test_a_product_that_is_not_contiguous_keeps_its_order() -> None:
    mlp = text_mlp()
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        linear.__class__ = _Transposed
    x = states(mlp)
    assert all(map(torch.equal, results(patched(mlp), x), results(mlp, x)))


@pytest.mark.parametrize("which", ["gate_proj", "up_proj"])
def test_gate_or_up_changed_in_place_is_noticed(which: str) -> None:
    mlp = patched(text_mlp())
    seen = []
    getattr(mlp, which).register_forward_hook(lambda module, args, output: seen.append(output))
    y = mlp(states(mlp))
    with torch.no_grad():
        seen[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()


def test_a_weight_of_down_proj_changed_in_place_is_noticed() -> None:
    mlp = patched(text_mlp())
    y = mlp(states(mlp))
    with torch.no_grad():
        mlp.down_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"down_proj.*modified in place"):
        y.sum().backward()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What a reference cycle would keep stays kept."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_nothing_is_left_after_the_backward_pass() -> None:
    mlp = patched(text_mlp())
    x = states(mlp)

    def run() -> torch.Tensor:
        y = mlp(x).sum()
        torch.autograd.grad(y, [x, *mlp.parameters()])
        return y

    y, left = kept_bytes(run)
    assert y.grad_fn is not None  # the graph is still there
    assert left == 0


class _SavesItsOutput(nn.Linear):
    """What tanh saves has tanh in its graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("asked", ["down_proj", "gate_proj", "nothing"])
def test_nothing_is_left_of_a_graph_that_is_dropped(asked: str) -> None:
    mlp = text_mlp()
    mlp.down_proj.__class__ = _SavesItsOutput
    mlp = patched(mlp)
    x = states(mlp)

    def run() -> torch.Tensor:
        y = mlp(x).sum()
        if asked != "nothing":
            torch.autograd.grad(y, getattr(mlp, asked).weight)
        return y.detach()

    assert kept_bytes(run)[1] == 0


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    mlp = patched(text_mlp())
    x = states(mlp)
    y = mlp(x).sin().sum()
    inputs = [x, *mlp.parameters()]
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(y, inputs), first))


def test_a_second_derivative_is_refused() -> None:
    mlp = patched(text_mlp())
    x = states(mlp)
    with pytest.raises(RuntimeError, match="geglu has no second derivative"):
        torch.autograd.grad(mlp(x).sum(), x, create_graph=True)


def test_checkpointing_sees_every_saved_tensor_and_recomputes_the_same() -> None:
    mlp = text_mlp()
    x = states(mlp)
    inputs = [x, *mlp.parameters()]
    expected = torch.autograd.grad(mlp(x).sin().sum(), inputs)
    twin = patched(mlp)
    _, kept = kept_bytes(lambda: checkpoint(twin, x, use_reentrant=False))
    assert kept == 0
    y = checkpoint(twin, x, use_reentrant=False)
    found = torch.autograd.grad(y.sin().sum(), [x, *twin.parameters()])
    assert all(map(torch.equal, found, expected))


def test_hooks_that_are_there_already_get_the_product() -> None:
    mlp = patched(text_mlp())
    x = states(mlp)
    sizes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(x)
    assert sizes.count(TOKENS * mlp.intermediate_size) == 3  # gate, up, product
    with disable_saved_tensors_hooks("for the test"):
        assert all(map(torch.equal, results(mlp, x), results(text_mlp(), x)))


def test_without_gradients_nothing_is_kept() -> None:
    mlp = text_mlp()
    twin, x = patched(mlp), states(mlp)
    with torch.no_grad():
        y, kept = kept_bytes(lambda: twin(x))
        assert kept == 0
        assert torch.equal(y, mlp(x))
    with torch.inference_mode():
        assert torch.equal(twin(x), mlp(x))


def test_autocast_has_the_bits_of_the_stock_one() -> None:
    mlp = text_mlp(torch.float32)
    x = states(mlp)
    one = TOKENS * mlp.intermediate_size * 2
    twin = patched(mlp)
    with torch.autocast("cpu", torch.bfloat16):
        stock = kept_bytes(lambda: mlp(x))[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert stock - kept_bytes(lambda: twin(x))[1] == 2 * one
        y, expected_y = twin(x), mlp(x)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.float().sin().sum(), [x, *twin.parameters()])
    expected = torch.autograd.grad(expected_y.float().sin().sum(), [x, *mlp.parameters()])
    assert all(map(torch.equal, [y, *found], [expected_y, *expected]))


def test_it_compiles_without_a_graph_break() -> None:
    mlp = patched(text_mlp(torch.float32))
    x = states(mlp)
    compiled = torch.compile(mlp.forward, fullgraph=True, backend="aot_eager")
    inputs = [x, *mlp.parameters()]
    expected = torch.autograd.grad(mlp(x).sin().sum(), inputs)
    found = torch.autograd.grad(compiled(x).sin().sum(), inputs)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference)


@pytest.mark.parametrize("family", ["e2b", "26b_a4b"])
def test_every_mlp_of_the_model_is_patched_and_no_expert(family: str) -> None:
    model = build(family)
    inputs = batch(model)
    expected_loss, expected = loss_and_gradients(model, inputs)
    report = patches.apply(model, [Geglu()])
    mlps = {n for n, m in model.named_modules() if isinstance(m, Gemma4TextMLP | Gemma4VisionMLP)}
    assert set(report.rows[0].sites) == mlps
    assert {n.split(".")[1] for n in mlps} == {"language_model", "vision_tower"}
    loss, gradients = loss_and_gradients(model, inputs)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_another_activation_is_left_alone() -> None:
    config = config_of("e2b").text_config
    config.hidden_activation = "silu"
    plan = Geglu().plan(Gemma4TextMLP(config, layer_idx=0))
    assert plan.status == "not applicable"
    assert "silu" in plan.reason


def test_an_activation_that_is_not_what_the_config_says_is_refused() -> None:
    mlp = text_mlp()
    mlp.act_fn = ACT2FN["gelu_python_tanh"]
    with pytest.raises(PatchError, match=r"geglu: .*act_fn"):
        Geglu().plan(mlp)


def test_an_unknown_mlp_is_refused() -> None:
    class Unknown(nn.Module):
        config = config_of("e2b").text_config
        act_fn = ACT2FN["gelu_pytorch_tanh"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    Unknown.__name__ = "Gemma4TextMLP"
    with pytest.raises(PatchError, match=r"geglu: .*not one of the versions"):
        Geglu().plan(Unknown())


def test_not_applicable_without_an_mlp() -> None:
    plan = Geglu().plan(nn.Linear(2, 2))
    assert plan.status == "not applicable"
    assert "MLP" in plan.reason
