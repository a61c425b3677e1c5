"""One row of a source, checked and brought into one form."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from gemtune.data.media.audio import AudioClip
from gemtune.data.media.encoders import MEDIA, Encoders
from gemtune.data.media.videos import Video
from gemtune.data.rendering.messages import (
    ROLES,
    content_parts,
    message_weight,
    reasoning_text,
    tool_calls,
    tool_list,
)
from gemtune.errors import DataError

# Column of the row that holds the media of each kind, in the order of their parts.
MEDIA_COLUMNS = {"image": "images", "video": "videos", "audio": "audios"}
# What a message may carry beside its text. Leaving it out unsaid would train a model that never
# thinks and never calls a tool; so what the renderer does not take is refused.
_EXTRAS = {
    "tools": ("tool_calls", "tool_responses"),
    "reasoning": ("reasoning_content", "reasoning", "thinking"),
    "weights": ("train", "weight"),
}

_PLAIN = frozenset({"role", "content"})


@dataclass
class Conversation:
    """Messages whose content is a list of parts: `{type: text, text}`, or `{type: image}` and the
    like, which stand for the next of `images`, `videos` or `audios`.

    A message has `role` (system, user, assistant, tool) and `content`, and where the row gave them
    `reasoning_content` (text), `tool_calls` (`{type: function, function: {name, arguments}}`,
    arguments a dict), `tool_responses`, `name`, `tool_call_id` and `weight` (a float; 0.0 for
    `train: false`).
    """

    messages: list[dict[str, Any]]
    images: list[Image.Image]
    """One for each image part, in order; opened, not decoded."""
    where: str
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Declarations of the functions that may be called, as the row has them."""
    videos: list[Video] = field(default_factory=list)
    audios: list[AudioClip] = field(default_factory=list)
    """Found and measured, not decoded."""
    num_prompt_messages: int = 0
    """Of a prompt/completion row: how many messages the prompt is. Otherwise 0."""

    @property
    def media(self) -> dict[str, list[Any]]:
        """Those of each kind."""
        return {kind: getattr(self, column) for kind, column in MEDIA_COLUMNS.items()}

    def before_last_answer(self) -> Conversation:
        """What the model is given to write its last message."""
        roles = [message["role"] for message in self.messages]
        last = len(roles) - 1 - roles[::-1].index("assistant")
        kept = self.messages[:last]
        count = dict.fromkeys(MEDIA, 0)
        for part in (part for message in kept for part in message["content"]):
            if part["type"] in count:
                count[part["type"]] += 1
        return Conversation(
            kept,
            self.images[: count["image"]],
            self.where,
            self.tools,
            self.videos[: count["video"]],
            self.audios[: count["audio"]],
            min(self.num_prompt_messages, len(kept)),
        )


class ConversationReader:
    """Rows with `messages` (and `images`, `videos`, `audios`, `tools`) -> `Conversation`.

    Args:
        tokenizer: its special tokens are looked for in the text.
        media: opens the media; a row with a kind that it does not take is refused.
        accepts: what else the caller can render, of tools, reasoning and weights; a row with
            anything else is refused, never read in part.
        control_tokens: "refuse" a text with a control token in it, or pass it through as "text".
            "text" is for a caller that tokenizes such a text without reading the token in it.
    """

    def __init__(
        self,
        tokenizer: Any,
        media: Encoders,
        accepts: Iterable[str] = (),
        control_tokens: str = "refuse",
    ) -> None:
        self._media = media
        self._accepts = frozenset((*media.kinds, *accepts))
        self._refuses_control_tokens = control_tokens == "refuse"
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        longest_first = sorted(special, key=len, reverse=True)
        self.control_token = re.compile("|".join(map(re.escape, longest_first)))
        # Looked for first: there are thousands of tokens, and few characters that begin one.
        self._begins = "".join(sorted({token[0] for token in special}))

    def read(self, row: dict[str, Any], where: str) -> Conversation:
        """Raises DataError, beginning with `where`, for anything that cannot be learned from."""
        given = row.get("messages")
        if not isinstance(given, list) or not given:
            raise DataError(f"{where}: 'messages' must be a list with at least one message.")
        if row.get("tools") and "tools" not in self._accepts:
            raise DataError(f"{where}: 'tools' are not read yet. Leave such rows out.")
        media = _MediaOfRow(self._media, row, where)
        messages: list[dict[str, Any]] = []
        for number, message in enumerate(given, start=1):
            role = self._role(message, number, messages, where)
            place = f"{where}, message {number}"
            read: dict[str, Any] = {"role": role, "content": []}
            if not message.keys() <= _PLAIN:
                read |= self._extras(message, role, place)
            content, thoughts = message.get("content"), []
            if content is not None or not (read.get("tool_calls") or read.get("tool_responses")):
                read["content"], thoughts = self._parts(content, role, place, media, read)
            if thoughts:
                read["reasoning_content"] = "\n".join(thoughts)
            messages.append(read)
        media.check_all_used()
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{where}: no assistant message, so there is nothing to learn.")
        return Conversation(
            messages,
            media.opened["image"],
            where,
            tool_list(row.get("tools"), where),
            media.opened["video"],
            media.opened["audio"],
            row.get("num_prompt_messages") or 0,
        )

    def _role(self, message: Any, number: int, before: list[dict[str, Any]], where: str) -> str:
        """The message's role, if it may stand here."""
        if not isinstance(message, dict):
            raise DataError(
                f"{where}: message {number} must be an object with 'role' and 'content', not "
                f"{type(message).__name__}."
            )
        role = message.get("role")
        roles = ROLES if "tools" in self._accepts else ROLES[:-1]
        if role not in roles:
            raise DataError(
                f"{where}: message {number} has role {role!r}; allowed are {', '.join(roles)}."
            )
        if role not in _may_follow(before):
            tools = " (a tool message follows a tool call)" if "tools" in self._accepts else ""
            raise DataError(
                f"{where}: message {number} ({role}) is out of order: an optional system "
                f"message comes first, then user and assistant take turns{tools}."
            )
        for kind, fields in () if message.keys() <= _PLAIN else _EXTRAS.items():
            for name in () if kind in self._accepts else fields:
                # `train: true` and a weight of 1 ask for nothing that is not done anyway.
                given, plain = message.get(name), (None, True) if kind == "weights" else (None,)
                if given not in plain and (given or kind == "weights"):
                    raise DataError(
                        f"{where}: message {number} has '{name}', which is not read yet and would "
                        "be lost. Remove it, or leave such rows out."
                    )
        return role

    def _extras(self, message: dict[str, Any], role: str, where: str) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if (calls := message.get("tool_calls")) or message.get("tool_responses"):
            if role != "assistant":
                raise DataError(
                    f"{where}: only an assistant message calls tools, not a {role} one."
                )
            if calls:
                extras["tool_calls"] = tool_calls(calls, where)
            if responses := message.get("tool_responses"):
                extras["tool_responses"] = responses
        for name in ("name", "tool_call_id"):
            if message.get(name) is not None:
                extras[name] = message[name]
        if (reasoning := reasoning_text(message, role, where)) is not None:
            extras["reasoning_content"] = reasoning
        if (weight := message_weight(message, role, where)) is not None:
            extras["weight"] = weight
        return extras

    def _parts(
        self, content: Any, role: str, where: str, media: _MediaOfRow, message: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The parts of a message, and the thoughts among them."""
        if isinstance(content, str) and content and "reasoning_content" not in message:
            self._check_text(content.strip(), where)  # the way of most rows
            if role == "assistant" and not content.strip() and not message.get("tool_calls"):
                raise DataError(f"{where}: the assistant message is empty.")
            return [{"type": "text", "text": content}], []
        parts, texts, thoughts = [], [], []
        for kind, value in content_parts(content, role, where, self._accepts, self._media.refusals):
            if kind == "text":
                parts.append({"type": "text", "text": value})
                texts.append(value.strip())
            elif kind == "reasoning":
                thoughts.append(value)
            else:
                media.take(kind, value)
                parts.append({"type": kind})
                texts.append("\n")  # its token stands between the texts
        self._check_text("".join(texts), where)
        for thought in (message.get("reasoning_content"), *thoughts):
            if thought:
                self._check_text(thought, where)
        if thoughts and "reasoning_content" in message:
            raise DataError(
                f"{where}: the reasoning is given twice, as a field and as parts of the content. "
                "Keep one of them."
            )
        if role == "assistant" and not any(texts) and not message.get("tool_calls"):
            raise DataError(f"{where}: the assistant message is empty.")
        return parts, thoughts

    def _check_text(self, text: str, where: str) -> None:
        """Refuse what the tokenizer would read as something else, or not at all.

        Parts are joined first, as templates join them: half a control token is none.
        """
        if (
            self._refuses_control_tokens
            and any(begin in text for begin in self._begins)
            and (found := self.control_token.search(text))
        ):
            raise DataError(
                f"{where}: the text contains {found.group()!r}, which the tokenizer reads as a "
                "control token. Remove it, or write it apart."
            )
        try:
            if not text.isascii():
                text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: the text contains {text[error.start]!r}, half of a surrogate pair, "
                "which is no character. Remove it."
            ) from error


def _may_follow(before: list[dict[str, Any]]) -> tuple[str, ...]:
    """The roles that may come next."""
    if not before:
        return ("system", "user")
    last = before[-1]
    if last["role"] == "tool":
        return ("tool", "assistant")
    if last["role"] == "assistant" and last.get("tool_calls") and not last.get("tool_responses"):
        return ("tool",)
    if last["role"] == "assistant" and last.get("tool_responses") and not last["content"]:
        return ("assistant",)
    return ("assistant",) if last["role"] == "user" else ("user",)


class _MediaOfRow:
    """Hands media to the parts of a row: what a part names itself, else the next of a column."""

    def __init__(self, files: Encoders, row: dict[str, Any], where: str) -> None:
        self._files = files
        self._where = where
        # Set by the source where several roots meet in one run, never by the data.
        root = row.get("media_root")
        self._root = None if root is None else Path(root)
        self.opened: dict[str, list[Any]] = {kind: [] for kind in MEDIA}
        self._pending: dict[str, list[Any]] = {}
        self._num_given: dict[str, int] = {}
        for kind, column in MEDIA_COLUMNS.items():
            given = row.get(column)
            if given is not None and not isinstance(given, list):
                raise DataError(f"{where}: '{column}' must be a list, not {type(given).__name__}.")
            self._pending[kind] = list(given or [])
            self._num_given[kind] = len(self._pending[kind])

    def take(self, kind: str, inline: Any) -> None:
        pending = self._pending[kind]
        if inline is None and not pending:
            raise DataError(
                f"{self._where}: the messages have more {kind} parts than the "
                f"{self._num_given[kind]} {kind}s given in '{MEDIA_COLUMNS[kind]}'."
            )
        given = inline if inline is not None else pending.pop(0)
        self.opened[kind].append(self._files.open(kind, given, self._where, self._root))

    def check_all_used(self) -> None:
        for kind, pending in self._pending.items():
            if pending:
                given = self._num_given[kind]
                raise DataError(
                    f"{self._where}: {given} {kind}s are given but the messages have "
                    f'{given - len(pending)} {kind} parts ({{"type": "{kind}"}}).'
                )
