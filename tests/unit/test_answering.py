"""Answers and conversations: what the model is asked, what is shown, and how they end."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gemtune.answering import Answerer, Dialog, GenerateConfig, TokenStream, load_answerer
from gemtune.chat_loop import ChatLoop, Printer
from gemtune.data.rendering.template import ChatTemplate
from gemtune.errors import DataError, ModelError

SCRIPT = Path(__file__).parents[2] / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def answerer(tiny_checkpoint: Path) -> Answerer:
    torch.manual_seed(0)
    return load_answerer(
        GenerateConfig(model=str(tiny_checkpoint), max_new_tokens=5, temperature=0.0)
    )


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = [str(tmp_path / f"{n}.png") for n in range(2)]
    for n, path in enumerate(paths):
        pixels = np.random.default_rng(n).integers(0, 256, (48, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def test_the_prompt_is_the_templates(answerer: Answerer, pictures: list[str]) -> None:
    images = [answerer.read_image(path) for path in pictures]
    dialog = Dialog().ask("Which digit?", images).answered("7").ask("And <turn|> now?")
    inputs = answerer.inputs(dialog, thinking=False)
    tokenizer = answerer.processing.tokenizer
    text = tokenizer.apply_chat_template(
        [
            {
                "role": "user",
                "content": [*[{"type": "image"}] * 2, {"type": "text", "text": "Which digit?"}],
            },
            {"role": "assistant", "content": "7"},
            {"role": "user", "content": "And XX now?"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    soft = answerer.processing.model_config.image_token_id
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(soft) == 4 and inputs["pixel_values"].shape[0] == 2
    control = tokenizer.convert_tokens_to_ids("<turn|>")
    # The one of the text is no control token.
    assert ids.count(control) == text.count("<turn|>")
    assert tokenizer.decode([i for i in ids if i != soft]).endswith(text[text.rindex(" now?") :])


@pytest.mark.parametrize("thinking", [False, True])
def test_the_template_is_told_whether_to_think(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch, thinking: bool
) -> None:
    told: list[bool] = []
    run = ChatTemplate.run

    def run_and_note(self: ChatTemplate, *arguments: Any, **options: Any) -> Any:
        told.append(options["enable_thinking"])
        return run(self, *arguments, **options)

    monkeypatch.setattr(ChatTemplate, "run", run_and_note)
    answerer.inputs(Dialog().ask("Why?"), thinking=thinking)
    assert set(told) == {thinking}


def test_tokens_are_shown_as_they_come_and_make_the_answer(answerer: Answerer) -> None:
    shown: list[str] = []
    stream = TokenStream(answerer.processing.tokenizer, lambda text, _: shown.append(text))
    dialog = Dialog().ask("Which digit?")
    answerer.answer(dialog, stream, thinking=False)
    inputs = answerer.inputs(dialog, thinking=False)
    with torch.no_grad():
        expected = answerer.model.generate(**inputs, do_sample=False, max_new_tokens=5)
    new = expected[0, inputs["input_ids"].shape[1] :]
    text = answerer.processing.tokenizer.decode(new, skip_special_tokens=True)
    assert "".join(shown) == text and stream.answer == text.strip()


class Bytes:
    """A tokenizer of bytes, with two control tokens."""

    def get_vocab(self) -> dict[str, int]:
        return {"<|channel>": 300, "<channel|>": 301}

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


def test_thoughts_are_apart_and_characters_whole() -> None:
    shown: list[tuple[str, bool]] = []
    stream = TokenStream(Bytes(), lambda text, thought: shown.append((text, thought)))
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for number in [300, *b"thought\nhm", 301, *"Ü!\nja".encode()]:
        stream.put(torch.tensor([number]))
    stream.end()
    assert [text for text, thought in shown if thought] == ["h", "m"]
    assert [text for text, thought in shown if not thought] == ["Ü", "!", "\n", "j", "a"]
    assert stream.answer == "Ü!\nja"
    written: list[str] = []
    printer = Printer(written.append)
    for text, thought in shown:
        printer(text, thought)
    printer.close()
    assert "".join(written) == "[thinking] hm\n[answer] Ü!\nja\n"


class Talk:
    """Lines of a person, some of which are Ctrl-C, and what is written."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines, self.written = list(lines), ""

    def read(self, prompt: str) -> str:
        line = self.lines.pop(0) if self.lines else EOFError
        if isinstance(line, str):
            return line
        raise line

    def write(self, text: str) -> None:
        self.written += text


def talk(answerer: Any, *lines: str | type[BaseException]) -> tuple[int, Talk, ChatLoop]:
    person = Talk(*lines)
    loop = ChatLoop(answerer, read=person.read, write=person.write)
    return loop.run(), person, loop


def test_a_conversation(answerer: Answerer, pictures: list[str]) -> None:
    status, person, loop = talk(
        answerer, f"/image {pictures[0]}", f"/image {pictures[1]}", "Which?", "/think on", "Sure?"
    )
    assert status == 0 and loop.thinking and "2 images waiting" in person.written
    assert len(loop.dialog.images) == 2 and loop.images == []
    assert [m["role"] for m in loop.dialog.messages][:1] == ["user"]
    status, person, loop = talk(answerer, "Hello", "/reset", "/image no.png", "/nonsense", "/quit")
    assert status == 0 and loop.dialog == Dialog()
    assert "error: image=no.png cannot be read" in person.written
    assert person.written.count("/image FILE adds") == 2


class Stopped:
    """An answerer whose answers somebody stops."""

    def __init__(self, answerer: Answerer) -> None:
        self.processing = answerer.processing

    def answer(self, dialog: Dialog, stream: TokenStream, *, thinking: bool) -> None:
        stream.put(torch.tensor([[1]]))
        stream.put(torch.tensor([self.processing.tokenizer.encode("yes")[-1]]))
        raise KeyboardInterrupt


def test_ctrl_c_ends_an_answer_and_twice_the_program(answerer: Answerer) -> None:
    status, person, loop = talk(Stopped(answerer), "Go on", "And?", KeyboardInterrupt, "unread")
    assert status == 130 and person.lines == ["unread"]
    assert person.written.count("[stopped]") == 2 and len(loop.dialog.messages) == 4
    status, person, _ = talk(answerer, KeyboardInterrupt, "/think off", KeyboardInterrupt, "/quit")
    assert status == 0 and person.written.count("Ctrl-C again") == 2


def test_ctrl_c_reaches_a_real_generation(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = TokenStream.put

    def put_and_press(self: TokenStream, value: torch.Tensor) -> None:
        put(self, value)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TokenStream, "put", put_and_press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status, person, _ = talk(answerer, "Go on", "/quit")
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 0 and "[stopped]" in person.written


def test_what_is_no_image_is_refused(answerer: Answerer, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("none")
    with pytest.raises(DataError, match="not an image that can be read"):
        answerer.read_image(str(tmp_path / "text.png"))


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(None, {}), (0.0, {"do_sample": False}), (0.5, {"do_sample": True, "temperature": 0.5})],
)
def test_sampling_is_the_models_unless_told(
    temperature: float | None, expected: dict[str, Any]
) -> None:
    told = GenerateConfig(temperature=temperature).sampling()
    assert {k: v for k, v in told.items() if v is not None} == {"max_new_tokens": 512, **expected}


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Iterator[Callable[..., Any]]:
    """generate(*arguments) -> (exit status, output, errors)."""
    spec = importlib.util.spec_from_file_location("generate_script", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
        return module.main(), *capsys.readouterr()

    yield run
    sys.path[:] = before


def test_the_script(
    generate: Callable[..., Any], tiny_checkpoint: Path, pictures: list[str], tmp_path: Path
) -> None:
    model = f"model={tiny_checkpoint}"
    asked = ("prompt=What?", f"image={','.join(pictures)}", "max_new_tokens=3", "temperature=0")
    status, output, _ = generate(model, *asked)
    assert status == 0 and output.endswith("\n")
    for arguments, says in (
        (("model=/nowhere/at/all", "prompt=a"), "there is no such folder"),
        ((f"model={tmp_path}", "prompt=a"), "holds no model"),
        (("prompt=a",), "model= is missing"),
        ((model, "prompt=a", "image=no.png"), "image=no.png cannot be read"),
        ((model, "image=no.png"), "image= belongs to prompt="),
        ((model, "prompt=a", "top_p=0"), "above 0"),
    ):
        status, output, errors = generate(*arguments)
        assert status == 2 and says in errors and len(errors.strip().splitlines()) == 1


def test_an_adapter_without_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone"}')
    with pytest.raises(ModelError, match="base=/gone: there is no such folder"):
        load_answerer(GenerateConfig(model=str(tmp_path)))
