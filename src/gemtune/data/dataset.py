"""A data set that is checked as a whole before the first step, and decoded as it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemtune.data.chat import IGNORE_INDEX, ChatEncoder, Example, Rendering
from gemtune.data.collate import Batch, collate
from gemtune.data.filters import read_filter
from gemtune.data.fitting import labels_of
from gemtune.data.formats import check_mapping
from gemtune.data.learning import LEARN
from gemtune.data.media import ImageEncoder
from gemtune.data.media_files import MediaPolicy
from gemtune.data.mixture import read_mix
from gemtune.data.preparation import Preparation, Progress
from gemtune.data.prepared import PreparedRows
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
    truncate: str = option("none", "none: a longer row is a bad row; right, left: its text is cut")
    on_bad_row: str = option("error", "error: stop; skip: leave it out, count and name it")
    max_bad_rows: int | None = option(None, "skip: more than these stop the run; null: any number")
    learn: str = option("assistant", "assistant, last_assistant, completion, or all (but media)")
    thinking: str = option("auto", "tell the template so: auto (rows with reasoning), on or off")
    dropped_reasoning: str = option(
        "refuse", "reasoning that the template leaves out: refuse, keep (put it back) or drop"
    )
    empty_thought: str = option(
        "last", "12B and up answer after an empty thought: before the last answer, or all"
    )
    ignored_keys: list[str] = option([], "keys of messages that need not be rendered: [id, date]")
    prepared: str = option("keep", "keep (in cache_dir), refresh (anew), off (in memory)")
    cache_dir: str | None = option(None, "prepared rows; null: ~/.cache/gemtune/prepared")
    num_prepare_workers: int | None = option(None, "processes; null: as many as are worth it")
    shuffle: bool = option(True, "a new order each epoch, decided by run.seed")
    num_workers: int = option(0, "loader processes; 0: in the training process")
    media_root: str | None = option(None, "folder that media paths may not leave; null: the file's")
    allow_urls: bool = option(False, "fetch media from public http(s) addresses; kept in ~/.cache")
    max_image_pixels: int = option(50_000_000, "a larger image is a bad row, and not decoded")
    max_media_bytes: int = option(200_000_000, "a larger file is a bad row, and not read")
    verify_images: bool = option(False, "decode every image in the check, not its header alone")

    def __post_init__(self) -> None:
        if self.path is None and not self.mix:
            raise ConfigError(
                "data.path is not set. Give a file, a folder saved by datasets, or a hub dataset "
                "id: data.path=conversations.jsonl"
            )
        self._check_sources()
        self._check_rendering()
        require_choice("data.truncate", self.truncate, ["none", "right", "left"])
        require_choice("data.on_bad_row", self.on_bad_row, ["error", "skip"])
        require_range("data.max_length", self.max_length, at_least=2)
        require_range("data.max_rows", self.max_rows, at_least=1)
        require_range("data.eval_max_rows", self.eval_max_rows, at_least=0)
        require_range("data.eval_generate_rows", self.eval_generate_rows, at_least=0)
        require_range("data.eval_max_new_tokens", self.eval_max_new_tokens, at_least=1)
        require_range("data.num_workers", self.num_workers, at_least=0)
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"data.eval_fraction={self.eval_fraction} must be in [0, 1).")

    def _check_rendering(self) -> None:
        require_choice("data.learn", self.learn, LEARN)
        require_choice("data.thinking", self.thinking, ["auto", "on", "off"])
        require_choice("data.dropped_reasoning", self.dropped_reasoning, ["refuse", "keep", "drop"])
        require_choice("data.empty_thought", self.empty_thought, ["last", "all"])
        require_choice("data.prepared", self.prepared, ["keep", "refresh", "off"])
        require_range("data.max_bad_rows", self.max_bad_rows, at_least=0)
        require_range("data.num_prepare_workers", self.num_prepare_workers, at_least=1)

    @property
    def rendering(self) -> Rendering:
        """What the encoder is told."""
        return Rendering(
            learn=self.learn,
            thinking=self.thinking,
            dropped_reasoning=self.dropped_reasoning,
            empty_thought=self.empty_thought,
            ignored_keys=tuple(self.ignored_keys),
        )

    def check_bad_rows(self, num_bad: int) -> None:
        """Raise DataError where more rows are bad than may be."""
        if self.max_bad_rows is not None and num_bad > self.max_bad_rows:
            raise DataError(
                f"{num_bad} bad rows are more than data.max_bad_rows={self.max_bad_rows}. Mend "
                "them, or raise it. python scripts/preview_data.py lists them."
            )

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


class ChatDataset:
    """Rows that were found good, in the order of the source.

    Their ids and what is learned of them are prepared, usually in files that every rank maps into
    memory; images are read again when a batch needs them.

    Args:
        prepared: the first rows of the source, encoded.
        rows: those of them that this data set is made of, in growing order; None: all.
    """

    def __init__(
        self,
        source: Source,
        encoder: ChatEncoder,
        prepared: PreparedRows,
        rows: np.ndarray | None = None,
    ) -> None:
        self.source = source
        self.encoder = encoder
        self.notes: list[str] = list(source.notes)
        """What was understood of the source, one line each."""
        self.prepared = prepared
        rows = np.arange(len(prepared)) if rows is None else rows
        bad = prepared.is_bad[rows]
        self.rejected: list[str] = [prepared.reason(row) for row in rows[bad].tolist()]
        self._rows = rows[~bad]

    def mix(self, seed: int, epoch: str) -> None:
        """Repeat the rows of a mix as its weights say. Counts are then those of an epoch."""
        order, note = mixed_order(self.source, self._rows, seed, epoch)
        self._rows = self._rows[order]
        self.notes.append(note)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Example:
        row = int(self._rows[i])
        ids = self.prepared.ids(row)
        labels = labels_of(ids, self.prepared.runs(row).tolist(), IGNORE_INDEX)
        example = Example(ids, labels, where=self.source.describe(row))
        num_images = int(self.prepared.num_images[row])
        if not num_images:
            return example
        first = int(self.prepared.first_image[row])
        return self.encoder.add_images(example, self.source.rows[row], num_images, first)

    def row(self, i: int) -> dict[str, Any]:
        """The row as the source has it."""
        return self.source.rows[int(self._rows[i])]

    def prompt(self, i: int) -> tuple[Example, str]:
        """The row up to its last answer, and that answer."""
        return self.encoder.encode_prompt(self.row(i), self.source.describe(int(self._rows[i])))

    def batch(self, examples: Sequence[Example], padding_side: str = "right") -> Batch:
        """Collate with this tokenizer's padding."""
        tokenizer = self.encoder.tokenizer
        return collate(
            examples,
            pad_id=tokenizer.pad_token_id,
            image_id=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
            padding_side=padding_side,
        )

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each row."""
        return self.prepared.lengths[self._rows].astype(np.int64)

    @property
    def every_row_has_images(self) -> bool:
        return bool((self.prepared.num_images[self._rows] > 0).all())

    @property
    def num_images(self) -> int:
        return int(self.prepared.num_images[self._rows].sum())

    @property
    def num_tokens(self) -> int:
        return int(self.prepared.lengths[self._rows].sum())

    @property
    def num_supervised_tokens(self) -> int:
        return int(self.prepared.num_supervised_tokens[self._rows].sum())

    @property
    def longest_row_tokens(self) -> int:
        return int(self.prepared.lengths[self._rows].max(initial=0))


def prepare(
    config: DataConfig,
    tokenizer: Any,
    image_processor: Any,
    seed: int,
    progress: Progress = lambda done, total: None,
) -> tuple[ChatDataset | StreamedDataset, ChatDataset]:
    """The training and the evaluation rows, every one of them checked (unless streamed).

    Raises:
        DataError: naming file, row and remedy.
    """
    source = config.read_train()
    num_rows = len(source.rows)
    if not config.mix:
        num_rows = min(num_rows, config.max_rows or num_rows)
    eval_source = source if config.eval_path is None else config.read_eval()
    train_rows, eval_rows = _split(config, num_rows, eval_source, seed)

    def encoder_of(part: Source) -> ChatEncoder:
        return ChatEncoder(
            tokenizer,
            ImageEncoder(image_processor, part.media_root, config.media_policy),
            max_length=config.max_length,
            truncate=config.truncate,
            rendering=config.rendering,
        )

    preparation = Preparation(config.cache_dir, config.prepared, config.num_prepare_workers)

    def dataset(part: Source, count: int, rows: np.ndarray) -> ChatDataset:
        encoder = encoder_of(part)
        prepared = preparation.rows(part, encoder, count, progress, config.on_bad_row == "error")
        return ChatDataset(part, encoder, prepared, rows)

    def judging() -> ChatDataset:
        return dataset(eval_source, int(eval_rows.max(initial=-1)) + 1, eval_rows)

    if config.streaming:
        check_streaming(
            source, config.shuffle, config.eval_fraction if config.eval_path is None else 0
        )
        evaluation = judging()
        streamed = StreamedDataset(source, encoder_of(source), train_rows, config.on_bad_row)
        if source.parts:
            streamed.mix(seed, config.mix_epoch)
        return streamed, evaluation
    training = dataset(source, num_rows, train_rows)
    if eval_source is source:
        evaluation = ChatDataset(source, training.encoder, training.prepared, eval_rows)
    else:
        evaluation = judging()
    if not len(training):
        raise DataError(
            f"data.path={config.sources}: none of its {len(train_rows)} rows can be learned from. "
            f"The first: {training.rejected[0]}"
        )
    config.check_bad_rows(len(training.rejected) + len(evaluation.rejected))
    if source.parts:
        training.mix(seed, config.mix_epoch)
    return training, evaluation


def _split(
    config: DataConfig, num_rows: int, eval_source: Source, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from, and rows of `eval_source` to be judged by, both in growing order."""
    if config.eval_path is not None:
        train_rows, eval_rows = np.arange(num_rows), np.arange(len(eval_source.rows))
    else:
        shuffled = np.random.default_rng(seed).permutation(num_rows)
        num_eval = _num_held_out(config.eval_fraction, num_rows)
        eval_rows, train_rows = np.sort(shuffled[:num_eval]), np.sort(shuffled[num_eval:])
    return train_rows, eval_rows[: config.eval_max_rows]


def _num_held_out(fraction: float, num_rows: int) -> int:
    if fraction == 0 or num_rows < 2:
        return 0
    return min(max(1, round(fraction * num_rows)), num_rows - 1)
