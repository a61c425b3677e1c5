"""The fields of one message, each checked by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from gemtune.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
_REASONING = ("reasoning_content", "reasoning", "thinking")
# Where a part itself may say what its medium is, the first that is given; else a column does.
_INLINE = {
    "image": ("image", "path", "url", "image_url", "bytes"),
    "video": ("video", "frames", "path", "url", "video_url", "bytes"),
    "audio": ("audio", "path", "url", "audio_url", "bytes"),
}
# What a part says of its medium beside it.
_WITH_INLINE = {"video": ("fps", "timestamps"), "audio": ("sampling_rate",)}
_ALIASES = {"image_url": "image", "video_url": "video", "audio_url": "audio"}


def content_parts(
    content: Any,
    role: str,
    where: str,
    accepts: frozenset[str],
    refusals: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[tuple[str, Any]]:
    """(kind, value) of each part: text, reasoning with their text; image, video, audio with what
    the part names, or None where a column of the row has it.

    Args:
        refusals: kind of media that is not in `accepts` -> why.

    Raises:
        DataError: a part that may not stand there, or that is not in `accepts`.
    """
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise DataError(
            f"{where}: 'content' must be a text or a list of parts, not "
            f"{'an empty list' if content == [] else type(content).__name__}."
        )
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        kind = _ALIASES.get(kind, kind) if isinstance(kind, str) else kind
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise DataError(f"{where}: a text part needs a 'text' string, not {text!r}.")
            yield "text", text
        elif kind in ("thinking", "reasoning") and "reasoning" in accepts and role == "assistant":
            text = next((part[k] for k in (kind, "text") if part.get(k) is not None), None)
            if not isinstance(text, str):
                raise DataError(f"{where}: a {kind} part needs a '{kind}' text, not {text!r}.")
            yield "reasoning", text
        elif kind in _INLINE and kind in accepts and role in ("user", "tool"):
            yield kind, _inline(part, kind, where)
        elif kind in refusals and role in ("user", "tool"):
            raise DataError(
                f"{where}: a part of type {kind!r} is not read: {refusals[kind]}. Leave such rows "
                "out with data.on_bad_row=skip."
            )
        else:
            others = [k + "s" if k == "image" else k for k in _INLINE if k in accepts]
            raise DataError(
                f"{where}: a part of type {kind!r} is not read from the {role} role. "
                f"Text may stand anywhere, {', '.join(others) or 'nothing else'} in user messages."
            )


def _inline(part: dict[str, Any], kind: str, where: str) -> Any:
    """What the part itself says of its medium."""
    inline = next((part[k] for k in _INLINE[kind] if part.get(k) is not None), None)
    if isinstance(inline, dict) and "url" in inline:  # {"image_url": {"url": ...}}
        inline = inline["url"]
    beside = {k: part[k] for k in _WITH_INLINE.get(kind, ()) if part.get(k) is not None}
    if not beside:
        return inline
    if inline is None:
        raise DataError(
            f"{where}: '{next(iter(beside))}' of a {kind} part belongs to the {kind} itself, which "
            "the part does not name."
        )
    if isinstance(inline, dict):
        return inline | beside
    name = (
        "frames" if isinstance(inline, list) else "bytes" if isinstance(inline, bytes) else "path"
    )
    return {name: inline} | beside


def message_weight(message: dict[str, Any], role: str, where: str) -> float | None:
    """How much the message counts in the loss, where `weight` or `train` says it."""
    train, weight = message.get("train"), message.get("weight")
    if train is None and weight is None:
        return None
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{where}: 'train' must be true or false, not {train!r}.")
    if weight is not None:
        # A bool is an int in Python, and NaN compares with nothing.
        numeric = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not numeric or not math.isfinite(weight) or weight < 0:
            raise DataError(
                f"{where}: 'weight' must be a finite number of at least 0, not {weight!r}."
            )
        if train is False and weight > 0:
            raise DataError(
                f"{where}: 'train' is false but 'weight' is {weight}. Keep one of them."
            )
    if role != "assistant" and (train or weight):
        raise DataError(
            f"{where}: only assistant messages are weighed, not a {role} message. Remove 'train' "
            "and 'weight' from it."
        )
    return 0.0 if train is False else float(1.0 if weight is None else weight)


def reasoning_text(message: dict[str, Any], role: str, where: str) -> str | None:
    """The reasoning, under any of its usual names."""
    given = [name for name in _REASONING if message.get(name)]
    if not given:
        return None
    if role != "assistant":
        raise DataError(f"{where}: '{given[0]}' belongs to assistant messages, not to {role} ones.")
    if len({str(message[name]) for name in given}) > 1:
        raise DataError(f"{where}: {' and '.join(given)} differ. Keep one of them.")
    if not isinstance(message[given[0]], str):
        raise DataError(
            f"{where}: '{given[0]}' must be a text, not {type(message[given[0]]).__name__}."
        )
    return message[given[0]]


def tool_calls(given: Any, where: str) -> list[dict[str, Any]]:
    """Calls as `{type: function, function: {name, arguments: dict}}` (and their id)."""
    if not isinstance(given, list):
        raise DataError(f"{where}: 'tool_calls' must be a list, not {type(given).__name__}.")
    calls = []
    for number, call in enumerate(given, start=1):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}: tool call {number} must be "
                '{"function": {"name": "...", "arguments": {...}}}.'
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: the arguments of tool call {number} are not valid JSON ({error})."
                ) from error
        if arguments is not None and not isinstance(arguments, dict):
            raise DataError(
                f"{where}: the arguments of tool call {number} must be an object, not "
                f"{type(arguments).__name__}."
            )
        read = {"name": function["name"], "arguments": arguments or {}}
        calls.append({"type": "function", "function": read})
        if call.get("id") is not None:
            calls[-1]["id"] = call["id"]
    return calls


def tool_list(given: Any, where: str) -> list[dict[str, Any]]:
    """The declared functions: a list, or its JSON text."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: 'tools' is not valid JSON ({error}).") from error
    if not given:
        return []
    if not isinstance(given, list):
        raise DataError(f"{where}: 'tools' must be a list, not {type(given).__name__}.")
    for number, tool in enumerate(given, start=1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}: tool {number} must be "
                '{"type": "function", "function": {"name": "...", ...}}.'
            )
    return given
