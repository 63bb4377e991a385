"""Commands run one after the other, and what a signal does to the one that runs."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import orjson

from ochat_train.launch.nodes import TrainingCommand

STOPPED = 75  # the exit code of what was asked to stop and can go on; training has the same
# HUP too: when a terminal is closed, the system signals this process alone.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_POLL_S = 0.2
LAUNCH = "OCHAT_LAUNCH"  # the variable that names a launch for the processes that it starts; RUN/lock has it


def say(message: str) -> None:
    """Print a line that stands out among those of the commands."""
    with suppress(OSError):  # a terminal that was closed
        print(f"launch: {message}", flush=True)


class MainProcess(NamedTuple):
    """Where training's main process runs, as RUN/lock says."""

    host: str
    pid: int

    @property
    def is_here(self) -> bool:
        return self.host == os.uname().nodename


class Commands:
    """Runs commands, each in a session of its own, so that a terminal sends Ctrl-C to this process alone.

    DeepSpeed's launcher would kill the ranks in the middle of a save. The first signal asks training to save and to
    stop, and ends any other command; the second one stops at once.
    """

    _num_received = 0  # by this process; a signal just before the next run of an ablation is not lost

    def __init__(self, run_dir: Path) -> None:
        self.num_signals = 0  # how many were acted upon
        self._run_dir = run_dir
        self._lock_before: bytes | None = None  # RUN/lock before training was started; None: nothing trains
        self._port = 0  # on which the processes of training meet
        os.environ[LAUNCH] = secrets.token_hex(8)
        self._at_once = signal.SIGKILL
        self._process: subprocess.Popen[bytes] | None = None  # the newest one
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        Commands._num_received += 1  # acted upon where the command that runs is known

    def require(self, module: Sequence[str]) -> None:
        """Run a module of Python with its arguments, and exit with its code unless that is 0."""
        if code := self._run([sys.executable, "-m", *module]):
            sys.exit(code)

    def train(self, command: TrainingCommand) -> int:
        """Train once; returns the exit code of training."""
        if not command.is_first:
            say(f"waiting until the first node has prepared the data and listens on {command.address}:{command.port}")
            self._await_port(command.address, command.port)
        self._lock_before, self._port, self._at_once = self._read_lock(), command.port, command.at_once
        code = self._run(command.words)
        main = self._main_process()
        self._lock_before = None
        if self.num_signals == 1 and code == 256 - signal.SIGUSR1:
            # It met the main process before its first step or after its last one, where there is nothing to save.
            return STOPPED
        # A killed launcher leaves its processes running. When it was the inner one of two, the outer one exits with 0.
        if self.num_signals == 0 and main is not None and main.is_here and _kill(main.pid, signal.SIGKILL):
            self._end(signal.SIGKILL)
            say(f"the launcher ended with exit code {code} and left training running; killed that, too")
            return 1
        return code

    def pause(self, seconds: float) -> None:
        """Wait; a signal exits."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._exit_if_signalled()
            time.sleep(min(left, _POLL_S))

    def _run(self, command: Sequence[str]) -> int:
        """Run a command; returns its exit code, as a shell does where a signal ended it."""
        self._exit_if_signalled()
        self._process = subprocess.Popen(command, start_new_session=True)
        is_ending = False
        while True:
            if self._num_received > self.num_signals:
                self.num_signals += 1
                is_ending = self._act() or is_ending
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(_POLL_S)
                break
        if is_ending and self.num_signals == 1:
            sys.exit(STOPPED)
        return 128 - code if code < 0 else code

    def _await_port(self, address: str, port: int) -> None:
        """Wait until somebody listens there; a signal exits."""
        while True:
            with suppress(OSError), socket.create_connection((address, port), timeout=1):
                return
            self.pause(1)

    def _exit_if_signalled(self) -> None:
        if self._num_received > self.num_signals:
            sys.exit(STOPPED)

    def _act(self) -> bool:
        """Do what the signal of this number means; returns whether it ends a command that is not training."""
        main = self._main_process()
        if self.num_signals == 1 and main is not None:
            if main.is_here and _kill(main.pid, signal.SIGUSR1):
                say("finishing the step and saving; press Ctrl-C again to stop at once")
            else:
                say(
                    f"process {main.pid} on {main.host} cannot be reached from here: send it SIGUSR1 there, and "
                    "training saves and stops; press Ctrl-C again to stop at once"
                )
        elif self.num_signals == 1:
            self._end(signal.SIGTERM)
            say("stopping")
            return True
        elif self.num_signals == 2:
            self._end(self._at_once)
            say("stopping at once")
        else:
            self._end(signal.SIGKILL)
        return False

    def _end(self, number: signal.Signals) -> None:
        """Signal what runs, and all that it started."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read_lock(self) -> bytes:
        try:
            return (self._run_dir / "lock").read_bytes()
        except OSError:
            return b""

    def _main_process(self) -> MainProcess | None:
        """The main process of the training that this process started; None before it holds the run's folder."""
        lock = self._read_lock()
        if self._lock_before is None or not lock or lock == self._lock_before:  # another run's, or an older one's
            return None
        with suppress(ValueError, KeyError):  # it is being written
            held = orjson.loads(lock)
            # Another run may have taken the folder after this one was started. It has another name of its launch, and
            # where the launcher reached its process by ssh, without this environment, it meets on another port.
            is_ours = held["launch"] in (None, os.environ[LAUNCH]) and held["port"] == str(self._port)
            return MainProcess(held["host"], held["pid"]) if is_ours else None
        return None


def _kill(pid: int, number: signal.Signals) -> bool:
    """Signal a process; False when it cannot be."""
    try:
        os.kill(pid, number)
    except OSError:
        return False
    return True
