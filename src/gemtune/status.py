"""`runs/<name>/status.json`: how the newest start of a run stands, for scripts."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gemtune import exit_codes
from gemtune.run_files import STATUS_FILE

_NAMES = {
    exit_codes.DONE: "finished",
    exit_codes.CRASHED: "failed",
    exit_codes.REFUSED: "failed",
    exit_codes.PREEMPTED: "preempted",
    exit_codes.HUNG: "hung",
    exit_codes.INTERRUPTED: "interrupted",
}


class StatusFile:
    """Written when a start owns its run folder, and when it ends; replaced in one step.

    Best effort: a start that is refused before it owns the folder, or is killed, leaves what
    stands there. Errors of writing are not raised.

    Fields: `status` (running, finished, preempted, interrupted, hung, failed), `exit_code` of the
    processes (null while running), `step` (the last one done), `reason`, `time` (UTC), and of the
    process that wrote it `host` and `pid`.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._writes = False
        self.step = 0

    def open(self, folder: Path, *, step: int, writes: bool) -> None:
        """From here on the folder is this start's. `writes`: this process says that it runs."""
        self._folder, self.step, self._writes = folder, step, writes
        if writes:
            self._write("running", None, "")

    def end(self, exit_code: int, reason: str, *, for_rank_0: bool = False) -> None:
        """How it ended; nothing if the folder was never this start's.

        `for_rank_0`: write although another process should, which may be gone.
        """
        if self._writes or for_rank_0:
            self._write(_NAMES.get(exit_code, "failed"), exit_code, reason)

    @property
    def folder(self) -> Path | None:
        """The run folder, once it is this start's."""
        return self._folder

    def _write(self, status: str, exit_code: int | None, reason: str) -> None:
        if self._folder is None:
            return
        record: dict[str, Any] = {
            "status": status,
            "exit_code": exit_code,
            "step": self.step,
            "reason": reason,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        # Several ranks may write it when one is lost.
        staging = self._folder / f".{STATUS_FILE}.{os.getpid()}"
        with suppress(OSError):
            staging.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            staging.replace(self._folder / STATUS_FILE)
