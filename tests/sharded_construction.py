"""What it takes to bring a model onto several ranks, and what they hold then."""

from __future__ import annotations

import gc
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gemma4_zoo import TINY_CONFIG
from torch.distributed.tensor import DTensor
from transformers import Gemma4Config

from gemtune import patches
from gemtune.models import ModelConfig, load_model, load_processing
from gemtune.optim import AdamW
from gemtune.parallel.fsdp import shard
from gemtune.parallel.units import find_units
from gemtune.parallel.weights import whole_on_first

SEED = 5
NUM_LAYERS = 12


def bring_up(rank: int, folder: str) -> None:
    """The worker: rank 0 builds a model, the others a skeleton; then it is sharded."""
    config = ModelConfig(weights="random", dtype="float32")
    processing = replace(load_processing(config), model_config=_large())
    patches.apply(load_model(config, processing, SEED, without_weights=True))  # imports
    gc.collect()
    before = _reset_peak()
    model = load_model(config, processing, SEED, without_weights=rank > 0)
    patches.apply(model)
    whole_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    shard(model, find_units(model), torch.device("cpu"), mixed_precision="no")
    gc.collect()
    found: dict[str, Any] = {
        "whole": whole_bytes,
        "peak": _memory("VmHWM") - before,
        "after": _memory("VmRSS") - before,
        "on meta": [
            name
            for name, module in model.named_modules()
            for value in (*vars(module).values(), *module._parameters.values(), *module.buffers())
            if isinstance(value, torch.Tensor) and value.is_meta
        ],
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
    }
    optimizer = AdamW(lr=1e-3).build(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    slots = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    found["parameter bytes"] = _local_bytes(model.parameters())
    found["optimizer bytes"] = _local_bytes(slots)
    differing = []
    original = dict(load_model(config, processing, SEED).named_parameters()) if rank == 0 else {}
    for name, whole in whole_on_first(model.named_parameters()):
        if whole is not None and not torch.equal(whole, original[name]):
            differing.append(name)
    found["differing"] = differing
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.barrier()


def _large() -> Gemma4Config:
    """160 MB in float32, in layers of 13 MB."""
    values = json.loads(TINY_CONFIG.read_text())
    values["text_config"] |= {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": NUM_LAYERS,
        "num_kv_shared_layers": NUM_LAYERS // 2,
        "layer_types": ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2),
        "use_double_wide_mlp": False,
    }
    return Gemma4Config.from_dict(values)


def _local_bytes(tensors: Any) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    """Bytes of resident memory: VmRSS, now; VmHWM, the most since `_reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status).group(1))
