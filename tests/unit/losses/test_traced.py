"""The operators behind torch.compile: the same numbers, fixed shapes. And fake tensors."""

import contextlib
import functools

import pytest
import torch
from lm_head import IGNORE, assert_close, gradients, problem, relative_error
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gemtune.losses import linear_cross_entropy, traced

OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "per token": {"reduction": "none"},
    "num_items": {"num_items": 50},
    "num_items on the device": {"num_items": torch.tensor(50)},
    "everything": {"softcap": 5.0, "label_smoothing": 0.1, "z_loss_weight": 0.01, "metrics": True},
    "everything per token": {"softcap": 5.0, "metrics": True, "reduction": "none"},
    "chunks": {"chunk_bytes": 101 * 8 * 5, "softcap": 30.0},
}


@contextlib.contextmanager
def operators(monkeypatch):
    """Eager calls take the way of a compiled one: faster than compiling for every case."""
    with monkeypatch.context() as context:
        context.setattr(traced, "is_tracing", lambda: True)
        yield


def run(inputs, upstream=None, **options):
    hidden, weight, labels = inputs
    found = linear_cross_entropy(hidden, weight, labels, **options)
    loss, metrics = found if options.get("metrics") else (found, ())
    total = loss.sum() if upstream is None else (loss * upstream).sum()
    return [loss, *metrics, *gradients(total, hidden, weight)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_operators_give_what_eager_code_gives(options, ignored, monkeypatch):
    inputs = problem(ignored=ignored)
    upstream = 1.7
    if options.get("reduction") == "none":
        upstream = torch.linspace(-1, 2, len(inputs[2]), dtype=torch.float64)
    expected = run(inputs, upstream, **options)
    with operators(monkeypatch):
        found = run(inputs, upstream, **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operators_round_each_gradient_once(dtype, monkeypatch):
    inputs = problem(ignored=0.4, dtype=dtype)
    expected = run(inputs, 0.37, softcap=30.0)
    with operators(monkeypatch):
        found = run(inputs, 0.37, softcap=30.0)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs.double()) < 2e-3


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operators_make_only_gradients_that_are_needed(trained, reduction, monkeypatch):
    hidden, weight, labels = problem(ignored=0.5)
    expected = gradients(linear_cross_entropy(hidden, weight, labels).sum(), hidden, weight)
    hidden.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    scale = 1 if reduction == "mean" else 1 / int((labels != IGNORE).sum())
    with operators(monkeypatch):
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum() * scale
        assert loss.requires_grad == any(trained)
        if any(trained):
            loss.backward()
    for tensor, needed, gradient in zip((hidden, weight), trained, expected, strict=True):
        assert (tensor.grad is not None) == needed
        if needed:
            assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_library_accepts_the_operators(reduction):
    """opcheck: schema, fake implementation against the real one, autograd registration."""
    hidden, weight, labels = problem(ignored=0.5)
    settings = (30.0, 0.1, 0.01, 1 << 20, True, torch.float64)
    if reduction == "none":
        arguments = (hidden, weight, None, None, labels, IGNORE, *settings)
        operator = torch.ops.gemtune.linear_cross_entropy_per_token.default
    else:
        needs = [True, True, False, False]
        arguments = (hidden, weight, None, None, labels, None, True, needs, IGNORE, *settings)
        operator = torch.ops.gemtune.linear_cross_entropy.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    library.opcheck(operator, arguments, test_utils=checks)


def test_a_compiled_model_has_one_graph_and_the_same_gradients():
    def model(hidden, weight, labels):
        return linear_cross_entropy(hidden.sin(), weight, labels, softcap=30.0) * 2

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for num_rows, ignored in ((37, 0.5), (37, 0.1), (37, 1.0)):
        hidden, weight, labels = problem(num_rows, ignored=ignored)
        expected = model(hidden, weight, labels)
        found = compiled(hidden, weight, labels)
        assert_close(found, expected)
        for ours, theirs in zip(
            gradients(found, hidden, weight), gradients(expected, hidden, weight), strict=True
        ):
            assert_close(ours, theirs)


def test_a_compiled_call_refuses_stray_labels():
    hidden, weight, labels = problem()
    labels[3] = 101
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"labels: 1 outside.*\[101\]"):
        compiled(hidden, weight, labels)


class Largest(TorchDispatchMode):
    """The largest new float tensor."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.num_bytes = max(self.num_bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_on_fake_tensors_a_planner_sees_the_chunk_and_no_more(reduction):
    """A head of Gemma 4's size, which would need 2 GiB of logits, planned without memory."""
    with FakeTensorMode():
        new = functools.partial(torch.empty, dtype=torch.bfloat16)
        hidden = new(2, 1024, 256).requires_grad_()
        weight = new(262144, 256)
        labels = torch.empty(2, 1024, dtype=torch.int64)
        chunk_bytes = 256 * 2**20
        with Largest() as largest:
            loss = linear_cross_entropy(
                hidden, weight, labels, softcap=30.0, chunk_bytes=chunk_bytes, reduction=reduction
            )
            loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.shape == (() if reduction == "mean" else (2, 1024))
    assert hidden.grad.shape == hidden.shape and hidden.grad.dtype == torch.bfloat16
    assert 0.9 * chunk_bytes < largest.num_bytes <= chunk_bytes


def test_second_derivatives_are_refused(monkeypatch):
    hidden, weight, labels = problem()
    for reduction in ("mean", "none"):
        with operators(monkeypatch):
            loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum()
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(loss, hidden, create_graph=True)
