"""Which parameters FSDP2 gathers together, read off the modules of a Gemma 4 as it is.

Class names and `_no_split_modules` say what a model might hold (transformers#45663); the modules
say what it holds. Works on a plain model and on one with adapters in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from gemtune.errors import ModelError

_TOWERS = ("vision_tower", "audio_tower")
_TABLE = "embed_tokens_per_layer"


@dataclass(frozen=True)
class Units:
    """Names of modules and parameters, as they are below the root."""

    modules: tuple[str, ...]
    """Each is gathered and freed by itself, in the order of the model; the root holds the rest."""
    replicated: frozenset[str]
    """Parameters that are not sharded."""
    on_host: frozenset[str]
    """Those of them that stay in host memory."""


def find_units(root: nn.Module, on_host: Iterable[str] = ()) -> Units:
    """Units of a `Gemma4ForConditionalGeneration`, adapters included.

    Every decoder layer is one, every layer of a tower of which anything is trained, and the table
    of per-layer embeddings: it is read once a forward, and a root keeps what it holds until the
    backward pass. The root has the embeddings with the head that shares their weight, norms and
    projectors. Towers that are not trained, and parameters named in `on_host`, are replicated: a
    rank without images then owes the others nothing.

    Raises:
        ModelError: no decoder layers, or a parameter that two units share.
    """
    on_host = frozenset(on_host)
    replicated = {*on_host, *_frozen_towers(root)}
    modules = []
    for name, module in root.named_modules():
        is_layer = _is_layer(name, root)
        if not is_layer and name.rpartition(".")[2] != _TABLE:
            continue
        if any(n not in replicated for n, _ in module.named_parameters(prefix=name)):
            modules.append(name)
    if not any("language_model" in name for name in modules):
        raise ModelError(
            f"{type(root).__name__} has no decoder layers below a 'language_model', so that it is "
            "not known how to shard it. Use parallel=ddp, and report it."
        )
    _refuse_shared(root, modules, replicated)
    return Units(tuple(modules), frozenset(replicated), on_host)


def _is_layer(name: str, root: nn.Module) -> bool:
    """A direct child of an outermost `layers` list."""
    parts = name.split(".")
    if "layers" not in parts or parts.index("layers") != len(parts) - 2:
        return False
    return isinstance(root.get_submodule(".".join(parts[:-1])), nn.ModuleList)


def _frozen_towers(root: nn.Module) -> Iterator[str]:
    for name, module in root.named_modules():
        if name.rpartition(".")[2] in _TOWERS and not any(
            p.requires_grad for p in module.parameters()
        ):
            yield from (n for n, _ in module.named_parameters(prefix=name))


def _refuse_shared(root: nn.Module, modules: list[str], replicated: set[str]) -> None:
    """A parameter of two units would be sharded once and missed in the other."""
    seen: dict[int, tuple[str, str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        unit = next((m for m in modules if name.startswith(f"{m}.")), "")
        where = "no unit" if name in replicated else unit or "the root"
        other, first = seen.setdefault(id(parameter), (where, name))
        if other != where:
            raise ModelError(
                f"{name} of {where} shares its weight with {first} of {other}; FSDP2 wants shared "
                "weights in one unit. Use parallel=ddp, and report it."
            )
