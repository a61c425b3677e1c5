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
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]  # of this checkout, installed or not

import hydra
from hydra.errors import HydraException
from rich.console import Console

from gemtune.composition import explain, with_unchecked_keys
from gemtune.config import RunConfig, typed
from gemtune.console import Screen
from gemtune.data import OtherMedia, prepare
from gemtune.errors import ConfigError, UserError
from gemtune.models import load_processing
from gemtune.options import did_you_mean, option, require_choice, require_range
from gemtune.preview import make_preview, print_preview
from gemtune.preview_page import preview_page

CONFIGS = REPOSITORY / "configs"
PREFIX = "preview."


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


def own_keys(arguments: Sequence[str]) -> tuple[PreviewConfig, list[str]]:
    """The keys that start with `preview.` as values, and the arguments that are left."""
    values: dict[str, str | int | bool] = {}
    kinds = {field.name: type(field.default) for field in dataclasses.fields(PreviewConfig)}
    for argument in arguments:
        if not argument.startswith(PREFIX):
            continue
        key, equals, value = argument.removeprefix(PREFIX).partition("=")
        if key not in kinds or not equals:
            raise ConfigError(
                f"{argument} is not a key of the preview.{did_you_mean(key, kinds)} "
                f"Keys: {', '.join(PREFIX + name for name in kinds)}."
            )
        if kinds[key] is bool and value.lower() in ("true", "false"):
            values[key] = value.lower() == "true"
        elif kinds[key] is int and value.isdigit():
            values[key] = int(value)
        elif kinds[key] is str:
            values[key] = value
        else:
            wanted = "true or false" if kinds[key] is bool else "a whole number"
            raise ConfigError(f"{argument}: {PREFIX}{key} wants {wanted}.")
    return PreviewConfig(**values), [a for a in arguments if not a.startswith(PREFIX)]


def compose(arguments: Sequence[str]) -> RunConfig:
    """The configuration that train.py would make of these arguments."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return typed(hydra.compose("train", with_unchecked_keys(list(arguments))))


def show(arguments: Sequence[str]) -> int:
    """Print the preview, write the page; the exit status."""
    own, rest = own_keys(arguments)
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
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    try:
        return show(sys.argv[1:])
    except HydraException as error:
        print(f"error: {explain(str(error), CONFIGS)}", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
