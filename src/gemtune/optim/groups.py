"""What an optimizer steps: trained parameters with their part, and groups by rate and decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gemtune.errors import ConfigError
from gemtune.models.parts import part_of

_ADAPTED = "base_model.model."
# Looked up, not multiplied: decay would pull rows towards zero that a batch does not even read.
_TABLE_PARTS = ("embeddings", "ple")
_TABLE_NAMES = ("position_embedding_table",)
# It turns pixels into the first hidden states, as the embeddings do with ids.
_INPUT_MODULES = (".patch_embedder.",)


@dataclass(frozen=True)
class Trained:
    """A parameter that is trained, and what decides how it is stepped."""

    name: str
    """In the model without an adapter around it."""
    part: str
    """Of `gemtune.models.PARTS`; what an adapter adds belongs to the part that it sits in."""
    parameter: nn.Parameter
    is_table: bool
    """Of embeddings: rows that are looked up, or an adapter's factors of them."""

    @property
    def decays(self) -> bool:
        """Matrices and stacks of them; no norm, bias or scale, and no table."""
        return self.parameter.dim() >= 2 and not self.is_table

    @property
    def is_hidden_matrix(self) -> bool:
        """Between hidden states: of two dimensions, neither a table nor a factor of an adapter."""
        is_factor = ".lora_" in self.name
        is_input = any(module in self.name for module in _INPUT_MODULES)
        return self.decays and self.parameter.dim() == 2 and not is_factor and not is_input


def find_trained(model: nn.Module) -> list[Trained]:
    """The trained parameters, each once, whether or not an adapter is around the model.

    Raises:
        ConfigError: there is none.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = []
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = path.removeprefix(_ADAPTED)
            part = part_of(name)
            is_table = id(parameter) in tables or part in _TABLE_PARTS
            is_table = is_table or name.endswith(_TABLE_NAMES)
            found.append(Trained(name, part, parameter, is_table))
    if not found:
        raise ConfigError(
            "No parameter is left to train: model.freeze and adapter leave nothing. "
            "Free a part, or choose adapter=lora."
        )
    return found


def group(
    trained: Iterable[Trained], *, lr: float, part_lrs: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer, one for each rate with and without decay; those with it come first.

    Each keeps `lr_ratio`, its rate over `lr`: `set_learning_rate` applies it at every step.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for each in trained:
        rate = part_lrs.get(each.part, lr)
        groups.setdefault((not each.decays, rate), []).append(each.parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_exempt else weight_decay,
            "lr": rate,
            "lr_ratio": rate / lr,
        }
        for (is_exempt, rate), parameters in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def require_parts(trained: Iterable[Trained], part_lrs: Mapping[str, float]) -> None:
    """Raise ConfigError for the rate of a part of which nothing is trained."""
    parts = sorted({each.part for each in trained})
    for part, rate in part_lrs.items():
        if part not in parts:
            raise ConfigError(
                f"optim.part_lrs.{part}={rate:g}: nothing of '{part}' is trained. Trained: "
                f"{', '.join(parts)}. Take the key away, or free the part (model.freeze, "
                "adapter.parts)."
            )


def set_learning_rate(groups: Iterable[dict[str, Any]], rate: float) -> None:
    """Give every group of an optimizer its share of the main rate."""
    for each in groups:
        each["lr"] = rate * each.get("lr_ratio", 1.0)
