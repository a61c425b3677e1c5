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

from gemtune.losses import HostLabels, linear_cross_entropy
from gemtune.options import option
from gemtune.patches.base import APPLIED, Edit, Plan
from gemtune.patches.fingerprint import require_known
from gemtune.patches.lm_head import head_product

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


def require_causal_lm(patch: str, model: nn.Module) -> None:
    """TypeError unless `model` is one of the two classes with an LM head; PatchError: unknown code.

    This includes every subclass: what is replaced is its `forward`, which must be known.
    """
    from transformers.models.gemma4 import modeling_gemma4

    supported = (modeling_gemma4.Gemma4ForConditionalGeneration, modeling_gemma4.Gemma4ForCausalLM)
    if not isinstance(model, supported):
        raise TypeError(
            f"{patch} patches {' and '.join(c.__name__ for c in supported)}, "
            f"not {type(model).__name__}."
        )
    require_known(patch, type(model).forward, _KNOWN)


@dataclass(frozen=True)
class LinearCrossEntropy:
    """The loss without the logits (Liger-Kernel#1203): see `gemtune.losses`.

    Ignored labels are dropped before the matmul, and the rest go through the head in chunks, soft
    cap included, so that [tokens, 262144] logits never exist. Calls without labels (generation)
    run the stock forward; calls with labels in eval mode do too unless they pass
    `skip_logits=True`, because evaluation code may ask for the logits.

    The output has `logits=None` and the sums of `gemtune.losses.LinearCrossEntropyMetrics`. With
    `num_items_in_batch` the summed loss is divided by it; `accepts_loss_kwargs` becomes True, so
    that transformers' Trainer passes it and accumulates correctly (stock Gemma 4 says False).
    """

    name: ClassVar[str] = "linear_cross_entropy"

    chunk_mib: int | None = option(
        None, "budget for one chunk of float32 logits in MiB; null: chosen for the device"
    )
    loss_only_evaluation: bool = option(
        False, "no logits in eval mode either, where labels are given"
    )

    def plan(self, model: nn.Module) -> Plan:
        """Edits of the model itself: `forward`, `accepts_loss_kwargs`.

        Raises:
            TypeError: any other class.
        """
        require_causal_lm(self.name, model)
        forward = _chunked_forward(type(model).forward, self)
        site = type(model).__name__
        return Plan(
            APPLIED,
            "logits in chunks, ignored labels dropped",
            (
                Edit(model, "forward", MethodType(forward, model), site),
                Edit(model, "accepts_loss_kwargs", True, site),
            ),
        )


def arguments_by_name(stock_forward: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """One dict of a call of that method, without `self`."""
    names = list(inspect.signature(inspect.unwrap(stock_forward)).parameters)[1:]
    return kwargs | dict(zip(names, args, strict=False))


def _chunked_forward(stock_forward: Any, patch: LinearCrossEntropy) -> Any:
    # functools.wraps keeps the signature, by which transformers' Trainer chooses its columns.
    @functools.wraps(stock_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kwargs = arguments_by_name(stock_forward, args, kwargs)
        if not wants_loss_alone(self, kwargs, patch.loss_only_evaluation):
            return stock_forward(self, **without_our_options(kwargs))
        chunk_bytes = None if patch.chunk_mib is None else patch.chunk_mib * 2**20
        return loss_without_logits(self, chunk_bytes=chunk_bytes, **kwargs)

    forward.loss_patch = patch  # read by supervised_positions, which goes around it
    return forward


def wants_loss_alone(
    model: nn.Module, kwargs: dict[str, Any], loss_only_evaluation: bool = False
) -> bool:
    """Whether this call has labels and nobody will look at the logits."""
    skip_logits = kwargs.get("skip_logits")
    if skip_logits is None:
        skip_logits = model.training or loss_only_evaluation
    return bool(skip_logits) and kwargs.get("labels") is not None


def without_our_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a stock forward knows."""
    ours = ("skip_logits", "host_labels", "supervised_positions")
    return {name: value for name, value in kwargs.items() if name not in ours}


def labels_of_each_position(
    model: nn.Module,
    labels: torch.Tensor,
    *,
    host_labels: HostLabels | None = None,
    shift_labels: torch.Tensor | None = None,
    attention_mask: Any = None,
) -> torch.Tensor:
    """[B, S]: what each position has to say next, on the CPU where `host_labels` are."""
    if shift_labels is not None:
        return shift_labels
    if host_labels is not None:
        labels = host_labels.tensor
    # Labels move, hidden states stay: a shifted view of the hidden states is a full copy.
    shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if (
        _loss_heeds_mask(type(model).forward)
        and isinstance(attention_mask, torch.Tensor)
        and attention_mask.dim() == 2
    ):
        # Behind a filled cache the mask is longer: it has the keys before as well.
        mask = attention_mask[:, -labels.shape[1] :]
        shift_mask = F.pad(mask[:, 1:], (0, 1), value=0).bool()
        shift_labels = shift_labels.masked_fill(~shift_mask.to(labels.device), IGNORE_INDEX)
    return shift_labels


def _loss_heeds_mask(stock_forward: Any) -> bool:
    # transformers 5.5 leaves a padded position out of the loss even where it has a label; later
    # releases go by the labels alone.
    return "shift_attention_mask" in inspect.unwrap(stock_forward).__code__.co_varnames


def loss_without_logits(
    model: nn.Module,
    *,
    labels: torch.Tensor,
    chunk_bytes: int | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    host_labels: HostLabels | None = None,
    skip_logits: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    return_dict: bool | None = None,
    **inputs: Any,
) -> Any:
    """Same loss as the stock forward; `logits` is None."""
    from gemtune.patches.causal_lm_output import CausalLMOutputWithoutLogits

    outputs = model.model(**inputs, return_dict=True)
    supervised = inputs.get("supervised_positions")
    if supervised is not None:
        targets = supervised.targets
    else:
        targets = labels_of_each_position(
            model,
            labels,
            host_labels=host_labels,
            shift_labels=shift_labels,
            attention_mask=inputs.get("attention_mask"),
        )
    weight, low_rank = head_product(model, outputs.last_hidden_state)
    loss, metrics = linear_cross_entropy(
        outputs.last_hidden_state,
        weight,
        targets,
        softcap=model.config.get_text_config().final_logit_softcapping,
        ignore_index=IGNORE_INDEX,
        num_items=num_items_in_batch,
        chunk_bytes=chunk_bytes,
        metrics=True,
        low_rank=low_rank,
    )
    names = {field.name for field in fields(CausalLMOutputWithoutLogits)}
    others = {n: getattr(outputs, n, None) for n in names - {"loss", "logits", *metrics._fields}}
    result = CausalLMOutputWithoutLogits(loss=loss, **others, **metrics._asdict())
    return result if return_dict in (None, True) else result.to_tuple()
