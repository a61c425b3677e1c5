"""The layers that share keys and values run only where something is learned."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from gemtune.losses.supervision import has_values, to_device
from gemtune.options import option
from gemtune.patches.base import APPLIED, NOT_APPLICABLE, Plan, Wrap, modules_of_class
from gemtune.patches.fingerprint import require_known
from gemtune.patches.linear_cross_entropy import (
    IGNORE_INDEX,
    LinearCrossEntropy,
    arguments_by_name,
    labels_of_each_position,
    loss_without_logits,
    require_causal_lm,
    wants_loss_alone,
    without_our_options,
)

# Called as they are. What is relied on: a layer that shares keys and values takes everything else
# that belongs to a position from its arguments, and the model passes keywords on to its layers.
_KNOWN = {
    "Gemma4TextDecoderLayer": {
        "65fb94749e0d",  # 5.5.2
        "4eca4c0c2dda",  # 5.5.3-5.23.0
    },
    "Gemma4TextAttention": {
        "eace2ca01246",  # 5.5.2-5.6.2
        "b1fcfb5283cf",  # 5.7.0
        "9f81e91f9749",  # 5.8.0-5.22.2
        "b21fd0692dc0",  # 5.23.0
    },
    "Gemma4TextModel": {
        "07acee1e788f",  # 5.5.2
        "69d73fe20c87",  # 5.5.3-5.7.0
        "ab36b885ee85",  # 5.8.0-5.8.1
        "38840acc30c7",  # 5.9.0-5.22.2
        "9ba2b2351ccd",  # 5.23.0
    },
    "Gemma4Model": {
        "2f9609baa6d2",  # 5.5.2-5.5.4
        "0145c892a90a",  # 5.6.0-5.7.0
        "ab2a780566e1",  # 5.8.0-5.8.1
        "e7c7a22a3185",  # 5.9.0
        "4e4db178d130",  # 5.10.1-5.12.1
        "e3f2eab59b96",  # 5.13.0-5.14.1
        "57c5e24113dd",  # 5.15.0
        "3a1e7196ea44",  # 5.16.0-5.17.0
        "4fa202015c6f",  # 5.18.0
        "1f0864455566",  # 5.19.0-5.22.2
        "e6fee425378a",  # 5.23.0
    },
}

_ATTENTIONS = ("sdpa", "eager")  # the others have masks that cannot be cut by queries
_RECORDS = ("output_hidden_states", "output_attentions", "output_router_logits")

_GENERATION = "a call without labels"

_logger = logging.getLogger(__name__)
_said: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class SupervisedPositions:
    """The upper layers of E2B and E4B, at the positions whose next token is learned.

    The last 20 of E2B's 35 layers and the last 18 of E4B's 42 read keys and values that lower
    layers made, and make none. What such a layer computes at a position reaches that position's
    logits and nothing else, so where the label is ignored it cannot change the loss. From the
    first of these layers on only [B, P] positions run, P the largest number of supervised ones in
    a row; keys and values stay full length. Loss and gradients are those of the stock model.

    Acts where the loss is all that is asked for: labels are given, in training mode or with
    `skip_logits=True`. Its loss is that of `linear_cross_entropy`, also where that patch is left
    out: `logits` is None. The rest runs in full, and why is logged once for each reason.

    Finding the positions waits for the GPU once a forward, unless `host_labels=
    gemtune.losses.HostLabels(labels)`, labels on the CPU, is passed to the model as well.

    Memory: two masks [B, 1, P, S] in the dtype of the activations, shared by all layers.
    """

    name: ClassVar[str] = "supervised_positions"

    largest_share: float = option(
        0.9, "a batch with more of its positions supervised than that runs in full"
    )

    def plan(self, model: nn.Module) -> Plan:
        """A wrap of the model's forward, and one of each layer that shares keys and values.

        Raises:
            TypeError: a model with such layers, but neither Gemma4ForConditionalGeneration nor
                Gemma4ForCausalLM.
        """
        layers = modules_of_class(model, "Gemma4TextDecoderLayer")
        shared = [(site, layer) for site, layer in layers if layer.self_attn.is_kv_shared_layer]
        if not shared:
            return Plan(NOT_APPLICABLE, "the model has no layers that share keys and values")
        require_causal_lm(self.name, model)
        for class_name, known in _KNOWN.items():
            for _, module in modules_of_class(model, class_name)[:1]:
                require_known(self.name, type(module).forward, known)
        forward = functools.partial(_forward_at_positions, self.largest_share)
        changes = [Wrap(layer, "forward", _layer_at_positions, site) for site, layer in shared]
        return Plan(
            APPLIED,
            f"{len(shared)} of {len(layers)} layers run where a label is; generation runs in full",
            (Wrap(model, "forward", forward, type(model).__name__), *changes),
        )


class Positions:
    """Where the upper layers of one forward run. Travels as a keyword through the model.

    `targets` [B, P], on the CPU, is what is to be said next at each of them. No dataclass, because
    FSDP and DDP rebuild those to reach the tensors in them.
    """

    def __init__(self, index: torch.Tensor, targets: torch.Tensor) -> None:
        """`index` [B, P], on the CPU, holds positions in their rows, ascending."""
        self.targets = targets
        self._index = index
        self._indices: dict[torch.device, torch.Tensor] = {}
        self._shared: dict[Any, Any] = {}

    def index(self, device: torch.device) -> torch.Tensor:
        """[B, P] there."""
        if device not in self._indices:
            self._indices[device] = to_device(self._index, device)
        return self._indices[device]

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """[B or 1, S, ...] -> [B, P, ...]"""
        index = self.index(values.device)
        if values.shape[0] > 1:
            starts = torch.arange(len(index), device=index.device) * values.shape[1]
            index = index + starts.unsqueeze(1)
        chosen = values.flatten(0, 1).index_select(0, index.flatten())
        return chosen.unflatten(0, index.shape)

    def queries_of(self, mask: torch.Tensor) -> torch.Tensor:
        """[B or 1, 1, S, S] -> [B, 1, P, S]"""
        index = self.index(mask.device)[:, None, :, None]
        mask = mask.expand(len(index), -1, -1, -1)
        return mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[3]))

    def causal_mask(self, length: int, window: int | None, device: torch.device) -> torch.Tensor:
        """[B, 1, P, S], True where the position sees the key."""
        query = self.index(device)[:, None, :, None]
        key = torch.arange(length, device=device)
        seen = key <= query
        return seen if window is None else seen & (key > query - window)

    def once(self, key: Any, cut: Callable[[], Any]) -> Any:
        """cut(), made for the first layer that asks: all layers of a kind share the result."""
        if key not in self._shared:
            self._shared[key] = cut()
        return self._shared[key]


@torch.compiler.disable
def locate(shift_labels: torch.Tensor, largest_share: float) -> Positions | str:
    """The positions to run for labels [B, S], or why all of them should run.

    Reads the labels: on a GPU that waits for it.
    """
    if not has_values(shift_labels):
        return "labels without values (fake tensors)"
    supervised = shift_labels.to("cpu", torch.int64)
    is_supervised = supervised != IGNORE_INDEX
    counts = is_supervised.sum(1, keepdim=True)
    length, most = supervised.shape[1], int(counts.max()) if len(counts) else 0
    if most == 0:
        return "a batch without labels"
    if most > largest_share * length:
        return f"a batch with more than {largest_share:.0%} of its positions supervised"
    # Supervised ones first, each group in order.
    index = is_supervised.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    filled = torch.arange(most) >= counts
    index = torch.where(filled, index.gather(1, (counts - 1).clamp(min=0)), index)
    targets = supervised.gather(1, index).masked_fill(filled, IGNORE_INDEX)
    return Positions(index, targets)


def _forward_at_positions(
    largest_share: float, self: nn.Module, inner: Any, *args: Any, **kwargs: Any
) -> Any:
    kwargs = arguments_by_name(type(self).forward, args, kwargs)
    loss_patch: LinearCrossEntropy | None = getattr(inner.func, "loss_patch", None)
    loss_alone = wants_loss_alone(
        self, kwargs, loss_patch is not None and loss_patch.loss_only_evaluation
    )
    reason = _why_in_full(self, kwargs, loss_alone)
    if reason is None:
        shift_labels = labels_of_each_position(
            self,
            kwargs["labels"],
            host_labels=kwargs.get("host_labels"),
            shift_labels=kwargs.get("shift_labels"),
            attention_mask=kwargs.get("attention_mask"),
        )
        found = locate(shift_labels, largest_share)
        if isinstance(found, Positions):
            kwargs["supervised_positions"] = found
        else:
            reason = found
    if reason is not None:
        _say_once(self, reason)
    if loss_patch is not None:
        return inner(**kwargs)
    if loss_alone:
        return loss_without_logits(self, **kwargs)
    return inner(**without_our_options(kwargs))


def _why_in_full(model: nn.Module, kwargs: dict[str, Any], loss_alone: bool) -> str | None:
    config = model.config.get_text_config()
    if kwargs.get("labels") is None:
        return _GENERATION
    if not loss_alone:
        return "an evaluation that may look at the logits (skip_logits=True: it does not)"
    if config._attn_implementation not in _ATTENTIONS:
        return f"attention by {config._attn_implementation}, whose masks have no rows to leave out"
    for key in _RECORDS:
        asked = kwargs.get(key)
        if asked or (asked is None and getattr(config, key, False)):
            return f"a call with {key}"
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        return "a call with a filled cache"
    return None


def _say_once(model: nn.Module, reason: str) -> None:
    said = _said.setdefault(model, set())
    if reason not in said:
        said.add(reason)
        # The report says it of generation, which is no exception.
        level = logging.INFO if reason == _GENERATION else logging.WARNING
        _logger.log(level, "supervised_positions: all positions of %s run (said once)", reason)


def _layer_at_positions(self: nn.Module, inner: Any, *args: Any, **kwargs: Any) -> Any:
    positions: Positions | None = kwargs.pop("supervised_positions", None)
    if positions is None:
        return inner(*args, **kwargs)
    kwargs = arguments_by_name(type(self).forward, args, kwargs)
    hidden_states, mask = kwargs["hidden_states"], kwargs["attention_mask"]
    position_embeddings, position_ids = kwargs["position_embeddings"], kwargs["position_ids"]
    length = position_embeddings[0].shape[1]
    if self.layer_idx == self.config.num_hidden_layers - self.config.num_kv_shared_layers:
        hidden_states = positions.rows(hidden_states)
    # Layers of a kind have the same mask and the same RoPE tables.
    kind = (self.self_attn.sliding_window, hidden_states.device)

    def cut_mask() -> torch.Tensor:
        if mask is None:
            cut = positions.causal_mask(length, *kind)
        else:
            cut = positions.queries_of(mask)
        return cut if cut.dtype != torch.bool else _as_bias(cut, hidden_states)

    kwargs |= {
        "hidden_states": hidden_states,
        "position_embeddings": positions.once(
            ("position embeddings", kind), lambda: tuple(map(positions.rows, position_embeddings))
        ),
        "attention_mask": positions.once(("mask", kind), cut_mask),
    }
    if kwargs["per_layer_input"] is not None:
        kwargs["per_layer_input"] = positions.rows(kwargs["per_layer_input"])
    if position_ids is not None:
        kwargs["position_ids"] = positions.once(("ids", kind), lambda: positions.rows(position_ids))
    return inner(**kwargs)


def _as_bias(mask: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """What SDPA makes of a mask of booleans at each call, and keeps for the backward pass."""
    dtype, device = hidden_states.dtype, hidden_states.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, -torch.inf)
