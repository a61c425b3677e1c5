"""Exported folders, and small models to check without a run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gemtune.models import ModelConfig, Processing, load_processing


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
