"""A data set that is checked as a whole before the first step, and decoded as it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemtune.data.chat import IGNORE_INDEX, ChatEncoder, Example
from gemtune.data.collate import Batch, collate, collate_packed
from gemtune.data.filters import read_filter
from gemtune.data.formats import check_mapping
from gemtune.data.media import ImageEncoder
from gemtune.data.media_files import MediaPolicy
from gemtune.data.mixture import read_mix
from gemtune.data.sources import Source, join_sources, mixed_order, read_source
from gemtune.data.streaming import StreamedDataset, check_streaming
from gemtune.errors import ConfigError, DataError
from gemtune.options import option, require_choice, require_range


@dataclass
class DataConfig:
    """Conversations to learn from, and those to be judged by."""

    name: str = option("chat", "short name, part of the default run name")
    path: str | None = option(None, "file (jsonl, json, parquet, arrow, csv), folder, hub dataset")
    split: str = option("train", "split of a hub dataset or of a saved folder")
    subset: str | None = option(None, "configuration of a hub dataset, where it has several")
    columns: dict[str, str] = option({}, "our column: the data's, {prompt: question}")
    filter: dict[str, Any] = option({}, "rows to take: {lang: en}, {score: {'>=': 3}}")
    id_column: str | None = option("id", "a value that stands twice is a bad row; null: it may")
    mix: list[Any] = option([], "instead of `path`: [{path: .., weight: 2}, ..], see MixEntry")
    mix_epoch: str = option(
        "all", "all: every row at least once; first: until one source is used up"
    )
    streaming: bool = option(
        False, "each row is checked at its turn, not all before the first step"
    )
    max_rows: int | None = option(None, "only the first rows (of each source); null: all")
    eval_path: str | None = option(None, "the same for evaluation; null: part of `path`")
    eval_split: str = option("test", "split of a hub dataset in `eval_path`")
    eval_fraction: float = option(0.02, "share of `path` held out when `eval_path` is null")
    eval_max_rows: int | None = option(None, "rows used for eval/loss; null: all")
    eval_generate_rows: int | None = option(8, "rows answered by generating; null: all")
    eval_max_new_tokens: int = option(64, "longest generated answer, in tokens")
    max_length: int = option(2048, "tokens of a row, image tokens included")
    truncate: str = option("none", "none: a longer row is a bad row; right: its text is cut")
    on_bad_row: str = option("error", "error: stop; skip: leave it out, count and name it")
    shuffle: bool = option(True, "a new order each epoch, decided by run.seed")
    num_workers: int = option(0, "loader processes; 0: in the training process")
    media_root: str | None = option(None, "folder that media paths may not leave; null: the file's")
    allow_urls: bool = option(False, "fetch media from public http(s) addresses; kept in ~/.cache")
    max_image_pixels: int = option(50_000_000, "a larger image is a bad row, and not decoded")
    max_media_bytes: int = option(200_000_000, "a larger file is a bad row, and not read")
    verify_images: bool = option(False, "decode every image in the check, not its header alone")
    packing: bool = option(
        False, "whole rows together in rows of max_length; loop.*_batch_size count those"
    )
    bucket_rows: int | None = option(
        None, "rows sorted by length together; null: those of a step, same gradient; 0: none"
    )

    def __post_init__(self) -> None:
        if self.path is None and not self.mix:
            raise ConfigError(
                "data.path is not set. Give a file, a folder saved by datasets, or a hub dataset "
                "id: data.path=conversations.jsonl"
            )
        self._check_sources()
        require_choice("data.truncate", self.truncate, ["none", "right"])
        require_choice("data.on_bad_row", self.on_bad_row, ["error", "skip"])
        require_range("data.max_length", self.max_length, at_least=2)
        require_range("data.max_rows", self.max_rows, at_least=1)
        require_range("data.eval_max_rows", self.eval_max_rows, at_least=0)
        require_range("data.eval_generate_rows", self.eval_generate_rows, at_least=0)
        require_range("data.eval_max_new_tokens", self.eval_max_new_tokens, at_least=1)
        require_range("data.num_workers", self.num_workers, at_least=0)
        self._check_batching()
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"data.eval_fraction={self.eval_fraction} must be in [0, 1).")

    def _check_sources(self) -> None:
        require_choice("data.mix_epoch", self.mix_epoch, ["all", "first"])
        require_range("data.max_image_pixels", self.max_image_pixels, at_least=1)
        require_range("data.max_media_bytes", self.max_media_bytes, at_least=1)
        read_filter(self.filter, "data.filter")
        check_mapping(self.columns, "data.columns")
        if not self.mix:
            return
        if self.path is not None:
            raise ConfigError(
                f"data.path={self.path} and data.mix are both given. Put the path into the mix, or "
                "set data.path=null."
            )
        for name in ("columns", "filter"):
            if getattr(self, name):
                raise ConfigError(
                    f"data.{name} is for data.path; give each source of data.mix its own."
                )
        read_mix(self.mix)

    def _check_batching(self) -> None:
        require_range("data.bucket_rows", self.bucket_rows, at_least=0)
        if self.packing and self.streaming:
            raise ConfigError(
                "data.packing=true needs the length of every row before the first step, and "
                "data.streaming=true does not look at them. Leave one of them out."
            )
        if not self.bucket_rows:
            return
        rows = f"data.bucket_rows={self.bucket_rows}"
        if self.packing:
            raise ConfigError(
                f"{rows} is for padded rows; data.packing=true pads next to nothing. Leave one of "
                "them out."
            )
        if self.streaming:
            raise ConfigError(
                f"{rows} sorts by lengths that data.streaming=true does not know. Leave one of "
                "them out."
            )
        if not self.shuffle:
            raise ConfigError(
                f"{rows} changes the order of the file, which data.shuffle=false keeps. Leave one "
                "of them out."
            )

    @property
    def sources(self) -> str:
        """What is learned from, for a line."""
        return self.path or " + ".join(entry.path for entry in read_mix(self.mix))

    @property
    def media_policy(self) -> MediaPolicy:
        return MediaPolicy(
            allow_urls=self.allow_urls,
            max_image_pixels=self.max_image_pixels,
            max_media_bytes=self.max_media_bytes,
            verify_images=self.verify_images,
        )

    def read_train(self) -> Source:
        """The rows of `path`, or of the mix."""
        common = {
            "media_root": self.media_root,
            "id_column": self.id_column,
            "streaming": self.streaming,
        }
        if self.mix:
            return join_sources(read_mix(self.mix), max_rows=self.max_rows, **common)
        assert self.path is not None  # __post_init__ refuses it
        return read_source(
            self.path,
            self.split,
            "data.path",
            subset=self.subset,
            columns=self.columns,
            filter=self.filter,
            **common,
        )

    def read_eval(self) -> Source:
        """The rows of `eval_path`, whole whatever `streaming` says: they are few."""
        assert self.eval_path is not None
        return read_source(
            self.eval_path,
            self.eval_split,
            "data.eval_path",
            subset=self.subset,
            columns=self.columns,
            media_root=self.media_root,
            id_column=self.id_column,
        )


@dataclass(slots=True)
class _Kept:
    """A good row: where it stands in the source, and its [S] int32 ids and labels."""

    index: int
    ids: np.ndarray
    labels: np.ndarray
    num_images: int


class ChatDataset:
    """Rows that were found good, in the order of the source.

    Ids and labels are kept (8 bytes a token); images are read again when a batch needs them.
    """

    def __init__(self, source: Source, encoder: ChatEncoder) -> None:
        self.source = source
        self.encoder = encoder
        self.rejected: list[str] = []
        self.notes: list[str] = list(source.notes)
        """What was understood of the source, one line each."""
        self._kept: list[_Kept] = []

    def check(
        self, indices: Sequence[int], on_bad_row: str, progress: Callable[[int, int], None]
    ) -> None:
        """Encode the text of every row. A bad one raises, or is left out and named."""
        for done, index in enumerate(indices, start=1):
            try:
                example, images = self.encoder.encode_text(
                    self.source.rows[index], self.source.describe(index)
                )
            except DataError as error:
                if on_bad_row == "error":
                    raise
                self.rejected.append(str(error))
            else:
                self._keep(index, example, len(images))
            progress(done, len(indices))

    def mix(self, seed: int, epoch: str) -> None:
        """Repeat the rows of a mix as its weights say. Counts are then those of an epoch."""
        order, note = mixed_order(self.source, [kept.index for kept in self._kept], seed, epoch)
        self._kept = [self._kept[i] for i in order.tolist()]
        self.notes.append(note)

    def _keep(self, index: int, example: Example, num_images: int) -> None:
        ids, labels = example.input_ids.astype(np.int32), example.labels.astype(np.int32)
        self._kept.append(_Kept(index, ids, labels, num_images))

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, i: int) -> Example:
        kept = self._kept[i]
        example = Example(kept.ids, kept.labels, where=self.source.describe(kept.index))
        if not kept.num_images:
            return example
        return self.encoder.add_images(example, self.source.rows[kept.index], kept.num_images)

    def row(self, i: int) -> dict[str, Any]:
        """The row as the source has it."""
        return self.source.rows[self._kept[i].index]

    def prompt(self, i: int) -> tuple[Example, str]:
        """The row up to its last answer, and that answer."""
        return self.encoder.encode_prompt(self.row(i), self.source.describe(self._kept[i].index))

    def batch(self, examples: Sequence[Example], padding_side: str = "right") -> Batch:
        """Collate with this tokenizer's padding."""
        tokenizer = self.encoder.tokenizer
        return collate(
            examples,
            pad_id=tokenizer.pad_token_id,
            image_id=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
            padding_side=padding_side,
        )

    def packed_batch(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """Several examples in each row, see `collate_packed`."""
        tokenizer = self.encoder.tokenizer
        return collate_packed(
            rows,
            pad_id=tokenizer.pad_token_id,
            image_id=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
        )

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each row."""
        return np.array([len(kept.ids) for kept in self._kept], dtype=np.int64)

    @property
    def every_row_has_images(self) -> bool:
        return all(kept.num_images for kept in self._kept)

    @property
    def num_images(self) -> int:
        return sum(kept.num_images for kept in self._kept)

    @property
    def num_tokens(self) -> int:
        return sum(len(kept.ids) for kept in self._kept)

    @property
    def num_supervised_tokens(self) -> int:
        return sum(int((kept.labels[1:] != IGNORE_INDEX).sum()) for kept in self._kept)

    @property
    def longest_row_tokens(self) -> int:
        return max((len(kept.ids) for kept in self._kept), default=0)


def prepare(
    config: DataConfig,
    tokenizer: Any,
    image_processor: Any,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[ChatDataset | StreamedDataset, ChatDataset]:
    """The training and the evaluation rows, every one of them checked (unless streamed).

    Raises:
        DataError: naming file, row and remedy.
    """
    source = config.read_train()
    num_rows = len(source.rows)
    if not config.mix:
        num_rows = min(num_rows, config.max_rows or num_rows)
    train_rows = np.arange(num_rows)
    if config.eval_path is not None:
        eval_source = config.read_eval()
        eval_rows = np.arange(len(eval_source.rows))
    else:
        eval_source = source
        shuffled = np.random.default_rng(seed).permutation(num_rows)
        num_eval = _num_held_out(config.eval_fraction, num_rows)
        eval_rows, train_rows = np.sort(shuffled[:num_eval]), np.sort(shuffled[num_eval:])
    if config.eval_max_rows is not None:
        eval_rows = eval_rows[: config.eval_max_rows]

    def encoder_of(part: Source) -> ChatEncoder:
        return ChatEncoder(
            tokenizer,
            ImageEncoder(image_processor, part.media_root, config.media_policy),
            max_length=config.max_length,
            truncate=config.truncate,
        )

    evaluation = ChatDataset(eval_source, encoder_of(eval_source))
    if config.streaming:
        check_streaming(
            source, config.shuffle, config.eval_fraction if config.eval_path is None else 0
        )
        evaluation.check(eval_rows.tolist(), config.on_bad_row, progress)
        streamed = StreamedDataset(source, encoder_of(source), train_rows, config.on_bad_row)
        if source.parts:
            streamed.mix(seed, config.mix_epoch)
        return streamed, evaluation
    training = ChatDataset(source, encoder_of(source))
    training.check(train_rows.tolist(), config.on_bad_row, progress)
    evaluation.check(eval_rows.tolist(), config.on_bad_row, progress)
    if not len(training):
        raise DataError(
            f"data.path={config.sources}: none of its {len(train_rows)} rows can be learned from. "
            f"The first: {training.rejected[0]}"
        )
    if source.parts:
        training.mix(seed, config.mix_epoch)
    return training, evaluation


def _num_held_out(fraction: float, num_rows: int) -> int:
    if fraction == 0 or num_rows < 2:
        return 0
    return min(max(1, round(fraction * num_rows)), num_rows - 1)
