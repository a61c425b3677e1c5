"""Preparing rows: encoded once, by several processes, kept for every rank and every later start."""

from __future__ import annotations

import concurrent.futures
import ctypes
import fcntl
import gc
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from gemtune.data.preparation.key import preparation_key
from gemtune.data.preparation.rows import (
    PreparedRows,
    is_undamaged,
    read_batch,
    read_prepared,
    to_batch,
    write_batch,
)
from gemtune.data.rendering.chat import ChatEncoder
from gemtune.data.sources.source import Source
from gemtune.errors import DataError
from gemtune.forks import garbage_stays_here
from gemtune.signals import leave_to_parent

ROWS_PER_FILE = 2000
_ROWS_AT_ONCE = 500
# A process more has to save more than its start costs.
_FILES_PER_PROCESS = 4
_MAX_PROCESSES = 16
_DONE_FILE = "done.json"
_UNUSED_SECONDS = 30 * 24 * 3600
_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1
# Ranks of a launch start within seconds of each other; see `_is_of_this_launch`.
_STARTED = time.time()

Progress = Callable[[int, int], None]


class Preparation:
    """Encodes the first rows of a source, or reads what an earlier start or another rank encoded.

    Below `cache_dir` each preparation has a folder named by all it depends on. Its files are
    written one by one, each in one step: a preparation that was killed goes on with the files it
    has. Whoever has the lock beside the folder prepares; the others wait for it, without any
    collective, however long it takes, and then find every file there.

    Args:
        keeps: "keep", "refresh" (prepare anew) or "off" (in memory, in every process).
        num_processes: None: as many as are worth it.
    """

    def __init__(
        self, cache_dir: str | None = None, keeps: str = "keep", num_processes: int | None = None
    ) -> None:
        self._root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self._keeps = keeps
        self._num_processes = num_processes

    def rows(
        self,
        source: Source,
        encoder: ChatEncoder,
        num_rows: int,
        progress: Progress = lambda done, total: None,
        stop_at_bad_row: bool = False,
    ) -> PreparedRows:
        """Rows [0, num_rows) of the source.

        Raises:
            DataError: the first bad row, if asked for; or the folder cannot be written.
        """
        key = None if self._keeps == "off" else preparation_key(source, encoder)
        ranges = [
            (first, min(first + ROWS_PER_FILE, num_rows))
            for first in range(0, num_rows, ROWS_PER_FILE)
        ]
        if key is None:
            batches = []
            for first, end in ranges:
                batches.append(encode_range(source, encoder, first, end))
                _check(batches[-1], stop_at_bad_row)
                progress(end, num_rows)
            return PreparedRows(batches)
        try:
            return self._kept(source, encoder, self._root / key, ranges, progress, stop_at_bad_row)
        except OSError as error:
            raise DataError(
                f"Prepared rows cannot be kept in {self._root}: {error.strerror or error}. Give "
                "another folder with data.cache_dir=FOLDER, or keep them in memory with "
                "data.prepared=off."
            ) from error

    def _kept(
        self,
        source: Source,
        encoder: ChatEncoder,
        folder: Path,
        ranges: list[tuple[int, int]],
        progress: Progress,
        stop_at_bad_row: bool,
    ) -> PreparedRows:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"rows_{first:09d}_{end:09d}.arrow" for first, end in ranges]
        done = folder / f"{ranges[-1][1] if ranges else 0:09d}_{_DONE_FILE}"
        with _lock(folder):
            if self._keeps == "refresh" and not _is_of_this_launch(done):
                _empty(folder)
            missing = [n for n, path in enumerate(paths) if not is_undamaged(path)]
            if missing and done.exists():
                done.unlink()
            _delete_unused(self._root, folder)
            for path in [path for n, path in enumerate(paths) if n not in missing]:
                _check(read_batch(path), stop_at_bad_row)
            total = ranges[-1][1] if ranges else 0
            at = total - sum(ranges[n][1] - ranges[n][0] for n in missing)
            work = _Work(source, encoder, [(ranges[n], paths[n]) for n in missing])
            for number in work.done_in_order(self._processes(len(missing))):
                _check(read_batch(paths[missing[number]]), stop_at_bad_row)
                at += ranges[missing[number]][1] - ranges[missing[number]][0]
                progress(at, total)
            if not done.exists():
                _write_done(done, paths)
            os.utime(done)
        return read_prepared(paths)

    def _processes(self, num_files: int) -> int:
        if self._num_processes is not None:
            return max(1, min(self._num_processes, num_files))
        worth = num_files // _FILES_PER_PROCESS
        return max(1, min(worth, len(os.sched_getaffinity(0)), _MAX_PROCESSES))


def default_cache_dir() -> Path:
    """`gemtune/prepared` below XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gemtune" / "prepared"


def encode_range(source: Source, encoder: ChatEncoder, first: int, end: int) -> pa.RecordBatch:
    """Rows [first, end) encoded, bad ones with their reason."""
    encoded = []
    collects = gc.isenabled()
    gc.disable()  # there are no cycles to find, and thousands of lists to look through
    try:
        for begin in range(first, end, _ROWS_AT_ONCE):
            places = range(begin, min(begin + _ROWS_AT_ONCE, end))
            encoded += encoder.encode_rows(
                [(_read(source, index), source.describe(index)) for index in places]
            )
    finally:
        if collects:
            gc.enable()
    return to_batch(encoded)


def _read(source: Source, index: int) -> dict | DataError:
    try:
        return source.rows[index]
    except DataError as error:
        return error


def _check(batch: pa.RecordBatch, stop_at_bad_row: bool) -> None:
    reasons = batch.column("reason")
    if stop_at_bad_row and reasons.null_count < len(reasons):
        raise DataError(reasons.drop_null()[0].as_py())


class _Work:
    """Files to be written, by this process or by forked ones that share what it has read."""

    current: _Work | None = None

    def __init__(
        self, source: Source, encoder: ChatEncoder, files: list[tuple[tuple[int, int], Path]]
    ) -> None:
        self._source = source
        self._encoder = encoder
        self._files = files

    def write(self, number: int) -> int:
        (first, end), path = self._files[number]
        write_batch(encode_range(self._source, self._encoder, first, end), path)
        return number

    def done_in_order(self, num_processes: int) -> Iterator[int]:
        """Numbers of the files, each once it is written."""
        if num_processes <= 1:
            yield from map(self.write, range(len(self._files)))
            return
        _Work.current = self  # what forked processes find
        context = multiprocessing.get_context("fork")
        pool = concurrent.futures.ProcessPoolExecutor(
            num_processes, mp_context=context, initializer=_begin_process, initargs=(os.getpid(),)
        )
        try:
            with garbage_stays_here():  # processes start as they are needed
                yield from pool.map(_write, range(len(self._files)))
        except concurrent.futures.process.BrokenProcessPool as error:
            raise DataError(
                "A process that prepares data was killed, most likely because memory ran out. Use "
                f"fewer than {num_processes} with data.num_prepare_workers; what is prepared "
                "already is kept."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            _Work.current = None


def _begin_process(parent: int) -> None:
    leave_to_parent(0)
    # Nobody would read what an orphan writes.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _write(number: int) -> int:
    assert _Work.current is not None
    return _Work.current.write(number)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Wait until no other process prepares this folder. The system drops a dead one's lock."""
    with folder.with_name(f".{folder.name}.lock").open("a") as file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_POLL_SECONDS)
        yield


def _is_of_this_launch(done: Path) -> bool:
    """Whether another rank of this launch has refreshed it already."""
    return done.exists() and json.loads(done.read_text())["written"] >= _STARTED


def _write_done(done: Path, paths: list[Path]) -> None:
    staging = done.with_name(f".{done.name}")
    staging.write_text(
        json.dumps({"written": time.time(), "files": [path.name for path in paths]}) + "\n"
    )
    staging.replace(done)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _delete_unused(root: Path, used: Path) -> None:
    """Folders that no run has used for a month."""
    for folder in root.iterdir():
        if folder == used or not folder.is_dir():
            continue
        times = [path.stat().st_mtime for path in folder.iterdir()]
        if times and max(times) < time.time() - _UNUSED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_name(f".{folder.name}.lock").unlink(missing_ok=True)
