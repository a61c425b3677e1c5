"""What only a CUDA device can show. Needs torch, transformers and pytest, nothing more."""

from __future__ import annotations

import pytest
import torch
from gemma4_zoo import batch, build, loss_and_gradients, relative_error

from gemtune import patches
from gemtune.memory import PeakTracker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GIB = 2**30


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("family", ["e2b", "26b_a4b", "31b"])
def test_patched_loss_and_gradients_equal_stock_ones_in_float32(family: str) -> None:
    model = build(family, torch.float32).cuda()
    inputs = on_gpu(batch(model))
    expected_loss, expected = loss_and_gradients(model, inputs, reference=True)
    patches.apply(model)
    loss, gradients = loss_and_gradients(model, inputs)
    assert relative_error(loss, expected_loss) < 1e-5
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        # Against the largest gradient: some are sums that cancel to nearly nothing.
        scale = max(float(g.norm()) for g in expected.values())
        assert float((gradient - expected[name]).norm()) < 1e-4 * scale, name


def test_in_bfloat16_the_patched_loss_is_as_near_to_float64_as_the_stock_one() -> None:
    model = build("e2b")
    inputs = batch(model)
    exact, _ = loss_and_gradients(model, inputs, reference=True)
    model = model.bfloat16().cuda()
    inputs = on_gpu(inputs)
    stock_error = relative_error(loss_and_gradients(model, inputs)[0].cpu(), exact)
    patches.apply(model)
    assert relative_error(loss_and_gradients(model, inputs)[0].cpu(), exact) <= stock_error + 2e-3


def test_peaks_come_from_the_allocator_and_belong_to_their_phase() -> None:
    tracker = PeakTracker(torch.device("cuda"))
    assert tracker.source == "cuda allocator"
    before = torch.cuda.memory_allocated() / GIB
    tracker.enter("forward")
    tracker.enter("loss")
    torch.empty(2**28, dtype=torch.uint8, device="cuda")  # gone at once
    tracker.enter("backward")
    tracker.enter("optimizer")
    peaks = tracker.finish()
    assert peaks["loss"] - before == pytest.approx(0.25, abs=0.01)
    for phase in ("forward", "backward", "optimizer"):
        assert peaks[phase] - before < 0.01
