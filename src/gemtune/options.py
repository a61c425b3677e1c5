"""One configuration field: its default and the line that `train.py --help` prints for it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from gemtune.errors import ConfigError


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default (copied for each instance if it is a list or dict)."""
    metadata = {"help": help}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest of `known`, or nothing where none is near."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""


def require_choice(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise ConfigError(
            f"{key}={value} is not one of {', '.join(allowed)}.{did_you_mean(str(value), allowed)}"
        )


def require_range(
    key: str, value: float | None, *, at_least: float | None = None, above: float | None = None
) -> None:
    """Raise ConfigError unless `value` is None, or a number within the bounds."""
    if value is None:
        return
    if at_least is not None and not value >= at_least:
        raise ConfigError(f"{key}={value} is too small: it must be at least {at_least}.")
    if above is not None and not value > above:
        raise ConfigError(f"{key}={value} is too small: it must be above {above}.")
