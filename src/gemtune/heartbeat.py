"""What the ranks of a run tell each other while they train: that they live, and where they are.

Through a client of its own to the key-value store of the launch (MASTER_ADDR, MASTER_PORT), so that
it works while the main thread waits in a collective, with torchrun's store and with rank 0's.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path

from torch.distributed import DistStoreError, TCPStore

_CONNECT_SECONDS = 60
_LONGEST_INTERVAL_SECONDS = 5.0


@dataclass(frozen=True)
class Progress:
    """Where a main thread is."""

    step: int = 0
    """The step it works on, from 1."""
    count: int = 0
    """Marks passed in this step."""
    phase: str = "loading"
    limited: bool = False
    """Whether it must reach the next mark within the time limit."""
    at: float = field(default_factory=time.monotonic)
    """On this process's clock."""


@dataclass(frozen=True)
class Pulse:
    """What a rank says of itself, every few seconds."""

    rank: int
    pid: int
    born: int
    """When the process started, as the kernel counts: a pid may be used again."""
    machine: str
    host: str
    beat: int
    step: int
    count: int
    phase: str
    limited: bool
    left: bool
    """It ends in an orderly way and says no more."""

    @property
    def name(self) -> str:
        return f"rank {self.rank} (pid {self.pid}, host {self.host})"

    @property
    def place(self) -> str:
        return f"in step {self.step}, phase {self.phase}" if self.step else f"in phase {self.phase}"


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end. The first one that any rank gives is everybody's."""

    kind: str
    """failed: a rank ended before the run; lost: it is gone or stopped; hung: it does not move."""
    text: str
    exit_code: int
    ranks: list[int]


@dataclass
class Sight:
    """The newest pulse of a rank."""

    pulse: Pulse
    at: float
    """When it came, on this process's clock."""


class Heartbeat:
    """Sends this rank's pulse and reads the others', in a thread, until `close`.

    Rank 0 reads every rank; the others read rank 0 and the ranks of their own machine: in all a few
    small requests a rank and interval.
    """

    def __init__(
        self, rank: int, world_size: int, seconds: float, progress: Callable[[], Progress]
    ) -> None:
        self.rank = rank
        self.interval = min(_LONGEST_INTERVAL_SECONDS, seconds / 4)
        self.sights: dict[int, Sight] = {}
        self.verdict: Verdict | None = None
        self.waiting_since: float | None = None
        """Since when a request to the store is without answer."""
        self.store_lost = False
        self._progress = progress
        self._watched = _watched(rank, world_size)
        self._beat = 0
        self._left = False
        self._proposal: Verdict | None = None
        self._wake = threading.Event()
        self._told = threading.Event()
        self._ended = threading.Event()
        # A restart by torchrun must not read what ended the attempt before it.
        self._prefix = f"gemtune/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def propose(self, verdict: Verdict, wait_seconds: float) -> None:
        """Tell all ranks why they end, unless another rank was first; waits until that is known."""
        if self.verdict is None:
            self._proposal = verdict
            self._told.clear()
            self._wake.set()
            self._told.wait(wait_seconds)
        self.verdict = self.verdict or verdict

    def look(self) -> None:
        """Read now, without waiting for the next interval."""
        self._wake.set()

    def close(self, wait_seconds: float) -> None:
        """Say that this rank leaves, and end the thread."""
        self._left = True
        self._wake.set()
        self._ended.wait(wait_seconds)

    @property
    def store(self) -> str:
        return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"

    def _run(self) -> None:
        try:
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=_CONNECT_SECONDS),
            )
            while not self._exchange(store):
                self._wake.wait(self.interval)
        except (DistStoreError, RuntimeError, OSError, KeyError):
            # Whoever hosts it is gone. That alone is no reason to end: the watchdog decides.
            self.store_lost = True
        finally:
            self.waiting_since = None
            self._told.set()
            self._ended.set()

    def _exchange(self, store: TCPStore) -> bool:
        """One round; True when this rank has left."""
        self.waiting_since = time.monotonic()
        self._wake.clear()
        leaving = self._left
        self._beat += 1
        store.set(self._key(self.rank), json.dumps(asdict(self._pulse(leaving))))
        verdict_key = f"{self._prefix}/verdict"
        if self._proposal is not None and self.verdict is None:
            proposal = json.dumps(asdict(self._proposal))
            self.verdict = _verdict(store.compare_set(verdict_key, "", proposal))
            self._told.set()
        elif self.verdict is None and store.check([verdict_key]):
            self.verdict = _verdict(store.get(verdict_key))
        if not leaving:
            self._read(store)
        self.waiting_since = None
        return leaving

    def _read(self, store: TCPStore) -> None:
        for rank in self._watched:
            if rank not in self.sights and not store.check([self._key(rank)]):
                continue
            pulse = Pulse(**json.loads(store.get(self._key(rank))))
            before = self.sights.get(rank)
            if before is None or before.pulse.beat != pulse.beat:
                self.sights[rank] = Sight(pulse, time.monotonic())

    def _pulse(self, leaving: bool) -> Pulse:
        progress = self._progress()
        return Pulse(
            rank=self.rank,
            pid=os.getpid(),
            born=process_state(os.getpid())[1],
            machine=this_machine(),
            host=socket.gethostname(),
            beat=self._beat,
            step=progress.step,
            count=progress.count,
            phase=progress.phase,
            limited=progress.limited,
            left=leaving,
        )

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/pulse/{rank}"


def _watched(rank: int, world_size: int) -> list[int]:
    if rank == 0:
        return list(range(1, world_size))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    local = range(rank - local_rank, rank - local_rank + local_size)
    return sorted({0, *local} - {rank})


def _verdict(text: bytes) -> Verdict:
    return Verdict(**json.loads(text))


@cache
def this_machine() -> str:
    """Which processes this one can see: the kernel's boot and the namespace of its pids."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def process_state(pid: int) -> tuple[str, int]:
    """State letter of a process (T stopped, Z dead but not collected) and when it started.

    ("", 0) where there is none, or no /proc.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", 0
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[0], int(fields[19])
