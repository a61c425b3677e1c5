"""Opening a source: a file of any kind that is read, a saved folder, or a hub dataset."""

from __future__ import annotations

import bisect
import importlib.resources
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemtune.data.sources.hub_stream import HubStream
from gemtune.data.sources.text_tables import FileRows, JsonRows, read_csv, read_jsonl
from gemtune.errors import DataError

BUNDLED = "bundled:"
SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".tsv")
# Rows looked at for the columns of a file in which each row names its own.
_NUM_PROBED_ROWS = 100
_SCANNED_AT_ONCE = 1000


@dataclass
class Table:
    """Rows as they are stored, and what is known of them before any is read."""

    rows: Sequence[dict[str, Any]]
    """May raise DataError, naming the row, for one that cannot be read."""
    name: str
    columns: list[str]
    folder: Path | None = None
    """Where a local file or folder is."""
    line_numbers: Sequence[int] | None = None
    is_columnar: bool = False
    """Every row has every field of every struct; those it was not given are None."""
    is_sequential: bool = False
    """Rows come one after another; going back means beginning again."""

    def scan(self, columns: list[str]) -> Iterator[dict[str, Any] | None]:
        """Every row in order, with these columns at least; None for one that cannot be read."""
        if isinstance(self.rows, PlainRows | ArrowRows):
            yield from self.rows.only(columns)
            return
        for index in range(len(self.rows)):
            try:
                yield self.rows[index]
            except DataError:
                yield None

    def describe(self, index: int) -> str:
        """`file.jsonl line 12`, or `file.parquet row 11` (rows count from 0)."""
        if self.line_numbers is not None:
            return f"{self.name} line {self.line_numbers[index]}"
        return f"{self.name} row {index}"


def resolve_path(path: str) -> str:
    """`bundled:NAME/FILE` -> the file inside the package; anything else as it is."""
    if path.startswith(BUNDLED):
        return str(_assets() / path.removeprefix(BUNDLED))
    return str(Path(path).expanduser())


def _assets() -> Path:
    return Path(str(importlib.resources.files("gemtune"))) / "assets"


def open_table(
    path: str, split: str, key: str, subset: str | None = None, streaming: bool = False
) -> Table:
    """The rows of a file, of a folder saved by `datasets`, or of a hub dataset.

    Args:
        path: a file, such a folder, `bundled:...`, or a hub dataset id.
        split: which split of a hub dataset or of a saved DatasetDict.
        key: the configuration key that gave `path`, for messages.
        subset: which configuration of a hub dataset.
        streaming: a hub dataset is read as it comes; nothing is downloaded before.

    Raises:
        DataError: missing, unreadable, or of an unknown kind.
    """
    local = Path(resolve_path(path))
    try:
        if local.is_dir():
            return _open_folder(local, split, f"{key}={path}")
        if local.is_file():
            return _open_file(local, f"{key}={path}", streaming)
    except OSError as error:
        raise DataError(f"{local} cannot be read: {error.strerror or error}.") from error
    if path.startswith(BUNDLED):
        bundled = sorted(f.relative_to(_assets()).as_posix() for f in _assets().rglob("*.parquet"))
        raise DataError(
            f"{key}={path}: the package holds no such file. It holds "
            f"{', '.join(BUNDLED + name for name in bundled)}."
        )
    if _looks_like_hub_id(path):
        return _open_hub(path, split, key, subset, streaming)
    if local.exists():
        raise DataError(f"{key}={path} is neither a regular file nor a folder.")
    raise DataError(
        f"{key}={path}: there is no such file (looked in {Path.cwd()}). Give a file "
        f"({', '.join(SUFFIXES)}), a folder saved by datasets, or a hub dataset id such as "
        "HuggingFaceH4/no_robots."
    )


def _looks_like_hub_id(path: str) -> bool:
    if path.startswith((".", "/", "~")) or path.endswith(SUFFIXES):
        return False
    return path.count("/") == 1 and not Path(path).parent.is_dir()


def _open_file(path: Path, given: str, streaming: bool) -> Table:
    folder, name = path.parent.absolute(), str(path)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        rows = read_jsonl(path)
        return Table(rows, name, _probed(rows), folder, rows.line_numbers)
    if suffix in (".csv", ".tsv"):
        rows, columns = read_csv(path, "\t" if suffix == ".tsv" else ",")
        return Table(rows, name, columns, folder, rows.line_numbers)
    if suffix == ".json":
        if streaming:
            raise DataError(
                f"{given}: a .json file is read as a whole, so it cannot be streamed. Write one "
                "row a line into a .jsonl file, or set data.streaming=false."
            )
        listed = JsonRows(path)
        return Table(listed, name, _probed(listed), folder)
    if suffix == ".parquet":
        return _open_parquet(path, folder)
    if suffix == ".arrow":
        try:
            arrow = ArrowRows(path)
        except Exception as error:  # pyarrow's errors have no common class but Exception
            raise DataError(f"{path} cannot be read as Arrow: {error}") from error
        return Table(arrow, name, arrow.columns, folder, is_columnar=True)
    raise DataError(
        f"{given}: files ending in '{path.suffix}' are not read. Give {', '.join(SUFFIXES)}."
    )


def _probed(rows: FileRows | JsonRows) -> list[str]:
    """The columns of the first rows that can be read; if none can, the first fault is raised."""
    columns: dict[str, None] = {}
    fault = None
    for index in range(min(len(rows), _NUM_PROBED_ROWS)):
        try:
            columns |= dict.fromkeys(rows[index])
        except DataError as error:
            fault = fault or error
    if not columns and fault is not None:
        raise fault
    return list(columns)


class PlainRows(Sequence):
    """Rows of a `datasets` table as they are stored: an image stays {bytes, path}.

    Images are decoded when a batch needs them, and by our own code, which names the row.
    """

    def __init__(self, table: Any) -> None:
        self._table = table.with_format("arrow")
        self.fingerprint: str = getattr(table, "_fingerprint", "")
        """What `datasets` calls this content."""

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._table[index].to_pylist()[0]

    def only(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """Every row, other columns left unread."""
        table = self._table.select_columns(columns)
        for first in range(0, len(table), _SCANNED_AT_ONCE):
            yield from table[first : first + _SCANNED_AT_ONCE].to_pylist()


class ArrowRows(Sequence):
    """Rows of an Arrow file or stream, mapped into memory and not copied."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        import pyarrow

        source = pyarrow.memory_map(str(self._path))
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        else:
            reader = pyarrow.ipc.open_stream(source)
            self._batches = list(reader)
        for batch in self._batches:
            batch.validate()
        self.columns = list(reader.schema.names)
        self._ends = list(itertools.accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        batch = self._batches[number]
        first = self._ends[number] - batch.num_rows
        return batch.slice(index - first, 1).to_pylist()[0]

    def only(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """Every row, other columns left unread."""
        for batch in self._batches:
            yield from batch.select(columns).to_pylist()

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _open_parquet(path: Path, folder: Path) -> Table:
    import datasets
    import pyarrow.parquet

    shows_progress = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # a local file is mapped, not read
    try:
        metadata = pyarrow.parquet.read_metadata(path)
        if not metadata.num_rows:  # `datasets` fails on such a file
            return Table([], str(path), list(metadata.schema.to_arrow_schema().names), folder)
        table = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # datasets wraps what pyarrow raises in its own generic error
        cause = error.__cause__ or error
        raise DataError(f"{path} cannot be read as Parquet: {cause}") from error
    finally:
        if shows_progress:
            datasets.enable_progress_bars()
    return Table(PlainRows(table), str(path), table.column_names, folder, is_columnar=True)


def _open_folder(path: Path, split: str, given: str) -> Table:
    import datasets

    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        files = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)
        holds = f" It holds {', '.join(files[:5])}." if files else ""
        raise DataError(
            f"{given} is a folder, and not one that datasets' save_to_disk wrote. Give one file "
            f"({', '.join(SUFFIXES)}) inside it.{holds}"
        )
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever datasets and pyarrow raise on a damaged folder
        raise DataError(f"{given} cannot be read as a saved dataset: {error}") from error
    name = str(path)
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(
                f"{given} has no split '{split}'. Its splits are: {', '.join(saved)}. Choose with "
                "data.split (data.eval_split for data.eval_path)."
            )
        saved, name = saved[split], f"{path}[{split}]"
    columns, folder = saved.column_names, path.absolute()
    return Table(PlainRows(saved), name, columns, folder, is_columnar=True)


def _open_hub(path: str, split: str, key: str, subset: str | None, streaming: bool) -> Table:
    import datasets

    name = f"{path}[{split}]" if subset is None else f"{path}/{subset}[{split}]"
    options: dict[str, Any] = {} if subset is None else {"name": subset}
    try:
        if streaming:
            stream = HubStream(datasets.load_dataset(path, split=split, streaming=True, **options))
            return Table(stream, name, stream.columns, is_columnar=True, is_sequential=True)
        table = datasets.load_dataset(path, split=split, **options)
    except DataError as error:
        raise DataError(f"{key}={path}, split {split}: {error}") from error
    except Exception as error:  # network, access, missing dataset or split: all end here
        raise DataError(
            f"{key}={path}, split {split}, cannot be read from the Hugging Face hub: "
            f"{str(error).splitlines()[0] if str(error) else error!r}\n"
            "Check the name and the network, run `hf auth login` if it is gated, or give a local "
            f"file: {key}=FILE.jsonl"
        ) from error
    return Table(PlainRows(table), name, table.column_names, is_columnar=True)
