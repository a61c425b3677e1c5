"""Attention without cuDNN's kernels, whose backward with a mask gives NaN (pytorch#196678)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gemtune.errors import PatchError
from gemtune.patches.base import APPLIED, NOT_APPLICABLE, Plan, Wrap, modules_of_class

# The fault needs a mask, a length of 64 modulo 128 and scores far below zero, not a certain head
# size, so that the vision tower can meet it as well.
_ATTENTION = ("Gemma4TextAttention", "Gemma4VisionAttention")
_TEXT_MODEL = "Gemma4TextModel"

_OTHER_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _without_cudnn(
    self: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # Forward chooses the kernel, and with it that of its backward. So the switch is needed around
    # every forward of the attention, those that gradient checkpointing repeats included.
    if torch.compiler.is_compiling():
        # A trace cannot hold the setting as it was; this it can, and it allows all other kernels.
        with sdpa_kernel(_OTHER_KERNELS):
            return inner(*args, **kwargs)
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return inner(*args, **kwargs)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


@dataclass(frozen=True)
class SdpaGuard:
    """Turns cuDNN attention off while an attention module of Gemma 4 runs.

    On H100 and H200, with torch from 2.11 on, `scaled_dot_product_attention` prefers cuDNN. Given a
    mask, its backward overflows where a row's log-sum-exp is below -88.7 and the length is 64
    modulo 128: training of Gemma 4 in bfloat16 ends in NaN after some steps (pytorch#196678,
    Automodel#3232, trl#7181). Other models of the process, and the setting between two calls, stay
    as they were. Where cuDNN is the only kernel that was left enabled, torch raises.
    """

    name: ClassVar[str] = "sdpa_guard"

    def plan(self, model: nn.Module) -> Plan:
        """One wrap for each attention module that calls `scaled_dot_product_attention`.

        PatchError where there is a Gemma 4 text model without the attention known here.
        """
        kinds = {type(module).__name__ for module in model.modules()}
        if _TEXT_MODEL not in kinds:
            return Plan(NOT_APPLICABLE, f"the model has no {_TEXT_MODEL}")
        if _ATTENTION[0] not in kinds:
            raise PatchError(
                f"sdpa_guard: this model has a {_TEXT_MODEL} but no {_ATTENTION[0]}, so its "
                "attention cannot be found. Leave the patch out of patches=[...], call "
                "torch.backends.cuda.enable_cudnn_sdp(False) yourself, and report it."
            )
        attention = modules_of_class(model, *_ATTENTION)
        wraps = tuple(
            Wrap(module, "forward", _without_cudnn, site)
            for site, module in attention
            if module.config._attn_implementation == "sdpa"
        )
        if not wraps:
            used = sorted({str(module.config._attn_implementation) for _, module in attention})
            return Plan(NOT_APPLICABLE, f"attention is {', '.join(used)}, not sdpa")
        return Plan(
            APPLIED, "cuDNN attention off: NaN in its masked backward (pytorch#196678)", wraps
        )
