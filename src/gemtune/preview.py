"""What the model will be shown and what it will learn, for a person to look at before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gemtune.data import ChatDataset, StreamedDataset
from gemtune.data.media.encoders import MEDIA
from gemtune.data.rendering.chat import IGNORE_INDEX, ChatEncoder, Example
from gemtune.errors import DataError

MAX_TOKENS_SHOWN = 4000
_BINS = 12
_BAR = 40
_LEARNED, _CONTROL, _MEDIUM = "bold green", "cyan", "magenta"


@dataclass
class Token:
    """One token, or a run of the soft tokens of an image, a frame or an audio."""

    id: int
    text: str
    learned: bool
    count: int = 1
    is_control: bool = False
    """A control token, and not a text that reads like one."""


@dataclass
class Medium:
    """A medium of a row: what it is, the soft tokens it takes, and what of it can be seen."""

    kind: str
    size: str
    """`640 x 480`, of a video with its frames, of audio `3.20 s`."""
    num_tokens: int
    image: Image.Image | None
    """Of a video the first frame."""

    @property
    def line(self) -> str:
        return f"{self.kind} {self.size}: {self.num_tokens:,} tokens"


@dataclass
class PreviewRow:
    """One row as the model gets it."""

    where: str
    tokens: list[Token]
    num_tokens: int
    num_learned: int
    media: list[Medium] = field(default_factory=list)


@dataclass
class Bin:
    """Rows of [first, last] tokens."""

    first: int
    last: int
    num_rows: int


@dataclass
class Preview:
    """Some rows, and figures of all of them."""

    rows: list[PreviewRow]
    num_rows: int
    num_tokens: int
    num_learned: int
    num_media: dict[str, int]
    lengths: list[Bin]
    notes: list[str]
    rejected: list[str]
    is_whole: bool
    """Whether the figures are of all rows; streamed ones are unknown before their turn."""


def make_preview(dataset: ChatDataset | StreamedDataset, num_rows: int) -> Preview:
    """The first rows, and figures of all that are known."""
    rows = [preview_row(dataset, i) for i in range(min(num_rows, len(dataset)))]
    if isinstance(dataset, ChatDataset):
        lengths = dataset.lengths
        figures = (dataset.num_tokens, dataset.num_supervised_tokens, dataset.num_media)
    else:
        lengths = np.array([row.num_tokens for row in rows], dtype=np.int64)
        figures = (
            int(lengths.sum()),
            sum(row.num_learned for row in rows),
            {kind: sum(m.kind == kind for row in rows for m in row.media) for kind in MEDIA},
        )
    return Preview(
        rows,
        len(dataset),
        *figures,
        histogram(lengths),
        list(dataset.notes),
        list(dataset.rejected),
        isinstance(dataset, ChatDataset),
    )


def first_rows(dataset: ChatDataset | StreamedDataset, num_rows: int) -> list[PreviewRow]:
    """The first rows, without those whose media are damaged: training says that in its turn."""
    rows = []
    for i in range(min(num_rows, len(dataset))):
        with suppress(DataError):
            rows.append(preview_row(dataset, i))
    return rows


def preview_row(dataset: ChatDataset | StreamedDataset, i: int) -> PreviewRow:
    """Row i of the data set, with its media decoded as in training."""
    example = dataset[i]
    encoder = dataset.encoder
    learned = example.labels != IGNORE_INDEX
    return PreviewRow(
        example.where,
        list(_tokens(encoder, example.input_ids, learned)),
        len(example.input_ids),
        example.num_supervised_tokens,
        list(_media(dataset, i, example)),
    )


def _media(dataset: ChatDataset | StreamedDataset, i: int, example: Example) -> Iterator[Medium]:
    """What is known of each medium that the example still has."""
    kept = dataset.kept_media(i) if example.images or example.videos or example.audios else {}
    if not kept:
        return
    encoder = dataset.encoder
    given = encoder.media_of(dataset.row(i), example.where)
    of_kind = {k: given[k][first : first + count] for k, (first, count) in kept.items()}
    for image, encoded in zip(of_kind["image"], example.images, strict=True):
        width, height = image.size
        yield Medium("image", f"{width} x {height}", encoded.num_soft_tokens, image)
    for video, frames in zip(of_kind["video"], example.videos, strict=True):
        assert encoder.media.video is not None
        width, height = video.size
        size = f"{width} x {height}, {len(video.indices)} frames to {video.timestamps[-1]:.1f} s"
        first = encoder.media.video.first_frame(video, example.where)
        yield Medium("video", size, frames.num_soft_tokens, first)
    for clip, audio in zip(of_kind["audio"], example.audios, strict=True):
        yield Medium("audio", f"{clip.seconds:.2f} s", audio.num_soft_tokens, None)


def _tokens(encoder: ChatEncoder, ids: np.ndarray, learned: np.ndarray) -> Iterator[Token]:
    """Each token with its text; those of a medium as one; characters of several tokens whole."""
    tokenizer = encoder.tokenizer
    soft = frozenset(encoder.placeholders.soft_ids.values())
    control = frozenset(encoder.control.ids.values())
    pending: list[Token] = []
    shown = ids[:MAX_TOKENS_SHOWN].tolist()
    for place, number in enumerate(shown):
        if number in soft and pending and pending[-1].id == number:
            pending[-1].count += 1
            continue
        text = tokenizer.decode([number])
        is_control = number in control
        pending.append(Token(number, text, bool(learned[place]), is_control=is_control))
    at = 0
    while at < len(pending):
        token = pending[at]
        if "\ufffd" in token.text:  # a byte of a character: shown by the last of its tokens
            for end in range(at + 2, min(at + 5, len(pending) + 1)):
                whole = tokenizer.decode([t.id for t in pending[at:end]])
                if "\ufffd" not in whole:
                    for part in pending[at : end - 1]:
                        part.text = ""
                    pending[end - 1].text = whole
                    break
        at += 1
    yield from pending


def histogram(lengths: np.ndarray, num_bins: int = _BINS) -> list[Bin]:
    """Rows by their tokens, in bins of one width."""
    if not len(lengths):
        return []
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(longest - shortest + 1) // num_bins))
    counts = np.bincount((lengths - shortest) // width)
    return [
        Bin(shortest + n * width, shortest + (n + 1) * width - 1, int(count))
        for n, count in enumerate(counts)
    ]


def summary_lines(preview: Preview) -> Iterator[str]:
    """Figures of the whole, in words."""
    yield from preview.notes
    scope = "" if preview.is_whole else " in the rows shown"
    yield f"{preview.num_rows:,} rows{' (streamed, not looked at)' if scope else ''}"
    share = preview.num_learned / preview.num_tokens if preview.num_tokens else 0
    yield (
        f"{preview.num_tokens:,} tokens{scope}, {preview.num_learned:,} of them learned "
        f"({share:.1%}); {media_counts(preview.num_media)}"
    )
    if preview.rejected:
        number = len(preview.rejected)
        yield f"{number:,} row{'s' * (number != 1)} cannot be learned from"


def media_counts(counts: Mapping[str, int]) -> str:
    """`1,200 images, 3 videos`; images are named even where there are none."""
    names = {"image": "images", "video": "videos", "audio": "audios"}
    return ", ".join(
        f"{count:,} {names[kind]}" for kind, count in counts.items() if count or kind == "image"
    )


def print_preview(preview: Preview, console: Console, *, ids: bool, max_rejected: int = 20) -> None:
    """To a terminal: what is learned in green (between « » where there are no colours), control
    tokens in cyan, media in magenta."""
    for line in summary_lines(preview):
        console.print(Text(line))
    for row in preview.rows:
        console.rule(Text(row.where), align="left")
        console.print(Text(_row_line(row), style="dim"))
        console.print(row_text(row, colours=console.color_system is not None))
        if ids:
            console.print(_id_table(row))
    console.rule("tokens of a row", align="left")
    most = max((each.num_rows for each in preview.lengths), default=1)
    for each in preview.lengths:
        bar = "█" * max(each.num_rows > 0, round(_BAR * each.num_rows / most))
        console.print(Text(f"{each.first:>8,} to {each.last:<8,} {each.num_rows:>8,}  {bar}"))
    if preview.rejected:
        console.rule("left out", align="left")
        for said in preview.rejected[:max_rejected]:
            console.print(Text(said))
        if len(preview.rejected) > max_rejected:
            console.print(f"... and {len(preview.rejected) - max_rejected:,} more")


def _row_line(row: PreviewRow) -> str:
    parts = [f"{row.num_tokens:,} tokens, {row.num_learned:,} learned"]
    parts += [medium.line for medium in row.media]
    if row.num_tokens > MAX_TOKENS_SHOWN:
        parts.append(f"the first {MAX_TOKENS_SHOWN:,} tokens are shown")
    return "; ".join(parts)


def row_text(row: PreviewRow, *, colours: bool = True) -> Text:
    """The row as text, what is learned marked."""
    text = Text()
    for learned, run in _runs(row.tokens):
        if learned and not colours:
            text.append("«")
        for token in run:
            other = _MEDIUM if token.count > 1 else _CONTROL if token.is_control else ""
            text.append(printable(token), style=_LEARNED if learned else other)
        if learned and not colours:
            text.append("»")
    return text


def _runs(tokens: Sequence[Token]) -> Iterator[tuple[bool, list[Token]]]:
    """Tokens that are alike, one run after another."""
    run: list[Token] = []
    for token in tokens:
        if run and run[-1].learned != token.learned:
            yield run[0].learned, run
            run = []
        run.append(token)
    if run:
        yield run[0].learned, run


def printable(token: Token) -> str:
    """Its text, control characters made visible."""
    text = f"{token.text}×{token.count}" if token.count > 1 else token.text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def _id_table(row: PreviewRow) -> Table:
    table = Table("id", "token", "learned", "times", show_edge=False)
    for token in row.tokens:
        shown = printable(token).replace("\n", "\\n")
        style = _LEARNED if token.learned else ""
        table.add_row(
            str(token.id),
            Text(shown, style=style),
            "yes" if token.learned else "",
            str(token.count) if token.count > 1 else "",
        )
    return table
