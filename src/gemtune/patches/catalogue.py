"""The patches by name: the key in `patches=[...]`, the file name and the name in the report."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from gemtune.errors import PatchError
from gemtune.options import did_you_mean

if TYPE_CHECKING:
    from gemtune.patches.base import Patch

# In the order in which they are planned and reported. A new patch is a file in this folder with
# a dataclass of the same name in CamelCase, and its name here.
_NAMES = (
    "vision_position_lookup",
    "vision_pooler",
    "vision_unpadded",
    "rms_norm",
    "geglu",
    "ple_projection",
    "placeholder_merge",
    "sdpa_guard",
    "vision_streaming",
    "ple_offload",
    "linear_cross_entropy",
    "supervised_positions",
    "relative_position_lookup",
)

# Chosen by name only: they trade time for memory, or serve other models than Gemma 4.
_ON_REQUEST = frozenset({"vision_streaming", "ple_offload", "relative_position_lookup"})


def available() -> tuple[str, ...]:
    """The names of every patch."""
    return _NAMES


def default() -> tuple[str, ...]:
    """The names of the patches that cost nothing: those that `apply(model)` puts in."""
    return tuple(name for name in _NAMES if name not in _ON_REQUEST)


def patch_class(name: str) -> type[Patch]:
    """The dataclass of the patch called `name`; PatchError with the list for any other."""
    if name not in _NAMES:
        raise PatchError(
            f"'{name}' is not a patch.{did_you_mean(name, _NAMES)} Patches: {', '.join(_NAMES)}."
        )
    module = importlib.import_module(f"gemtune.patches.{name}")
    return getattr(module, "".join(word.capitalize() for word in name.split("_")))


def resolve(patch: str | Patch) -> Patch:
    """A patch from its name, with its default options; a `Patch` object as it is."""
    return patch_class(patch)() if isinstance(patch, str) else patch
