"""Answers of a model folder, token by token: a merged export, or an adapter and its base."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from gemtune.data import OtherMedia
from gemtune.data.batching.collate import collate
from gemtune.data.media.encoders import Encoders
from gemtune.data.media.files import MediaPolicy
from gemtune.data.rendering.chat import ChatEncoder, Rendering
from gemtune.errors import DataError, ModelError
from gemtune.models import ModelConfig, Processing, load_model, load_processing
from gemtune.options import option, require_choice, require_range

_ADAPTER_FILE = "adapter_config.json"
_NO_LIMIT = 1_000_000_000
_THOUGHT_LABEL = "thought\n"


@dataclass
class GenerateConfig:
    """The keys of a conversation with a model."""

    model: str = option("", "an exported folder, an adapter's folder, or a hub id")
    base: str = option("", "the model below an adapter, if not where its config says")
    prompt: str = option("", "one question; without it a conversation in the terminal")
    image: str = option("", "image files of the prompt, FILE[,FILE]")
    thinking: bool = option(False, "have the model think before it answers")
    max_new_tokens: int = option(512, "tokens of an answer, at most")
    temperature: float | None = option(None, "null: generation_config.json's; 0: greedy")
    top_p: float | None = option(None, "null: generation_config.json's")
    top_k: int | None = option(None, "null: generation_config.json's")
    seed: int | None = option(None, "makes the answers repeatable")
    device: str = option("auto", "cpu, cuda; auto: cuda where there is one")
    dtype: str = option("auto", "float32, bfloat16; auto: as the weights are stored")

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, ["auto", "float32", "bfloat16"])
        require_range("max_new_tokens", self.max_new_tokens, at_least=1)
        require_range("temperature", self.temperature, at_least=0)
        require_range("top_p", self.top_p, above=0)
        require_range("top_k", self.top_k, at_least=1)

    def sampling(self) -> dict[str, Any]:
        """What `generate` is told beside the model's own generation config."""
        told: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature == 0:
            return told | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        for key in ("temperature", "top_p", "top_k"):
            if (value := getattr(self, key)) is not None:
                told |= {key: value, "do_sample": True}
        return told


@dataclass
class Dialog:
    """What was said so far. Thoughts are left out of it, as the template wants."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)

    def ask(self, text: str, images: Sequence[bytes] = ()) -> Dialog:
        """With a question more, its images in front of the text."""
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": parts if images else text}]
        return Dialog(messages, [*self.images, *images])

    def answered(self, text: str) -> Dialog:
        return replace(self, messages=[*self.messages, {"role": "assistant", "content": text}])


class TokenStream(BaseStreamer):
    """Hands the text of new tokens on as they come, whole characters only.

    Args:
        show: gets a text, and whether it is a thought.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str, bool], None]) -> None:
        vocabulary = tokenizer.get_vocab()
        self._begin, self._end = (vocabulary.get(name) for name in ("<|channel>", "<channel|>"))
        self._tokenizer, self._show = tokenizer, show
        self._is_prompt, self._is_thought = True, False
        self._pending: list[int] = []
        self._shown, self._label = "", ""
        self._answer: list[str] = []

    @property
    def answer(self) -> str:
        """What was said so far, without thoughts."""
        return "".join(self._answer).strip()

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: first with the prompt, then with each token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for number in value.flatten().tolist():
            self._add(number)

    def end(self) -> None:
        self._flush(last=True)

    def _add(self, number: int) -> None:
        if number in (self._begin, self._end):
            self._flush(last=True)
            self._is_thought = number == self._begin
            self._label = _THOUGHT_LABEL if self._is_thought else ""
            return
        self._pending.append(number)
        self._flush()

    def _flush(self, *, last: bool = False) -> None:
        text = self._tokenizer.decode(self._pending, skip_special_tokens=True)
        if text.endswith("\ufffd") and not last:
            return  # bytes of a character that is not whole
        self._emit(text[len(self._shown) :])
        self._shown = text
        if last or text.endswith("\n"):
            self._pending, self._shown = [], ""

    def _emit(self, text: str) -> None:
        if self._label:
            if self._label.startswith(text):
                self._label = self._label.removeprefix(text)
                return
            text, self._label = text.removeprefix(self._label), ""
        if not text:
            return
        if not self._is_thought:
            self._answer.append(text)
        self._show(text, self._is_thought)


class Answerer:
    """A model in memory that continues dialogs. See `load_answerer`."""

    def __init__(
        self, model: Any, processing: Processing, config: GenerateConfig, device: torch.device
    ) -> None:
        self.model, self.processing, self.config = model, processing, config
        self._device = device
        media = Encoders.of(processing.image_processor, OtherMedia(), None, MediaPolicy())
        self._encoder = ChatEncoder(processing.tokenizer, media, max_length=_NO_LIMIT)
        tokenizer = processing.tokenizer
        stops = model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        turn_end = tokenizer.convert_tokens_to_ids("<turn|>")
        self._stops = sorted({*stops, tokenizer.eos_token_id, turn_end} - {None})

    def read_image(self, path: str) -> bytes:
        """The file, once it is known to be an image that can be decoded.

        Raises:
            DataError: it is none, or cannot be read.
        """
        try:
            content = Path(path).expanduser().read_bytes()
        except OSError as error:
            raise DataError(f"image={path} cannot be read: {error.strerror}.") from error
        images = self._encoder.media.image
        images.encode(images.open(content, f"image={path}"), f"image={path}")
        return content

    @torch.no_grad()
    def answer(self, dialog: Dialog, stream: TokenStream, *, thinking: bool) -> None:
        """Generate the next turn into `stream`; KeyboardInterrupt goes through.

        Raises:
            DataError: the template refuses the dialog.
        """
        inputs = self.inputs(dialog, thinking=thinking)
        self.model.generate(
            **{name: value.to(self._device) for name, value in inputs.items()},
            **self.config.sampling(),
            eos_token_id=self._stops,
            pad_token_id=self.processing.tokenizer.pad_token_id,
            streamer=stream,
        )

    def inputs(self, dialog: Dialog, *, thinking: bool) -> dict[str, torch.Tensor]:
        """The dialog as model inputs, ready for the next turn; [1, S] and its images.

        A control token in a text stays text.
        """
        self._encoder.rendering = Rendering(thinking="on" if thinking else "off")
        # The encoder wants the turn that it ends before.
        row = {"messages": dialog.answered("x").messages}
        if dialog.images:
            row["images"] = list(dialog.images)
        example, _ = self._encoder.encode_prompt(row, "the conversation")
        soft_ids = self._encoder.placeholders.soft_ids
        return collate([example], pad_id=0, soft_ids=soft_ids).inputs


def load_answerer(config: GenerateConfig) -> Answerer:
    """Read the model that `config.model` names.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    if not config.model:
        raise ModelError("model= is missing: an exported folder, an adapter's, or a hub id.")
    adapter = Path(config.model).expanduser()
    is_adapter = (adapter / _ADAPTER_FILE).is_file()
    place = _base_of(adapter, config.base) if is_adapter else _checked(config.model, "model")
    settings = ModelConfig(path=place)
    processing = load_processing(settings)
    stored = str(getattr(processing.model_config, "dtype", None)).removeprefix("torch.")
    known = stored if stored in ("float32", "bfloat16") else "bfloat16"
    settings.dtype = known if config.dtype == "auto" else config.dtype
    model: Any = load_model(settings, processing, seed=0)
    if is_adapter:
        model = _with_adapter(model, adapter)
    device = torch.device(_device(config.device))
    if config.seed is not None:
        torch.manual_seed(config.seed)
    return Answerer(model.to(device).eval(), processing, config, device)


def _with_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # peft asks for it under its old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            return PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(
            f"The adapter in {folder} does not fit its base model: {first}. Give the one it was "
            "trained on with base=PATH."
        ) from error


def _base_of(adapter: Path, given: str) -> str:
    if given:
        return _checked(given, "base")
    try:
        named = json.loads((adapter / _ADAPTER_FILE).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{adapter / _ADAPTER_FILE} cannot be read: {error!r}") from error
    return _checked(str(named), "base")


def _checked(place: str, key: str) -> str:
    """A folder with a model, or a hub id."""
    folder = Path(place).expanduser()
    if (folder / "config.json").is_file() or place.startswith("bundled:"):
        return place
    if folder.is_dir():
        raise ModelError(
            f"{key}={place} holds no model (no config.json and no {_ADAPTER_FILE}). Give an "
            "exported folder, such as runs/NAME/model."
        )
    if place.count("/") != 1 or place.startswith((".", "/", "~")):
        raise ModelError(
            f"{key}={place}: there is no such folder. Give an exported folder, or a hub id such as "
            "google/gemma-4-E2B-it."
        )
    return place


def _device(asked: str) -> str:
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device={asked}: this machine has no CUDA device. Use device=cpu.")
    return asked
