"""The keys of `data`, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gemtune.data.media.files import MediaPolicy
from gemtune.data.rendering.chat import Rendering
from gemtune.data.rendering.learning import LEARN
from gemtune.data.sources.filters import read_filter
from gemtune.data.sources.formats import check_mapping
from gemtune.data.sources.mixture import read_mix
from gemtune.data.sources.source import Source, join_sources, read_source
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
    max_length: int = option(2048, "tokens of a row, those of media included")
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
    max_video_seconds: float = option(300.0, "a longer video is a bad row, and not decoded")
    max_video_frames: int = option(20_000, "the same for one of more frames; 32 are used")
    verify_media: bool = option(
        False, "decode every image, video and audio in the check, not its header alone"
    )
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
        self._check_rendering()
        require_choice("data.truncate", self.truncate, ["none", "right", "left"])
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
        require_range("data.max_video_seconds", self.max_video_seconds, at_least=0)
        require_range("data.max_video_frames", self.max_video_frames, at_least=1)
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
            max_video_seconds=self.max_video_seconds,
            max_video_frames=self.max_video_frames,
            verify_media=self.verify_media,
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
