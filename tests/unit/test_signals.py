"""Signals: who is heard, what the ranks agree on, and what a process stuck in C does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemtune import signals
from gemtune.signals import STOP_SIGNALS, StopSignal, is_launcher


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    """The process's, in force; afterwards the handlers are what they were."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield signals.install()
    for number, handler in before.items():
        signal.signal(number, handler)


def program(body: str) -> subprocess.Popen[str]:
    """A Python process that installs the signals, runs `body` and has printed `ready` in it."""
    code = "from gemtune import signals\nstop = signals.install()\n" + textwrap.dedent(body)
    source = str(Path(signals.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": source},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()).strip() != "ready":
        assert line, "ended before it was ready"
    return process


def ended(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"hangs:\n{output}")
    return process.returncode, output


def test_in_training_a_signal_is_noted_and_repeats_change_nothing(stop: StopSignal) -> None:
    said: list[str] = []
    stop.say = said.append
    stop.training()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert stop.received == signal.SIGUSR1 and stop.exit_code == 75
    assert said == ["SIGUSR1: saving at the end of this step."]


def test_a_second_ctrl_c_stops_at_once_but_not_its_echo(
    stop: StopSignal, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop.say = lambda text: None
    stop.training()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # the launcher passes the same one on
    assert stop.received == signal.SIGINT and stop.exit_code == 130
    monkeypatch.setattr(signals, "_SAME_PRESS_SECONDS", 0.0)
    monkeypatch.setattr(stop, "_end_later", lambda *arguments: None)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def test_sigterm_after_ctrl_c_is_the_launcher_leaving(stop: StopSignal) -> None:
    stop.say = lambda text: None
    stop.training()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.exit_code == 130


@pytest.mark.parametrize(
    ("requests", "code", "reason"),
    [
        ([0, 0], None, ""),
        ([0, signal.SIGTERM], 75, "SIGTERM on rank 1"),
        ([signal.SIGUSR1, 0], 75, "SIGUSR1 on rank 0"),
        ([signal.SIGINT, signal.SIGINT], 130, "Ctrl-C on rank 0"),
        ([signal.SIGINT, signal.SIGTERM], 75, "SIGTERM on rank 1"),
    ],
)
def test_ranks_agree(requests: list[float], code: int | None, reason: str) -> None:
    for own in requests:  # every rank comes to the same, whatever it got itself
        stop = StopSignal()
        stop.received = int(own)
        assert stop.agree(requests) == (code is not None)
        if code is not None:
            assert (stop.exit_code, stop.reason) == (code, reason)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_outside_training_it_ends_at_once(number: int, code: int) -> None:
    process = program("import time\nprint('ready', flush=True)\ntime.sleep(60)")
    process.send_signal(number)
    returned, output = ended(process, 4)
    assert returned == code and "nothing to save" in output and "Traceback" not in output


def test_also_where_the_main_thread_never_comes_back_from_c() -> None:
    process = program(
        """
        import ctypes
        mutex = ctypes.create_string_buffer(64)
        libc = ctypes.CDLL(None)
        print('ready', flush=True)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
        """
    )
    time.sleep(0.5)  # until it is in there
    process.send_signal(signal.SIGTERM)
    returned, output = ended(process, 15)
    assert returned == 75 and "the main thread does not answer" in output


def test_a_signal_to_a_forked_child_is_not_the_parents() -> None:
    process = program(
        """
        import os, time
        stop.training()
        if (child := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.2)
        print('ready', flush=True)
        os.kill(child, 10)
        time.sleep(0.5)
        print('received', stop.received, flush=True)
        os.kill(child, 9)
        os.waitpid(child, 0)
        """
    )
    returned, output = ended(process, 10)
    assert returned == 0 and "received 0" in output


def test_a_loader_worker_hears_its_parent_only() -> None:
    process = program(
        """
        import os, signal, subprocess, time
        stop.training()
        if (child := os.fork()) == 0:
            signals.leave_to_parent(0)
            time.sleep(60)
            os._exit(0)
        time.sleep(0.3)
        print('ready', flush=True)
        for name in ('TERM', 'INT', 'USR1'):
            subprocess.run(['/bin/sh', '-c', f'kill -{name} {child}'], check=True)
        time.sleep(0.3)
        print('lives', os.waitpid(child, os.WNOHANG) == (0, 0), flush=True)
        os.kill(child, signal.SIGTERM)
        print('ended', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        """
    )
    _, output = ended(process, 15)
    assert "lives True" in output and "ended 0" in output


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["/venv/bin/python", "/venv/bin/accelerate", "launch", "train.py"], True),
        (["/venv/bin/python", "/venv/bin/torchrun", "--nproc-per-node", "2"], True),
        (["python", "-m", "torch.distributed.run", "--nnodes=2"], True),
        (["python", "-m", "accelerate.commands.launch", "train.py"], True),
        (["python", "/lib/python3.11/site-packages/torch/distributed/run.py"], True),
        (["bash", "-c", "accelerate launch train.py"], False),
        (["slurmstepd: [123.0]"], False),
        (["python", "sweep.py", "accelerate"], False),
        (["python", "-u", "/venv/bin/torchrun", "train.py"], True),
        ([""], False),
    ],
)
def test_who_is_a_launcher(command: list[str], expected: bool) -> None:
    assert is_launcher(command) == expected


def test_the_child_of_a_dead_launcher_gets_sigterm(tmp_path: Path) -> None:
    launcher = tmp_path / "accelerate"
    child = tmp_path / "child.py"
    ready, got = tmp_path / "ready", tmp_path / "got"
    child.write_text(
        "import pathlib, time\nfrom gemtune import signals\n"
        "stop = signals.install()\nstop.training()\nsignals.follow_launcher()\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "end = time.monotonic() + 60\n"
        "while not stop.requested and time.monotonic() < end:\n    time.sleep(0.02)\n"
        f"pathlib.Path({str(got)!r}).write_text(stop.reason)\n"
    )
    launcher.write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, {str(child)!r}])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(signals.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, str(launcher)], env=environment)
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    while not got.exists() or not got.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert got.read_text() == "SIGTERM"
