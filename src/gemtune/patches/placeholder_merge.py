"""Image and video features put in the place of their tokens, without copies and without a wait."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from gemtune.patches.base import APPLIED, NOT_APPLICABLE, Plan, Wrap
from gemtune.patches.fingerprint import require_known

# Set on the modules while the stock forward runs over embeddings that are merged already.
_IS_MERGED = "_gemtune_is_merged"
_PER_LAYER_INPUTS = "_gemtune_per_layer_inputs"

# The forward is called, not replaced; what it does around the merge has to be known all the same.
# get_image_features and get_video_features are not called: from 5.15.0 they cut the features into
# one tensor an image, for which the host waits until the tower is done, only to join them again.
_KNOWN = {
    "forward": (
        "2f9609baa6d2",  # 5.5.2-5.5.4
        "0145c892a90a",  # 5.6.0-5.7.0
        "ab2a780566e1",  # 5.8.0-5.8.1
        "e7c7a22a3185",  # 5.9.0
        "4e4db178d130",  # 5.10.0-5.12.1
        "e3f2eab59b96",  # 5.13.0-5.14.1
        "57c5e24113dd",  # 5.15.0
        "3a1e7196ea44",  # 5.15.1-5.17.0
        "4fa202015c6f",  # 5.18.0
        "1f0864455566",  # 5.19.0-5.22.2
        "e6fee425378a",  # 5.23.0
    ),
    "get_placeholder_mask": ("42f8900b75d0", "b14a3aa93433"),  # 5.5.2-5.14.1, from 5.15.0
    "get_image_features": ("b5c2c8df1d09", "ba20b3a86ab7"),  # 5.5.2-5.14.1, from 5.15.0
    "get_video_features": (
        "7b547931e160",  # 5.5.2-5.14.1
        "0b54ca6cc72c",  # 5.15.0-5.18.0
        "d0722c543158",  # from 5.19.0
    ),
}
_KNOWN_PER_LAYER_INPUTS = ("809ae8a75b38", "7b3f1d6ec863")  # 5.5.2-5.20.2, from 5.21.0


def merge_features(
    embeddings_BSH: torch.Tensor, mask_BS: torch.Tensor, features_FH: torch.Tensor
) -> torch.Tensor:
    """The embeddings with row f of the features at the f-th position where the mask is set.

    Equal to `embeddings.masked_scatter(mask[..., None], features)`, value and gradients, for a mask
    of exactly F positions; the caller checks that. On CUDA the host waits for nothing. Backward
    keeps F indices.
    """
    # A mask of fewer positions is filled up with -1, which index_copy refuses on every device.
    positions_F = torch.nonzero_static(mask_BS.flatten(), size=features_FH.shape[0]).squeeze(1)
    rows = embeddings_BSH.flatten(0, 1).index_copy(0, positions_F, features_FH)
    return rows.view_as(embeddings_BSH)


class _Count:
    """How often a mask is set. On CUDA it travels to the host while the device goes on working."""

    def __init__(self, mask: torch.Tensor) -> None:
        self._count = mask.sum()
        self._arrived = None
        if mask.is_cuda:
            self._count = self._count.to("cpu", non_blocking=True)  # pinned
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(mask.device))

    def require(self, kind: str, num_features: int) -> None:
        """ValueError, in the words of transformers, unless there are as many features."""
        # This waits for what was queued before the count, not for the tower behind it: the device
        # has work while the host looks. A device-side assertion would not wait at all, but it
        # ends the process with a CUDA error in the place of this one.
        if self._arrived is not None:
            self._arrived.synchronize()
        if int(self._count) != num_features:
            raise ValueError(
                f"{kind.capitalize()} features and {kind} tokens do not match, tokens: "
                f"{int(self._count)}, features: {num_features}"
            )


def _features_of(model: nn.Module, pixels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[images or frames, patches, ...] -> [F, H], those of all images one after the other."""
    outputs = model.vision_tower(pixel_values=pixels, pixel_position_ids=positions)
    return model.embed_vision(inputs_embeds=outputs.last_hidden_state)


def _media(inputs: dict[str, Any], frames_are_flat: bool) -> dict[str, tuple[torch.Tensor, ...]]:
    """Pixels and patch positions of what was given."""
    media = {}
    if inputs.get("pixel_values") is not None:
        media["image"] = (inputs["pixel_values"], inputs.get("image_position_ids"))
    if inputs.get("pixel_values_videos") is not None:
        video = (inputs["pixel_values_videos"], inputs.get("video_position_ids"))
        # [videos, frames, patches, ...] until transformers 5.19
        media["video"] = video if frames_are_flat else tuple(part.flatten(0, 1) for part in video)
    return media


def _is_for_stock(inputs: dict[str, Any], frames_are_flat: bool) -> bool:
    """Calls that the stock forward gets as they are.

    With a cache (generation) there is nothing to save, and 5.5 derives its mask from whether pixels
    were passed. Audio is merged by transformers. What is refused there is refused in its words.
    """
    lacks_frame_counts = (
        frames_are_flat
        and inputs.get("pixel_values_videos") is not None
        and inputs.get("num_frames_per_video") is None
    )
    others = (
        "inputs_embeds",
        "input_features",
        "past_key_values",
        "per_layer_inputs",
        "mm_encoder_outputs",
    )
    return (
        inputs.get("input_ids") is None
        or any(inputs.get(name) is not None for name in others)
        or lacks_frame_counts
        or torch.compiler.is_compiling()
    )


def _merging_forward(parameters: tuple[str, ...]) -> Callable[..., Any]:
    """What goes around a forward of these parameters: merge, then run it on the embeddings."""
    frames_are_flat = "num_frames_per_video" in parameters  # from 5.19.0
    takes_per_layer_inputs = "per_layer_inputs" in parameters  # from 5.9.0

    def around(self: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(parameters, args, strict=False)) | kwargs
        if _is_for_stock(inputs, frames_are_flat):
            return inner(*args, **kwargs)
        media = _media(inputs, frames_are_flat)
        has_per_layer_inputs = bool(self.config.get_text_config().hidden_size_per_layer_input)
        if not media and not (has_per_layer_inputs and takes_per_layer_inputs):
            return inner(*args, **kwargs)  # which makes no unused tensor, or cannot be kept from it
        embeddings, per_layer_inputs, features = _embed(
            self, inputs["input_ids"], media, has_per_layer_inputs
        )
        inputs |= {"input_ids": None, "pixel_values": None, "pixel_values_videos": None}
        inputs["inputs_embeds"] = embeddings
        if takes_per_layer_inputs:
            inputs["per_layer_inputs"] = per_layer_inputs
        return_dict = inputs.pop("return_dict", None)
        vars(self)[_IS_MERGED] = True
        vars(self.language_model)[_PER_LAYER_INPUTS] = per_layer_inputs
        try:
            output = inner(**inputs, return_dict=True)
        finally:
            del vars(self)[_IS_MERGED], vars(self.language_model)[_PER_LAYER_INPUTS]
        if "image" in features:
            output = dataclasses.replace(output, image_hidden_states=features["image"])
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    return around


def _embed(
    model: nn.Module,
    input_ids_BS: torch.Tensor,
    media: dict[str, tuple[torch.Tensor, ...]],
    has_per_layer_inputs: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    """Merged embeddings [B, S, H], per-layer inputs of the text, and the features by kind."""
    *masks, audio_mask = model.get_placeholder_mask(input_ids_BS, None)
    masks = dict(zip(("image", "video"), masks, strict=True))
    counts = {kind: _Count(masks[kind]) for kind in media}
    is_placeholder = masks["image"] | masks["video"] | audio_mask
    text_ids = input_ids_BS.masked_fill(is_placeholder, model.config.text_config.pad_token_id)
    embeddings = model.get_input_embeddings()(text_ids)
    per_layer_inputs = None
    if has_per_layer_inputs:
        per_layer_inputs = model.language_model.get_per_layer_inputs(text_ids, None)
    features = {}
    for kind, (pixels, positions) in media.items():
        found = _features_of(model, pixels, positions).to(embeddings.device, embeddings.dtype)
        counts[kind].require(kind, found.shape[0])
        embeddings = merge_features(embeddings, masks[kind].to(embeddings.device), found)
        features[kind] = found
    return embeddings, per_layer_inputs, features


def _no_placeholders(
    self: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, ...]:
    """Stock would compare every merged embedding with those of the placeholders."""
    if _IS_MERGED not in vars(self):
        return inner(*args, **kwargs)
    embeddings = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[1]
    nowhere = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
    return nowhere, nowhere, nowhere


def _stashed_per_layer_inputs(
    self: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any
) -> torch.Tensor:
    """5.5-5.8 have no parameter for them, and would search the vocabulary for every embedding."""
    stashed = vars(self).get(_PER_LAYER_INPUTS)
    return inner(*args, **kwargs) if stashed is None else stashed


@dataclasses.dataclass(frozen=True)
class PlaceholderMerge:
    """The merge of text and media in training and evaluation; calls with a cache stay as they are.

    Stock copies the features to count them, scatters them by a mask of B*S*H elements, and on CUDA
    the host waits each time until the tower is done; for models with per-layer inputs it makes a
    second [B, S, H] tensor that nothing reads. Here the features are written to their rows. A wrong
    number of features is a ValueError in the words of transformers, before anything is computed
    with them.

    In transformers 5.5-5.8 the unused tensor stays. Those of 5.15.0 and 5.19-5.22 fail on every
    video, and do not with this patch.
    """

    name: ClassVar[str] = "placeholder_merge"

    def plan(self, model: nn.Module) -> Plan:
        """Wraps of each Gemma4Model. PatchError for one that was not read and proven equal."""
        found = [
            (site or "model", module)
            for site, module in model.named_modules()
            if type(module).__name__ == "Gemma4Model"
        ]
        if not found:
            return Plan(NOT_APPLICABLE, "the model has no Gemma4Model, which merges text and media")
        changes = []
        for site, module in found:
            language_model = module.language_model
            for method, known in _KNOWN.items():
                require_known(self.name, getattr(type(module), method), known)
            get_per_layer_inputs = type(language_model).get_per_layer_inputs
            require_known(self.name, get_per_layer_inputs, _KNOWN_PER_LAYER_INPUTS)
            forward = inspect.unwrap(type(module).forward)
            parameters = tuple(inspect.signature(forward).parameters)[1:]
            changes.append(Wrap(module, "forward", _merging_forward(parameters), site))
            changes.append(Wrap(module, "get_placeholder_mask", _no_placeholders, site))
            if "per_layer_inputs" not in parameters:
                wrap = Wrap(
                    language_model,
                    "get_per_layer_inputs",
                    _stashed_per_layer_inputs,
                    f"{site}.language_model",
                )
                changes.append(wrap)
        return Plan(APPLIED, "features written to their rows, none copied", tuple(changes))
