"""Reads a Gemma 4 checkpoint from a folder or the hub, or builds one from a seed."""

from __future__ import annotations

import contextlib
import copy
import importlib.resources
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors import SafetensorError
from torch import nn

from gemtune.errors import ConfigError, ModelError
from gemtune.models.audio_tower import (
    audio_files,
    has_audio_tower,
    leave_out_audio,
    put_back_audio,
    read_audio,
    unread_audio,
    without_audio,
)
from gemtune.models.media import other_media
from gemtune.models.parts import PARTS, freeze
from gemtune.models.recomputation import KINDS, recompute, require_kinds
from gemtune.models.stored import cached_path
from gemtune.options import option, require_choice, require_range

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BUNDLED = "bundled:"
_IMAGES_BOTH_WAYS_IN_ALL_LAYERS = (Version("5.9"), Version("5.13"))
"""Releases of transformers, from the first to before the second."""


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
    audio_tower: bool = option(
        True,
        "false: E2B's and E4B's audio tower with its projector is not loaded, 0.6 GiB in bfloat16; "
        "no row may have audio, and exports have the tower again, as the base has it",
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

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights, once "auto" is decided."""
        return _DTYPES[self.dtype]

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
    built_as = model_config if config.audio_tower else without_audio(model_config)
    require_kinds(config.recomputed_layers, built_as)
    tokenizer = _read(source, lambda: AutoTokenizer.from_pretrained(source, **hub))
    image_processor = _read(source, lambda: Gemma4ImageProcessorPil.from_pretrained(source, **hub))
    if not tokenizer.chat_template:
        raise ModelError(
            f"{source} has no chat template (base models ship none). Use the instruction-tuned "
            "checkpoint (its name ends in -it), or copy its chat_template.jinja there."
        )
    processor_file = cached_path(source, "processor_config.json", hub)
    others = _read(
        source,
        lambda: other_media(tokenizer, model_config, processor_file, hears=config.audio_tower),
    )
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
    return finished(model, config)


def finished(model: nn.Module, config: ModelConfig) -> nn.Module:
    """The model as it is trained: parts frozen, layers recomputed where asked, training mode."""
    freeze(model, config.freeze)
    if config.gradient_checkpointing:
        recompute(model, config.recomputed_layers)
    return model.train()


def leaves_out_audio(config: ModelConfig, processing: Processing) -> bool:
    """Whether the checkpoint has an audio tower that the model is built without."""
    return not config.audio_tower and has_audio_tower(processing.model_config)


def put_back_audio_tower(
    model: nn.Module, config: ModelConfig, processing: Processing, seed: int
) -> nn.Module:
    """The model of `load_model` with the audio tower that it was built without, if it was.

    Tower and projector have the weights that they would have had from the start: the checkpoint's
    in `config.dtype`, of random ones those of the seed. They are on the CPU and for exports: no
    patch knows of them.

    Raises:
        ModelError: the weights cannot be read.
    """
    if not leaves_out_audio(config, processing):
        return model
    if config.weights == "random":
        donor = _build(replace(config, audio_tower=True), processing, seed)
        modules, audio_config = dict(donor.model.named_children()), donor.config.audio_config
    else:
        source, model_config = processing.source, processing.model_config
        hub, dtype = processing.hub_options, _DTYPES[config.dtype]
        modules = _read(source, lambda: read_audio(source, hub, model_config, dtype))
        audio_config = copy.deepcopy(model_config.audio_config)
        # transformers notes it in every part of what it reads.
        audio_config.dtype = model.config.text_config.dtype
    put_back_audio(model, modules, audio_config)
    return model


def _skeleton(config: ModelConfig, processing: Processing) -> nn.Module:
    """A model of the configuration, on torch's default device."""
    from transformers import Gemma4ForConditionalGeneration

    model_config = copy.deepcopy(processing.model_config)
    model_config._attn_implementation = _attention(config)
    model = Gemma4ForConditionalGeneration(model_config)
    if leaves_out_audio(config, processing):
        leave_out_audio(model)  # and not before: a seed gives the rest the same weights
    _set_generation(model, processing)
    # Parameters only: buffers such as the RoPE frequencies lose accuracy in bfloat16.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(config.torch_dtype)
    return model


def _set_generation(model: nn.Module, processing: Processing) -> None:
    from transformers import GenerationConfig

    with contextlib.suppress(OSError):  # a checkpoint without one has the settings of its config
        model.generation_config = GenerationConfig.from_pretrained(
            processing.source, **processing.hub_options
        )


def _attention(config: ModelConfig) -> dict[str, str]:
    # A dict, because asking for SDPA as a whole is refused where there is an audio tower.
    return {"text_config": config.attention, "vision_config": config.attention}


def _build(config: ModelConfig, processing: Processing, seed: int) -> nn.Module:
    if config.weights == "random":
        torch.manual_seed(seed)
        return _skeleton(config, processing)
    return from_checkpoint(config, processing)


def from_checkpoint(
    config: ModelConfig, processing: Processing, state_dict: dict[str, Any] | None = None
) -> nn.Module:
    """What transformers makes of the checkpoint, or of a `state_dict` as a checkpoint has it.

    Raises:
        ModelError: it cannot be read, lacks some of the weights, or has them in another shape.
    """
    from transformers import Gemma4ForConditionalGeneration

    source, hub, model_config = processing.source, processing.hub_options, processing.model_config
    unread: Any = contextlib.nullcontext()
    if leaves_out_audio(config, processing):
        # Now, and not when the training is done: whether an export can have it again.
        _read(source, lambda: audio_files(source, hub, processing.model_config))
        unread, model_config = unread_audio(), without_audio(model_config)
    where, options = (source, hub) if state_dict is None else (None, {})
    with unread, reading_errors(source):
        model, found = Gemma4ForConditionalGeneration.from_pretrained(
            where,
            config=model_config,
            dtype=config.torch_dtype,
            attn_implementation=_attention(config),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below
            state_dict=state_dict,
            **options,
        )
    if state_dict is not None:
        _set_generation(model, processing)
    # transformers would go on with random values in the place of both.
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ModelError(
            f"{source} lacks {len(missing)} of the model's weights, such as {missing[0]}: the "
            "download is incomplete, or config.json belongs to another checkpoint."
        )
    if found["mismatched_keys"]:
        name, there, wanted = min(found["mismatched_keys"])
        raise ModelError(
            f"{source} has {name} as {list(there)} where config.json says {list(wanted)}: it "
            "belongs to another checkpoint."
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
    _refuse_wrong_masks(model_config)
    return model_config


def _refuse_wrong_masks(model_config: Any) -> None:
    """The 26B and 31B see an image in both directions in layers of sliding attention only."""
    first, fixed = _IMAGES_BOTH_WAYS_IN_ALL_LAYERS
    text, installed = model_config.get_text_config(), version("transformers")
    in_both = getattr(text, "use_bidirectional_attention", None) == "vision"
    if in_both and first <= Version(installed) < fixed:
        raise ModelError(
            f"transformers {installed} lets this model's layers of full attention see images in "
            "both directions. It was not made for that, and no later release does it: what is "
            f"learned here would not fit there. Install transformers {fixed} or newer."
        )


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
    with reading_errors(source):
        return read()


@contextlib.contextmanager
def reading_errors(source: str) -> Iterator[None]:
    """What can go wrong on the way to the hub or in a folder, put in plain words."""
    try:
        yield
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
