"""The result of a run: a folder that stock transformers loads, with no gemtune installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from gemtune.checkpoint.disk import (
    check_space,
    is_no_space,
    no_space_message,
    replace,
    staging_beside,
)
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
        folder: where to; what stands there is replaced once the new one is whole and on disk.
        processor_file: the source's own processor_config.json, which also describes video and
            audio; without one only the image settings are written.

    Raises:
        CheckpointError: it cannot be written. What stood there before stays.
    """
    needed_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    staging: Path | None = None
    try:
        staging = staging_beside(folder)
        check_space(staging, needed_bytes)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if processor_file is not None:
            shutil.copyfile(processor_file, staging / processor_file.name)
        else:
            image_processor.save_pretrained(staging)
        _add_legacy_keys(staging / "config.json")
        _open_to_readers(staging)
        replace(folder)
    except (OSError, SafetensorError) as error:
        reason = no_space_message(folder.parent, needed_bytes) if is_no_space(error) else error
        raise CheckpointError(f"The model could not be written to {folder}: {reason}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


def _open_to_readers(folder: Path) -> None:
    """Weights as readable as the rest: safetensors 0.8 lets only the owner read what it writes."""
    mode = (folder / "config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def _add_legacy_keys(path: Path) -> None:
    """Head sizes of the full-attention layers under the names that older readers know.

    transformers 5.15 replaced `global_head_dim` and `num_global_key_value_heads` by
    `per_layer_config`; vLLM, llama.cpp and older transformers read the old ones (vllm#51744,
    llama.cpp#26882).
    """
    config = json.loads(path.read_text())
    text = config["text_config"]
    full = next(i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention")
    # Its keys are layer numbers as text, padded to one width ("05") from ten layers on.
    overrides = {
        int(layer): values for layer, values in (text.get("per_layer_config") or {}).items()
    }
    of_full = overrides.get(full, {})
    text.setdefault("global_head_dim", of_full.get("head_dim", text["head_dim"]))
    text.setdefault("num_global_key_value_heads", of_full.get("num_key_value_heads"))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
