"""A child that is forked ends nothing that belongs to its parent."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gemtune.forks import garbage_stays_here


class Held:
    """In a cycle with itself: only a collection ends it, and it says where it ended."""

    def __init__(self, folder: Path) -> None:
        self.itself, self.folder = self, folder

    def __del__(self) -> None:
        (self.folder / str(os.getpid())).touch()


@pytest.fixture(autouse=True)
def no_automatic_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def in_child(work: Callable[[], object]) -> int:
    """The pid of a forked process that has done it."""
    if not (pid := os.fork()):
        work()
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_garbage_goes_before_the_fork(tmp_path: Path) -> None:
    Held(tmp_path)
    with garbage_stays_here():
        in_child(gc.collect)
    assert [p.name for p in tmp_path.iterdir()] == [str(os.getpid())]


def test_what_becomes_garbage_in_the_child_stays_as_well(tmp_path: Path) -> None:
    kept = [Held(tmp_path)]

    def drop() -> None:
        kept.clear()
        gc.collect()

    with garbage_stays_here():
        in_child(drop)
    assert not list(tmp_path.iterdir())
    kept.clear()
    gc.collect()  # here it is collected again
    assert [p.name for p in tmp_path.iterdir()] == [str(os.getpid())]


def test_without_it_the_child_ends_what_is_the_parents(tmp_path: Path) -> None:
    Held(tmp_path)
    pid = in_child(gc.collect)
    assert [p.name for p in tmp_path.iterdir()] == [str(pid)]
    gc.collect()
