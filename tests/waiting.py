"""Waiting for an event: a line in a file, a process that ends. No test passes or fails by how long that takes."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Reached by what hangs, and by nothing else: also not on a machine where ten others work.
HANG_S = 600.0


def wait_until(is_so: Callable[[], object]) -> None:
    """Wait for it to be true."""
    deadline = time.monotonic() + HANG_S
    while not is_so():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


@contextmanager
def ends() -> Iterator[None]:
    """Raises TimeoutError within what hangs; only in the main thread."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"it did not end within {HANG_S:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
