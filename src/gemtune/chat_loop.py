"""A conversation with a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from gemtune.answering import Answerer, Dialog, TokenStream
from gemtune.errors import UserError

HELP = (
    "/image FILE adds an image to the next message, /reset forgets everything, "
    "/think on|off, /quit. Ctrl-C ends an answer; a second one ends the program."
)
_DIM, _PLAIN = "\033[2m", "\033[0m"


def write_stdout(text: str) -> None:
    """At once, so that tokens are seen as they come."""
    sys.stdout.write(text)
    sys.stdout.flush()


@dataclass
class Printer:
    """Puts thoughts, dimmed where that is possible, and the answer apart."""

    write: Callable[[str], None] = write_stdout
    colours: bool = False
    _was_thought: bool = False

    def __call__(self, text: str, is_thought: bool) -> None:
        if is_thought != self._was_thought:
            begin, end = (_DIM, _PLAIN) if self.colours else ("[thinking] ", "\n[answer] ")
            self.write(begin if is_thought else end + "\n" * self.colours)
        self._was_thought = is_thought
        self.write(text)

    def close(self) -> None:
        """End the line, and the dimming of a thought that was cut."""
        self.write((_PLAIN if self._was_thought and self.colours else "") + "\n")


@dataclass
class ChatLoop:
    """Reads lines until /quit, the end of input, or a second Ctrl-C."""

    answerer: Answerer
    thinking: bool = False
    read: Callable[[str], str] = input
    write: Callable[[str], None] = write_stdout
    colours: bool = False
    dialog: Dialog = field(default_factory=Dialog)
    images: list[bytes] = field(default_factory=list)
    """Of the next message."""
    _interrupted: bool = False
    """Whether the last thing that happened was Ctrl-C."""

    def run(self) -> int:
        """The exit status."""
        self.write(f"{HELP}\n")
        while True:
            try:
                line = self.read("> ").strip()
                self._interrupted = False
            except EOFError:
                self.write("\n")
                return 0
            except KeyboardInterrupt:
                if self._interrupted:
                    self.write("\n")
                    return 130
                self._interrupted = True
                self.write("\nCtrl-C again, or /quit, ends the program\n")
                continue
            if line == "/quit":
                return 0
            try:
                self._take(line)
            except UserError as error:
                self.write(f"error: {error}\n")

    def _take(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/reset":
            self.dialog, self.images = Dialog(), []
            self.write("forgotten\n")
        elif command == "/image" and argument:
            self.images.append(self.answerer.read_image(argument))
            self.write(f"{len(self.images)} image{'s' * (len(self.images) > 1)} waiting\n")
        elif command == "/think" and argument in ("on", "off"):
            self.thinking = argument == "on"
            self.write(f"thinking is {argument}\n")
        elif line.startswith("/"):
            self.write(f"{HELP}\n")
        elif line:
            self._answer(line)

    def _answer(self, text: str) -> None:
        asked = self.dialog.ask(text, self.images)
        printer = Printer(self.write, self.colours)
        stream = TokenStream(self.answerer.processing.tokenizer, printer)
        try:
            self.answerer.answer(asked, stream, thinking=self.thinking)
        except KeyboardInterrupt:
            self._interrupted = True
            self.write(" [stopped]")
        printer.close()
        self.images = []
        # A turn without an answer would leave two questions in a row.
        if stream.answer:
            self.dialog = asked.answered(stream.answer)
