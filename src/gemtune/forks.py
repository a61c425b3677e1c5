"""Forking with what the parent has in memory, and without running its garbage in the child."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_stays_here() -> Iterator[None]:
    """Processes that are forked within it never collect what this one had.

    An object of a library may end threads when it is collected (PyAV's frames do), and a forked
    child has none of its parent's: it would wait for them for ever. It would also copy every page
    that it only looks at. Objects that are garbage already go before the fork.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
