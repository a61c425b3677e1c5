"""Exported folders, and small models to check without a run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Gemma4ForConditionalGeneration

from gemtune.models import ModelConfig, Processing, load_processing

QUICK = ("loop.max_steps=2", "data.eval_generate_rows=0", "optim.lr=2e-2")
IDS = torch.arange(20, 60)[None]


def tensor_names(folder: Path) -> set[str]:
    """Of all its safetensors files."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found = set(opened.keys())
        assert not found & names, "a tensor is in two shards"
        names |= found
    return names


def patterns(names: Iterable[str]) -> set[str]:
    """The names with {n} for the number of a layer."""
    return {re.sub(r"\.layers\.\d+\.", ".layers.{n}.", name) for name in names}


def processing_of(folder: str | Path) -> Processing:
    return load_processing(ModelConfig(path=str(folder)))


@torch.no_grad()
def shift(model: Any, name: str, amount: float) -> None:
    """Change one value of a weight."""
    model.get_parameter(name).view(-1)[3] += amount


def on(base: Path) -> tuple[str, ...]:
    return ("model.weights=pretrained", f"model.path={base}", "model.dtype=bfloat16")


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, mm_token_type_ids=torch.zeros_like(IDS)).logits.float()


def stock(folder: Path) -> Any:
    return Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def with_peft(base: Path, folder: Path) -> Any:
    """In float32, on weights as training held them."""
    from peft import PeftModel

    model = stock(base)
    for value in model.state_dict().values():
        value.copy_(value.to(torch.bfloat16))
    return PeftModel.from_pretrained(model, str(folder))
