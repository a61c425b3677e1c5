"""The folder that stock transformers, or peft, loads with no gemtune installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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

CARD_FILE = "README.md"
SHARD_BYTES = 5 * 10**9


def export_model(
    model: nn.Module,
    tokenizer: Any,
    image_processor: Any,
    folder: Path,
    processor_file: Path | None = None,
    *,
    card: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    check: Callable[[Path], None] = lambda staging: None,
) -> Path:
    """Write weights, configuration, tokenizer, template and processor settings, by one rename.

    Args:
        model: the plain model, adapters merged. Tied weights are written once.
        folder: where to; what stands there is replaced once the new one is whole and on disk.
        processor_file: the source's own processor_config.json, which also describes video and
            audio; without one only the image settings are written.
        card: the text of README.md.
        shard_bytes: a safetensors file gets no more, unless one tensor has.
        check: called with the finished folder before it is in its place; what it raises keeps it
            from getting there.

    Raises:
        CheckpointError: it cannot be written. What stood there before stays.
    """

    def fill(staging: Path) -> None:
        model.save_pretrained(staging, max_shard_size=shard_bytes)
        _add_legacy_keys(staging / "config.json")
        write_processing(staging, tokenizer, image_processor, processor_file)

    needed_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return put_in_place(folder, fill, needed_bytes, card=card, check=check)


def put_in_place(
    folder: Path,
    fill: Callable[[Path], None],
    needed_bytes: int,
    *,
    card: str | None,
    check: Callable[[Path], None],
) -> Path:
    """Have `fill` write a staging folder, `check` it, and give it its name by one rename.

    Raises:
        CheckpointError: it cannot be written. What stood there before stays.
    """
    staging: Path | None = None
    try:
        staging = staging_beside(folder)
        check_space(staging, needed_bytes)
        fill(staging)
        if card is not None:
            (staging / CARD_FILE).write_text(card, encoding="utf-8")
        _open_to_readers(staging)
        check(staging)
        replace(folder)
    except (OSError, SafetensorError) as error:
        reason = no_space_message(folder.parent, needed_bytes) if is_no_space(error) else error
        raise CheckpointError(f"The model could not be written to {folder}: {reason}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


def write_processing(
    staging: Path, tokenizer: Any, image_processor: Any, processor_file: Path | None
) -> None:
    """Tokenizer with its template, and how media become inputs."""
    tokenizer.save_pretrained(staging)
    if processor_file is not None:
        shutil.copyfile(processor_file, staging / processor_file.name)
    else:
        image_processor.save_pretrained(staging)


def _open_to_readers(folder: Path) -> None:
    """Weights as readable as the rest: safetensors 0.8 lets only the owner read what it writes."""
    mode = next(folder.glob("*.json")).stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def _add_legacy_keys(path: Path) -> None:
    """What older readers know by other names, beside the new ones.

    transformers 5.15 replaced `global_head_dim` and `num_global_key_value_heads` by
    `per_layer_config`; vLLM, llama.cpp and older transformers read the old ones (vllm#51744,
    llama.cpp#26882). The rope of the vision tower, which later releases call "axial", is "default"
    to older ones, and fails there under its new name; the later ones read both.
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
    rope = (config.get("vision_config") or {}).get("rope_parameters") or {}
    if rope.get("rope_type") == "axial":
        rope["rope_type"] = "default"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
