"""Weights in host memory beside a real GPU: what stays, what visits, and what it costs."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gemma4_zoo import TINY_CONFIG, batch, build, loss_and_gradients
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

from gemtune import patches
from gemtune.patches.host_memory import PINNED, HostMemory, host_parameters
from gemtune.patches.ple_offload import PleOffload, fetch_rows, places_of, prefetch
from gemtune.patches.vision_streaming import VisionStreaming

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB = 2**20
TABLE = "model.language_model.embed_tokens_per_layer.weight"
STREAMINGS = pytest.mark.parametrize("memory", ["pinned", "mapped"])


def frozen() -> Any:
    return build("e2b", torch.float32, frozen=("vision_tower", "embed_tokens_per_layer"))


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def assert_close(found: tuple, expected: tuple) -> None:
    """Up to the order in which the GPU adds; a wrong row or layer would be off by far more."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    scale = max(float(g.norm()) for g in expected[1].values())
    for name, gradient in found[1].items():
        assert float((gradient - expected[1][name]).norm()) < 1e-4 * scale, name


def peak_bytes(compute: Callable[[], Any]) -> tuple[Any, int]:
    """The result, and the most that was allocated meanwhile on top of what was before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = compute()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("choice", [["vision_streaming"], ["ple_offload"], patches.available()])
def test_loss_and_gradients_are_those_of_the_stock_model(
    choice: list[str], checkpointing: bool, when: str
) -> None:
    model = frozen()
    inputs = on_gpu(batch(model))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = loss_and_gradients(copy.deepcopy(model).cuda(), inputs)
    model = model.cuda() if when == "after" else model
    report = patches.apply(model, choice)
    assert "applied" in {row.status for row in report.rows}
    model.cuda()
    stays = set(host_parameters(model))
    assert stays == {name for name, p in model.named_parameters() if p.device.type == "cpu"}
    assert stays
    assert model.device.type == "cuda"
    for _ in range(3):
        assert_close(loss_and_gradients(model, inputs), expected)
    report.undo()
    if when == "after":
        assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert_close(loss_and_gradients(model.cuda(), inputs), expected)


@pytest.mark.parametrize("choice", [["vision_streaming"], ["ple_offload"]])
def test_generation_gives_the_same_tokens(choice: list[str]) -> None:
    model = frozen().eval()
    inputs = on_gpu(batch(model, (1,)))
    del inputs["labels"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = copy.deepcopy(model).cuda().generate(**inputs, **options)
    patches.apply(model, choice)
    assert torch.equal(model.cuda().generate(**inputs, **options), expected)


def test_registered_pages_are_pinned_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart, let_go = torch.cuda.cudart(), []

    class Logged:
        cudaHostRegister = staticmethod(cudart.cudaHostRegister)

        @staticmethod
        def cudaHostUnregister(address: int) -> Any:  # noqa: N802
            let_go.append((address, int(cudart.cudaHostUnregister(address))))

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Logged)
    memory = HostMemory(PINNED)
    values = [torch.randn(1000, 1000), torch.randn(7).bfloat16().cuda()]
    held = memory.hold(values)
    assert [t.device.type for t in held] == ["cpu", "cpu"]
    assert all(t.is_pinned() for t in held)
    for tensor, value in zip(held, values, strict=True):
        assert torch.equal(tensor.to("cuda", non_blocking=True), value.cuda())
    address = held[0].data_ptr()
    del memory, held, tensor
    gc.collect()
    assert let_go == [(address, 0)]


def test_the_table_is_off_the_gpu_and_only_its_rows_come() -> None:
    values = json.loads(TINY_CONFIG.read_text())
    layers = values["text_config"]["num_hidden_layers"]
    width = layers * values["text_config"]["hidden_size_per_layer_input"]
    rows = 256 * MIB // (4 * width)
    values["text_config"]["vocab_size_per_layer_input"] = rows
    model = Gemma4ForConditionalGeneration(Gemma4Config.from_dict(values))
    table = model.get_parameter(TABLE).requires_grad_(False)
    assert table.nbytes > 250 * MIB
    inputs = batch(model)
    patches.apply(model, [PleOffload()])
    base = torch.cuda.memory_allocated()
    model.cuda()
    assert model.get_parameter(TABLE) is table
    assert table.device.type == "cpu"
    moved = sum(p.nbytes for p in model.parameters() if p is not table)
    assert torch.cuda.memory_allocated() - base < moved + 32 * MIB
    _, peak = peak_bytes(lambda: loss_and_gradients(model, on_gpu(inputs)))
    assert torch.cuda.memory_allocated() - base < 2 * moved + 32 * MIB  # with gradients
    assert peak < table.nbytes / 2


def test_prefetched_rows_need_no_wait_and_are_the_same() -> None:
    model = frozen()
    inputs = batch(model)
    expected = loss_and_gradients(copy.deepcopy(model).cuda(), on_gpu(inputs))
    patches.apply(model, [PleOffload()])
    model.cuda()
    embedding = model.model.language_model.embed_tokens_per_layer
    ids = inputs["input_ids"]
    reference = embedding(ids.cuda())
    for _ in range(5):
        prefetch(model, ids)
        device_ids = ids.cuda()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = embedding(device_ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found, reference)
        prefetch(model, ids)
        assert_close(loss_and_gradients(model, on_gpu(inputs)), expected)


def test_rows_are_right_while_the_memory_of_earlier_ones_is_used_again() -> None:
    table = torch.randn(5000, 512)
    on_device, stream = table.cuda(), torch.cuda.Stream()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(5000, (4, 128), generator=generator)
        fetched = fetch_rows(table, ids, torch.device("cuda"), stream=stream)
        ids = ids.cuda(non_blocking=True)
        junk = torch.full((4, 128, 512), 7.0, device="cuda")
        found = fetched.rows[places_of(fetched, ids)]
        del fetched
        assert torch.equal(found, on_device[ids])
        del junk


def big_tower() -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
    from transformers import Gemma4VisionConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

    torch.manual_seed(0)
    config = Gemma4VisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        position_embedding_size=256,
    )
    tower = Gemma4VisionModel(config).requires_grad_(False).train()
    grid = torch.stack(torch.meshgrid(torch.arange(12), torch.arange(12), indexing="xy"), -1)
    pixels = torch.rand(2, 144, 768, device="cuda")
    return tower, (pixels, grid.reshape(1, 144, 2).expand(2, -1, -1).cuda())


@STREAMINGS
def test_the_tower_takes_two_layers_of_the_gpu(memory: str) -> None:
    tower, inputs = big_tower()
    stock = copy.deepcopy(tower).cuda()
    expected, activations = peak_bytes(lambda: stock(*inputs).last_hidden_state)
    stock.cpu()
    patches.apply(tower, [VisionStreaming(memory=memory)])
    gc.collect()
    before = torch.cuda.memory_allocated()
    tower.cuda()
    table = tower.patch_embedder.position_embedding_table.nbytes
    assert torch.cuda.memory_allocated() - before < table + 4 * MIB
    layer = sum(p.nbytes for p in tower.encoder.layers[0].parameters())
    total = sum(p.nbytes for p in tower.parameters())
    # Many passes in a row, and the CPU runs ahead of the GPU: no third buffer, no mixed layers.
    for _ in range(10):
        found, peak = peak_bytes(lambda: tower(*inputs).last_hidden_state)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        assert peak < 2 * layer + activations + 8 * MIB
        assert peak < total / 2
    after = torch.cuda.memory_allocated() - before
    assert after < table + found.nbytes + 4 * MIB


@STREAMINGS
def test_passes_back_to_back_do_not_disturb_each_other(memory: str) -> None:
    tower, (pixels, positions) = big_tower()
    stock = copy.deepcopy(tower).cuda()
    batches = [pixels * (i + 1) / 8 for i in range(8)]
    expected = [stock(p, positions).last_hidden_state for p in batches]
    patches.apply(tower, [VisionStreaming(memory=memory)])
    tower.cuda()
    found = [tower(p, positions).last_hidden_state for p in batches]  # no wait in between
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def test_ddp_takes_the_model_once_it_ignores_the_host_parameters() -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = frozen()
    inputs = on_gpu(batch(model))
    expected = loss_and_gradients(copy.deepcopy(model).cuda(), inputs)
    patches.apply(model, ["vision_streaming", "ple_offload"])
    model.cuda()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ignored = [*host_parameters(model), *(name for name, _ in model.named_buffers())]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        # The audio tower, which gets no input, has no gradients.
        wrapped = DistributedDataParallel(model, device_ids=[0], find_unused_parameters=True)
        loss_and_gradients(wrapped, inputs)
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        used = {name: gradients[name] for name in expected[1]}
        assert_close((expected[0], used), expected)
    finally:
        dist.destroy_process_group()
