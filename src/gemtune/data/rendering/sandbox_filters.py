"""Filters of chat templates that differ from jinja2's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from itertools import islice
from typing import Any

from jinja2.exceptions import SecurityError

_MAX_INDENT = 16
_MAX_TERMS = 1_000_000


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers defines it for templates: HTML is not escaped."""
    if indent is not None and (not isinstance(indent, int) or indent > _MAX_INDENT):
        raise SecurityError(f"indents JSON by {str(indent)[:20]}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def without_strings(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter sum for numbers alone: of lists it would be as long as all of them."""

    @wraps(function)
    def numbers(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
        terms = list(islice(iterable, _MAX_TERMS))
        if not isinstance(start, int | float):
            raise SecurityError(f"sums values of type {type(start).__name__}")
        return function(environment, terms, attribute, start)

    return numbers
