"""One row of a source, checked and brought into one form."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from PIL import Image

from gemtune.data.media import ImageEncoder
from gemtune.errors import DataError

_ROLES = ("system", "user", "assistant")
_INLINE_IMAGE = ("image", "path", "url")
# Fields that carry something to learn or to condition on. Leaving them out unsaid would train a
# model that never thinks and never calls a tool.
_NOT_READ = ("reasoning", "reasoning_content", "thinking", "tool_calls", "tool_responses")


@dataclass
class Conversation:
    """Messages whose content is a list of `{type: text, text}` and `{type: image}` parts."""

    messages: list[dict[str, Any]]
    images: list[Image.Image]
    """One for each image part, in order; opened, not decoded."""
    where: str

    def before_last_answer(self) -> Conversation:
        """What the model is given to write its last message."""
        roles = [message["role"] for message in self.messages]
        last = len(roles) - 1 - roles[::-1].index("assistant")
        kept = self.messages[:last]
        num_images = sum(part["type"] == "image" for m in kept for part in m["content"])
        return Conversation(kept, self.images[:num_images], self.where)


class ConversationReader:
    """Rows with `messages` (and `images`) -> `Conversation`."""

    def __init__(self, tokenizer: Any, images: ImageEncoder) -> None:
        self._images = images
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        longest_first = sorted(special, key=len, reverse=True)
        self._control_token = re.compile("|".join(map(re.escape, longest_first)))

    def read(self, row: dict[str, Any], where: str) -> Conversation:
        """Raises DataError, beginning with `where`, for anything that cannot be learned from."""
        given = row.get("messages")
        if not isinstance(given, list) or not given:
            raise DataError(f"{where}: 'messages' must be a list with at least one message.")
        if row.get("tools"):
            raise DataError(f"{where}: 'tools' are not read yet. Leave such rows out.")
        pending = self._given_images(row, where)
        num_given = len(pending)
        images: list[Image.Image] = []
        messages: list[dict[str, Any]] = []
        for number, message in enumerate(given, start=1):
            role = self._role(message, number, messages, where)
            parts = []
            for part in self._parts(message.get("content"), role, f"{where}, message {number}"):
                if part["type"] == "image":
                    images.append(self._take_image(part, pending, where, num_given))
                    part = {"type": "image"}
                parts.append(part)
            messages.append({"role": role, "content": parts})
        if pending:
            raise DataError(
                f"{where}: {num_given} images are given but the messages have "
                f'{num_given - len(pending)} image parts ({{"type": "image"}}).'
            )
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{where}: no assistant message, so there is nothing to learn.")
        return Conversation(messages, images, where)

    def _given_images(self, row: dict[str, Any], where: str) -> list[Any]:
        images = row.get("images")
        if images is not None and not isinstance(images, list):
            raise DataError(f"{where}: 'images' must be a list, not {type(images).__name__}.")
        return list(images or [])

    def _role(self, message: Any, number: int, before: list[dict[str, Any]], where: str) -> str:
        """The message's role, if it may stand here."""
        if not isinstance(message, dict):
            raise DataError(
                f"{where}: message {number} must be an object with 'role' and 'content', not "
                f"{type(message).__name__}."
            )
        role = message.get("role")
        if role not in _ROLES:
            raise DataError(
                f"{where}: message {number} has role {role!r}; allowed are {', '.join(_ROLES)}."
            )
        previous = before[-1]["role"] if before else None
        allowed = {None: ("system", "user"), "user": ("assistant",)}.get(previous, ("user",))
        if role not in allowed:
            raise DataError(
                f"{where}: message {number} ({role}) is out of order: an optional system "
                "message comes first, then user and assistant take turns."
            )
        for field in _NOT_READ:
            if message.get(field):
                raise DataError(
                    f"{where}: message {number} has '{field}', which is not read yet and would be "
                    "lost. Remove it, or leave such rows out."
                )
        return role

    def _parts(self, content: Any, role: str, where: str) -> list[dict[str, Any]]:
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not content:
            raise DataError(
                f"{where}: 'content' must be a text or a list of parts, not "
                f"{'an empty list' if content == [] else type(content).__name__}."
            )
        parts, texts = [], []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "image") or (kind == "image" and role != "user"):
                raise DataError(
                    f"{where}: a part of type {kind!r} is not read from the {role} role. "
                    "Text may stand anywhere, images in user messages."
                )
            if kind == "image":
                parts.append(part)
                texts.append("\n")  # its token stands between the texts
                continue
            text = part.get("text")
            if not isinstance(text, str):
                raise DataError(f"{where}: a text part needs a 'text' string, not {text!r}.")
            parts.append({"type": "text", "text": text})
            texts.append(text.strip())
        self._check_text("".join(texts), where)
        if role == "assistant" and not any(texts):
            raise DataError(f"{where}: the assistant message is empty.")
        return parts

    def _check_text(self, text: str, where: str) -> None:
        """Refuse what the tokenizer would read as something else, or not at all.

        Parts are joined first, as templates join them: half a control token is none.
        """
        if found := self._control_token.search(text):
            raise DataError(
                f"{where}: the text contains {found.group()!r}, which the tokenizer reads as a "
                "control token. Remove it, or write it apart."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: the text contains {text[error.start]!r}, half of a surrogate pair, "
                "which is no character. Remove it."
            ) from error

    def _take_image(
        self, part: dict[str, Any], pending: list[Any], where: str, num_given: int
    ) -> Image.Image:
        """The image in the part itself, else the next one of `images`."""
        inline = next((part[key] for key in _INLINE_IMAGE if part.get(key) is not None), None)
        if inline is None and not pending:
            raise DataError(
                f"{where}: the messages have more image parts than the {num_given} images given "
                "in 'images'."
            )
        return self._images.open(inline if inline is not None else pending.pop(0), where)
