"""Whom the watchdog names, and when it keeps still."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import TCPStore

from gemtune.heartbeat import (
    Heartbeat,
    Progress,
    Pulse,
    Sight,
    Verdict,
    process_state,
    this_machine,
)
from gemtune.signals import StopSignal
from gemtune.watchdog import Limits, Watchdog

LIMITS = Limits(heartbeat_seconds=100, timeout_seconds=1000, grace_seconds=50)


def pulse(rank: int, **changes: object) -> Pulse:
    """Of a rank on another machine that trains."""
    values = {
        "rank": rank,
        "pid": 7,
        "born": 1,
        "machine": "elsewhere",
        "host": "there",
        "beat": 1,
        "step": 5,
        "count": 2,
        "phase": "backward",
        "limited": True,
        "left": False,
    }
    return Pulse(**(values | changes))  # type: ignore[arg-type]


def watchdog(own: Progress, *sights: tuple[Pulse, float], awake: float = -math.inf) -> Watchdog:
    """Of rank 0, not started: it sees pulses that came so many seconds ago.

    The clock may count from the start of the machine, a minute ago: `awake` has no zero.
    """
    now = time.monotonic()
    found = Watchdog()
    found._rank, found._limits, found._stop = 0, LIMITS, StopSignal()
    found._progress, found._awake_since = own, awake
    found._heartbeat = SimpleNamespace(  # type: ignore[assignment]
        sights={p.rank: Sight(p, now - ago) for p, ago in sights},
        waiting_since=None,
        store_lost=False,
        store="host:1",
        look=lambda: None,
    )
    return found


def waiting(seconds: float, *, limited: bool = True, step: int = 5, count: int = 3) -> Progress:
    """No mark passed for so long. For the cases of a test see `late`."""
    return Progress(step, count, "optimizer", limited, time.monotonic() - seconds)


def late(*arguments: float, **options: Any) -> Callable[[], Progress]:
    """`waiting`, as of when the test runs and not of when it was read."""
    return lambda: waiting(*arguments, **options)


def text(verdict: Verdict | None) -> str:
    return "" if verdict is None else verdict.text


def test_a_silent_rank_is_named_with_its_place() -> None:
    found = watchdog(waiting(101), (pulse(1), 101), (pulse(2), 1), (pulse(3, pid=9), 130))
    verdict = found._silent_rank()
    assert verdict is not None and verdict.ranks == [1, 3] and verdict.exit_code == 76
    assert "rank 1 (pid 7, host there) does not answer since 101 s, last seen in step 5" in (
        verdict.text
    )
    assert "rank 3 (pid 9" in verdict.text and "rank 2" not in verdict.text


@pytest.mark.parametrize(
    ("own", "other", "ago", "awake_ago"),
    [
        (late(101), pulse(1), 60, None),  # within the limit
        (late(101), pulse(1, left=True), 500, None),  # it said goodbye
        # A load may block all threads.
        (late(101, limited=False, step=1), pulse(1, phase="loading"), 500, None),
        (late(2), pulse(1), 500, None),  # steps go on: only its pulse is late
        (late(500), pulse(1), 500, 20),  # this process itself was stopped meanwhile
    ],
    ids=["in time", "left", "loading", "steps go on", "own pause"],
)
def test_no_rank_is_blamed_too_early(
    own: Callable[[], Progress], other: Pulse, ago: float, awake_ago: float | None
) -> None:
    awake = -math.inf if awake_ago is None else time.monotonic() - awake_ago
    assert watchdog(own(), (other, ago), awake=awake)._silent_rank() is None


def test_a_rank_that_stops_before_it_could_say_that_it_has_loaded_is_named() -> None:
    found = watchdog(waiting(101), (pulse(1, step=0, phase="loading"), 101))
    assert "rank 1 (pid 7, host there) does not answer since 101 s" in text(found._silent_rank())


def test_a_dead_process_of_this_machine_is_named_without_waiting_for_the_limit() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    born = process_state(child.pid)[1]
    child.wait()
    gone = pulse(1, pid=child.pid, born=born, machine=this_machine())
    found = watchdog(waiting(1), (gone, 1))
    assert found._silent_rank() is None  # its last words may be on the way
    found._gone_since[1] -= 4
    assert "is gone without a word" in text(found._silent_rank())

    # A process that lives under the same number is another one; its own is not.
    born, here = process_state(os.getpid())[1], this_machine()
    other = watchdog(waiting(1), (pulse(1, pid=os.getpid(), born=born - 1, machine=here), 1))
    other._silent_rank()
    assert 1 in other._gone_since
    same = watchdog(waiting(1), (pulse(1, pid=os.getpid(), born=born, machine=here), 1))
    same._silent_rank()
    assert not same._gone_since


def test_the_rank_that_is_behind() -> None:
    found = watchdog(waiting(1001), (pulse(1, phase="forward", count=0), 1), (pulse(2, count=3), 1))
    verdict = found._stuck()
    assert verdict is not None and verdict.ranks == [1]
    assert "rank 1 (pid 7, host there) is behind, in step 5, phase forward" in verdict.text

    own = watchdog(waiting(1001), (pulse(1, step=6, count=0), 1))._stuck()
    assert own is not None and own.ranks == [0] and "rank 0 (pid" in own.text
    equal = watchdog(waiting(1001), (pulse(1, count=3), 1))._stuck()
    assert equal is not None and equal.ranks == [] and "none is behind" in equal.text


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (late(500), pulse(1, count=0)),
        (late(9999, limited=False), pulse(1, count=0)),
        (late(9999), pulse(1, count=0, limited=False, phase="evaluation")),
    ],
    ids=["in time", "no limit here", "waits for a phase without limit"],
)
def test_phases_without_limit(own: Callable[[], Progress], other: Pulse) -> None:
    assert watchdog(own(), (other, 1))._stuck() is None


def test_marks_and_phases() -> None:
    found = Watchdog()
    found.progress("forward", 1)
    assert not found._progress.limited
    found.limit(True)
    found.progress("forward", 2)
    found.progress("backward", 2)
    assert (found._progress.step, found._progress.count, found._progress.limited) == (2, 1, True)
    with found.unlimited("saving"):
        found.progress("inside")
        assert not found._progress.limited
    assert found._progress.limited


def test_grace() -> None:
    found = watchdog(waiting(1))
    assert found._out_of_grace() is None
    found._stop.received, found._stop.received_at = 15, time.monotonic() - 51
    assert "rank 0 got SIGTERM 50 s ago" in text(found._out_of_grace())


def test_a_store_that_is_gone_ends_nothing_while_steps_are_done() -> None:
    found = watchdog(waiting(2))
    found._heartbeat.store_lost = True  # type: ignore[union-attr]
    assert found._silent_rank() is None
    found._progress = waiting(101)
    assert "does not answer at host:1" in text(found._silent_rank())


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[TCPStore]:
    """The launch's, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    yield TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def until(true: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_ranks_over_a_store(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Heartbeat(0, 2, 0.2, lambda: Progress(3, 1, "forward", True))
    monkeypatch.setenv("LOCAL_RANK", "1")
    second = Heartbeat(1, 2, 0.2, lambda: Progress(2, 4, "backward", True))
    for heartbeat in (first, second):
        heartbeat.start()
    until(lambda: 1 in first.sights and 0 in second.sights)
    seen = first.sights[1].pulse
    assert (seen.step, seen.phase, seen.pid, seen.machine) == (
        2,
        "backward",
        os.getpid(),
        this_machine(),
    )
    assert process_state(seen.pid)[1] == seen.born > 0
    beat = seen.beat
    until(lambda: first.sights[1].pulse.beat > beat + 2)

    second.propose(Verdict("failed", "second was first", 2, [1]), 5)
    first.propose(Verdict("hung", "too late", 76, [0]), 5)
    assert first.verdict == second.verdict == Verdict("failed", "second was first", 2, [1])
    second.close(5)
    until(lambda: first.sights[1].pulse.left)
    first.close(5)
    assert not first._thread.is_alive() or first._thread.join(2) is None
