"""Per-layer inputs from one unbind against the slices that stock transformers takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gemma4_zoo import batch, build, loss_and_gradients
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches.ple_projection import PerLayerInputs, PleProjection

B, S, L, D = 2, 5, 4, 3


def whole() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(B, S, L, D, generator=generator, dtype=torch.float64)
    return values.requires_grad_()


def handed_out(tensor: torch.Tensor) -> PerLayerInputs:
    return PerLayerInputs(tensor.unbind(dim=2))


def test_a_layer_is_the_slice_of_that_layer() -> None:
    tensor = whole()
    for layer in range(L):
        assert torch.equal(handed_out(tensor)[:, :, layer, :], tensor[:, :, layer, :])


@pytest.mark.parametrize("positions", [slice(None), slice(0, None), slice(-1, None), slice(-3, -1)])
def test_positions_are_narrowed_for_every_layer(positions: slice) -> None:
    tensor = whole()
    narrowed = handed_out(tensor)[:, positions, :, :]
    for layer in range(L):
        expected = tensor[:, positions, :, :][:, :, layer, :]
        assert torch.equal(narrowed[:, :, layer, :], expected)


def test_a_slice_of_all_positions_costs_nothing() -> None:
    # transformers 5.23 takes one in every training step.
    inputs = handed_out(whole())
    assert inputs[:, slice(0, None), :, :] is inputs
    assert inputs[:, slice(-S, None), :, :] is inputs


def test_the_gradient_is_that_of_the_slices() -> None:
    # Some layers at all positions, the rest at the last two, one of them not at all: transformers
    # 5.23 narrows the positions of the layers that share keys and values.
    tensor = whole()

    def loss(inputs: Any) -> torch.Tensor:
        total = (inputs[:, :, 0, :] ** 2).sum() + inputs[:, :, 1, :].sin().sum()
        return total + (inputs[:, slice(-2, None), :, :][:, :, 3, :] ** 3).sum()

    (found,) = torch.autograd.grad(loss(handed_out(tensor)), tensor)
    (expected,) = torch.autograd.grad(loss(tensor), tensor)
    assert torch.equal(found, expected)
    assert torch.equal(found[:, :, 2], torch.zeros_like(found[:, :, 2]))


@pytest.mark.parametrize(
    "index",
    [
        0,
        slice(None),
        (slice(None), slice(None), 1),
        (slice(None), slice(None), slice(0, 2), slice(None)),
        (slice(None), slice(None), torch.tensor(1), slice(None)),
        (slice(None), slice(-1, None), 1, slice(None)),
        (slice(None), torch.tensor([0, 1]), slice(None), slice(None)),
        (slice(0, 1), slice(None), 1, slice(None)),
        (slice(None), slice(None), 1, 0),
        (..., 1, slice(None)),
        None,
    ],
    ids=repr,
)
def test_any_other_index_is_a_type_error(index: Any) -> None:
    with pytest.raises(TypeError, match=r"ple_projection: .*read as \[:, :, i, :\]"):
        handed_out(whole())[index]


def test_a_layer_that_does_not_exist_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        handed_out(whole())[:, :, L, :]


class _Created(TorchDispatchMode):
    """How many tensors of a shape the operations return, views aside."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.names = shape, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape and not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return result


def backward_of(model: Any, inputs: dict[str, torch.Tensor]) -> list[str]:
    """What the backward pass creates in the shape of the per-layer inputs of all layers."""
    config = model.config.text_config
    width = config.hidden_size_per_layer_input
    loss = model(**inputs, use_cache=False).loss
    with _Created((*inputs["input_ids"].shape, config.num_hidden_layers, width)) as created:
        loss.backward()
    return created.names


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_the_backward_pass_fills_no_zeros(checkpointing: bool) -> None:
    model = build("e2b")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = batch(model, (0, 0))
    num_layers = model.config.text_config.num_hidden_layers
    assert backward_of(model, inputs).count("select_backward") == num_layers
    patches.apply(model, [PleProjection()])
    created = backward_of(model, inputs)
    assert "select_backward" not in created
    assert created.count("stack") == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["e2b", "e4b"])
def test_loss_and_gradients_have_the_bits_of_the_stock_ones(
    family: str, dtype: torch.dtype
) -> None:
    model = build(family, dtype)
    inputs = batch(model)
    expected_loss, expected = loss_and_gradients(model, inputs)
    patches.apply(model, [PleProjection()])
    loss, gradients = loss_and_gradients(model, inputs)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_without_gradients_the_tensor_itself_comes_out() -> None:
    model = build("e2b")
    patches.apply(model, [PleProjection()])
    decoder = model.model.language_model
    ids = torch.arange(40, 46)[None]

    def project() -> Any:
        embeddings = decoder.embed_tokens(ids)
        per_layer = decoder.get_per_layer_inputs(ids, embeddings)
        return decoder.project_per_layer_inputs(embeddings, per_layer)

    assert isinstance(project(), PerLayerInputs)
    with torch.no_grad():
        assert isinstance(project(), torch.Tensor)
    # LoRA on a frozen base: there is no gradient to save on.
    model.requires_grad_(False)
    assert isinstance(project(), torch.Tensor)


def test_evaluation_with_gradients_on_may_keep_the_last_logits_alone() -> None:
    # From 5.23 on this narrows the positions of the upper layers.
    model = build("e2b").eval()
    inputs = batch(model, (0,))
    del inputs["labels"]
    expected = model(**inputs, logits_to_keep=1, use_cache=False).logits
    patches.apply(model, [PleProjection()])
    found = model(**inputs, logits_to_keep=1, use_cache=False).logits
    assert found.requires_grad
    assert torch.equal(found, expected)


def test_it_compiles_without_a_graph_break() -> None:
    def total(tensor: torch.Tensor) -> torch.Tensor:
        inputs = handed_out(tensor)[:, slice(-2, None), :, :]
        return (inputs[:, :, 0, :] * inputs[:, :, 3, :]).sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    tensor = whole()
    (expected,) = torch.autograd.grad(total(tensor), tensor)
    (found,) = torch.autograd.grad(compiled(tensor), tensor)
    torch.testing.assert_close(found, expected)


def test_not_applicable_without_per_layer_embeddings() -> None:
    plan = PleProjection().plan(build("31b"))
    assert plan.status == "not applicable"
    assert "no per-layer embeddings" in plan.reason
    plan = PleProjection().plan(nn.Linear(2, 2))
    assert plan.status == "not applicable"
    assert "decoder" in plan.reason


@pytest.mark.parametrize(
    "method", ["forward", "project_per_layer_inputs", "_maybe_slice_kv_shared_inputs"]
)
def test_an_unknown_reader_is_refused(method: str) -> None:
    stock = type(build("e2b").model.language_model)

    def unknown(self: Any, per_layer_inputs: torch.Tensor) -> torch.Tensor:
        return per_layer_inputs.sum(dim=2)

    changed = type("Gemma4TextModel", (stock,), {method: unknown})
    model = changed.__new__(changed)
    nn.Module.__init__(model)
    model.hidden_size_per_layer_input = D
    with pytest.raises(PatchError, match=r"ple_projection: .*not one of the versions"):
        PleProjection().plan(model)
