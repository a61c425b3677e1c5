"""Reads a Gemma 4 checkpoint from a folder or the hub, or builds one from a seed."""

from __future__ import annotations

import contextlib
import copy
import importlib.resources
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from gemtune.errors import ConfigError, ModelError
from gemtune.models.media import other_media
from gemtune.models.parts import PARTS, freeze
from gemtune.models.recomputation import KINDS, recompute, require_kinds
from gemtune.options import option, require_choice, require_range

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BUNDLED = "bundled:"


@dataclass
class ModelConfig:
    """Which Gemma 4, and how it is held in memory."""

    name: str = option("tiny", "short name, part of the default run name")
    path: str = option("bundled:tiny", "hub id, local folder, or bundled:tiny")
    revision: str = option("main", "branch, tag or commit of a hub checkpoint")
    weights: str = option("pretrained", "pretrained, or random: built from run.seed")
    dtype: str = option(
        "auto",
        "of the weights: float32, bfloat16; auto: bfloat16 under an adapter, else float32",
    )
    attention: str = option("sdpa", "sdpa or eager (the audio tower is always eager)")
    gradient_checkpointing: bool = option(
        False, "recompute each layer in backward (non-reentrant): less memory, about 1/3 more time"
    )
    recomputed_layers: list[str] | None = option(
        None,
        f"with gradient_checkpointing, only these kinds of layers, of {', '.join(KINDS)} (those "
        "that share keys and values, whatever they see); null: all",
    )
    freeze: list[str] = option([], f"parts that are not trained, of {', '.join(PARTS)}")
    neftune_alpha: float | None = option(
        None, "NEFTune: noise on text embeddings in training, of alpha / sqrt(tokens * width)"
    )

    def __post_init__(self) -> None:
        if self.dtype == "float16":
            raise ConfigError(
                "model.dtype=float16 overflows in Gemma 4's MLP products and vision pooler "
                "(transformers#46277). Use bfloat16 or float32."
            )
        require_choice("model.dtype", self.dtype, [*_DTYPES, "auto"])
        require_choice("model.weights", self.weights, ["pretrained", "random"])
        require_choice("model.attention", self.attention, ["sdpa", "eager"])
        require_range("model.neftune_alpha", self.neftune_alpha, above=0)
        for part in self.freeze:
            require_choice("model.freeze", part, PARTS)
        self._check_recomputed_layers()

    def _check_recomputed_layers(self) -> None:
        if self.recomputed_layers is None:
            return
        for kind in self.recomputed_layers:
            require_choice("model.recomputed_layers", kind, KINDS)
        named = f"model.recomputed_layers=[{','.join(self.recomputed_layers)}]"
        if not self.recomputed_layers:
            raise ConfigError(
                f"{named} names no layers. Name kinds of {', '.join(KINDS)}, or recompute nothing "
                "with model.gradient_checkpointing=false and without this key."
            )
        if not self.gradient_checkpointing:
            raise ConfigError(
                f"{named} chooses among layers that nothing recomputes. Add "
                "model.gradient_checkpointing=true, or leave it out."
            )

    def resolve_dtype(self, *, frozen: bool) -> None:
        """Decide "auto". AdamW in bfloat16 rounds most updates of a trained weight away."""
        if self.dtype == "auto":
            self.dtype = "bfloat16" if frozen else "float32"


@dataclass
class Processing:
    """What turns conversations into model inputs, and the configuration of the model."""

    tokenizer: Any
    image_processor: Any
    model_config: Any
    source: str
    """The hub id or folder it was read from."""
    hub_options: dict[str, str]
    processor_file: Path | None
    """Its processor_config.json, which also describes video and audio, where it has one."""
    other_media: dict[str, Any]
    """How it turns these into inputs: the arguments of `gemtune.data.OtherMedia`."""


def load_processing(config: ModelConfig) -> Processing:
    """Tokenizer, image processor and configuration: small files, no weights.

    The image processor is the PIL one: it needs no torchvision and gives the same pixels.

    Raises:
        ModelError: nothing there, no access, not a Gemma 4, or no chat template.
        ConfigError: `recomputed_layers` names a kind of layers that this Gemma 4 lacks.
    """
    from transformers import AutoTokenizer
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    source = _resolve(config.path)
    hub = {} if Path(source).is_dir() else {"revision": config.revision}
    model_config = _read(source, lambda: _read_model_config(source, hub))
    require_kinds(config.recomputed_layers, model_config)
    tokenizer = _read(source, lambda: AutoTokenizer.from_pretrained(source, **hub))
    image_processor = _read(source, lambda: Gemma4ImageProcessorPil.from_pretrained(source, **hub))
    if not tokenizer.chat_template:
        raise ModelError(
            f"{source} has no chat template (base models ship none). Use the instruction-tuned "
            "checkpoint (its name ends in -it), or copy its chat_template.jinja there."
        )
    processor_file = _processor_file(source, hub)
    others = _read(source, lambda: other_media(tokenizer, model_config, processor_file))
    return Processing(tokenizer, image_processor, model_config, source, hub, processor_file, others)


def load_model(
    config: ModelConfig, processing: Processing, seed: int, *, without_weights: bool = False
) -> nn.Module:
    """The model on the CPU, in training mode, with parts frozen.

    `without_weights`: on the meta device, where tensors have no values and take no memory.

    Raises:
        ModelError: the weights cannot be read.
        ConfigError: `recomputed_layers` names a kind of layers that the model lacks.
    """
    config.resolve_dtype(frozen=False)  # unless that was decided before
    if without_weights:
        with torch.device("meta"):
            model = _skeleton(config, processing)
    else:
        model = _build(config, processing, seed)
    freeze(model, config.freeze)
    if config.gradient_checkpointing:
        recompute(model, config.recomputed_layers)
    return model.train()


def _skeleton(config: ModelConfig, processing: Processing) -> nn.Module:
    """A model of the configuration, on torch's default device."""
    from transformers import Gemma4ForConditionalGeneration, GenerationConfig

    model_config = copy.deepcopy(processing.model_config)
    model_config._attn_implementation = _attention(config)
    model = Gemma4ForConditionalGeneration(model_config)
    with contextlib.suppress(OSError):  # a checkpoint without one has the settings of its config
        model.generation_config = GenerationConfig.from_pretrained(
            processing.source, **processing.hub_options
        )
    # Parameters only: buffers such as the RoPE frequencies lose accuracy in bfloat16.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(_DTYPES[config.dtype])
    return model


def _attention(config: ModelConfig) -> dict[str, str]:
    # A dict, because asking for SDPA as a whole is refused where there is an audio tower.
    return {"text_config": config.attention, "vision_config": config.attention}


def _build(config: ModelConfig, processing: Processing, seed: int) -> nn.Module:
    from transformers import Gemma4ForConditionalGeneration

    source, hub = processing.source, processing.hub_options
    if config.weights == "random":
        torch.manual_seed(seed)
        return _skeleton(config, processing)
    model, found = _read(
        source,
        lambda: Gemma4ForConditionalGeneration.from_pretrained(
            source,
            config=processing.model_config,
            dtype=_DTYPES[config.dtype],
            attn_implementation=_attention(config),
            output_loading_info=True,
            **hub,
        ),
    )
    if found["missing_keys"]:
        # transformers would go on with random values in their place.
        missing = sorted(found["missing_keys"])
        raise ModelError(
            f"{source} lacks {len(missing)} of the model's weights, such as {missing[0]}: the "
            "download is incomplete, or config.json belongs to another checkpoint."
        )
    return model


def _read_model_config(source: str, hub: dict[str, str]) -> Any:
    from transformers import AutoConfig

    model_config = AutoConfig.from_pretrained(source, **hub)
    if model_config.model_type != "gemma4":
        hint = (
            " The 12B (gemma4_unified) has no vision tower and is not supported yet."
            if model_config.model_type == "gemma4_unified"
            else ""
        )
        raise ModelError(
            f"{source} is a '{model_config.model_type}' model, not a Gemma 4 (model_type gemma4)."
            f"{hint} Choose model=e2b, e4b, 26b_a4b or 31b, or give a Gemma 4 with model.path=."
        )
    return model_config


def _processor_file(source: str, hub: dict[str, str]) -> Path | None:
    from transformers.utils import cached_file

    try:
        return Path(cached_file(source, "processor_config.json", **hub))
    except OSError:
        return None


def _resolve(path: str) -> str:
    if path.startswith(_BUNDLED):
        folder = Path(str(importlib.resources.files("gemtune"))) / "assets"
        folder = folder / path.removeprefix(_BUNDLED)
        if not folder.is_dir():
            raise ModelError(f"model.path={path}: the only bundled model is bundled:tiny.")
        return str(folder)
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelError(
                f"model.path={path} is a folder without config.json, so it is no checkpoint. "
                "Give the folder that holds config.json, the safetensors and the tokenizer."
            )
        return str(local)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local:
        raise ModelError(
            f"model.path={path}: there is no such folder. Give a local checkpoint folder, or a hub "
            "id such as google/gemma-4-E2B-it."
        )
    return path


def _read(source: str, read: Any) -> Any:
    """`read()`, with what can go wrong on the way to the hub or in a folder put in plain words."""
    try:
        return read()
    except (OSError, ValueError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if Path(source).is_dir():
            raise ModelError(
                f"The checkpoint folder {source} cannot be read: {first_line}\n"
                "It must hold config.json, model*.safetensors, the tokenizer with its chat "
                "template, and processor_config.json (or preprocessor_config.json)."
            ) from error
        raise ModelError(
            f"{source} cannot be read from the Hugging Face hub: {first_line}\n"
            "Any of these helps:\n"
            f"  1. accept the licence at https://huggingface.co/{source}, then run: hf auth login\n"
            "  2. check the network, or unset HF_HUB_OFFLINE\n"
            "  3. give a local copy of the checkpoint: model.path=FOLDER"
        ) from error
