"""Rows of JSONL, CSV and JSON files: found once, read where they stand, each by its own line."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gemtune.errors import DataError

# A longer line is a file without line ends, or made to fill the memory.
MAX_ROW_BYTES = 1 << 28
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class FileRows(Sequence):
    """Rows of a text file by their place in it: 24 bytes of memory a row, whatever its length.

    A row is read and parsed when it is asked for; what is wrong with it is said then, with its
    line, so that one bad row can be left out.

    Args:
        path: the file.
        spans: (first byte, end, line number) of each row.
        parse: text and line number -> row; raises DataError without the place.
    """

    def __init__(
        self,
        path: Path,
        spans: Iterator[tuple[int, int, int]],
        parse: Callable[[str], dict[str, Any]],
    ) -> None:
        self.path = path
        self.line_numbers = array("q")
        self._starts, self._ends = array("q"), array("q")
        self._parse = parse
        self._descriptor: int | None = None
        self._identity = _identity(os.stat(path))  # noqa: PTH116
        for start, end, line in spans:
            self._starts.append(start)
            self._ends.append(end)
            self.line_numbers.append(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, end = self._starts[index], self._ends[index]
        where = f"{self.path} line {self.line_numbers[index]}"
        data = os.pread(self._file(), end - start, start)
        if len(data) != end - start:
            raise DataError(f"{where}: the file became shorter while it was read.")
        try:
            text = data.decode("utf-8-sig" if start == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: not UTF-8 ({error.reason}). Convert the file, for example: "
                "iconv -f LATIN1 -t UTF-8 FILE > NEW"
            ) from error
        try:
            return self._parse(text.rstrip("\r\n"))
        except DataError as error:
            raise DataError(f"{where}: {error}") from (error.__cause__ or error)

    def _file(self) -> int:
        if self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            if _identity(os.fstat(descriptor)) != self._identity:
                os.close(descriptor)
                raise DataError(f"{self.path} was changed while it was in use. Start again.")
            self._descriptor = descriptor
        return self._descriptor

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}  # another process opens the file itself

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def read_jsonl(path: Path) -> FileRows:
    """Every line that is not blank is a row."""
    return FileRows(path, _json_lines(path), parse_json_row)


def _json_lines(path: Path) -> Iterator[tuple[int, int, int]]:
    offset = 0
    for number, line in enumerate(_lines(path), start=1):
        end = offset + len(line)
        # A byte order mark may be all that a blank first line holds.
        if (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip():
            yield offset, end, number
        offset = end


def _lines(path: Path) -> Iterator[bytes]:
    """The lines as bytes: each is decoded where its number is known."""
    with path.open("rb") as file:
        if file.read(2) in _UTF16:
            raise DataError(
                f"{path} is UTF-16; UTF-8 is read. Convert the file: "
                "iconv -f UTF-16 -t UTF-8 FILE > NEW"
            )
        file.seek(0)
        number = 0
        while line := file.readline(MAX_ROW_BYTES):
            number += 1
            if len(line) == MAX_ROW_BYTES:
                raise DataError(
                    f"{path} line {number}: longer than {MAX_ROW_BYTES:,} bytes. Is it JSONL, one "
                    "object a line?"
                )
            yield line


def parse_json_row(text: str) -> dict[str, Any]:
    """One line of JSONL."""
    try:
        row = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON ({error.msg}, column {error.colno}). Each line must hold one whole "
            "object."
        ) from error
    except RecursionError as error:
        raise DataError("the JSON is nested too deeply. Leave such rows out.") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise DataError(f"not valid JSON ({error}).") from error
    if not isinstance(row, dict):
        raise DataError("a row must be a JSON object {...}.")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the key {twice!r} stands twice in one object. Keep one of them.")
    return found


def read_json(path: Path) -> list[Any]:
    """A JSON file as a whole: a list of rows, or {"data": [...]}."""
    data = path.read_bytes()
    if data[:2] in _UTF16:
        raise DataError(
            f"{path} is UTF-16; UTF-8 is read. Convert the file: "
            "iconv -f UTF-16 -t UTF-8 FILE > NEW"
        )
    if not data.strip():
        return []
    try:
        content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        lines = " If each line is an object of its own, name the file .jsonl."
        raise DataError(
            f"{path} line {error.lineno}: not valid JSON ({error.msg}, column {error.colno})."
            + (lines if error.msg == "Extra data" else "")
        ) from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} line {line}: not UTF-8 ({error.reason}). Convert the file, for example: "
            "iconv -f LATIN1 -t UTF-8 FILE > NEW"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}: the JSON is nested too deeply. Leave such rows out.") from error
    except (ValueError, DataError) as error:
        raise DataError(f"{path}: {error}") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        found = (
            f"an object with {', '.join(map(repr, content)) or 'nothing in it'}"
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise DataError(f'{path} must hold a list of rows, or {{"data": [...]}}; it holds {found}.')
    return rows


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)  # json.loads would make one for each row


class JsonRows(Sequence):
    """Rows of a JSON file, counted from 0."""

    def __init__(self, path: Path) -> None:
        self._rows = read_json(path)
        self._path = path

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        if not isinstance(row, dict):
            raise DataError(f"{self._path} row {index}: a row must be a JSON object {{...}}.")
        return row


class _CsvRow:
    """Parses one record by the columns of the first line."""

    def __init__(self, columns: list[str], delimiter: str) -> None:
        self.columns = columns
        self.delimiter = delimiter

    def __call__(self, text: str) -> dict[str, Any]:
        with _long_fields():
            try:
                records = [r for r in _reader(_csv_lines(text), self.delimiter) if r]
            except csv.Error as error:
                raise DataError(f"not valid CSV ({error}). Is a quote left open?") from error
        if len(records) != 1 or len(records[0]) != len(self.columns):
            raise DataError(
                f"{len(records[0]) if records else 0} fields where the first line names "
                f"{len(self.columns)} columns. A field with a comma, a quote or a line end in it "
                "stands in double quotes."
            )
        return dict(zip(self.columns, records[0], strict=True))


def read_csv(path: Path, delimiter: str = ",") -> tuple[FileRows, list[str]]:
    """The records behind the first line, every value a text, and the names of the columns."""
    spans = _csv_records(path, delimiter)
    first = next(spans, None)
    if first is None:
        return FileRows(path, iter(()), parse_json_row), []
    header = FileRows(path, iter([first]), _CsvHeader(delimiter))[0]["columns"]
    return FileRows(path, spans, _CsvRow(header, delimiter)), header


class _CsvHeader:
    def __init__(self, delimiter: str) -> None:
        self.delimiter = delimiter

    def __call__(self, text: str) -> dict[str, Any]:
        try:
            columns = next(_reader(_csv_lines(text), self.delimiter))
        except csv.Error as error:
            raise DataError(f"not valid CSV ({error}). Is a quote left open?") from error
        if "" in columns or len(set(columns)) != len(columns):
            raise DataError(
                f"the first line must name every column once; it reads {', '.join(columns)!r}."
            )
        return {"columns": columns}


def _csv_records(path: Path, delimiter: str) -> Iterator[tuple[int, int, int]]:
    offset, number = 0, 0

    def lines() -> Iterator[str]:
        nonlocal offset, number
        for line in _lines(path):
            offset += len(line)
            number += 1
            # Commas, quotes and line ends are what is looked for; other bytes may be anything.
            yield line.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace")

    reader = _reader(lines(), delimiter)
    while True:
        start, line = offset, number + 1
        with _long_fields():
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error:  # said when the row is read
                record = [""]
        if record:
            yield start, offset, line


def _reader(lines: Iterator[str], delimiter: str) -> Any:
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _csv_lines(text: str) -> Iterator[str]:
    """Split at the line ends of files, not at every character that Unicode calls one."""
    parts = text.split("\n")
    yield from (part + "\n" for part in parts[:-1])
    if parts[-1]:
        yield parts[-1]


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Python's own limit of a field is 128 KiB, for the whole process."""
    before = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)
