"""A request to stop: by Slurm before the time is up, by the host before it is taken away, by the user."""

import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any, Self

# What a run exits with that was asked to stop: the step is finished and saved, the same command goes on. It is
# EX_TEMPFAIL of sysexits.h, "try again later".
STOPPED = 75
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A terminal and DeepSpeed's launcher both pass one Ctrl-C on, a moment apart.
_ONE_REQUEST_S = 2.0


class StopRequest:
    """While it is entered, SIGTERM, SIGUSR1 and Ctrl-C set `is_made` instead of ending the process.

    A second signal, more than two seconds later, ends it at once with the shell's code of that signal.
    """

    def __init__(self) -> None:
        self.is_made = False
        self._made_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.is_made:
            self.is_made, self._made_at = True, time.monotonic()
        elif time.monotonic() - self._made_at > _ONE_REQUEST_S:
            # print might wait for a lock that the interrupted code holds.
            os.write(sys.stderr.fileno(), f"{signal.Signals(number).name} again: stopping at once\n".encode())
            os._exit(128 + number)
