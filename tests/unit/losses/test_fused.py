"""The compiled kernels of a GPU, compiled for the CPU: the same loss and gradients."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from lm_head import IGNORE, gradients, problem, reference_logits, reference_losses, relative_error

from gemtune.losses import fused, linear_cross_entropy, tiles

CASES = {
    "cap": {"softcap": 30.0},
    "no cap": {},
    "cap beyond the bound": {"softcap": 300.0},
    "everything": {"softcap": 5.0, "label_smoothing": 0.1, "z_loss_weight": 0.01},
}


@pytest.fixture(params=["uncompiled", "compiled"])
def fused_everywhere(request, monkeypatch):
    """The functions as they are, and as inductor compiles them."""
    if request.param == "compiled" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU, and there is no g++")
    if request.param == "uncompiled":
        monkeypatch.setattr(fused, "_compiled", lambda function: function)
    monkeypatch.setattr(tiles, "fused_softmax", lambda device_type: fused.softmax_chunk)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("fused_everywhere")
def test_loss_metrics_and_gradients(options):
    hidden, weight, labels = problem(64, 17, 499, ignored=0.3, dtype=torch.float32)
    found, metrics = linear_cross_entropy(
        hidden, weight, labels, chunk_bytes=499 * 8 * 13, metrics=True, **options
    )
    count = (labels != IGNORE).sum()
    expected = reference_losses(hidden, weight, labels, **options).sum() / count
    assert relative_error(found, expected) < 1e-5
    for ours, theirs in zip(
        gradients(found, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        assert relative_error(ours, theirs) < 1e-5
    logits = reference_logits(hidden, weight, options.get("softcap"))[labels != IGNORE]
    assert metrics.num_tokens == count
    assert metrics.num_correct == (logits.argmax(-1) == labels[labels != IGNORE]).sum()
    log_p = F.log_softmax(logits, -1)
    assert relative_error(metrics.entropy_sum, -(log_p.exp() * log_p).sum()) < 1e-4
    assert relative_error(metrics.logsumexp_sum, logits.logsumexp(-1).sum()) < 1e-5


@pytest.mark.usefixtures("fused_everywhere")
def test_half_precision_gradients_of_the_logits(monkeypatch):
    """The layout on CUDA: float32 logits, gradients in bfloat16 in a buffer of their own."""

    def emulated(out, a, b, *, alpha=1.0, keep=False):
        assert a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
        out.copy_(alpha * (a.double() @ b.double()) + (out.double() if keep else 0.0))

    monkeypatch.setattr(tiles, "mixed_matmul_support", lambda *_: (True, True))
    monkeypatch.setattr(tiles, "multiply_into", emulated)
    hidden, weight, labels = problem(512, 64, 997, ignored=0.25, dtype=torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = reference_losses(*exact, labels, 30.0).sum() / 384
    loss = linear_cross_entropy(hidden, weight, labels, softcap=30.0, chunk_bytes=997 * 6 * 100)
    assert relative_error(loss, expected) < 1e-6
    for ours, theirs in zip(
        gradients(loss, hidden, weight), gradients(expected, *exact), strict=True
    ):
        assert relative_error(ours, theirs) <= 2.6e-3


@pytest.mark.usefixtures("fused_everywhere")
def test_it_is_tried_out_before_it_is_used():
    fused._try_out(torch.device("cpu"))


def test_without_a_compiler_the_tiles_do_the_work(monkeypatch):
    def fails(device):
        raise OSError("no compiler")

    fused.fused_softmax.cache_clear()
    monkeypatch.setattr(fused, "_can_compile", lambda: True)
    monkeypatch.setattr(fused, "_try_out", fails)
    with pytest.warns(UserWarning, match="tile by tile.*no compiler"):
        assert fused.fused_softmax("cuda") is None
    assert fused.fused_softmax("cpu") is None
    fused.fused_softmax.cache_clear()
