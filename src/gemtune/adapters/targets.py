"""Which parameters an adapter goes to, as full paths: names alone would hit the towers too."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from gemtune.adapters.config import Lora
from gemtune.errors import ConfigError

_LANGUAGE = r"model\.language_model\.layers\.\d+\."
# Regular expressions over full paths. The towers wrap their linear layers in a clipped one, whose
# inner `.linear` is what peft can adapt (peft#3129).
_MODULES = {
    "language": _LANGUAGE + r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    "vision": r"model\.vision_tower\.encoder\.layers\.\d+\..*",
    "audio": r"model\.audio_tower\.layers\.\d+\..*",
    "projector": r"model\.embed_(vision|audio)\..*",
}
_EMBEDDINGS = "model.language_model.embed_tokens"
# Experts are parameters of three dimensions, which no list of modules reaches.
_EXPERTS = _LANGUAGE + r"experts"
_EXPERT_PARAMETERS = _EXPERTS + r"\.(gate_up_proj|down_proj)"
_ALSO = {
    "router": _LANGUAGE + r"router\..*",
    "norms": _LANGUAGE + r".*norm(_\d)?\.weight",
    "ple_projection": r"model\.language_model\.(layers\.\d+\.per_layer_(input_gate|projection)|"
    r"per_layer_model_projection)\..*",
    "projector": r"model\.embed_(vision|audio)\..*",
}


@dataclass(frozen=True)
class Targets:
    """What one part gives an adapter."""

    part: str
    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    @property
    def pattern(self) -> str:
        """A regular expression for the paths of this part and of no other."""
        if self.part == "embeddings":
            return re.escape(_EMBEDDINGS) + "|lm_head"
        return _EXPERTS + ".*" if self.part == "experts" else _MODULES[self.part]


def find_targets(model: nn.Module, parts: Iterable[str]) -> list[Targets]:
    """The targets of each part in this model.

    Raises:
        ConfigError: a part has none.
    """
    found = [_targets_of(model, part) for part in dict.fromkeys(parts)]
    for targets in found:
        if not targets.modules and not targets.parameters:
            raise ConfigError(
                f"adapter.parts names '{targets.part}', but this model has nothing of it."
            )
    return found


def also_trained(model: nn.Module, parts: Iterable[str]) -> list[str]:
    """Names of the parameters that are trained in full beside the adapter.

    Raises:
        ConfigError: a part has none.
    """
    names: list[str] = []
    for part in dict.fromkeys(parts):
        found = [n for n, _ in model.named_parameters() if re.fullmatch(_ALSO[part], n)]
        if not found:
            raise ConfigError(
                f"adapter.also_train names '{part}', but this model has nothing of it."
            )
        names += found
    return names


def adapter_rows(model: nn.Module, adapter: Lora) -> list[tuple[str, str]]:
    """For people: (part, what is adapted, with counts) of a model that has its adapter."""
    trained = [(n.removeprefix("base_model.model."), p) for n, p in model.named_parameters()]
    trained = [(name, p) for name, p in trained if p.requires_grad]
    rows = []
    for part in dict.fromkeys(adapter.parts):
        pattern = re.compile(rf"({Targets(part).pattern})\.(base_layer\.)*(lora_|modules_to).*")
        mine = [(name, p) for name, p in trained if pattern.fullmatch(name)]
        targets = {re.sub(r"\.(lora_\w+|modules_to\w+)\..*", "", name) for name, _ in mine}
        kinds = sorted({_kind(name) for name in targets})
        count = sum(p.numel() for _, p in mine)
        rank = adapter.rank_of(part)
        text = f"rank {rank}, {len(targets)} targets ({', '.join(kinds)}), {count:,} parameters"
        rows.append((part, text))
    for part in dict.fromkeys(adapter.also_train):
        mine = [p for name, p in trained if re.fullmatch(_ALSO[part], name)]
        count = sum(p.numel() for p in mine)
        rows.append((part, f"in full, {len(mine)} tensors, {count:,} parameters"))
    return rows


def _targets_of(model: nn.Module, part: str) -> Targets:
    if part == "experts":
        names = [n for n, _ in model.named_parameters() if re.fullmatch(_EXPERT_PARAMETERS, n)]
        return Targets(part, parameters=tuple(names))
    if part == "embeddings":
        return Targets(part, modules=(_EMBEDDINGS,))
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return Targets(part, modules=tuple(n for n in linear if re.fullmatch(_MODULES[part], n)))


def _kind(name: str) -> str:
    """`q_proj` of `...self_attn.q_proj.linear`."""
    name = name.replace(".base_layer", "").removesuffix(".linear")
    return name.rpartition(".")[2]
