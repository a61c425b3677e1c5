"""The result of a run: a folder that stock transformers loads, with no gemtune installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from gemtune.checkpoint.folder import check_space
from gemtune.errors import CheckpointError


def export_model(
    model: nn.Module,
    tokenizer: Any,
    image_processor: Any,
    folder: Path,
    processor_file: Path | None = None,
) -> Path:
    """Write weights, configuration, tokenizer, template and processor settings, by one rename.

    Args:
        model: the plain model, adapters merged.
        folder: where to; what stands there is replaced once the new one is whole.
        processor_file: the source's own processor_config.json, which also describes video and
            audio; without one only the image settings are written.

    Raises:
        CheckpointError: it cannot be written. What stood there before stays.
    """
    staging = folder.with_name(f".staging-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        check_space(staging, sum(p.numel() * p.element_size() for p in model.parameters()))
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if processor_file is not None:
            shutil.copyfile(processor_file, staging / processor_file.name)
        else:
            image_processor.save_pretrained(staging)
        _add_legacy_keys(staging / "config.json")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"The model could not be written to {folder}: {error}") from error
    if folder.exists():
        shutil.rmtree(folder)
    staging.rename(folder)
    return folder


def _add_legacy_keys(path: Path) -> None:
    """Head sizes of the full-attention layers under the names that older readers know.

    transformers 5.15 replaced `global_head_dim` and `num_global_key_value_heads` by
    `per_layer_config`; vLLM, llama.cpp and older transformers read the old ones (vllm#51744,
    llama.cpp#26882).
    """
    config = json.loads(path.read_text())
    text = config["text_config"]
    full = next(i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention")
    overrides = {int(layer): values for layer, values in text.get("per_layer_config", {}).items()}
    of_full = overrides.get(full, {})
    text.setdefault("global_head_dim", of_full.get("head_dim", text["head_dim"]))
    text.setdefault("num_global_key_value_heads", of_full.get("num_key_value_heads"))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
