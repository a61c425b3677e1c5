"""Which patches are tried together, on which models, and what a report must say of them."""

from __future__ import annotations

import itertools

from gemma4_zoo import SHARING_FAMILIES

from gemtune import patches

NAMES = patches.available()
ALONE = [(name,) for name in NAMES]
PAIRS = list(itertools.combinations(NAMES, 2))
ALL = tuple(NAMES)
DEFAULT = patches.default()

# Some patches are for parts that are not trained.
TRAINED = {
    "everything": (),
    "towers and PLE frozen": ("vision_tower", "embed_tokens_per_layer"),
    "norms alone": ("proj", "embed", "gate", "table", "experts", "router", "linear"),
}


def name_of(choice: tuple[str, ...]) -> str:
    return {ALL: "all", DEFAULT: "default"}.get(choice, "+".join(choice))


def status_of(name: str, family: str, trained: str) -> str:
    """What the report must say, in every transformers release that is supported."""
    is_sharing = family in SHARING_FAMILIES  # only these have embeddings of each layer as well
    is_frozen = trained != "everything"
    applies = {
        "relative_position_lookup": False,
        "ple_projection": is_sharing,
        "ple_offload": is_sharing and is_frozen,
        "supervised_positions": is_sharing,
        "vision_streaming": is_frozen,
    }
    return "applied" if applies.get(name, True) else "not applicable"


def is_new(choice: tuple[str, ...], family: str, trained: str) -> bool:
    """Whether all of it applies. Where a part does not, the rest is a choice of its own."""
    return choice in (ALL, DEFAULT) or all(
        status_of(name, family, trained) == "applied" for name in choice
    )
