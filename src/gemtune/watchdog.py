"""Ends a run that would otherwise wait for ever: for a rank that is gone, stopped or stuck."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gemtune.exit_codes import HUNG
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

# A rank with an error prints it and ends by itself; the others may find the same error meanwhile.
_SETTLE_SECONDS = 5.0
# Between seeing a process gone and saying so: its last words may still be on the way.
_GONE_SECONDS = 3.0
# What a rank that is missed takes to be found gone, once there is reason to hurry.
_HURRY_SECONDS = 2 * _GONE_SECONDS
_PROPOSE_SECONDS = 5.0
_CLOSE_SECONDS = 5.0
# Rank 0 knows every rank, so it speaks first.
_RANK_0_FIRST_SECONDS = 10.0


@dataclass(frozen=True)
class Limits:
    """None: no limit."""

    heartbeat_seconds: float = 120.0
    """Without a pulse of a rank, and without a mark that this rank passed."""
    timeout_seconds: float = 1800.0
    """Without a mark passed by a main thread, in training. Without a pulse while loading."""
    grace_seconds: float | None = None
    """From a signal until the process has ended."""


class Watchdog:
    """Follows this rank's main thread and the other ranks, from a thread of its own.

    It acts on a verdict: all ranks print the same line and the stacks of their threads, kill what
    is stopped on their machine, and end with the verdict's exit code, whatever their main thread
    does. Before `start` and after `close` it does nothing.

    It does not fire while steps are done, nor for phases without a limit (loading, the first step,
    evaluation, saving). Time in which this process itself was stopped does not count.
    """

    def __init__(self) -> None:
        self._progress = Progress()
        self._limited = False
        self._heartbeat: Heartbeat | None = None
        self._closed = threading.Event()
        self._gone_since: dict[int, float] = {}
        self._awake_since = float("-inf")
        self._judging, self._ends = threading.Lock(), threading.Lock()

    def start(
        self,
        *,
        rank: int,
        world_size: int,
        limits: Limits,
        stop: StopSignal,
        folder: Callable[[], Path | None],
        on_end: Callable[[Verdict], None],
    ) -> None:
        """Begin to watch.

        Args:
            folder: where the stacks go, beside stderr.
            on_end: called just before the process ends for a verdict.
        """
        self._rank, self._limits, self._stop = rank, limits, stop
        self._folder, self._on_end = folder, on_end
        if world_size > 1:
            seconds = limits.heartbeat_seconds
            self._heartbeat = Heartbeat(rank, world_size, seconds, lambda: self._progress)
            self._heartbeat.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def progress(self, phase: str, step: int | None = None) -> None:
        """The main thread passes a mark: it begins `phase` (of `step`). Costs a microsecond."""
        before = self._progress
        step = before.step if step is None else step
        count = before.count + 1 if step == before.step else 0
        self._progress = Progress(step, count, phase, self._limited)

    def limit(self, limited: bool) -> None:
        """Whether phases have a time limit from here on: in training, after the first step."""
        is_first = limited and not self._limited
        self._limited = limited
        self.progress(self._progress.phase)
        if is_first and self._heartbeat is not None:
            self._heartbeat.look()  # the others need not wait to hear that this one has loaded

    @contextmanager
    def unlimited(self, phase: str) -> Iterator[None]:
        """A phase that may take any time."""
        before, self._limited = self._limited, False
        self.progress(phase)
        try:
            yield
        finally:
            self._limited = before
            self.progress("between phases")

    def tell(self, text: str, exit_code: int) -> None:
        """Tell the other ranks how this one ends before the run does: they do not wait for it."""
        if self._heartbeat is not None:
            verdict = Verdict("failed", f"rank {self._rank} {text}", exit_code, [self._rank])
            self._heartbeat.propose(verdict, _PROPOSE_SECONDS)

    def failure_elsewhere(self, *, lost_connection: bool) -> Verdict | None:
        """Why this rank's error is the consequence of another's, if it is.

        With `lost_connection` it waits for the verdict as long as one can take; not long where
        another rank has left in an orderly way, or this one is asked to stop as well.
        """
        heartbeat = self._heartbeat
        if heartbeat is None:
            return None
        heartbeat.look()
        seconds = self._limits.heartbeat_seconds + _HURRY_SECONDS if lost_connection else 2.0
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and heartbeat.verdict is None:
            if heartbeat.store_lost and not lost_connection:
                break
            self._judge()
            left = any(sight.pulse.left for sight in heartbeat.sights.values())
            if self._gone_since:
                deadline = max(deadline, time.monotonic() + 1)  # it will be named in seconds
            elif left or self._stop.requested:
                deadline = min(deadline, time.monotonic() + _HURRY_SECONDS)
            time.sleep(0.1)
        verdict = heartbeat.verdict
        return None if verdict is None or verdict.ranks == [self._rank] else verdict

    def close(self) -> None:
        """Say goodbye to the other ranks and watch no more."""
        self._closed.set()
        if self._heartbeat is not None:
            self._heartbeat.close(_CLOSE_SECONDS)

    def end(self, verdict: Verdict) -> None:
        """End this process for `verdict`: stacks, the stopped ranks of this machine, exit."""
        self._ends.acquire()  # once: the main thread and ours may both come here
        _say(f"gemtune, rank {self._rank}: {verdict.text}")
        if verdict.kind != "failed":
            self._dump_stacks(verdict)
            self._kill_stopped(verdict)
        with suppress(Exception):
            self._on_end(verdict)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(verdict.exit_code)

    def _watch(self) -> None:
        interval = min(1.0, self._limits.heartbeat_seconds / 4)
        last = self._awake_since = time.monotonic()
        while not self._closed.wait(interval):
            now = time.monotonic()
            if now - last > interval + self._limits.heartbeat_seconds / 2:
                # This process was stopped, or got no processor: it knows nothing of that time.
                self._awake_since = now
            last = now
            verdict = self._judge()
            if verdict is None:
                continue
            if verdict.kind == "failed":
                self._closed.wait(_SETTLE_SECONDS)
            if not self._closed.is_set():
                self.end(verdict)

    def _judge(self) -> Verdict | None:
        """The verdict that stands, or that this rank gives now."""
        with self._judging:
            heartbeat = self._heartbeat
            if heartbeat is not None and heartbeat.verdict is not None:
                return heartbeat.verdict
            found = self._out_of_grace() or self._silent_rank() or self._stuck()
            if found is None:
                return None
            if heartbeat is None:
                return found
            heartbeat.propose(found, _PROPOSE_SECONDS)
            return heartbeat.verdict

    def _out_of_grace(self) -> Verdict | None:
        stop, seconds = self._stop, self._limits.grace_seconds
        if not stop.requested or seconds is None or self._since(stop.received_at) < seconds:
            return None
        text = (
            f"rank {self._rank} got {stop.reason} {seconds:g} s ago and has not ended since: it is "
            f"{self._own_place()}. Not saved; run.grace_seconds={seconds:g}."
        )
        return Verdict("hung", text, HUNG, [self._rank])

    def _silent_rank(self) -> Verdict | None:
        if self._heartbeat is None:
            return None
        found: list[tuple[int, str]] = []
        for rank, sight in sorted(self._heartbeat.sights.items()):
            if not sight.pulse.left and (text := self._silence(sight)):
                found.append((rank, text))
        if not found and (text := self._silent_store()):
            found.append((0, text))
        if not found:
            return None
        text = "; ".join(text for _, text in found)
        return Verdict("lost", f"{text}. The run ends.", HUNG, [rank for rank, _ in found])

    def _silence(self, sight: Sight) -> str:
        """What is wrong with a rank; an empty text: nothing."""
        pulse, seconds = sight.pulse, self._since(sight.at)
        if pulse.machine and pulse.machine == this_machine():
            if _is_gone(pulse):
                first = self._gone_since.setdefault(pulse.rank, time.monotonic())
                if self._heartbeat is not None:
                    self._heartbeat.look()
                if time.monotonic() - first > _GONE_SECONDS:
                    return (
                        f"{pulse.name} is gone without a word, last seen {pulse.place} (killed, or "
                        "crashed: the kernel's log says whether it was out of memory)"
                    )
                return ""
            self._gone_since.pop(pulse.rank, None)
        limits = self._limits
        # A load may block all threads. Once this rank has done a step, the others have, whatever
        # their last pulse said.
        loads = pulse.phase == "loading" and not self._progress.limited
        limit = limits.timeout_seconds if loads else limits.heartbeat_seconds
        # Ranks do steps together: as long as this one passes marks, none is dead.
        if seconds < limit or self._since(self._progress.at) < limit:
            return ""
        stopped = process_state(pulse.pid)[0] == "T" and pulse.machine == this_machine()
        state = ", its process is stopped" if stopped else ""
        return f"{pulse.name} does not answer since {seconds:.0f} s{state}, last seen {pulse.place}"

    def _silent_store(self) -> str:
        """The store is rank 0's or the launcher's; without it steps may still go on."""
        heartbeat, progress = self._heartbeat, self._progress
        assert heartbeat is not None
        since = heartbeat.waiting_since
        silent = since is not None and self._since(since) >= self._limits.heartbeat_seconds
        if not (silent or heartbeat.store_lost) or not progress.limited:
            return ""
        seconds = self._since(progress.at)
        if seconds < self._limits.heartbeat_seconds:
            return ""
        zero = heartbeat.sights.get(0)
        who = f"the launcher or {zero.pulse.name}" if zero else "the launcher"
        return (
            f"{who} does not answer at {heartbeat.store}, and rank {self._rank} is "
            f"{self._own_place()} since {seconds:.0f} s"
        )

    def _stuck(self) -> Verdict | None:
        progress, timeout = self._progress, self._limits.timeout_seconds
        if not progress.limited:
            return None
        seconds = self._since(progress.at)
        if seconds < timeout + (_RANK_0_FIRST_SECONDS if self._rank else 0):
            return None
        sights = self._heartbeat.sights.values() if self._heartbeat else ()
        others = [sight.pulse for sight in sights if not sight.pulse.left]
        if any(not p.limited and (p.step, p.count) < _position(progress) for p in others):
            return None  # one that may take any time: the others wait for it
        behind = [p for p in others if (p.step, p.count) < _position(progress)]
        ahead = [p for p in others if (p.step, p.count) > _position(progress)]
        if behind:
            lowest = min((p.step, p.count) for p in behind)
            last = [p for p in behind if (p.step, p.count) == lowest]
            names = "; ".join(f"{p.name} is behind, {p.place}" for p in last)
            ranks = [p.rank for p in last]
        elif ahead or not others:
            names = f"rank {self._rank} (pid {os.getpid()}) is behind, {self._own_place()}"
            names = names if others else f"this process does not get on, {self._own_place()}"
            ranks = [self._rank]
        else:
            names = f"all ranks wait {self._own_place()}, none is behind"
            ranks = []
        text = f"{names}: no progress since {seconds:.0f} s (parallel.timeout_seconds={timeout:g})"
        return Verdict("hung", f"{text}. The run ends.", HUNG, ranks)

    def _since(self, at: float) -> float:
        return time.monotonic() - max(at, self._awake_since)

    def _own_place(self) -> str:
        progress = self._progress
        in_step = f"in step {progress.step}, " if progress.step else "in "
        return f"{in_step}phase {progress.phase}"

    def _dump_stacks(self, verdict: Verdict) -> None:
        folder = self._folder()
        with suppress(OSError, ValueError, AttributeError):
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        if folder is None:
            return
        path = folder / f"stacks_rank{self._rank}.txt"
        with suppress(OSError), path.open("w", encoding="utf-8") as file:
            file.write(f"{verdict.text}\n\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
            _say(f"gemtune, rank {self._rank}: the stacks are in {path}")

    def _kill_stopped(self, verdict: Verdict) -> None:
        """SIGKILL what cannot end by itself; one that can gets the time to show its stacks."""
        if self._heartbeat is None:
            return
        deadline = time.monotonic() + 2 * self._heartbeat.interval + 2
        for rank in set(verdict.ranks) - {self._rank}:
            sight = self._heartbeat.sights.get(rank)
            if sight is None or sight.pulse.machine != this_machine() or not this_machine():
                continue
            pulse = sight.pulse
            while not _is_gone(pulse):
                stopped = process_state(pulse.pid)[0] == "T"
                if stopped or time.monotonic() > deadline:
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(pulse.pid, signal.SIGKILL)
                    break
                time.sleep(0.1)


def _is_gone(pulse: Pulse) -> bool:
    """Whether the process of a pulse has ended; only on its own machine."""
    state, born = process_state(pulse.pid)
    return state in ("", "Z", "X") or born != pulse.born


def _position(progress: Progress) -> tuple[int, int]:
    return progress.step, progress.count


def _say(text: str) -> None:
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
