"""Masks of packed rows for the Gemma 4 sizes whose images are seen in both directions."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gemtune.errors import ConfigError

_ATTENTIONS = ("sdpa", "eager")  # the others take their documents in another form


def separate_documents(model: nn.Module) -> RemovableHandle | None:
    """Packed rows of this model compute what their documents would, each in a row of its own.

    transformers tells documents apart where it gets `position_ids` that begin again, no attention
    mask and no cache. On E2B and E4B that is right, and nothing is done (None). On the sizes with
    `use_bidirectional_attention: vision` some releases (5.23 is one; 5.5.4, 5.9.0 and 5.17.0 are
    not) then look up the images of each document where the row begins, so that the second one gets
    the bidirectional mask of the first. Here such a call gets the masks that transformers makes
    for the row as one document, without what reaches from one document into another. They are
    those of the documents alone, because nothing in them depends on where a row begins.

    Memory: two masks [B, 1, S, S] a forward, of booleans (eager: of floats).

    Args:
        model: a Gemma4ForConditionalGeneration.

    Returns:
        What undoes it: `.remove()`.

    Raises:
        ConfigError: attention of a kind that has no such masks.
    """
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if attention not in _ATTENTIONS:
        raise ConfigError(
            f"data.packing=true with model.attention={attention} is not supported: documents would "
            f"see each other, or their images would not. Use one of {', '.join(_ATTENTIONS)}."
        )
    if config.use_bidirectional_attention != "vision":
        return None
    hook = functools.partial(_with_masks, type(model).create_masks_for_generate)
    return model.model.register_forward_pre_hook(hook, with_kwargs=True)


def document_of(position_ids: torch.Tensor) -> torch.Tensor:
    """[B, S] positions -> [B, S] number of the document: one begins where they do not go on."""
    goes_on = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) == 1
    return (~goes_on).cumsum(-1)


def _with_masks(
    make_masks: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a packed call with its masks; those of any other as they are."""
    position_ids = kwargs.get("position_ids")
    given = [kwargs.get(name) for name in ("attention_mask", "past_key_values")]
    if position_ids is None or any(value is not None for value in given):
        return args, kwargs
    weight = module.get_input_embeddings().weight
    shape, device = position_ids.shape, position_ids.device
    masks = make_masks(
        config=module.config,
        # Read for shape, dtype and device.
        inputs_embeds=torch.empty(1, dtype=weight.dtype, device=device).expand(*shape, 1),
        attention_mask=None,
        past_key_values=None,
        position_ids=None,
        mm_token_type_ids=kwargs.get("mm_token_type_ids"),
        is_first_iteration=True,
    )
    documents = document_of(position_ids)
    together = documents[:, None, :, None] == documents[:, None, None, :]
    return args, kwargs | {
        "attention_mask": {kind: _within(mask, together) for kind, mask in masks.items()}
    }


def _within(mask: torch.Tensor | None, together: torch.Tensor) -> torch.Tensor:
    if mask is None:  # SDPA is told that it is causal
        return together.tril()
    if mask.dtype == torch.bool:
        return mask & together
    return mask.masked_fill(~together, torch.finfo(mask.dtype).min)
