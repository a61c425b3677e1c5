"""Renders a conversation with the checkpoint's own template and marks what is to be learned."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from gemtune.data.conversation import Conversation, ConversationReader
from gemtune.data.media import EncodedImage, ImageEncoder
from gemtune.errors import DataError

IGNORE_INDEX = -100

_MODEL_TURN = "<|turn>model\n"
_TURN_END = "<turn|>"
# What the model writes in its turn, with the token that ends it.
_ANSWER = re.compile(re.escape(_MODEL_TURN) + r"(.*?" + re.escape(_TURN_END) + ")", re.DOTALL)


@dataclass
class Example:
    """One row as model inputs: two [S] integer arrays, and its images in order."""

    input_ids: np.ndarray
    labels: np.ndarray
    """The ids where they are learned, -100 elsewhere; not shifted."""
    images: list[EncodedImage] = field(default_factory=list)
    where: str = ""

    @property
    def num_supervised_tokens(self) -> int:
        """Labels that the shift leaves: the first token is predicted by nothing."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


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
        self._reader = ConversationReader(tokenizer, images)
        self._boi_id, self._image_id, self._eoi_id = tokenizer.convert_tokens_to_ids(
            [tokenizer.boi_token, tokenizer.image_token, tokenizer.eoi_token]
        )
        self._answer_prefix = self._find_answer_prefix()

    def encode_text(self, row: dict[str, Any], where: str) -> tuple[Example, list[Image.Image]]:
        """Ids and labels, with the images opened but not decoded.

        Raises:
            DataError: naming the row, for anything that cannot be learned from.
        """
        conversation = self._reader.read(row, where)
        example = self._tokenize(*self._render_answers(conversation), conversation)
        return self._fit(example, conversation)

    def encode(self, row: dict[str, Any], where: str) -> Example:
        """The row as a training example, images decoded."""
        example, images = self.encode_text(row, where)
        return self._decode(example, images)

    def add_images(self, example: Example, row: dict[str, Any], num_images: int) -> Example:
        """Decode the first `num_images` of the row that the example's ids were made from."""
        images = self._reader.read(row, example.where).images
        return self._decode(example, images[:num_images])

    def encode_prompt(self, row: dict[str, Any], where: str) -> tuple[Example, str]:
        """Everything before the last assistant message, ready to generate, and that message."""
        conversation = self._reader.read(row, where)
        text, spans = self._render_answers(conversation)
        start, end = spans[-1]
        reference = text[start:end].removesuffix(_TURN_END).strip()
        prompt = conversation.before_last_answer()
        rendered = self._render(prompt, add_generation_prompt=True)
        example = self._tokenize(rendered, [], prompt)
        return self._decode(example, prompt.images), reference

    def _find_answer_prefix(self) -> str:
        """What the generation prompt puts after `<|turn>model` (an empty thought, or nothing)."""
        probe = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
        rendered = self._render(Conversation(probe, [], "the template"), add_generation_prompt=True)
        _, found, suffix = rendered.rpartition(_MODEL_TURN)
        if not found:
            raise DataError(
                f"The chat template's generation prompt does not contain {_MODEL_TURN!r}; it is "
                "not a Gemma 4 template."
            )
        return suffix

    def _render(self, conversation: Conversation, *, add_generation_prompt: bool) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                conversation.messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise DataError(
                f"{conversation.where}: the chat template refuses it: {error}"
            ) from error

    def _render_answers(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and where in it each answer with its `<turn|>` stands."""
        text = self._render(conversation, add_generation_prompt=False)
        spans = [match.span(1) for match in _ANSWER.finditer(text)]
        num_answers = sum(message["role"] == "assistant" for message in conversation.messages)
        if len(spans) != num_answers:
            raise DataError(
                f"{conversation.where}: the chat template rendered {len(spans)} model turns for "
                f"{num_answers} assistant messages, so what is to be learned is unknown. Its model "
                f"turns must read {_MODEL_TURN!r} ... {_TURN_END!r}."
            )
        if prefix := self._answer_prefix:
            # The larger sizes answer after an empty thought: it is given to them, not learned.
            # Their templates leave it out of answers already given.
            start, end = spans[-1]
            if not text.startswith(prefix, start):
                text = text[:start] + prefix + text[start:]
                spans[-1] = (start, end + len(prefix))
            spans = [
                (start + len(prefix) if text.startswith(prefix, start) else start, end)
                for start, end in spans
            ]
        return text, spans

    def _tokenize(
        self, text: str, spans: list[tuple[int, int]], conversation: Conversation
    ) -> Example:
        """Ids of the rendered text, image placeholders expanded, the spans as labels.

        What is learned is tokenized apart from what is given, so that no token reaches across an
        edge: the ids before an answer are those of its prompt, and all of the answer is learned.
        """
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
        tokenized = self.tokenizer(
            pieces, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        ids: list[int] = []
        labels: list[int] = []
        remaining = iter(conversation.images)
        for number, piece in enumerate(tokenized):
            is_answer = number % 2 == 1
            if not is_answer and self._image_id in piece:
                piece = self._expand_images(piece, remaining, conversation.where)
            ids += piece
            labels += piece if is_answer else [IGNORE_INDEX] * len(piece)
        if next(remaining, None) is not None:
            raise DataError(
                f"{conversation.where}: the chat template dropped an image, so it is no template "
                "for images."
            )
        return Example(np.array(ids), np.array(labels), where=conversation.where)

    def _expand_images(self, ids: list[int], images: Any, where: str) -> list[int]:
        """Each placeholder becomes begin, one token for each soft token of its image, end."""
        expanded: list[int] = []
        for token in ids:
            if token != self._image_id:
                expanded.append(token)
                continue
            image = next(images, None)
            if image is None:
                raise DataError(f"{where}: the chat template rendered extra images.")
            num_soft_tokens = self.images.num_soft_tokens(image)
            expanded += [self._boi_id, *[token] * num_soft_tokens, self._eoi_id]
        return expanded

    def _decode(self, example: Example, images: list[Image.Image]) -> Example:
        """The example with its images as patches."""
        example.images = [self.images.encode(image, example.where) for image in images]
        # The count was made from the header; the file may have changed since.
        num_expected = int((example.input_ids == self._image_id).sum())
        num_found = sum(image.num_soft_tokens for image in example.images)
        if num_found != num_expected:
            raise DataError(
                f"{example.where}: its images take {num_found} tokens where {num_expected} were "
                "counted when the row was checked. Was a file changed?"
            )
        return example

    def _fit(
        self, example: Example, conversation: Conversation
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
            begins = np.flatnonzero(example.input_ids == self._boi_id)
            ends = np.flatnonzero(example.input_ids == self._eoi_id)
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
