"""The LM head as the loss needs it: its weight, and what a LoRA on it adds to the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gemtune.errors import PatchError


def head_product(
    model: nn.Module, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """The weight [V, H] of `model.lm_head`, and its LoRA as (rows [..., R], weight [V, R]) or None.

    peft puts its layer in the place of the head, whose own weight is the base alone: a loss that
    read it would leave the adapter out, silently.

    Raises:
        PatchError: a head that is no linear map of the hidden states plus LoRAs on it.
    """
    head: Any = model.lm_head
    if hasattr(head, "modules_to_save"):  # peft trains a copy of the whole head
        head = _module_to_save(head)
    if not hasattr(head, "base_layer"):
        return _weight(head), None
    weight = _weight(head.base_layer)
    if head.disable_adapters or head.merged:
        return weight, None
    return weight, _low_rank(head, hidden_states)


def _module_to_save(wrapper: Any) -> Any:
    if wrapper.disable_adapters:
        return wrapper.original_module
    return wrapper.modules_to_save[wrapper.active_adapters[0]]


def _weight(head: Any) -> torch.Tensor:
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise _refusal(f"a {type(head).__name__}" + (" with bias" * isinstance(head, nn.Linear)))
    return head.weight


def _low_rank(head: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    active = [name for name in head.active_adapters if name in getattr(head, "lora_A", ())]
    # A variant (DoRA, for example) computes something else from the same A and B.
    if not active or any(name in getattr(head, "lora_variant", ()) for name in active):
        raise _refusal(f"adapted by something else than LoRA ({type(head).__name__})")
    rows, weights = [], []
    for name in active:
        down, up = head.lora_A[name], head.lora_B[name]
        if up.bias is not None:
            raise _refusal("adapted by a LoRA with bias")
        dropped = head.lora_dropout[name](hidden_states.to(down.weight.dtype))
        rows.append(down(dropped) * head.scaling[name])
        weights.append(up.weight)
    return torch.cat(rows, dim=-1), torch.cat(weights, dim=-1)


def _refusal(what: str) -> PatchError:
    return PatchError(
        f"lm_head is {what}. The loss without logits knows an nn.Linear without bias, plain, "
        "trained as a whole (modules_to_save) or with LoRA on it. Leave linear_cross_entropy and "
        "supervised_positions out of patches=[...], or adapt other layers."
    )
