"""A data set that is checked as a whole before the first step, and decoded as it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemtune.data.batching.collate import Batch, collate, collate_packed
from gemtune.data.config import DataConfig
from gemtune.data.media.encoders import Encoders, OtherMedia
from gemtune.data.preparation.cache import Preparation, Progress
from gemtune.data.preparation.rows import PreparedRows
from gemtune.data.rendering.chat import IGNORE_INDEX, ChatEncoder, Example
from gemtune.data.rendering.fitting import labels_of
from gemtune.data.sources.source import Source, mixed_order
from gemtune.data.streaming import StreamedDataset, check_streaming
from gemtune.errors import DataError


class ChatDataset:
    """Rows that were found good, in the order of the source.

    Their ids and what is learned of them are prepared, usually in files that every rank maps into
    memory; media are read again when a batch needs them.

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
        kept = self.prepared.kept_media(row)
        return self.encoder.add_media(example, self.source.rows[row], kept) if kept else example

    def row(self, i: int) -> dict[str, Any]:
        """The row as the source has it."""
        return self.source.rows[int(self._rows[i])]

    def prompt(self, i: int) -> tuple[Example, str]:
        """The row up to its last answer, and that answer."""
        return self.encoder.encode_prompt(self.row(i), self.source.describe(int(self._rows[i])))

    def batch(self, examples: Sequence[Example], padding_side: str = "right") -> Batch:
        """Collate with this tokenizer's padding."""
        return collate(
            examples,
            pad_id=self.encoder.tokenizer.pad_token_id,
            soft_ids=self.soft_ids,
            padding_side=padding_side,
        )

    def packed_batch(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """Several examples in each row, see `collate_packed`."""
        return collate_packed(
            rows,
            pad_id=self.encoder.tokenizer.pad_token_id,
            soft_ids=self.soft_ids,
        )

    def ids(self, i: int) -> np.ndarray:
        """[S] int32 token ids of a row, not to be written to."""
        return self.prepared.ids(int(self._rows[i]))

    @property
    def soft_ids(self) -> Mapping[str, int]:
        """Kind of medium -> the id of its soft tokens."""
        return self.encoder.placeholders.soft_ids

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each row."""
        return self.prepared.lengths[self._rows].astype(np.int64)

    @property
    def supervised_lengths(self) -> np.ndarray:
        """[N] learned tokens of each row."""
        return self.prepared.num_supervised_tokens[self._rows].astype(np.int64)

    def media_per_row(self, kind: str) -> np.ndarray:
        """[N] media of that kind in each row."""
        return self.prepared.num_media[kind][self._rows].astype(np.int64)

    def kept_media(self, i: int) -> dict[str, tuple[int, int]]:
        """Of each kind (first, how many) of the media of `row(i)`; empty where it has none."""
        return self.prepared.kept_media(int(self._rows[i]))

    @property
    def media_in_every_row(self) -> set[str]:
        """Kinds of which no row is without."""
        return {k for k, n in self.prepared.num_media.items() if bool((n[self._rows] > 0).all())}

    @property
    def num_media(self) -> dict[str, int]:
        """Of each kind, in all rows."""
        return {k: int(n[self._rows].sum()) for k, n in self.prepared.num_media.items()}

    @property
    def media_kinds(self) -> set[str]:
        """Kinds that a batch may have."""
        return {kind for kind, count in self.num_media.items() if count}

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
    others: OtherMedia | None = None,
) -> tuple[ChatDataset | StreamedDataset, ChatDataset]:
    """The training and the evaluation rows, every one of them checked (unless streamed).

    Args:
        others: how videos and audio become inputs, where the model takes them.

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
            Encoders.of(
                image_processor, others or OtherMedia(), part.media_root, config.media_policy
            ),
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
