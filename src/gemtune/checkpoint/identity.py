"""What a checkpoint was made with: the frozen weights below it, and the software."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from gemtune.models.stored import StoredTensor

_SAMPLES = 64  # values of each parameter
_PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy", "safetensors")
# What transformers writes into a configuration that does not describe the model.
_INCIDENTAL = frozenset(
    {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "_attn_implementation"}
)

_NOT_STORED: Mapping[nn.Parameter, StoredTensor] = MappingProxyType({})


def base_identity(
    model: nn.Module, stored: Mapping[nn.Parameter, StoredTensor] = _NOT_STORED
) -> dict[str, str] | None:
    """What the frozen parameters are: hashes of their names, shapes, types and of 64 values each.

    A checkpoint holds what is trained, so the rest must be the same when the run goes on: another
    base under the same path would be learned on without a word. A fine-tuned variant differs in
    its values and not in its index, hence the values. Those of a parameter on meta that is `stored`
    in a file are read there, which gives the same. None where another one is on meta.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            continue
        if parameter.is_meta and parameter not in stored:
            return None
        kind = str(parameter.dtype).removeprefix("torch.")
        digest.update(f"{name} {kind} {list(parameter.shape)}\n".encode())
        for tensor in _plain(parameter.detach()):
            step = max(1, tensor.numel() // _SAMPLES)
            if tensor.is_meta:
                places = range(0, tensor.numel(), step)[:_SAMPLES]
                values = stored[parameter].values_at(places).to(tensor.dtype)
            else:
                values = tensor.flatten()[::step][:_SAMPLES]
            digest.update(values.cpu().double().numpy().tobytes())
    return {"config": _config_hash(model), "frozen_weights": digest.hexdigest()}


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor, or what one of a class of its own (in 8 bits by torchao) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def _config_hash(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    text = json.dumps(_without_incidental(values), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_incidental(values: Any) -> Any:
    if isinstance(values, dict):
        return {k: _without_incidental(v) for k, v in values.items() if k not in _INCIDENTAL}
    if isinstance(values, list | tuple):
        return [_without_incidental(v) for v in values]
    return values


def software() -> dict[str, Any]:
    """Versions of what computes, and the git revision of the working folder's code, if any."""
    versions: dict[str, Any] = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    versions["cuda"] = torch.version.cuda
    return {"versions": versions, "git": _git_revision()}


def _git_revision() -> dict[str, Any] | None:
    """Commit and whether files differ from it; None: this code is in no git repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ["git", "-C", str(here), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return found.stdout.strip()

    try:
        # Not the repository of somebody who installed gemtune below it.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
