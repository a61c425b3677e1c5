"""Look at the data as the model will get it, before anything is trained:

    python scripts/preview_data.py recipe=gemma4_lora model=e2b data=chat data.path=FILE.jsonl

Takes the keys of train.py and its own:

    preview.rows=4           rows shown
    preview.ids=true         with the id of every token
    preview.split=eval       the rows to be judged by (train: those to be learned from)
    preview.html=PAGE.html   the same as one HTML page

Tokens that are learned are green. No weights are read. The exit status is 1 where a run would stop
at a bad row, and 2 where there is nothing to show.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Of this checkout, installed or not.
sys.path[:0] = [str(REPOSITORY / place) for place in ("src", ".", "scripts")]

from command_line import compose, finish, own_keys
from rich.console import Console

from gemtune.console import Screen
from gemtune.data import OtherMedia, prepare
from gemtune.models import load_processing
from gemtune.options import option, require_choice, require_range
from gemtune.preview import make_preview, print_preview
from gemtune.preview_page import preview_page


@dataclasses.dataclass
class PreviewConfig:
    """The keys of the preview itself."""

    rows: int = option(4, "rows shown")
    ids: bool = option(False, "with the id of every token")
    split: str = option("train", "train, or eval: the rows to be judged by")
    html: str = option("", "write the same to this HTML file")

    def __post_init__(self) -> None:
        require_range("preview.rows", self.rows, at_least=0)
        require_choice("preview.split", self.split, ["train", "eval"])


def show(arguments: Sequence[str]) -> int:
    """Print the preview, write the page; the exit status."""
    own, rest = own_keys("preview", PreviewConfig, arguments)
    config = compose(rest)
    processing = load_processing(config.model)
    screen = Screen(True)
    # Every bad row is wanted here, whatever the run would do with it.
    data = dataclasses.replace(config.data, on_bad_row="skip", max_bad_rows=None)
    with screen.preparing():
        sets = prepare(
            data,
            processing.tokenizer,
            processing.image_processor,
            config.run.seed,
            screen.checking,
            OtherMedia(**processing.other_media),
        )
    preview = make_preview(sets[own.split == "eval"], own.rows)
    width = None if sys.stdout.isatty() else 100
    console = Console(highlight=False, soft_wrap=True, width=width)
    print_preview(preview, console, ids=own.ids)
    if own.html:
        title = f"{config.data.name}: what {config.model.name} will learn ({own.split})"
        page = Path(own.html).expanduser()
        page.write_text(preview_page(preview, title, ids=own.ids), encoding="utf-8")
        console.print(f"written: {page}")
    if preview.rejected and config.data.on_bad_row == "error":
        console.print("data.on_bad_row=error: a run would stop at the first row that is left out.")
        return 1
    return 0


def main() -> int:
    """The exit status."""
    return finish(str(__doc__), show)


if __name__ == "__main__":
    sys.exit(main())
