"""The kinds of adapter and their keys."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from gemtune.adapters.libraries import INT4, INT8, NF4, require_library
from gemtune.errors import ConfigError
from gemtune.options import option, require_choice, require_range

PARTS = ("language", "experts", "embeddings", "vision", "audio", "projector")
ALSO_TRAINED = ("router", "norms", "ple_projection", "projector")


@dataclass
class Adapter:
    """No adapter: the parameters themselves are trained."""


@dataclass
class Lora(Adapter):
    """LoRA (arXiv:2106.09685); everything else is frozen."""

    rank: int = option(16, "rank of the update")
    ranks: dict[str, int] = option(
        {}, "part -> its rank, where it is another: adapter.ranks.vision=8"
    )
    alpha: float = option(32.0, "the update is scaled by alpha / rank")
    dropout: float = option(0.0, "dropout in front of the update; not with experts")
    parts: list[str] = option(["language"], ", ".join(PARTS))
    also_train: list[str] = option([], f"in full, beside the adapter: {', '.join(ALSO_TRAINED)}")

    name: ClassVar[str] = "LoRA"

    def __post_init__(self) -> None:
        require_range("adapter.rank", self.rank, at_least=1)
        require_range("adapter.alpha", self.alpha, above=0)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter.dropout={self.dropout} must be in [0, 1).")
        if not self.parts:
            raise ConfigError(f"adapter.parts is empty. Parts: {', '.join(PARTS)}.")
        for part in self.parts:
            require_choice("adapter.parts", part, PARTS)
        for part in self.also_train:
            require_choice("adapter.also_train", part, ALSO_TRAINED)
        for part, rank in self.ranks.items():
            require_choice("adapter.ranks", part, PARTS)
            require_range(f"adapter.ranks.{part}", rank, at_least=1)
            if part not in self.parts:
                raise ConfigError(
                    f"adapter.ranks.{part}={rank}: {part} is not among "
                    f"adapter.parts=[{','.join(self.parts)}]."
                )
        if "experts" in self.parts and self.dropout:
            raise ConfigError(
                f"adapter.dropout={self.dropout} is not possible with adapter.parts=experts: the "
                "update of an expert is added to its weights, not to what comes out of them. "
                "Use adapter.dropout=0."
            )

    def rank_of(self, part: str) -> int:
        """The rank of a part's updates."""
        return self.ranks.get(part, self.rank)


@dataclass
class RsLora(Lora):
    """Rank-stabilised LoRA (arXiv:2312.03732): the update is scaled by alpha / sqrt(rank)."""

    name: ClassVar[str] = "rsLoRA"


@dataclass
class Qlora(Lora):
    """LoRA (QLoRA, arXiv:2305.14314) on a base whose language layers are in 4 or 8 bits."""

    quantization: str = option(
        NF4, "of the language layers' linear weights: nf4 (bitsandbytes), int4 or int8 (torchao)"
    )

    name: ClassVar[str] = "QLoRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("adapter.quantization", self.quantization, [NF4, INT4, INT8])
        require_library(self.quantization)

    def on_whole_base(self) -> Lora:
        """The same adapter, for a base that is not quantised."""
        return Lora(**{each.name: getattr(self, each.name) for each in fields(Lora)})


@dataclass
class Dora(Lora):
    """DoRA (arXiv:2402.09353): direction by LoRA, and a magnitude of its own for each output."""

    name: ClassVar[str] = "DoRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in ("experts", "embeddings"):
            if part in self.parts:
                raise ConfigError(
                    f"adapter=dora has no form for adapter.parts={part}. Use adapter=lora for it."
                )
