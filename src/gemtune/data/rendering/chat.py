"""Renders a conversation with the checkpoint's own template and marks what is to be learned."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from gemtune.data.media.images import EncodedImage, ImageEncoder
from gemtune.data.rendering.control_tokens import ControlTokens
from gemtune.data.rendering.conversation import Conversation, ConversationReader
from gemtune.data.rendering.fitting import EncodedText, Fitter, labels_of
from gemtune.data.rendering.learning import LearnedMessages, refuse_unread_keys
from gemtune.data.rendering.leaves import plain_shape_key, read_shape
from gemtune.data.rendering.plans import Plan, assemble, filled, make_plan, texts_to_encode
from gemtune.data.rendering.reasoning import has_reasoning, lift_reasoning
from gemtune.data.rendering.spans import (
    MODEL_TURN,
    THOUGHT_END,
    TURN_END,
    Piece,
    Rules,
    find_pieces,
)
from gemtune.data.rendering.template import ChatTemplate
from gemtune.errors import DataError

IGNORE_INDEX = -100

_ACCEPTS = ("image", "tools", "reasoning", "weights")
# Shapes of conversations that are remembered: with tools there may be one for each row.
_MAX_PLANS = 4096


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


@dataclass(frozen=True)
class Rendering:
    """How conversations are rendered and what of them is learned: the keys of `data`."""

    learn: str = "assistant"
    """assistant, last_assistant, completion (of prompt/completion rows), or all (but media)."""
    thinking: str = "auto"
    """Whether the template is told that the model thinks: on, off, or auto: rows with reasoning."""
    dropped_reasoning: str = "refuse"
    """What becomes of reasoning that the template leaves out: refuse, keep or drop."""
    empty_thought: str = "last"
    """Where the larger sizes answer after an empty thought: before the last answer, or all."""
    ignored_keys: tuple[str, ...] = ()
    """Keys of messages that are not rendered and need not be."""


class ChatEncoder:
    """Rows with `messages` (and `images`, `tools`) -> `Example`.

    The whole conversation is rendered once and the spans to learn are found in the result from
    its turn tokens. Rendering prompt and answer apart and subtracting would be wrong: on the larger
    sizes a prompt is not a prefix of prompt + answer.

    A control token in a text of the data stays text.

    Args:
        tokenizer: with the Gemma 4 special tokens and a chat template.
        images: encoder for this row's images.
        max_length: tokens of a row, image tokens included.
        truncate: "none" (a longer row is refused), "right" or "left" (text is cut; an image never).
        rendering: what is learned, and how.
    """

    def __init__(
        self,
        tokenizer: Any,
        images: ImageEncoder,
        *,
        max_length: int,
        truncate: str = "none",
        rendering: Rendering | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.images = images
        self.max_length = max_length
        self.truncate = truncate
        self.rendering = rendering or Rendering()
        source = tokenizer.chat_template
        if not isinstance(source, str) or not source:
            raise DataError(
                "The tokenizer has no chat template (base models ship none). Take that of the "
                "instruction-tuned checkpoint of the same size: chat_template.jinja in its folder."
            )
        self.control = ControlTokens(tokenizer, source)
        special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        self._template = ChatTemplate(source, self.control.pattern, special)
        self._reader = ConversationReader(tokenizer, images, _ACCEPTS, control_tokens="text")
        self._boi_id, self._image_id, self._eoi_id = tokenizer.convert_tokens_to_ids(
            [tokenizer.boi_token, tokenizer.image_token, tokenizer.eoi_token]
        )
        turn, turn_end = tokenizer.convert_tokens_to_ids(["<|turn>", TURN_END])
        self._fitter = Fitter(
            max_length,
            truncate,
            turn=turn,
            turn_end=turn_end,
            user=self.control.encode(["user\n"])[0],
            media={self._boi_id: self._eoi_id},
        )
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._prefixes: dict[bool, str] = {False: self._find_answer_prefix(False)}

    def encode_rows(
        self, rows: Sequence[tuple[dict[str, Any] | DataError, str]]
    ) -> list[EncodedText | DataError]:
        """Ids and what is learned of each (row, place): images are measured, not decoded.

        One call of the tokenizer for all of them. A row that cannot be learned from has its error,
        beginning with its place, in its place; and so has one that is given as an error.
        """
        results: list[Any] = [row if isinstance(row, DataError) else None for row, _ in rows]
        waiting: list[tuple[int, Plan, list[list[int]], frozenset[int] | None, int]] = []
        texts: list[str] = []
        for number, (row, where) in enumerate(rows):
            if isinstance(row, DataError):
                continue
            try:
                conversation = self._read(row, where)
                plan, own, learned = self._plan(conversation)
                # Not the images themselves: each may be an open file.
                pictures = list(map(self._image_ids, conversation.images))
            except DataError as error:
                results[number] = error
                continue
            new = texts_to_encode(plan, own)
            waiting.append((number, plan, pictures, learned, len(new)))
            texts += new
        encoded = self.control.encode(texts)
        at = 0
        for number, plan, pictures, learned, count in waiting:
            where = rows[number][1]
            try:
                ids, runs = assemble(plan, encoded[at : at + count], pictures, learned, where)
                results[number] = self._fit(EncodedText(ids, runs, where, len(pictures)))
            except DataError as error:
                results[number] = error
            at += count
        return results

    def encode_text(self, row: dict[str, Any], where: str) -> tuple[Example, list[Image.Image]]:
        """Ids and labels, with the images opened but not decoded.

        Raises:
            DataError: naming the row, for anything that cannot be learned from.
        """
        result = self.encode_rows([(row, where)])[0]
        if isinstance(result, DataError):
            raise result
        ids = np.array(result.ids, dtype=np.int32)
        example = Example(ids, labels_of(ids, result.runs, IGNORE_INDEX), where=where)
        if not result.num_images:
            return example, []
        images = self.images_of(row, where)
        return example, images[result.first_image : result.first_image + result.num_images]

    def images_of(self, row: dict[str, Any], where: str) -> list[Image.Image]:
        """All images of a row, opened and not decoded."""
        return self._reader.read(row, where).images

    def encode(self, row: dict[str, Any], where: str) -> Example:
        """The row as a training example, images decoded."""
        example, images = self.encode_text(row, where)
        return self._decode(example, images)

    def add_images(
        self, example: Example, row: dict[str, Any], num_images: int, first_image: int = 0
    ) -> Example:
        """Decode the images of the row that the example's ids were made from."""
        images = self.images_of(row, example.where)
        return self._decode(example, images[first_image : first_image + num_images])

    def encode_prompt(self, row: dict[str, Any], where: str) -> tuple[Example, str]:
        """Everything before the last assistant message, ready to generate, and that message."""
        conversation = self._read(row, where)
        plan, texts, _ = self._plan(conversation)
        last = max(piece.message for piece in plan.pieces if piece.message is not None)
        answer = "".join(filled(p.atoms, texts) for p in plan.pieces if p.message == last)
        reference = answer.removesuffix(TURN_END).rpartition(THOUGHT_END)[2].strip()

        prompt = conversation.before_last_answer()
        shape, texts = read_shape(prompt)
        thinks = self._thinks(conversation)
        rendered = self._template.run(
            shape, texts, where, add_generation_prompt=True, enable_thinking=thinks
        )
        pieces = [Piece(rendered.atoms, None)]
        plan = make_plan(pieces, self.control, self.tokenizer.image_token, None)
        encoded = self.control.encode(texts_to_encode(plan, texts))
        ids, _ = assemble(
            plan, encoded, list(map(self._image_ids, prompt.images)), frozenset(), where
        )
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        example = Example(np.array(ids, dtype=np.int32), labels, where=where)
        return self._decode(example, prompt.images), reference

    def _read(self, row: dict[str, Any], where: str) -> Conversation:
        conversation = self._reader.read(row, where)
        refuse_unread_keys(row["messages"], self.rendering.ignored_keys, where)
        return lift_reasoning(conversation, self.rendering.dropped_reasoning)

    def _thinks(self, conversation: Conversation) -> bool:
        if self.rendering.thinking == "auto":
            return has_reasoning(conversation)
        return self.rendering.thinking == "on"

    def _plan(
        self, conversation: Conversation
    ) -> tuple[Plan, Sequence[str], frozenset[int] | None]:
        """The steps to this row's ids, the texts for them, and the messages to learn."""
        learned = LearnedMessages.of(conversation, self.rendering.learn)
        plain = plain_shape_key(conversation)
        shape = None
        if plain is None:
            shape, texts = read_shape(conversation)
            key: Any = repr(shape.structure)
        else:
            key, texts = plain
        thinks = self._thinks(conversation)
        plan = self._plans.get((key, thinks))
        if plan is None:
            if shape is None:
                shape, texts = read_shape(conversation)
            options = {"add_generation_prompt": False, "enable_thinking": thinks}
            rendered = self._template.trace(shape, **options)
            is_traced = rendered is not None
            if rendered is None:
                rendered = self._template.run(shape, texts, conversation.where, **options)
            elif not self._agrees(rendered, shape, texts, conversation.where, options):
                self._template.is_traceable = is_traced = False
                rendered = self._template.run(shape, texts, conversation.where, **options)
            pieces = find_pieces(
                rendered.atoms,
                shape.leaves,
                texts,
                [message["role"] for message in conversation.messages],
                self._rules(thinks),
                conversation.where,
            )
            plan = make_plan(pieces, self.control, self.tokenizer.image_token, None)
            if is_traced:
                self._plans[(key, thinks)] = plan
                if len(self._plans) > _MAX_PLANS:
                    self._plans.popitem(last=False)
        return plan, texts, learned

    def _agrees(
        self, rendered: Any, shape: Any, texts: Sequence[str], where: str, options: dict[str, Any]
    ) -> bool:
        """Whether the template, run on this row, gives what was found for its shape."""
        if any(map(self.control.found_in, texts)):
            return True  # the template must not see those: nothing to compare
        return filled(rendered.atoms, texts) == self._template.render(
            shape.filled(texts), where, **options
        )

    def _rules(self, thinks: bool) -> Rules:
        if thinks not in self._prefixes:
            self._prefixes[thinks] = self._find_answer_prefix(thinks)
        return Rules(
            self._prefixes[thinks], self.rendering.empty_thought, self.rendering.dropped_reasoning
        )

    def _find_answer_prefix(self, thinks: bool) -> str:
        """What the generation prompt puts after `<|turn>model` (an empty thought, or nothing)."""
        probe = [{"role": "user", "content": "a"}]
        rendered = self._template.render(
            {"messages": probe},
            "a first try",
            add_generation_prompt=True,
            enable_thinking=thinks,
        )
        _, found, suffix = rendered.rpartition(MODEL_TURN)
        if not found:
            raise DataError(
                f"The chat template's generation prompt does not contain {MODEL_TURN!r}; it is "
                "not a Gemma 4 template."
            )
        return suffix

    def _image_ids(self, image: Image.Image) -> list[int]:
        """Begin, one token for each soft token of the image, end."""
        count = self.images.num_soft_tokens(image)
        return [self._boi_id, *[self._image_id] * count, self._eoi_id]

    def _fit(self, text: EncodedText) -> EncodedText:
        """Refuse or cut a row that is too long; refuse one without a label."""
        fitted = self._fitter.fit(text)
        if not fitted.num_supervised_tokens:
            raise DataError(
                f"{text.where}: no token is left to learn"
                + (" after cutting it to data.max_length." if fitted is not text else ".")
            )
        return fitted

    def _decode(self, example: Example, images: list[Image.Image]) -> Example:
        """The example with its images as patches."""
        example.images = [self.images.encode(image, example.where) for image in images]
        # The count was made from the header; the file may have changed since.
        num_expected = int((example.input_ids == self._image_id).sum())
        num_found = sum(image.num_soft_tokens for image in example.images)
        if num_found != num_expected:
            raise DataError(
                f"{example.where}: its images take {num_found} tokens where {num_expected} were "
                "counted when the row was checked. Was a file changed? Then prepare the data again "
                "with data.prepared=refresh."
            )
        return example
