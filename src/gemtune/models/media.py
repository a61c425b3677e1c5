"""How a checkpoint turns videos and audio into inputs, and why it may take none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemtune.models.audio_tower import has_audio_tower

VIDEO_TOKEN = "<|video|>"
_VIDEO_DEFAULTS = {"max_soft_tokens": 70, "num_frames": 32}
_FRAME_OPTIONS = (
    *("do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "rescale_factor", "resample"),
    *("image_mean", "image_std", "patch_size", "pooling_kernel_size", "max_soft_tokens"),
)


def other_media(
    tokenizer: Any, model_config: Any, processor_file: Path | None, *, hears: bool = True
) -> dict[str, Any]:
    """The arguments of `gemtune.data.OtherMedia` for a checkpoint; `hears`: with its audio tower.

    The feature extractor is transformers' own. Its video processor needs torchvision: the frames go
    through the image processor of Pillow instead, with the settings of the video processor.

    `<|video|>` is made a special token where it is none, as `Gemma4Processor` does it.
    """
    stored = {} if processor_file is None else json.loads(processor_file.read_text())
    refusals: dict[str, str] = {}
    found: dict[str, Any] = {"refusals": refusals}
    if why := _why_no_video(tokenizer, model_config):
        refusals["video"] = why
    else:
        options = _VIDEO_DEFAULTS | stored.get("video_processor", {})
        found |= {"frames": _frame_processor(options), "num_frames": options["num_frames"]}
    if why := _why_no_audio(tokenizer, model_config, stored, hears):
        refusals["audio"] = why
    else:
        found["extractor"] = _feature_extractor(stored["feature_extractor"])
        found["max_audio_tokens"] = stored.get("audio_seq_length", 750)
    return found


def _why_no_video(tokenizer: Any, model_config: Any) -> str | None:
    from transformers import __version__

    release = tuple(int(part) for part in __version__.split(".")[:3] if part.isdigit())
    if release == (5, 15, 0) or (5, 19) <= release < (5, 23):
        return (
            f"transformers {__version__} fails on every video (5.15.0 and 5.19 to 5.22 do); "
            "install another, such as 5.23"
        )
    if getattr(model_config, "vision_config", None) is None:
        return "the model has no vision tower (config.json has no vision_config)"
    if VIDEO_TOKEN not in tokenizer.all_special_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO_TOKEN]})
    number = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    if number != model_config.video_token_id:
        return (
            f"the tokenizer has {VIDEO_TOKEN} as {number} and config.json as "
            f"{model_config.video_token_id}"
        )
    return None


def _why_no_audio(
    tokenizer: Any, model_config: Any, stored: dict[str, Any], hears: bool
) -> str | None:
    if not has_audio_tower(model_config):
        return (
            "the model has no audio tower (config.json has no audio_config); of Gemma 4, E2B and "
            "E4B have one"
        )
    if not hears:
        return "model.audio_tower=false leaves the audio tower out; model.audio_tower=true loads it"
    if "feature_extractor" not in stored:
        return "the checkpoint has no processor_config.json with a feature_extractor"
    number = tokenizer.convert_tokens_to_ids(getattr(tokenizer, "audio_token", None) or "<|audio|>")
    if number != model_config.audio_token_id:
        return (
            f"the tokenizer has its audio token as {number} and config.json as "
            f"{model_config.audio_token_id}"
        )
    return None


def _frame_processor(options: dict[str, Any]) -> Any:
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    return Gemma4ImageProcessorPil(**{k: options[k] for k in _FRAME_OPTIONS if k in options})


def _feature_extractor(options: dict[str, Any]) -> Any:
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor

    return Gemma4AudioFeatureExtractor.from_dict(options)
