"""Signals that ask a run to stop. Standard library only: in force before torch is imported."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from gemtune.exit_codes import INTERRUPTED, PREEMPTED

STOP_SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
STACKS_SIGNAL = signal.SIGUSR2

# A terminal and torchrun both send SIGINT for one Ctrl-C.
_SAME_PRESS_SECONDS = 1.0
# How long the main thread may take to leave by itself when a stop at once was asked for.
_LEAVE_SECONDS = 5.0

_LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun"}
_LAUNCHER_MODULES = ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands")
_PR_SET_PDEATHSIG = 1


class StopSignal:
    """SIGINT, SIGTERM, SIGUSR1: when a run that gets one stops.

    Outside training (loading, judging, exporting) there is nothing to save: the process ends at
    once. In training the ranks agree at the end of a step (`agree`), save it and end. While a run
    ends, further signals change nothing; only a second SIGINT stops at once.

    Python runs a handler when the main thread is back from C, which in a collective may be never.
    Signals are therefore also seen by a thread, through `signal.set_wakeup_fd`.
    """

    def __init__(self) -> None:
        self.say: Callable[[str], None] = _to_stderr
        self._process = os.getpid()
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None
        self.reset()

    def reset(self) -> None:
        """As if no signal had come; outside training."""
        self.received = 0
        """The first signal, or 0."""
        self.received_at = 0.0
        self.agreed: tuple[int, int] | None = None
        """Signal and rank that all ranks agreed to stop for."""
        self._mode = "at once"
        # Of Ctrl-C, as the main thread and as the listening thread saw it.
        self._presses: dict[str, list[float]] = {"main": [], "thread": []}

    @property
    def requested(self) -> bool:
        return self.received != 0

    @property
    def exit_code(self) -> int:
        """Of a run that stopped for the agreed signal, or for the one received."""
        number = self.agreed[0] if self.agreed else self.received
        return INTERRUPTED if number == signal.SIGINT else PREEMPTED

    @property
    def reason(self) -> str:
        """`SIGTERM on rank 1`, or an empty text."""
        if self.agreed:
            return f"{_name(self.agreed[0])} on rank {self.agreed[1]}"
        return _name(self.received) if self.received else ""

    def install(self) -> None:
        """Take the signals over. Main thread only; may be called again."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        # In C, so that it also answers while the main thread hangs.
        if sys.__stderr__ is not None:
            faulthandler.register(STACKS_SIGNAL, file=sys.__stderr__, all_threads=True)
        if self._reader is None:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            os.register_at_fork(after_in_child=_forget_wakeup_fd)
            threading.Thread(target=self._listen, name="signals", daemon=True).start()
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def training(self) -> None:
        """From here on a signal stops the run at the end of a step."""
        self._mode = "after the step"

    def not_training(self) -> None:
        """From here on a signal stops the process at once; so does one that is pending."""
        self._mode = "at once"
        if self.requested:
            self._leave(self.received)

    def ending(self) -> None:
        """From here on signals change nothing: the process ends already."""
        self._mode = "ending"

    def agree(self, requests: Sequence[float]) -> bool:
        """Take every rank's `received` of this step; whether the run stops.

        The same on all ranks: of different signals the one with the highest number counts (SIGTERM
        before SIGUSR1 before SIGINT).
        """
        number = int(max(requests))
        if number:
            self.agreed = (number, list(requests).index(number))
            self.ending()
        return bool(number)

    def _handle(self, number: int, _: object) -> None:
        if os.getpid() != self._process:
            return  # a forked loader worker: its parent will end it
        first = not self.requested
        self._note(number)
        if self._mode == "at once":
            self._leave(number)
        if number == signal.SIGINT and self._pressed_again("main"):
            raise KeyboardInterrupt
        if first and self._mode == "after the step":
            again = " Press it again to stop at once." if number == signal.SIGINT else ""
            self.say(f"{_name(number)}: saving at the end of this step.{again}")

    def _note(self, number: int) -> None:
        if not self.requested:
            self.received_at = time.monotonic()
            self.received = number

    def _pressed_again(self, seen_by: str) -> bool:
        presses = self._presses[seen_by]
        presses.append(time.monotonic())
        return presses[-1] - presses[0] > _SAME_PRESS_SECONDS

    def _leave(self, number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        # On any rank: it may be the only one that knows.
        _to_stderr(f"{_name(number)} outside training: there is nothing to save.")
        raise SystemExit(PREEMPTED)

    def _listen(self) -> None:
        """See signals while the main thread is in C, and end the process if it stays there."""
        assert self._reader is not None
        while data := self._reader.recv(64):
            for number in set(data).intersection(STOP_SIGNALS):
                self._note(number)
                again = number == signal.SIGINT and self._pressed_again("thread")
                if again or self._mode == "at once":
                    threading.Thread(
                        target=self._end_later, args=(number, again), daemon=True
                    ).start()

    def _end_later(self, number: int, pressed_again: bool) -> None:
        time.sleep(_LEAVE_SECONDS)
        if self._mode == "at once" or pressed_again:
            _to_stderr(f"{_name(number)}: the main thread does not answer; the process ends.")
            os._exit(INTERRUPTED if number == signal.SIGINT else PREEMPTED)


_installed: StopSignal | None = None


def install() -> StopSignal:
    """The process's one `StopSignal`, in force and as if no signal had come yet."""
    global _installed
    if _installed is None or _installed._process != os.getpid():
        _installed = StopSignal()
    _installed.reset()
    _installed.install()
    return _installed


def follow_launcher() -> None:
    """Get SIGTERM when the launcher dies: nothing trains on as an orphan. Linux only.

    One process under `accelerate launch` is a plain child of the launcher, which does not pass
    SIGTERM on; torchrun passes it on, but SIGUSR1 and SIGKILL end it alone. A parent that is no
    launcher (a shell, a scheduler) is not followed: leaving `nohup train.py &` must stay possible.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return
    if not is_launcher(command):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is that of `accelerate launch` or torchrun."""
    program = [word for word in command if word and not word.startswith("-")][:2]
    return any(
        Path(word).name in _LAUNCHERS
        or word.startswith(_LAUNCHER_MODULES)
        or word.endswith(("/accelerate/commands/launch.py", "/torch/distributed/run.py"))
        for word in program
    )


def leave_to_parent(_: int) -> None:
    """For a loader worker: signals of the run are the training process's business.

    A signal to the whole process group reaches the workers too, and a worker that dies of it would
    take the run along before it has saved. SIGTERM from the parent still ends it.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def _forget_wakeup_fd() -> None:
    """In a forked child: its signals are not ours."""
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _to_stderr(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
