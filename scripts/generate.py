"""Ask a fine-tuned model, or talk to it:

    python scripts/generate.py model=runs/NAME/model prompt="What is this?" image=cat.jpg
    python scripts/generate.py model=exports/NAME                 # a conversation in the terminal
    python scripts/generate.py model=exports/ADAPTER base=FOLDER  # an adapter and its base

    model=PATH             an exported folder, an adapter's folder, or a hub id
    base=PATH              the model below an adapter, if not where its config says
    prompt=TEXT            one question; without it a conversation
    image=FILE[,FILE]      its images
    thinking=false         have the model think before it answers
    max_new_tokens=512     tokens of an answer, at most
    temperature=           these three: as in generation_config.json; temperature=0 is greedy
    top_p=
    top_k=
    seed=                  makes the answers repeatable
    device=auto            cpu, cuda
    dtype=auto             float32, bfloat16; auto: as the weights are stored

In a conversation: /image FILE, /reset, /think on|off, /quit. Ctrl-C ends an answer, and a
second one the program. The exit status is 2 where a model or an image cannot be read.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Of this checkout, installed or not.
sys.path[:0] = [str(REPOSITORY / place) for place in ("src", "scripts")]

from command_line import finish, own_keys

from gemtune.answering import Answerer, Dialog, GenerateConfig, TokenStream, load_answerer
from gemtune.chat_loop import ChatLoop, Printer
from gemtune.errors import ConfigError


def generate(arguments: Sequence[str]) -> int:
    """Answer, or talk; the exit status."""
    config, _ = own_keys("", GenerateConfig, arguments)
    if config.image and not config.prompt:
        raise ConfigError("image= belongs to prompt=. In a conversation type /image FILE.")
    answerer = load_answerer(config)
    colours = sys.stdout.isatty()
    if config.prompt:
        return answer_once(answerer, config, colours)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` a history and editing
    return ChatLoop(answerer, config.thinking, colours=colours).run()


def answer_once(answerer: Answerer, config: GenerateConfig, colours: bool) -> int:
    """130: ended by Ctrl-C."""
    images = [answerer.read_image(name) for name in config.image.split(",") if name]
    printer = Printer(colours=colours)
    stream = TokenStream(answerer.processing.tokenizer, printer)
    dialog = Dialog().ask(config.prompt, images)
    try:
        answerer.answer(dialog, stream, thinking=config.thinking)
    except KeyboardInterrupt:
        return 130
    finally:
        printer.close()
    return 0


def main() -> int:
    """The exit status."""
    return finish(str(__doc__), generate)


if __name__ == "__main__":
    sys.exit(main())
