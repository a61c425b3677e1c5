"""A data set that is checked as a whole before the first step, and decoded as it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemtune.data.chat import IGNORE_INDEX, ChatEncoder, Example
from gemtune.data.collate import Batch, collate
from gemtune.data.media import ImageEncoder
from gemtune.data.sources import Source, read_source
from gemtune.errors import ConfigError, DataError
from gemtune.options import option, require_choice, require_range


@dataclass
class DataConfig:
    """Conversations to learn from, and those to be judged by."""

    name: str = option("chat", "short name, part of the default run name")
    path: str | None = option(None, "JSONL or Parquet file, or hub dataset, with `messages`")
    split: str = option("train", "split of a hub dataset")
    max_rows: int | None = option(None, "only the first rows of `path`; null: all")
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

    def __post_init__(self) -> None:
        if self.path is None:
            raise ConfigError(
                "data.path is not set. Give a JSONL or Parquet file, or a hub dataset id: "
                "data.path=conversations.jsonl"
            )
        require_choice("data.truncate", self.truncate, ["none", "right"])
        require_choice("data.on_bad_row", self.on_bad_row, ["error", "skip"])
        require_range("data.max_length", self.max_length, at_least=2)
        require_range("data.max_rows", self.max_rows, at_least=1)
        require_range("data.eval_max_rows", self.eval_max_rows, at_least=0)
        require_range("data.eval_generate_rows", self.eval_generate_rows, at_least=0)
        require_range("data.eval_max_new_tokens", self.eval_max_new_tokens, at_least=1)
        require_range("data.num_workers", self.num_workers, at_least=0)
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"data.eval_fraction={self.eval_fraction} must be in [0, 1).")


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
) -> tuple[ChatDataset, ChatDataset]:
    """The training and the evaluation rows, every one of them checked.

    Raises:
        DataError: naming file, row and remedy.
    """
    assert config.path is not None  # DataConfig refuses it
    source = read_source(config.path, config.split, "data.path")
    num_rows = min(len(source.rows), config.max_rows or len(source.rows))
    train_rows = np.arange(num_rows)
    if config.eval_path is not None:
        eval_source = read_source(config.eval_path, config.eval_split, "data.eval_path")
        eval_rows = np.arange(len(eval_source.rows))
    else:
        eval_source = source
        shuffled = np.random.default_rng(seed).permutation(num_rows)
        num_eval = _num_held_out(config.eval_fraction, num_rows)
        eval_rows, train_rows = np.sort(shuffled[:num_eval]), np.sort(shuffled[num_eval:])
    if config.eval_max_rows is not None:
        eval_rows = eval_rows[: config.eval_max_rows]

    sets = []
    for part, rows in ((source, train_rows), (eval_source, eval_rows)):
        encoder = ChatEncoder(
            tokenizer,
            ImageEncoder(image_processor, part.media_root),
            max_length=config.max_length,
            truncate=config.truncate,
        )
        dataset = ChatDataset(part, encoder)
        dataset.check(rows.tolist(), config.on_bad_row, progress)
        sets.append(dataset)
    if not len(sets[0]):
        raise DataError(
            f"data.path={config.path}: none of its {len(train_rows)} rows can be learned from. "
            f"The first: {sets[0].rejected[0]}"
        )
    return sets[0], sets[1]


def _num_held_out(fraction: float, num_rows: int) -> int:
    if fraction == 0 or num_rows < 2:
        return 0
    return min(max(1, round(fraction * num_rows)), num_rows - 1)
