"""A conversation as its shape and its texts: rows of one shape are rendered alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gemtune.data.rendering.conversation import Conversation

# What a text is to its message.
CONTENT, REASONING, CALL, RESPONSE, TOOL = "text", "reasoning", "tool call", "tool response", "tool"


class Leaf(NamedTuple):
    """One text of a conversation: of which message (from 0), and what it is there.

    The name of a declared tool is one too, of message -1.
    """

    message: int
    kind: str


class _Slot(NamedTuple):
    number: int


class _Joined(NamedTuple):
    """Texts with a space between, as one."""

    parts: tuple[Any, ...]


@dataclass
class Shape:
    """All of a conversation but its texts, in the form that templates take."""

    structure: dict[str, Any]
    leaves: list[Leaf]

    def filled(self, texts: Sequence[str]) -> dict[str, Any]:
        """The conversation with these texts: `messages`, and `tools` where there are some."""
        return _rebuilt(self.structure, texts, lambda text: text)

    def mapped(self, change: Callable[[str], str]) -> Shape:
        """With the strings that are part of the shape changed: keys, ids, declarations."""
        slots = [_Slot(i) for i in range(len(self.leaves))]
        return Shape(_rebuilt(self.structure, slots, change, joins=False), self.leaves)

    def hides_control_tokens(self, control: re.Pattern[str]) -> bool:
        """Whether one stands in what is part of the shape."""
        return any(control.search(text) for text in _strings(self.structure))

    def has_characters(self, pattern: re.Pattern[str]) -> bool:
        """The same for any pattern."""
        return any(pattern.search(text) for text in _strings(self.structure))


def read_shape(conversation: Conversation) -> tuple[Shape, list[str]]:
    """The shape, and the texts of its leaves in order.

    A text of white space alone is part of the shape: templates ask whether there is one.
    """
    texts: list[str] = []
    leaves: list[Leaf] = []

    def leaf(text: str, message: int, kind: str) -> Any:
        if not text.strip():
            return text
        texts.append(text)
        leaves.append(Leaf(message, kind))
        return _Slot(len(texts) - 1)

    def inside(value: Any, message: int, kind: str) -> Any:
        if isinstance(value, str):
            return leaf(value, message, kind)
        if isinstance(value, dict):
            return {key: inside(inner, message, kind) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [inside(inner, message, kind) for inner in value]
        return value

    messages = []
    for number, message in enumerate(conversation.messages):
        form = {"role": message["role"]}
        for key in ("name", "tool_call_id"):
            if key in message:
                form[key] = message[key]
        if message.get("reasoning_content"):
            form["reasoning_content"] = leaf(message["reasoning_content"], number, REASONING)
        if calls := message.get("tool_calls"):
            form["tool_calls"] = [
                {k: v for k, v in call.items() if k != "function"}
                | {"function": inside(call["function"], number, CALL)}
                for call in calls
            ]
        if responses := message.get("tool_responses"):
            form["tool_responses"] = [_response(r, number, inside) for r in responses]
        form["content"] = _content(message, number, leaf)
        messages.append(form)
    structure: dict[str, Any] = {"messages": messages}
    if conversation.tools:
        functions = [tool.get("function", tool) for tool in conversation.tools]
        structure["tools"] = [
            {"type": "function", "function": f | {"name": leaf(f["name"], -1, TOOL)}}
            for f in functions
        ]
    return Shape(structure, leaves), texts


def plain_shape_key(conversation: Conversation) -> tuple[Any, list[str]] | None:
    """(what decides the shape, the texts) of a conversation of texts and media alone; else None.

    The same as `read_shape`, without making a shape that is known already.
    """
    if conversation.tools:
        return None
    texts: list[str] = []
    key = []
    for message in conversation.messages:
        if len(message) != 2 and not (len(message) == 3 and "weight" in message):
            return None
        content = message["content"]
        if len(content) == 1 and content[0]["type"] == "text" and content[0]["text"].strip():
            texts.append(content[0]["text"])
            key.append(message["role"])
            continue
        kinds = []
        for part in content:
            text = part.get("text", "")
            if part["type"] == "text" and text.strip():
                texts.append(text)
                kinds.append("text")
            else:
                kinds.append((part["type"], text))
        key.append((message["role"], *kinds))
    return tuple(key), texts


def _content(message: dict[str, Any], number: int, leaf: Callable[..., Any]) -> Any:
    """A text where that is all there is: there are templates that know nothing else."""
    parts, role = message["content"], message["role"]
    kind = RESPONSE if role == "tool" else CONTENT
    if role == "system" or [part["type"] for part in parts] == ["text"]:
        joined = tuple(leaf(part["text"], number, kind) for part in parts)
        return joined[0] if len(joined) == 1 else _Joined(joined)
    if not parts:
        return ""
    return [
        {"type": "text", "text": leaf(part["text"], number, kind)}
        if part["type"] == "text"
        else part
        for part in parts
    ]


def _response(response: Any, number: int, inside: Callable[..., Any]) -> Any:
    if not isinstance(response, dict):
        return inside(response, number, RESPONSE)
    # Its name is that of the call, or names nothing.
    return {
        key: value if key == "name" else inside(value, number, RESPONSE)
        for key, value in response.items()
    }


def _rebuilt(
    value: Any, texts: Sequence[Any], change: Callable[[str], str], joins: bool = True
) -> Any:
    if isinstance(value, _Slot):
        return texts[value.number]
    if isinstance(value, _Joined):
        parts = [_rebuilt(part, texts, change, joins) for part in value.parts]
        if not joins:
            return _Joined(tuple(parts))
        whole = parts[0]
        for part in parts[1:]:
            whole = whole + " " + part
        return whole
    if isinstance(value, dict):
        return {change(k): _rebuilt(inner, texts, change, joins) for k, inner in value.items()}
    if isinstance(value, list):
        return [_rebuilt(inner, texts, change, joins) for inner in value]
    return change(value) if isinstance(value, str) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
