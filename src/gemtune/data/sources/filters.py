"""Which rows of a source are taken: plain comparisons of columns, nothing that runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gemtune.errors import ConfigError
from gemtune.options import did_you_mean

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda value, allowed: value in allowed,
    "not_in": lambda value, excluded: value not in excluded,
    "contains": lambda value, part: part in value,
}


@dataclass(frozen=True)
class RowFilter:
    """All of its conditions must hold: (column, comparison, wanted)."""

    conditions: tuple[tuple[str, str, Any], ...]

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for column, _, _ in self.conditions))

    def takes(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is taken. A column that it lacks is None, which passes no order.

        Raises:
            TypeError: a value that cannot be compared with what is wanted.
        """
        for column, comparison, wanted in self.conditions:
            value = row.get(column)
            if value is None and comparison not in ("==", "!=", "in", "not_in"):
                return False
            if not _COMPARISONS[comparison](value, wanted):
                return False
        return True


def read_filter(spec: Mapping[str, Any], key: str) -> RowFilter | None:
    """`{column: value}`, `{column: [values]}`, or `{column: {">=": 3, contains: text}}`.

    Raises:
        ConfigError: an unknown comparison.
    """
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{key}={spec!r} must name columns: {key}='{{language: en}}'.")
    conditions: list[tuple[str, str, Any]] = []
    for column, wanted in spec.items():
        if not isinstance(wanted, Mapping):
            wanted = {"in" if isinstance(wanted, list) else "==": wanted}
        for comparison, value in wanted.items():
            if comparison not in _COMPARISONS:
                raise ConfigError(
                    f"{key}.{column}: {comparison!r} is no comparison."
                    f"{did_you_mean(str(comparison), _COMPARISONS)} Comparisons: "
                    f"{', '.join(_COMPARISONS)}."
                )
            if comparison in ("in", "not_in") and not isinstance(value, list):
                raise ConfigError(f"{key}.{column}.{comparison}={value!r} must be a list.")
            conditions.append((str(column), comparison, value))
    return RowFilter(tuple(conditions)) if conditions else None
