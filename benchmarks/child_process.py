"""Parts of a benchmark in processes of their own, within a time limit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

NO_TIME = "the time limit was reached"


class OutOfTimeError(Exception):
    """The limit came before a part was done, or before it began."""


class Deadline:
    """So many seconds from now; 0: no limit."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds if seconds else None

    def seconds_left(self) -> float | None:
        """None: as long as it takes.

        Raises:
            OutOfTimeError: nothing is left.
        """
        if self._ends is None:
            return None
        left = self._ends - time.monotonic()
        if left <= 0:
            raise OutOfTimeError
        return left


def found_by(
    script: str, *words: str, environment: Mapping[str, str], deadline: Deadline
) -> dict[str, Any]:
    """The JSON that `script`, started with these words, prints in its last line.

    Raises:
        OutOfTimeError: it was ended at the deadline.
        SystemExit: it failed; with its words and its last output.
    """
    try:
        done = subprocess.run(
            [sys.executable, script, *words],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=deadline.seconds_left(),
        )
    except subprocess.TimeoutExpired as error:
        raise OutOfTimeError from error
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(words)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])
