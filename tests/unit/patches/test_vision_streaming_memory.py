"""Where the weights of a streamed tower are at each moment: two buffers on a GPU, one layer of
resident pages on a CPU."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemtune.patches.host_memory import can_map
from gemtune.patches.vision_streaming import DeviceBuffers

pytestmark = pytest.mark.skipif(not can_map(), reason="this system cannot give pages back")


class Stream:
    """A CUDA stream as far as order goes: what is certain to be done before its next operation."""

    def __init__(self) -> None:
        self.done: set[str] = set()

    def record_event(self) -> frozenset[str]:
        return frozenset(self.done)

    def wait_event(self, event: frozenset[str]) -> None:
        self.done |= event

    def wait_stream(self, other: Stream) -> None:
        self.done |= other.done


def test_no_buffer_is_overwritten_before_its_use_or_read_before_its_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, side = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    modules = [torch.nn.Linear(3, 4 + i) for i in range(6)]
    buffers = DeviceBuffers(modules, torch.device("cpu"))
    buffers._side = side
    start_copy = buffers.start_copy

    def logged(index: int) -> None:
        before = buffers._filled[index % 2]
        start_copy(index)
        if buffers._filled[index % 2] is not before:
            # Whoever had the buffer, and whatever ran before the buffers existed, is done.
            assert f"use {index - 2}" in side.done or index < 2
            assert "earlier" in side.done
            side.done.add(f"copy {index}")
            index, weights, _ = buffers._filled[index % 2]
            buffers._filled[index % 2] = (index, weights, side.record_event())

    buffers.start_copy = logged
    now.done.add("earlier")
    sizes = [sum(p.nbytes for p in module.parameters()) for module in modules]
    for index, module in enumerate(modules):
        weights = buffers.take(index)
        buffers.start_next(index)
        assert f"copy {index}" in now.done
        assert f"copy {index + 1}" in side.done or index == 5  # begun before the computation
        assert all(torch.equal(weights[id(p)], p) for p in module.parameters())
        now.done.add(f"use {index}")
        buffers.done(index)
    assert sum(len(b) for b in buffers._buffers) < 2 * max(sizes) + 4 * 256


def test_modules_out_of_order_get_their_own_weights() -> None:
    modules = [torch.nn.Linear(3, 4) for _ in range(5)]
    buffers = DeviceBuffers(modules, torch.device("cpu"))
    for index in (3, 3, 0, 4, 2, 1):
        buffers.start_copy((index + 1) % 5)
        weights = buffers.take(index)
        assert all(torch.equal(weights[id(p)], p) for p in modules[index].parameters())


_WATCH = """
import re, sys, torch
from pathlib import Path
from transformers import Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel
from gemtune import patches
from gemtune.patches.vision_streaming import VisionStreaming

def resident(folder):
    text, total, ours = Path("/proc/self/smaps").read_text(), 0, False
    for line in text.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = folder in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total / 1024

def process(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

config = Gemma4VisionConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
    num_attention_heads=8, num_key_value_heads=8, head_dim=64, position_embedding_size=2048)
tower = Gemma4VisionModel(config).requires_grad_(False).train()
mib = lambda module: sum(p.nbytes for p in module.parameters()) / 2**20
positions = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1)
inputs = torch.rand(1, 36, 768), positions.reshape(1, 36, 2)
expected = tower(*inputs).last_hidden_state
full = process("VmRSS")
folder = sys.argv[1]
patches.apply(tower, [VisionStreaming(folder=folder)])
print("total", mib(tower), "layer", mib(tower.encoder.layers[0]))
print("before", full)
print("after", process("VmRSS"))
print("rest", resident(folder))
for module in (tower.patch_embedder, *tower.encoder.layers):
    module.register_forward_hook(lambda *_: print("released", resident(folder)))
    inner = module.mlp if hasattr(module, "mlp") else module.input_proj
    inner.register_forward_hook(lambda *_: print("used", resident(folder)))
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
start = process("VmRSS")
found = tower(*inputs).last_hidden_state
print("peak", process("VmHWM") - start)
print("equal", int(torch.equal(found, expected)))
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """What a process of its own saw: a tower of more than 150 MiB, its layers 12 MiB each."""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("needs Linux, to see which pages are resident")
    folder = tmp_path_factory.mktemp("pages")
    command = [sys.executable, "-c", _WATCH, str(folder)]
    # glibc keeps what is freed for itself, except large blocks.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout
    assert list(folder.iterdir()) == []
    figures: dict[str, list[float]] = {}
    for name, value in re.findall(r"([a-z]+) ([-\d.]+)", output):
        figures.setdefault(name, []).append(float(value))
    return figures


def test_only_the_layer_in_use_is_resident(watched: dict[str, list[float]]) -> None:
    (total,), (layer,) = watched["total"], watched["layer"]
    assert watched["equal"] == [1]
    assert total > 150
    assert watched["rest"] == [0]
    assert len(watched["used"]) == len(watched["released"]) == 13
    assert max(watched["released"]) == 0
    assert max(watched["used"]) <= 1.1 * layer
    assert max(watched["used"]) > 0.5 * layer


def test_the_process_becomes_smaller_by_the_tower(watched: dict[str, list[float]]) -> None:
    (total,), (layer,) = watched["total"], watched["layer"]
    assert watched["before"][0] - watched["after"][0] > 0.95 * total
    assert watched["peak"][0] < 2 * layer + 10
