"""Vision position embeddings by table lookup instead of one-hot x table (transformers#46176)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import ClassVar

import torch
from torch import nn

from gemtune.errors import PatchError
from gemtune.patches.base import APPLIED, NOT_APPLICABLE, UPSTREAM, Edit, Plan
from gemtune.patches.table_lookup import sum_of_table_lookups


def _position_embeddings(
    self: nn.Module, pixel_position_ids: torch.Tensor, padding_positions: torch.Tensor
) -> torch.Tensor:
    """[N, P, 2] patch coordinates -> [N, P, H]; padding patches (negative ids) get zeros."""
    # Padding needs some valid index to look up; what it finds there is zeroed. The upper bound
    # is not clamped: an id beyond the table raises, as it does in the original.
    embeddings = sum_of_table_lookups(
        self.position_embedding_table, pixel_position_ids.clamp(min=0)
    )
    return embeddings.masked_fill(padding_positions.unsqueeze(-1), 0.0)


@dataclass(frozen=True)
class VisionPositionLookup:
    """transformers 5.5-5.9 build an int64 one-hot [N, 2, P, table] and multiply it by the table.

    For 40 images of 2,520 patches and the table of 10,240 rows that is 15.4 GiB, and 3.85 GiB
    more for its bfloat16 copy. transformers 5.10.1 looks the rows up itself: `upstream`.
    """

    name: ClassVar[str] = "vision_position_lookup"

    def plan(self, model: nn.Module) -> Plan:
        """One edit for each patch embedder of the model."""
        embedders = [
            (site, module)
            for site, module in model.named_modules()
            if type(module).__name__ == "Gemma4VisionPatchEmbedder"
        ]
        if not embedders:
            return Plan(NOT_APPLICABLE, "the model has no Gemma 4 vision tower")
        original = getattr(type(embedders[0][1]), "_position_embeddings", None)
        calls = original.__code__.co_names if original is not None else ()
        if "one_hot" in calls:
            edits = tuple(
                Edit(module, "_position_embeddings", MethodType(_position_embeddings, module), site)
                for site, module in embedders
            )
            return Plan(APPLIED, "one-hot replaced", edits)
        if "embedding" in calls:
            return Plan(UPSTREAM, "this transformers looks positions up itself")
        raise PatchError(
            "vision_position_lookup: this transformers computes the vision position embeddings in "
            "a way that is not known here. Leave the patch out of patches=[...], and report it."
        )
