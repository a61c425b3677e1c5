"""How a run ends on every rank, whatever happens on one: codes, status.json, last words."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from gemtune.errors import UserError
from gemtune.exit_codes import CRASHED, INTERRUPTED, REFUSED
from gemtune.heartbeat import Verdict
from gemtune.runtime import Runtime
from gemtune.watchdog import Limits

# What gloo and NCCL say when the process at the other end is gone.
_LOST_CONNECTION = re.compile(
    r"connection (closed|reset|refused)|broken pipe|gloo|nccl|socket|peer|remote process", re.I
)


@contextmanager
def guarded(runtime: Runtime, limits: Limits) -> Iterator[None]:
    """Watch the stages of a run, and let no rank end or fail without the others.

    An error on one rank is told to the others, which end with the same exit code within seconds
    also where their main threads wait for it; a rank that only noticed that another is gone says
    which. `status.json` is written on the way out (by the caller where nothing went wrong).
    """
    status, stop, watchdog = runtime.status, runtime.stop, runtime.watchdog

    def on_end(verdict: Verdict) -> None:
        status.end(verdict.exit_code, verdict.text, for_rank_0=verdict.kind != "failed")

    watchdog.start(
        rank=runtime.rank,
        world_size=runtime.world_size,
        limits=limits,
        stop=stop,
        folder=lambda: status.folder,
        on_end=on_end,
    )
    try:
        yield
    except BaseException as error:
        stop.ending()
        # Errors of files and of the web are OSErrors.
        lost = isinstance(error, RuntimeError) and bool(_LOST_CONNECTION.search(str(error)))
        ours = isinstance(error, UserError | KeyboardInterrupt)
        verdict = None if ours else watchdog.failure_elsewhere(lost_connection=lost)
        if verdict is not None:
            watchdog.end(verdict)
        if lost and stop.requested and not ours:
            code, reason = stop.exit_code, f"{stop.reason}; another rank had ended: {error}"
            status.end(code, reason)
            raise SystemExit(code) from None
        code, reason = _own(error, stop.reason)
        watchdog.tell(f"{'failed' if isinstance(error, Exception) else 'ended'}: {reason}", code)
        status.end(code, reason)
        raise
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        watchdog.close()


def _own(error: BaseException, signal_name: str) -> tuple[int, str]:
    """Exit code and reason of what ended this rank."""
    if isinstance(error, UserError):
        return REFUSED, str(error)
    if isinstance(error, SystemExit):
        return int(error.code or 0), f"{signal_name} outside training: there was nothing to save"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "Ctrl-C: stopped at once, without saving"
    return CRASHED, repr(error)
