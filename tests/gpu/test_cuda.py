"""What only a CUDA device can show. Needs torch, transformers and pytest, nothing more."""

from __future__ import annotations

import pytest
import torch
from gemma4_zoo import (
    FAMILIES,
    batch,
    build,
    cast,
    config_of,
    loss_and_gradients,
    relative_error,
)
from transformers import Gemma4ForConditionalGeneration

from gemtune import patches
from gemtune.memory import PeakTracker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GIB = 2**30


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", [patches.default(), patches.available()], ids=["default", "all"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_patched_loss_and_gradients_equal_stock_ones_in_float32(
    family: str, choice: tuple[str, ...], checkpointing: bool
) -> None:
    frozen = () if choice == patches.default() else ("vision_tower", "embed_tokens_per_layer")
    model = build(family, torch.float32, frozen=frozen).cuda()
    inputs = on_gpu(batch(model, (0, 1, 3, 1), (0, 0, 0, 1)))
    expected_loss, expected = loss_and_gradients(model, inputs, reference=True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    patches.apply(model, choice)
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
    model = cast(model, torch.bfloat16).cuda()
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


def test_bfloat16_gradients_stay_finite_where_cudnn_attention_gives_nan() -> None:
    """Heads of 256, a padding mask, and a length of 64 modulo 128 (pytorch#196678)."""
    config = config_of("e2b")
    config.text_config.head_dim = 256
    config.text_config.sliding_window = 128
    config._attn_implementation = {"text_config": "sdpa", "vision_config": "sdpa"}
    torch.manual_seed(0)
    model = cast(Gemma4ForConditionalGeneration(config), torch.bfloat16).cuda().train()
    patches.apply(model)
    ids = torch.randint(40, 600, (2, 192), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, 150:] = 0
    for _ in range(20):
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
