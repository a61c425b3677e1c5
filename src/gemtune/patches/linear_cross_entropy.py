"""Routes the LM head and the loss of Gemma 4 through the chunked `linear_cross_entropy`."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from gemtune.losses import linear_cross_entropy
from gemtune.options import option
from gemtune.patches.base import APPLIED, Edit, Plan
from gemtune.patches.fingerprint import require_known

IGNORE_INDEX = -100

# The forward of both classes in every release that was read, the newest range last.
_KNOWN = (
    "79e8fb5305de",  # Gemma4ForConditionalGeneration, 5.5.2-5.5.4
    "99da5c7f35a7",  # 5.6-5.7
    "33eb871d5caa",  # 5.8
    "140e1f971952",  # 5.9-5.17
    "26f101e8bff1",  # 5.18
    "d3def6f8f093",  # 5.19-5.20
    "32e89c424a02",  # 5.21-5.22
    "1c3c8b4824d0",  # 5.23
    "d61b4c38f3a7",  # Gemma4ForCausalLM, 5.5.2-5.7
    "67c07666d255",  # 5.8
    "4b05d870169e",  # 5.9-5.18
    "aa6ca29a2fed",  # 5.19-5.20
    "7ee0dd73741a",  # 5.21-5.22
    "20fce64421af",  # 5.23
)


def _supported_classes() -> tuple[type[nn.Module], ...]:
    from transformers.models.gemma4 import modeling_gemma4

    return (modeling_gemma4.Gemma4ForConditionalGeneration, modeling_gemma4.Gemma4ForCausalLM)


@dataclass(frozen=True)
class LinearCrossEntropy:
    """The loss without the logits (Liger-Kernel#1203): see `gemtune.losses`.

    Ignored labels are dropped before the matmul, and the rest go through the head in chunks, soft
    cap included, so that [tokens, 262144] logits never exist. Calls without labels (generation)
    run the stock forward; calls with labels in eval mode do too unless they pass
    `skip_logits=True`, because evaluation code may ask for the logits.
    """

    name: ClassVar[str] = "linear_cross_entropy"

    chunk_mib: int | None = option(
        None, "budget for one chunk of float32 logits in MiB; null: chosen for the device"
    )

    def plan(self, model: nn.Module) -> Plan:
        """One edit: the `forward` of the model itself. TypeError for any other class."""
        supported = _supported_classes()
        if not isinstance(model, supported):
            raise TypeError(
                f"linear_cross_entropy patches {' and '.join(c.__name__ for c in supported)}, "
                f"not {type(model).__name__}."
            )
        require_known(self.name, type(model).forward, _KNOWN)
        chunk_bytes = None if self.chunk_mib is None else self.chunk_mib * 2**20
        forward = _chunked_forward(type(model).forward, chunk_bytes)
        return Plan(
            APPLIED,
            "logits in chunks, ignored labels dropped",
            (Edit(model, "forward", MethodType(forward, model), type(model).__name__),),
        )


def _chunked_forward(stock_forward: Any, chunk_bytes: int | None) -> Any:
    original = inspect.unwrap(stock_forward)
    positional = list(inspect.signature(original).parameters)[1:]
    # transformers 5.5 leaves a padded position out of the loss even where it has a label; later
    # releases go by the labels alone.
    loss_heeds_mask = "shift_attention_mask" in original.__code__.co_varnames

    # functools.wraps keeps the signature, by which transformers' Trainer chooses its columns.
    @functools.wraps(stock_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(positional, args, strict=False))
        skip_logits = kwargs.pop("skip_logits", None)
        if skip_logits is None:
            skip_logits = self.training
        if kwargs.get("labels") is None or not skip_logits:
            return stock_forward(self, **kwargs)
        return _loss_without_logits(self, chunk_bytes, loss_heeds_mask, **kwargs)

    return forward


def _loss_without_logits(
    model: nn.Module,
    chunk_bytes: int | None,
    loss_heeds_mask: bool,
    *,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    return_dict: bool | None = None,
    **inputs: Any,
) -> Any:
    """Same loss as the stock forward; `logits` is None."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4CausalLMOutputWithPast

    outputs = model.model(**inputs, return_dict=True)
    if shift_labels is None:
        # Labels move, hidden states stay: a shifted view of the hidden states is a full copy.
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    mask = inputs.get("attention_mask")
    if loss_heeds_mask and isinstance(mask, torch.Tensor) and mask.dim() == 2:
        shift_mask = F.pad(mask[:, 1:], (0, 1), value=0).bool()
        shift_labels = shift_labels.masked_fill(~shift_mask.to(labels.device), IGNORE_INDEX)
    text_config = model.config.get_text_config()
    loss = linear_cross_entropy(
        outputs.last_hidden_state,
        model.lm_head.weight,
        shift_labels,
        softcap=text_config.final_logit_softcapping,
        ignore_index=IGNORE_INDEX,
        num_items=num_items_in_batch,
        chunk_bytes=chunk_bytes,
    )
    names = {field.name for field in fields(Gemma4CausalLMOutputWithPast)} - {"loss", "logits"}
    others = {name: getattr(outputs, name, None) for name in names}
    result = Gemma4CausalLMOutputWithPast(loss=loss, logits=None, **others)
    return result if return_dict in (None, True) else result.to_tuple()
