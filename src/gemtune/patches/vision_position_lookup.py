"""Vision position embeddings by table lookup, without one-hots and copies (transformers#46176)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import ClassVar

import torch
from torch import nn

from gemtune.errors import PatchError
from gemtune.patches.base import APPLIED, NOT_APPLICABLE, Edit, Plan, modules_of_class
from gemtune.patches.fingerprint import fingerprint, require_known
from gemtune.patches.table_lookup import sum_of_table_lookups

# What the patch saves, by what it stands in for.
_KNOWN = {
    # transformers 5.5.2-5.9.0
    "8cf6c2b7ba9f": "one-hot x table replaced",
    # transformers 5.10.1-5.23.0
    "894f7594b229": "one copy of the embeddings instead of four",
}


def _position_embeddings(
    self: nn.Module, pixel_position_ids: torch.Tensor, padding_positions: torch.Tensor
) -> torch.Tensor:
    """[N, P, 2] patch coordinates -> [N, P, H]; padding patches (negative ids) get zeros."""
    # Padding needs some valid index to look up. The upper bound is not clamped: an id beyond the
    # table raises, as it does in the original.
    indices = pixel_position_ids.clamp(min=0).unbind(-1)
    return sum_of_table_lookups(self.position_embedding_table, indices, zero=padding_positions)


@dataclass(frozen=True)
class VisionPositionLookup:
    """Each patch's row of the x table plus its row of the y table, added in place.

    transformers 5.5-5.9 build an int64 one-hot [N, 2, P, table] and multiply it by the table: for
    40 images of 2,520 patches and the table of 10,240 rows that is 15.4 GiB, and 3.85 GiB more for
    its bfloat16 copy. transformers 5.10.1 and later look the rows up, and hold x, y, their sum and
    the sum with padding zeroed at the same time, 4 x 295 MiB for these images in float32, where
    one is needed.
    """

    name: ClassVar[str] = "vision_position_lookup"

    def plan(self, model: nn.Module) -> Plan:
        """One edit for each patch embedder of the model."""
        embedders = modules_of_class(model, "Gemma4VisionPatchEmbedder")
        if not embedders:
            return Plan(NOT_APPLICABLE, "the model has no Gemma 4 vision tower")
        original = getattr(type(embedders[0][1]), "_position_embeddings", None)
        if original is None:
            raise PatchError(
                "vision_position_lookup: the patch embedder of this transformers has no "
                "_position_embeddings. Leave the patch out of patches=[...], and report it."
            )
        require_known(self.name, original, _KNOWN)
        changes = tuple(
            Edit(module, "_position_embeddings", MethodType(_position_embeddings, module), site)
            for site, module in embedders
        )
        return Plan(APPLIED, _KNOWN[fingerprint(original)], changes)
