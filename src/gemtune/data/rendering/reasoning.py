"""Reasoning that stands inside of an answer's text, which templates strip without a word."""

from __future__ import annotations

import re
from typing import Any

from gemtune.data.rendering.conversation import Conversation
from gemtune.errors import DataError

_BEGIN = "<|channel>"
_INLINE = re.compile(r"<\|channel>(?:thought\n)?(.*?)\n?<channel\|>", re.DOTALL)


def has_reasoning(conversation: Conversation) -> bool:
    """Whether a message has reasoning that was given as such."""
    return any("reasoning_content" in message for message in conversation.messages)


def lift_reasoning(conversation: Conversation, policy: str) -> Conversation:
    """The conversation with reasoning out of the texts of its answers.

    Args:
        policy: "refuse" it, "keep" it as the message's reasoning, or "drop" it as templates do.

    Raises:
        DataError: beginning with the place of the row.
    """
    for number, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        for part in message["content"]:
            if part["type"] == "text" and _BEGIN in part["text"] and _INLINE.search(part["text"]):
                _lift(message, part, f"{conversation.where}, message {number + 1}", policy)
    return conversation


def _lift(message: dict[str, Any], part: dict[str, Any], where: str, policy: str) -> None:
    if policy == "refuse":
        raise DataError(
            f"{where}: its text has reasoning in it ({_BEGIN} ... <channel|>), which chat "
            "templates strip, so that it would not be learned. Put it into 'reasoning_content', or "
            "set data.dropped_reasoning=keep (it becomes that) or drop."
        )
    thoughts = [thought for thought in _INLINE.findall(part["text"]) if thought.strip()]
    part["text"] = _INLINE.sub("", part["text"])
    if policy == "keep" and thoughts:
        if "reasoning_content" in message:
            raise DataError(
                f"{where}: the reasoning is given twice, as a field and inside of the text. Keep "
                "one of them."
            )
        message["reasoning_content"] = "\n".join(thoughts)
    if not any(p["type"] != "text" or p["text"].strip() for p in message["content"]) and not (
        message.get("tool_calls")
    ):
        raise DataError(f"{where}: the assistant message is empty but for its reasoning.")
