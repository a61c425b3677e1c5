"""Relative position encodings of AlphaFold3 by table lookup instead of one-hot x weight."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import ClassVar

import torch
from torch import nn

from gemtune.errors import PatchError
from gemtune.patches.base import APPLIED, NOT_APPLICABLE, Edit, Plan
from gemtune.patches.table_lookup import sum_of_table_lookups

_CLASS = "RelativePositionEncoding"
_ATTRIBUTES = ("r_max", "s_max", "c_z", "linear_no_bias")
_FEATURES = ("asym_id", "residue_index", "entity_id", "token_index", "sym_id")
# Further arguments of forward() that say how to compute, and not what.
_WITHOUT_EFFECT = frozenset({"inplace_safe", "chunk_size"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_PAIRS_PER_BLOCK = 2**17  # the temporaries of one block stay in the cache
_PROBE_TOKENS = 128


def _forward(
    self: nn.Module,
    input_feature_dict: Mapping[str, torch.Tensor],
    inplace_safe: bool = False,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Features [..., N] -> [..., N, N, c_z], in the dtype that a matmul with the weight has."""
    weight = _weight(self)
    device = weight.device.type
    # Autocast casts float32 and 16-bit operands of a matmul, and leaves float64 as it is.
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        weight = weight.to(torch.get_autocast_dtype(device))
    return _encode(self, weight, input_feature_dict, weight.dtype)


def _forward_in_float32(
    self: nn.Module,
    input_feature_dict: Mapping[str, torch.Tensor],
    inplace_safe: bool = False,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """The same for a module that returns float32 whatever its weight and autocast are."""
    return _encode(self, _weight(self), input_feature_dict, torch.float32)


def _encode(
    module: nn.Module,
    weight: torch.Tensor,
    features: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    tables = _tables(weight, module.r_max, module.s_max)
    indices = _pair_indices(features, module.r_max, module.s_max)
    return sum_of_table_lookups(tables, indices, dtype=dtype)


def _tables(weight: torch.Tensor, r_max: int, s_max: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[4 r_max + 3, c_z] by residue and token, [2 s_max + 2, c_z] by chain and entity.

    The token distance counts only inside one residue, where the residue distance is zero: there
    are not 66 x 66 combinations of the two but 66 + 65. The bit for one entity is a function of
    the chain row.
    """
    rows = weight.t().to(torch.promote_types(weight.dtype, torch.float32))
    residue, token, same_entity, chain = rows.split(
        [2 * r_max + 2, 2 * r_max + 2, 1, 2 * s_max + 2]
    )
    apart = residue + token[-1]
    within = residue[r_max] + token[:-1]
    return torch.cat([apart, within]), torch.cat([chain[:-1] + same_entity, chain[-1:]])


def _pair_indices(
    features: Mapping[str, torch.Tensor], r_max: int, s_max: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of `_tables` for every pair of tokens: two [..., N, N] of few bytes."""
    chosen = torch.broadcast_tensors(*(features[name] for name in _FEATURES))
    for name, feature in zip(_FEATURES, chosen, strict=True):
        if feature.dtype.is_floating_point or feature.dtype == torch.bool:
            raise TypeError(f"{name} must be of an integer dtype, not {feature.dtype}.")
    shape, num_tokens = chosen[0].shape, chosen[0].shape[-1]
    flat = [feature.reshape(-1, num_tokens) for feature in chosen]
    small = torch.uint8 if max(4 * r_max + 3, 2 * s_max + 2) <= 256 else torch.int32
    position = flat[0].new_empty(len(flat[0]), num_tokens, num_tokens, dtype=small)
    chain = torch.empty_like(position)
    step = max(1, _PAIRS_PER_BLOCK // max(1, num_tokens))
    for batch, start in itertools.product(range(len(position)), range(0, num_tokens, step)):
        rows = slice(start, start + step)
        queries = [feature[batch, rows, None] for feature in flat]
        keys = [feature[batch, None] for feature in flat]
        same_chain, same_residue, same_entity = (queries[k] == keys[k] for k in range(3))
        by_residue = _clipped_distance(queries[1], keys[1], r_max)
        by_token = _clipped_distance(queries[3], keys[3], r_max).add_(2 * r_max + 2)
        by_chain = _clipped_distance(queries[4], keys[4], s_max)
        by_residue.masked_fill_(~same_chain, 2 * r_max + 1)
        position[batch, rows] = torch.where(same_chain & same_residue, by_token, by_residue)
        chain[batch, rows] = by_chain.masked_fill_(~same_entity, 2 * s_max + 1)
    return position.view(*shape, num_tokens), chain.view(*shape, num_tokens)


def _clipped_distance(query: torch.Tensor, key: torch.Tensor, limit: int) -> torch.Tensor:
    """query - key + limit, clipped to [0, 2 limit]; subtracted in the dtype that it comes in."""
    return (query - key).add_(limit).clamp_(0, 2 * limit).to(torch.int32)


def _weight(module: nn.Module) -> torch.Tensor:
    """The weight, if it is all that the linear map has; it is read and the map is not called."""
    linear = module.linear_no_bias
    names = [name for name, _ in linear.named_parameters()]
    if names != ["weight"] or getattr(linear, "bias", None) is not None:
        raise PatchError(
            f"relative_position_lookup: linear_no_bias must have a weight and nothing else; it has "
            f"{names}. Put adapters on other layers, or leave the patch out of patches=[...]."
        )
    return linear.weight


@dataclass(frozen=True)
class RelativePositionLookup:
    """AlphaFold3's algorithm 3 as Protenix and PXDesign have it (PXDesign#17), without one-hots.

    `RelativePositionEncoding` makes int64 one-hots of 139 numbers for each pair of tokens, joins
    them, casts them to float32 and multiplies them by its weight: 2.8 KB a pair beside a result of
    0.5 KB, and 0.5 KB kept for the backward pass. Here a table of the 786 sums that can occur is
    made from the weight, and each pair looks up one row: 4 bytes a pair beside the result, 2 of
    them kept. No chunks are needed, and `inplace_safe` and `chunk_size` are taken and do nothing.

    The class is not part of transformers and there are several versions of it. `plan` runs the
    module's own `forward` and the new one on a copy with random integer weights, in training and
    eval mode, with and without autocast, and refuses unless they agree to the last bit. The result
    has the dtype that the module's own has; where that cannot run, the dtype of the weight.
    `linear_no_bias` is not called any more: only its weight is used, and an adapter put on it later
    raises PatchError.
    """

    name: ClassVar[str] = "relative_position_lookup"

    def plan(self, model: nn.Module) -> Plan:
        """One edit for each `RelativePositionEncoding` of the model."""
        named = [
            (site or _CLASS, module)
            for site, module in model.named_modules()
            if type(module).__name__ == _CLASS
        ]
        if not named:
            return Plan(NOT_APPLICABLE, f"the model has no {_CLASS}")
        changes, reasons = [], []
        for site, module in named:
            reason = _why_not(module)
            if reason:
                reasons.append(reason)
                continue
            forward = _proven_forward(module, site)
            changes.append(Edit(module, "forward", MethodType(forward, module), site))
        if not changes:
            return Plan(NOT_APPLICABLE, reasons[0])
        return Plan(APPLIED, "each pair of tokens looks up one row", tuple(changes))


def _why_not(module: nn.Module) -> str:
    """Why a module of this name is not one of those that the patch is for; "" if it is."""
    missing = [name for name in _ATTRIBUTES if not hasattr(module, name)]
    if missing:
        return f"its {_CLASS} is another one: it has no {' and no '.join(missing)}"
    if "relp_feature" in inspect.signature(type(module).forward).parameters:
        return (
            f"its {_CLASS}.forward takes one-hots that generate_relp made before (relp_feature), "
            "which the model hands on to other modules"
        )
    return ""


def _proven_forward(module: nn.Module, site: str) -> Callable[..., torch.Tensor]:
    """The forward to put in, proven equal to the module's own on a probe."""
    _require_known_layout(module, site)
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(module).float()
    weight = twin.linear_no_bias.weight
    with torch.no_grad():
        # Sums of four such integers are exact in every dtype: nothing need be allowed for rounding.
        weight.copy_(torch.randint(-31, 32, weight.shape, generator=generator))
    features = _probe_features(module.r_max, module.s_max, generator)
    features = {name: feature.to(weight.device) for name, feature in features.items()}
    try:
        own = _results(twin, type(module).forward, features)
    except Exception as error:
        raise PatchError(
            f"relative_position_lookup: {site}.forward fails on a probe with the features "
            f"{', '.join(_FEATURES)} ({type(error).__name__}: {error}), so nothing was changed. "
            "Leave the patch out of patches=[...]."
        ) from error
    for forward in (_forward, _forward_in_float32):
        ours = _results(twin, forward, features)
        if all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(own, ours, strict=True)):
            return forward
    raise PatchError(
        f"relative_position_lookup: {site}.forward computes something else than AlphaFold3's "
        "algorithm 3 as Protenix has it, so nothing was changed. Leave the patch out of "
        "patches=[...]."
    )


def _require_known_layout(module: nn.Module, site: str) -> None:
    _weight(module)
    expected = (module.c_z, 4 * module.r_max + 2 * module.s_max + 7)
    parameters = {name: tuple(value.shape) for name, value in module.named_parameters()}
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    linear = module.linear_no_bias
    wrong = None
    if parameters != {"linear_no_bias.weight": expected} or dict(module.named_buffers()):
        wrong = f"has {parameters} and not only linear_no_bias.weight {list(expected)}"
    elif linear.weight.is_meta:
        wrong = "has no values yet (meta device); patch the model after its weights are read"
    elif any(hooks for name, hooks in vars(linear).items() if name in _HOOKS):
        wrong = "has hooks on linear_no_bias, which is not called any more"
    elif "forward" in vars(module):
        wrong = "had its forward replaced before the patch"
    elif arguments[:1] != ["input_feature_dict"] or set(arguments[1:]) - _WITHOUT_EFFECT:
        wrong = f"has a forward({', '.join(arguments)}) that is not known"
    if wrong:
        raise PatchError(
            f"relative_position_lookup: {site} {wrong}, so nothing was changed. "
            "Leave the patch out of patches=[...]."
        )


def _probe_features(r_max: int, s_max: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Few chains, entities and copies, and distances inside and beyond the limits, at random."""

    def draw(limit: int) -> torch.Tensor:
        return torch.randint(limit, (_PROBE_TOKENS,), generator=generator)

    far = 3 * r_max + 4
    # Half of the tokens share few residues, so that the token distance counts for many pairs.
    residue = torch.where(draw(2).bool(), draw(far), draw(3))
    return {
        "asym_id": draw(3),
        "residue_index": residue,
        "entity_id": draw(2),
        "token_index": draw(far),
        "sym_id": draw(2 * s_max + 3),
    }


def _results(
    module: nn.Module, forward: Callable[..., torch.Tensor], features: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """In training and in eval mode, without and with autocast."""
    device = features["asym_id"].device
    results = []
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for training, lower in itertools.product((True, False), (False, True)):
            module.train(training)
            with torch.autocast(device.type, torch.bfloat16, enabled=lower):
                results.append(forward(module, dict(features)))
    return results
