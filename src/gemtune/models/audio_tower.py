"""The audio tower of E2B and E4B with its projector: left out of a model, and read again for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from gemtune.errors import ModelError

_MODULES = ("audio_tower", "embed_audio")


def has_audio_tower(model_config: Any) -> bool:
    """Whether a Gemma 4 of this configuration has one: E2B and E4B do."""
    return getattr(model_config, "audio_config", None) is not None


def without_audio(model_config: Any) -> Any:
    """A copy of the configuration, as 26B and 31B are: without an audio tower."""
    model_config = copy.deepcopy(model_config)
    model_config.audio_config = None
    return model_config


def leave_out_audio(model: Any) -> None:
    """Take tower and projector out of a model: it is as if it had been built without."""
    for name in _MODULES:
        setattr(model.model, name, None)
    model.config.audio_config = None


@contextmanager
def unread_audio() -> Iterator[None]:
    """Within it transformers reads a Gemma 4 past the audio tower's weights without a warning.

    What it expects to be left over are patterns of the class, which is as before afterwards.
    """
    from transformers import Gemma4ForConditionalGeneration as Gemma4

    own = "_keys_to_ignore_on_load_unexpected" in vars(Gemma4)
    before = Gemma4._keys_to_ignore_on_load_unexpected
    audio = [rf"\.{name}\." for name in _MODULES]
    Gemma4._keys_to_ignore_on_load_unexpected = [*(before or ()), *audio]
    try:
        yield
    finally:
        if own:
            Gemma4._keys_to_ignore_on_load_unexpected = before
        else:
            del Gemma4._keys_to_ignore_on_load_unexpected


def put_back_audio(model: Any, modules: Mapping[str, nn.Module], audio_config: Any) -> None:
    """Undo `leave_out_audio` with the modules of `read_audio`, or of another model."""
    for name in _MODULES:
        setattr(model.model, name, modules[name])
    model.config.audio_config = audio_config


def audio_files(source: str, hub: Mapping[str, str], model_config: Any) -> dict[str, Path]:
    """Name of each tensor of tower and projector -> the safetensors file that has it.

    Headers are read, and no tensor. A hub checkpoint is that of the commit which `model_config`
    was read from, whatever its branch has become since.

    Raises:
        ModelError: one is not there, or has another shape.
        OSError: the checkpoint has no safetensors, or they cannot be reached.
    """
    with torch.device("meta"):
        modules = _build(model_config)
    shapes = {
        f"model.{name}.{key}": list(value.shape)
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    files = _files(source, _pinned(hub, model_config), shapes)
    found: dict[str, list[int]] = {}
    for file in sorted({*files.values()}):
        with safe_open(file, "pt") as opened:
            known = [name for name in opened.keys() if name in shapes]  # noqa: SIM118 - no mapping
            found |= {name: opened.get_slice(name).get_shape() for name in known}
    odd = sorted(name for name, shape in shapes.items() if found.get(name) != shape)
    if odd:
        raise ModelError(
            f"model.audio_tower=false: {source} has {len(odd)} of the audio tower's weights not at "
            f"all, or in another shape, such as {odd[0]}, so that an export could not have them "
            "again. Use model.audio_tower=true."
        )
    return {name: files[name] for name in shapes}


def read_audio(
    source: str, hub: Mapping[str, str], model_config: Any, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Tower and projector of a checkpoint on the CPU, every weight in `dtype`; raises as
    `audio_files`."""
    modules = _build(model_config)
    files = audio_files(source, hub, model_config)
    tensors: dict[str, torch.Tensor] = {}
    for file in {*files.values()}:
        with safe_open(file, "pt") as opened:
            mine = [name for name, place in files.items() if place == file]
            tensors |= {name: opened.get_tensor(name).to(dtype) for name in mine}
    for name, module in modules.items():
        prefix = f"model.{name}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        module.load_state_dict(state, assign=True)
    return modules


def _build(model_config: Any) -> dict[str, nn.Module]:
    from transformers import AutoModel
    from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder

    audio = copy.deepcopy(model_config.audio_config)
    projector = Gemma4MultimodalEmbedder(audio, model_config.text_config)
    return dict(zip(_MODULES, (AutoModel.from_config(audio), projector), strict=True))


def _pinned(hub: Mapping[str, str], model_config: Any) -> dict[str, str]:
    commit = getattr(model_config, "_commit_hash", None)
    return {**hub, "revision": commit} if hub and commit else dict(hub)


def _files(source: str, hub: Mapping[str, str], names: Mapping[str, Any]) -> dict[str, Path]:
    """Of those `names` that the checkpoint has; of one file all of them, looked at or not."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    try:
        single = Path(cached_file(source, SAFE_WEIGHTS_NAME, **hub))
        return dict.fromkeys(names, single)
    except OSError:
        index = Path(cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **hub))
    placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    shards = {placed[name] for name in names if name in placed}
    paths = {shard: Path(cached_file(source, shard, **hub)) for shard in shards}
    return {name: paths[placed[name]] for name in names if name in placed}
