"""Renders a conversation with the checkpoint's own template and marks what is to be learned."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from gemtune.data.media import EncodedImage, ImageEncoder
from gemtune.errors import DataError

IGNORE_INDEX = -100

_ROLES = ("system", "user", "assistant")
_MODEL_TURN = "<|turn>model\n"
_TURN_END = "<turn|>"
# What the model writes in its turn, with the token that ends it.
_LEARNED = re.compile(re.escape(_MODEL_TURN) + r"(.*?" + re.escape(_TURN_END) + ")", re.DOTALL)


@dataclass
class Example:
    """One row as model inputs: [S] int64 arrays, and its images in order."""

    input_ids: np.ndarray
    labels: np.ndarray
    """The ids where they are learned, -100 elsewhere; not shifted."""
    images: list[EncodedImage] = field(default_factory=list)
    where: str = ""

    @property
    def num_supervised_tokens(self) -> int:
        return int((self.labels[1:] != IGNORE_INDEX).sum())


@dataclass
class _Conversation:
    messages: list[dict[str, Any]]
    images: list[Image.Image]
    where: str


class ChatEncoder:
    """Rows with `messages` (and `images`) -> `Example`.

    The whole conversation is rendered once and the spans to learn are found in the result from
    its turn tokens. Rendering prompt and answer apart and subtracting would be wrong: on the larger
    sizes a prompt is not a prefix of prompt + answer.

    Args:
        tokenizer: with the Gemma 4 special tokens and a chat template.
        images: encoder for this row's images.
        max_length: tokens of a row, image tokens included.
        truncate: "none" (a longer row is refused) or "right" (text is cut; an image never).
    """

    def __init__(
        self, tokenizer: Any, images: ImageEncoder, *, max_length: int, truncate: str = "none"
    ) -> None:
        self.tokenizer = tokenizer
        self.images = images
        self.max_length = max_length
        self.truncate = truncate
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        longest_first = sorted(special, key=len, reverse=True)
        self._special_token = re.compile("|".join(map(re.escape, longest_first)))
        self._ids = {
            name: tokenizer.convert_tokens_to_ids(getattr(tokenizer, name))
            for name in ("boi_token", "image_token", "eoi_token")
        }
        self._empty_thought = self._prefix_of_answers()

    def encode_text(self, row: dict[str, Any], where: str) -> tuple[Example, list[Image.Image]]:
        """Ids and labels, with the images opened but not decoded.

        Raises:
            DataError: naming the row, for anything that cannot be learned from.
        """
        conversation = self._read(row, where)
        if not any(m["role"] == "assistant" for m in conversation.messages):
            raise DataError(f"{where}: no assistant message, so there is nothing to learn.")
        text = self._render(conversation, add_generation_prompt=False)
        spans = [match.span(1) for match in _LEARNED.finditer(text)]
        num_assistant = sum(m["role"] == "assistant" for m in conversation.messages)
        if len(spans) != num_assistant:
            raise DataError(
                f"{where}: the chat template rendered {len(spans)} model turns for {num_assistant} "
                "assistant messages, so what is to be learned is unknown. Its model turns must "
                f"read {_MODEL_TURN!r} ... {_TURN_END!r}."
            )
        if self._empty_thought and not text[spans[-1][0] :].startswith("<|channel>"):
            # The larger sizes answer after an empty thought; it is given to them, not learned.
            start, end = spans[-1]
            text = text[:start] + self._empty_thought + text[start:]
            spans[-1] = (start + len(self._empty_thought), end + len(self._empty_thought))
        example = self._tokenize(text, spans, conversation)
        return self._fit(example, conversation)

    def encode(self, row: dict[str, Any], where: str) -> Example:
        """The row as a training example, images decoded."""
        example, images = self.encode_text(row, where)
        example.images = [self.images.encode(image, where) for image in images]
        return example

    def encode_prompt(self, row: dict[str, Any], where: str) -> tuple[Example, str]:
        """Everything before the last assistant message, ready to generate, and that message."""
        conversation = self._read(row, where)
        last = max(i for i, m in enumerate(conversation.messages) if m["role"] == "assistant")
        reference = "".join(
            part.get("text", "") for part in conversation.messages[last]["content"]
        ).strip()
        kept = conversation.messages[:last]
        num_images = sum(part["type"] == "image" for m in kept for part in m["content"])
        prompt = _Conversation(kept, conversation.images[:num_images], where)
        example = self._tokenize(self._render(prompt, add_generation_prompt=True), [], prompt)
        example.images = [self.images.encode(image, where) for image in prompt.images]
        return example, reference

    def _prefix_of_answers(self) -> str:
        """What the generation prompt puts after `<|turn>model` (an empty thought, or nothing)."""
        probe = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
        rendered = self._render(
            _Conversation(probe, [], "the template"), add_generation_prompt=True
        )
        _, found, suffix = rendered.rpartition(_MODEL_TURN)
        if not found:
            raise DataError(
                f"The chat template's generation prompt does not contain {_MODEL_TURN!r}; it is "
                "not a Gemma 4 template."
            )
        return suffix

    def _read(self, row: dict[str, Any], where: str) -> _Conversation:
        """Check one row and bring it into one form: every content a list of parts."""
        raw = row.get("messages")
        if not isinstance(raw, list) or not raw:
            raise DataError(f"{where}: 'messages' must be a list with at least one message.")
        messages = []
        pending = list(row.get("images") or [])
        images: list[Image.Image] = []
        num_given = len(pending)
        previous = None
        for number, message in enumerate(raw, start=1):
            role = message.get("role") if isinstance(message, dict) else None
            if role not in _ROLES:
                raise DataError(
                    f"{where}: message {number} has role {role!r}; allowed are {', '.join(_ROLES)}."
                )
            if role == previous or (role == "system" and number > 1):
                raise DataError(
                    f"{where}: message {number} ({role}) is out of order: an optional system "
                    "message comes first, then user and assistant take turns."
                )
            previous = role
            parts = self._parts(message.get("content"), role, f"{where}, message {number}")
            for part in parts:
                if part["type"] == "image":
                    images.append(self._take_image(part, pending, where, num_given))
            messages.append({"role": role, "content": parts})
        if pending:
            raise DataError(
                f"{where}: {num_given} images are given but the messages have "
                f'{num_given - len(pending)} image parts ({{"type": "image"}}).'
            )
        return _Conversation(messages, images, where)

    def _take_image(
        self, part: dict[str, Any], pending: list[Any], where: str, num_given: int
    ) -> Image.Image:
        inline = next((part.pop(k) for k in ("image", "path", "url") if part.get(k)), None)
        if inline is None and not pending:
            raise DataError(
                f"{where}: the messages have more image parts than the {num_given} images given "
                "in 'images'."
            )
        return self.images.open(inline if inline is not None else pending.pop(0), where)

    def _parts(self, content: Any, role: str, where: str) -> list[dict[str, Any]]:
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not content:
            raise DataError(f"{where}: 'content' must be a text or a list of parts.")
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "image") or (kind == "image" and role != "user"):
                raise DataError(
                    f"{where}: a part of type {kind!r} is not read from the {role} role. "
                    "Text may stand anywhere, images in user messages."
                )
            if kind == "text":
                self._check_text(part.get("text"), where)
            # Parquet fills the fields that a part does not have with null.
            parts.append({key: value for key, value in part.items() if value is not None})
        if role == "assistant" and not "".join(p.get("text", "") for p in parts).strip():
            raise DataError(f"{where}: the assistant message is empty.")
        return parts

    def _check_text(self, text: Any, where: str) -> None:
        if not isinstance(text, str):
            raise DataError(f"{where}: a text part needs a 'text' string, not {text!r}.")
        if found := self._special_token.search(text):
            raise DataError(
                f"{where}: the text contains {found.group()!r}, which the tokenizer reads as a "
                "control token. Remove it, or write it apart."
            )

    def _render(self, conversation: _Conversation, *, add_generation_prompt: bool) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                conversation.messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise DataError(
                f"{conversation.where}: the chat template refuses it: {error}"
            ) from error

    def _tokenize(
        self, text: str, spans: list[tuple[int, int]], conversation: _Conversation
    ) -> Example:
        """Ids of the rendered text, image placeholders expanded, the spans as labels."""
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = []
        labels: list[int] = []
        remaining = iter(conversation.images)
        span_ends = iter([*spans, (len(text) + 1, len(text) + 1)])
        start, end = next(span_ends)
        for token, (first, last) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            while first >= end:
                start, end = next(span_ends)
            if token == self._ids["image_token"]:
                image = next(remaining, None)
                if image is None:
                    raise DataError(f"{conversation.where}: the template rendered extra images.")
                num_soft = self.images.num_soft_tokens(image, conversation.where)
                ids += [self._ids["boi_token"], *[token] * num_soft, self._ids["eoi_token"]]
                labels += [IGNORE_INDEX] * (num_soft + 2)
            else:
                ids.append(token)
                labels.append(token if first >= start and last <= end else IGNORE_INDEX)
        if next(remaining, None) is not None:
            raise DataError(
                f"{conversation.where}: the chat template dropped an image, so it is no template "
                "for images."
            )
        return Example(np.array(ids), np.array(labels), where=conversation.where)

    def _fit(
        self, example: Example, conversation: _Conversation
    ) -> tuple[Example, list[Image.Image]]:
        """Refuse or cut a row that is too long; refuse one without a label."""
        where, images = conversation.where, conversation.images
        length = len(example.input_ids)
        if length > self.max_length:
            if self.truncate == "none":
                raise DataError(
                    f"{where}: {length} tokens are more than data.max_length={self.max_length}. "
                    "Raise it, cut text with data.truncate=right, or leave such rows out with "
                    "data.on_bad_row=skip."
                )
            begins = np.flatnonzero(example.input_ids == self._ids["boi_token"])
            ends = np.flatnonzero(example.input_ids == self._ids["eoi_token"])
            for begin, end in zip(begins, ends, strict=True):
                if begin < self.max_length <= end:
                    raise DataError(
                        f"{where}: data.max_length={self.max_length} cuts through an image (tokens "
                        f"{begin} to {end}). Raise it to at least {end + 1}, or leave such rows "
                        "out with data.on_bad_row=skip."
                    )
            images = images[: int((ends < self.max_length).sum())]
            example.input_ids = example.input_ids[: self.max_length]
            example.labels = example.labels[: self.max_length]
        if not example.num_supervised_tokens:
            raise DataError(
                f"{where}: no token is left to learn"
                + (" after cutting it to data.max_length." if length > self.max_length else ".")
            )
        return example, images
