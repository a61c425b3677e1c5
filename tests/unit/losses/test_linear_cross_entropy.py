"""linear_cross_entropy against plain float64 PyTorch: values, gradients, metrics."""

import functools

import pytest
import torch
import torch.nn.functional as F
from lm_head import (
    IGNORE,
    assert_close,
    gradients,
    problem,
    reference_logits,
    reference_losses,
    relative_error,
)

from gemtune.losses import linear_cross_entropy


def assert_same_loss_and_gradients(hidden, weight, labels, chunk_bytes=None, **options):
    expected = reference_losses(hidden, weight, labels, **options).sum()
    expected = expected / (labels != IGNORE).sum().clamp(min=1)
    actual = linear_cross_entropy(hidden, weight, labels, chunk_bytes=chunk_bytes, **options)
    assert_close(actual, expected)
    for ours, theirs in zip(
        gradients(actual, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        assert_close(ours, theirs)


@pytest.mark.parametrize("chunk_bytes", [None, 1, 101 * 8 * 5])
@pytest.mark.parametrize("softcap", [None, 0.7, 30.0, 400.0])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 0.99, 1.0])
def test_loss_and_gradients_match_float64(ignored, softcap, chunk_bytes):
    hidden, weight, labels = problem(num_rows=103, ignored=ignored)
    assert_same_loss_and_gradients(hidden, weight, labels, chunk_bytes, softcap=softcap)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 2), (7, 1, 997), (300, 5, 3), (64, 17, 4099)])
def test_odd_sizes(shape):
    hidden, weight, labels = problem(*shape, ignored=0.3)
    for chunk_bytes in (None, 8 * 4099 * 11):
        assert_same_loss_and_gradients(hidden, weight, labels, chunk_bytes, softcap=5.0)


@pytest.mark.parametrize("softcap", [None, 30.0, 200.0])
def test_large_logits_stay_finite(softcap):
    hidden, weight, labels = problem(ignored=0.2)
    hidden = (hidden.detach() * 300).requires_grad_()
    assert_same_loss_and_gradients(hidden, weight, labels, softcap=softcap)


def test_cap_bound_holds_in_float32():
    """A cap just below the limit, all logits at the cap: the sum of exponentials must be finite."""
    hidden, weight = torch.full((3, 1), 1e4), torch.ones(5000, 1)
    labels = torch.tensor([0, 17, 4999])
    for softcap in (75.0, 79.4, 79.6, 82.0, 100.0):
        loss = linear_cross_entropy(hidden, weight, labels, softcap=softcap)
        assert_close(loss, torch.tensor(5000.0).log(), 1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0, 300.0])
@pytest.mark.parametrize("extra", [(0.1, 0.0), (0.0, 1e-2), (0.3, 0.2)])
def test_label_smoothing_and_z_loss(extra, softcap):
    hidden, weight, labels = problem(ignored=0.4)
    options = {"label_smoothing": extra[0], "z_loss_weight": extra[1], "softcap": softcap}
    assert_same_loss_and_gradients(hidden, weight, labels, 8 * 101 * 4, **options)
    expected = reference_losses(hidden, weight, labels, **options)
    upstream = torch.linspace(-1, 2, len(labels), dtype=torch.float64)
    actual = linear_cross_entropy(hidden, weight, labels, reduction="none", **options)
    assert_close(actual, expected)
    for ours, theirs in zip(
        gradients((actual * upstream).sum(), hidden, weight),
        gradients((expected * upstream).sum(), hidden, weight),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_leading_dimensions_label_types_and_ignore_index():
    hidden, weight, labels = problem(num_rows=24, ignored=0.5)
    folded = labels.where(labels != IGNORE, 7).reshape(2, 3, 4).to(torch.int32)
    expected = F.cross_entropy(
        reference_logits(hidden, weight), folded.flatten().long(), ignore_index=7
    )
    strided = torch.stack((hidden, -hidden), -1)[..., 0].reshape(2, 3, 4, -1)
    actual = linear_cross_entropy(strided, weight, folded, ignore_index=7)
    assert_close(actual, expected)
    assert_close(gradients(actual, hidden)[0], gradients(expected, hidden)[0])
    losses = linear_cross_entropy(strided, weight, folded, ignore_index=7, reduction="none")
    assert losses.shape == folded.shape
    assert (losses[folded == 7] == 0).all()


@pytest.mark.parametrize("num_items", [50, torch.tensor(50), torch.tensor(50.0)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_num_items_divides_the_sum(reduction, num_items):
    hidden, weight, labels = problem(ignored=0.5)
    expected = reference_losses(hidden, weight, labels).sum() / 50
    actual = linear_cross_entropy(hidden, weight, labels, reduction=reduction, num_items=num_items)
    assert_close(actual, expected)
    for ours, theirs in zip(
        gradients(actual, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_upstream_gradient_scales_sum(dtype):
    hidden, weight, labels = problem(ignored=0.5, dtype=dtype)
    expected = -3.7 * reference_losses(hidden, weight, labels, 2.0).sum()
    actual = -3.7 * linear_cross_entropy(hidden, weight, labels, softcap=2.0, reduction="sum")
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(actual, expected, tolerance)
    for ours, theirs in zip(
        gradients(actual, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        assert_close(ours, theirs, tolerance)


def test_accumulated_micro_batches_equal_one_batch():
    hidden, weight, labels = problem(num_rows=40, ignored=0.5)
    whole = linear_cross_entropy(hidden, weight, labels, softcap=4.0)
    expected = gradients(whole, hidden, weight)
    total = (labels != IGNORE).sum()
    for rows in (slice(0, 9), slice(9, 33), slice(33, 40)):
        part = linear_cross_entropy(
            hidden[rows], weight, labels[rows], softcap=4.0, num_items=total
        )
        part.backward()
    assert_close(hidden.grad, expected[0])
    assert_close(weight.grad, expected[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0, 300.0])
def test_metrics_match_and_leave_the_loss_alone(softcap, reduction):
    hidden, weight, labels = problem(num_rows=211, hidden_size=4, vocab_size=7, ignored=0.3)
    options = {"softcap": softcap, "chunk_bytes": 7 * 8 * 10, "reduction": reduction}
    loss, metrics = linear_cross_entropy(hidden, weight, labels, metrics=True, **options)
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels, **options))
    valid = labels != IGNORE
    logits = reference_logits(hidden, weight, softcap)[valid]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    num_correct = (logits.argmax(-1) == labels[valid]).sum()
    assert 0 < num_correct < valid.sum()
    assert metrics.num_tokens == valid.sum()
    assert metrics.num_correct == num_correct
    assert_close(metrics.entropy_sum, entropy.sum())
    assert_close(metrics.logsumexp_sum, logits.logsumexp(-1).sum())
    assert not any(value.requires_grad or value.dim() for value in metrics)
    gradients(loss.sum(), hidden, weight)


@pytest.mark.parametrize("num_chunks", [1, 3, 16])
def test_bfloat16_weight_gradient_is_rounded_once(num_chunks):
    hidden, weight, labels = problem(512, 64, 997, ignored=0.25, dtype=torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = reference_losses(*exact, labels, 30.0).sum() / 384
    expected_hidden, expected_weight = gradients(expected, *exact)
    chunk_bytes = 997 * 4 * (384 // num_chunks)
    actual = linear_cross_entropy(hidden, weight, labels, softcap=30.0, chunk_bytes=chunk_bytes)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, 1e-6)
    grad_hidden, grad_weight = gradients(actual, hidden, weight)
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
    assert relative_error(grad_weight, expected_weight) <= 2.1e-3
    assert relative_error(grad_hidden, expected_hidden) <= 2.1e-3


def test_bfloat16_upstream_gradient_adds_no_rounding():
    hidden, weight, labels = problem(512, 64, 997, dtype=torch.bfloat16)
    expected = reference_losses(hidden, weight, labels, 30.0).mean() * 0.37
    actual = linear_cross_entropy(hidden, weight, labels, softcap=30.0) * 0.37
    for ours, theirs in zip(
        gradients(actual, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        # Both references are rounded to bfloat16 by autograd, so an exact result agrees nearly
        # everywhere; rounding twice would differ in a third of the elements.
        assert (ours != theirs).double().mean() < 0.01


def test_float16_small_weights_do_not_vanish():
    hidden, weight, labels = problem(dtype=torch.float16)
    expected = gradients(reference_losses(hidden, weight, labels).sum(), weight)[0]
    loss = linear_cross_entropy(hidden, weight, labels, num_items=10**7) * 1e7
    assert relative_error(gradients(loss, weight)[0], expected.double()) <= 1e-3


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32,) * 2])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_autocast_keeps_float32_sums_and_each_gradient_dtype(dtypes, reduction):
    for hidden_dtype, weight_dtype in (dtypes, dtypes[::-1]):
        hidden, weight, labels = problem(128, 32, 499, ignored=0.5)
        hidden = hidden.detach().to(hidden_dtype).requires_grad_()
        weight = weight.detach().to(weight_dtype).requires_grad_()
        rounded = [t.detach().bfloat16().double().requires_grad_() for t in (hidden, weight)]
        expected = reference_losses(*rounded, labels, 30.0).sum()
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, labels, softcap=30.0, reduction=reduction)
            loss = loss.sum()
            grads = gradients(loss, hidden, weight)
        assert loss.dtype == torch.float32
        assert_close(loss, expected, 1e-5)
        for tensor, ours, theirs in zip(
            (hidden, weight), grads, gradients(expected, *rounded), strict=True
        ):
            assert ours.dtype == tensor.dtype
            bound = 1e-5 if tensor.dtype == torch.float32 else 2.1e-3
            assert relative_error(ours, theirs) <= bound


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_inputs_get_no_gradient(reduction):
    hidden, weight, labels = problem(ignored=0.3)
    expected = gradients(reference_losses(hidden, weight, labels).sum(), hidden, weight)
    for frozen, trained, grad in ((weight, hidden, expected[0]), (hidden, weight, expected[1])):
        frozen.requires_grad_(False)
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum()
        loss.backward()
        scale = 1 if reduction == "none" else (labels != IGNORE).sum()
        assert frozen.grad is None
        assert_close(trained.grad * scale, grad)
        frozen.requires_grad_(True)
        trained.grad = None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_rows", [6, 0])
def test_nothing_to_learn_gives_connected_zero(reduction, num_rows):
    hidden, weight, _ = problem(num_rows=num_rows)
    hidden.data.fill_(torch.inf)
    labels = torch.full((num_rows,), IGNORE)
    loss, metrics = linear_cross_entropy(
        hidden, weight, labels, reduction=reduction, softcap=2.0, metrics=True
    )
    assert loss.sum().item() == 0 and not any(metrics)
    loss.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_nothing_to_learn_with_num_items():
    hidden, weight, labels = problem(ignored=1.0)
    for num_items in (0, 5, torch.tensor(0)):
        assert linear_cross_entropy(hidden, weight, labels, num_items=num_items).item() == 0


def test_second_backward_is_refused():
    loss = linear_cross_entropy(*problem())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_second_backward_per_token_recomputes():
    hidden, weight, labels = problem()
    loss = linear_cross_entropy(hidden, weight, labels, reduction="none").sum()
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward()
    assert_close(weight.grad, 2 * first)


def test_double_differentiation_is_refused():
    hidden, weight, labels = problem()
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(softcap):
    """gradcheck differentiates one graph many times, which only the per-token path allows."""
    hidden, weight, labels = problem(5, 3, 7, ignored=0.4)
    options = {"softcap": softcap, "label_smoothing": 0.1, "z_loss_weight": 0.05}
    function = functools.partial(linear_cross_entropy, labels=labels, reduction="none", **options)
    assert torch.autograd.gradcheck(function, (hidden, weight))

    loss = functools.partial(linear_cross_entropy, labels=labels, **options)
    grads = gradients(loss(hidden, weight), hidden, weight)
    for tensor, grad in zip((hidden.data, weight.data), grads, strict=True):
        for index in range(tensor.numel()):
            flat, center = tensor.view(-1), tensor.view(-1)[index].item()
            flat[index] = center + 1e-5
            above = loss(hidden, weight).item()
            flat[index] = center - 1e-5
            below = loss(hidden, weight).item()
            flat[index] = center
            assert abs((above - below) / 2e-5 - grad.view(-1)[index].item()) < 1e-8


def test_tied_weight_gradients_add_up():
    _, weight, labels = problem(ignored=0.3)
    tokens = labels.clamp(min=0)
    embedded = F.embedding(tokens, weight).sin()
    expected = gradients(reference_losses(embedded, weight, labels, 2.0).sum(), weight)[0]
    embedded = F.embedding(tokens, weight).sin()
    loss = linear_cross_entropy(embedded, weight, labels, softcap=2.0, reduction="sum")
    loss.backward()
    assert_close(weight.grad, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_matches_float64(dtype):
    hidden, weight, labels = problem(512, 64, 4099, ignored=0.5, dtype=dtype)
    expected = reference_losses(hidden, weight, labels, 30.0).sum() / 256
    expected_grads = gradients(expected, hidden, weight)
    on_cuda = [tensor.detach().cuda() for tensor in (hidden, weight, labels)]
    on_cuda[0].requires_grad_(), on_cuda[1].requires_grad_()
    actual = linear_cross_entropy(*on_cuda, softcap=30.0, chunk_bytes=4099 * 4 * 100)
    assert_close(actual.cpu(), expected, 1e-4)
    for ours, theirs in zip(gradients(actual, *on_cuda[:2]), expected_grads, strict=True):
        assert relative_error(ours.cpu(), theirs.double()) <= 4e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_labels_on_the_cpu_spare_the_wait_for_the_gpu():
    hidden, weight, labels = problem(512, 64, 4099, ignored=0.5, dtype=torch.float32)
    hidden, weight = (tensor.detach().cuda().requires_grad_() for tensor in (hidden, weight))
    expected = linear_cross_entropy(hidden, weight, labels.cuda(), softcap=30.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = linear_cross_entropy(hidden, weight, labels, softcap=30.0)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(loss, expected, 1e-6)
