"""The adapter alone, as `peft.PeftModel.from_pretrained(base, folder)` reads it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gemtune.adapters import Lora
from gemtune.config import RunConfig
from gemtune.errors import ConfigError

WEIGHTS_FILE = "adapter_model.safetensors"
_MERGED = "Export the whole model with kind=merged."


def require_adapter_alone(config: RunConfig) -> None:
    """Raise ConfigError, with the reason, where the adapter is not all that was trained, or what it
    belongs to is in no folder that stock transformers could load."""
    adapter = config.adapter
    if not isinstance(adapter, Lora):
        raise ConfigError(
            f"kind=adapter: this run trained the model itself, without an adapter. {_MERGED}"
        )
    if adapter.also_train:
        raise ConfigError(
            f"kind=adapter: adapter.also_train=[{','.join(adapter.also_train)}] trained weights of "
            f"the model in full, which an adapter does not hold. {_MERGED}"
        )
    if config.model.weights == "random":
        raise ConfigError(
            "kind=adapter: the model below the adapter was built from run.seed "
            f"(model.weights=random) and is in no folder that peft could load. {_MERGED}"
        )


def write_adapter(staging: Path, model: Any, config: RunConfig, base: str) -> None:
    """Write adapter_config.json, with targets as full paths, and adapter_model.safetensors.

    Args:
        model: the adapted model, as `gemtune.adapters.attach` made it.
        base: what the files say that the adapter belongs to: a hub id, or a folder.
    """
    assert isinstance(config.adapter, Lora)
    settings = copy.deepcopy(model.peft_config["default"])
    # peft keeps the shortest endings that are unique in this model. The tied head it adds itself.
    settings.target_modules = sorted({*model.base_model.targeted_module_names} - {"lm_head"})
    settings.base_model_name_or_path = base
    settings.revision = config.model.revision if config.model.revision != "main" else None
    settings.inference_mode = True
    settings.save_pretrained(str(staging))
    save_file(adapter_tensors(model), staging / WEIGHTS_FILE, metadata={"format": "pt"})


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of the file, by their names in it."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in [name for name in found if ".lora_embedding_" in name]:
        # peft looks for the tied head's factors too: the same, the other way round.
        other = "lora_B" if name.endswith("_A") else "lora_A"
        found[f"base_model.model.lm_head.{other}.weight"] = found[name].T
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


@torch.no_grad()
def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that the file holds."""
    return [p for name, p in model.named_parameters() if "lora_" in name]
