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
from gemtune.losses import HostLabels
from gemtune.losses.fused import fused_softmax
from gemtune.memory import PeakTracker
from gemtune.patches.supervised_positions import Positions, locate

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


def test_labels_on_the_cpu_spare_the_wait_for_the_positions() -> None:
    labels = torch.full((2, 64), -100)
    labels[0, 7], labels[1, 40:60] = 3, 5
    hidden = torch.randn(2, 64, 32, device="cuda")
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = locate(labels, largest_share=0.9)
        assert isinstance(found, Positions)
        rows, queries = found.rows(hidden), found.queries_of(mask)
        found.causal_mask(64, 16, hidden.device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(rows[1], hidden[1, 40:60])
    assert queries.shape == (2, 1, 20, 64)


def test_host_labels_give_the_loss_of_the_labels() -> None:
    model = build("e2b", torch.float32).cuda()
    inputs = batch(model)
    host_labels = HostLabels(inputs["labels"])
    patches.apply(model)
    expected = model(**on_gpu(inputs), use_cache=False).loss
    found = model(**on_gpu(inputs), host_labels=host_labels, use_cache=False).loss
    assert relative_error(found, expected) < 1e-6


def test_the_kernels_of_the_loss_compile_where_triton_is() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    assert fused_softmax("cuda") is not None
