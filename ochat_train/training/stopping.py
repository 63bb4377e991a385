"""How a run stops before its end: on request with its step saved, or with an error that names a lost or stalled rank.

No run hangs. A thread of each rank writes a heartbeat into a key-value store of the main rank once a second: that the
rank lives, and what its training does. The main rank watches all others and writes its verdict into the store; the
others watch the main rank. A process that ended on the watching rank's own host is noticed within seconds, one on
another host when it has sent nothing for LOST_AFTER_S.
"""

import faulthandler
import math
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import orjson
import psutil
from torch.distributed import DistStoreError, TCPStore  # type: ignore[attr-defined]  # documented, not re-exported

from ochat_train.training.engine import Failed, Refused, World, gather_objects

# The exit code of a run that was asked to stop: its step is finished and saved, and the same command continues it. This
# is EX_TEMPFAIL of sysexits.h, "try again later".
STOPPED = 75
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A terminal and DeepSpeed's launcher both pass one Ctrl-C on, a moment apart.
_ONE_REQUEST_S = 2.0

BEAT_S = 1.0
LOST_AFTER_S = 30.0


class StopRequest:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C set `is_made` instead of ending the process.

    Slurm sends them before the time is up, a host before it is taken away, a user at any time. A second signal, more
    than two seconds later, ends the process at once with the shell's exit code for that signal.
    """

    def __init__(self) -> None:
        self.is_made = False
        self._made_at = 0.0
        self._handlers_before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._handlers_before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.is_made:
            self.is_made, self._made_at = True, time.monotonic()
        elif time.monotonic() - self._made_at > _ONE_REQUEST_S:
            # print might wait for a lock that the interrupted code holds.
            os.write(sys.stderr.fileno(), f"{signal.Signals(number).name} again: stopping at once\n".encode())
            os._exit(128 + number)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a rank writes into the store.

    number counts heartbeats. mark counts what training has begun, which is the same on all ranks; progress also counts
    what it got done in between. pid is valid on hosts of this name and PID namespace (containers may share a name).
    """

    number: int
    mark: int
    progress: int
    step: int
    doing: str
    host: str
    pid_namespace: str
    pid: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """A rank's last heartbeat, and the times, on the watchdog's clock, of its last change and its last progress."""

    beat: Heartbeat
    heard_at: float
    progressed_at: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why the run ends, and the ranks that are the reason."""

    ranks: list[int]
    text: str


class Watchdog:
    """Watches the ranks while entered, by all of them together. Training calls `mark` whenever it begins something.

    Lost ranks are noticed from the first moment, stalls only after `limit_stalls`, because a start may take long. On a
    verdict every process ends with code 1, whatever its training waits for: one rank prints the verdict, and a stalled
    rank prints its stack.
    """

    def __init__(self, world: World) -> None:
        self._world, self._stall_timeout_s = world, math.inf
        namespace = os.readlink("/proc/self/ns/pid")
        self._beat = Heartbeat(0, 0, 0, 0, "starting", socket.gethostname(), namespace, os.getpid())
        self._watched = list(range(world.size)) if world.is_main else [0]
        self._seen: dict[int, _Seen] = {}
        self._num_beats = self._num_answers = self._num_rounds = 0
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        address, patience = os.environ["MASTER_ADDR"], timedelta(seconds=LOST_AFTER_S)
        is_main = self._world.is_main
        if is_main:
            self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=patience)
        port = gather_objects(self._store.port if is_main else 0)[0]
        if not is_main:
            self._store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)
        self._send_beat()
        self._num_hosts = len(set(gather_objects(self._beat.host)))  # after it the heartbeats of all ranks are there
        self._thread.start()
        threading.Thread(target=self._watch_store, name="watchdog of the store", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError) and self._world.size > 1:
            # A collective fails when another rank is gone. The thread soon knows which one, and ends the process.
            self._thread.join(4 * BEAT_S if self._num_hosts == 1 else LOST_AFTER_S + 4 * BEAT_S)
        self._is_done.set()
        self._thread.join(LOST_AFTER_S)
        if error is None or isinstance(error, (Failed, Refused)):  # which all ranks raise
            gather_objects(None)  # no rank leaves, and seems lost, before all have stopped watching
        else:
            with suppress(RuntimeError):
                self._send_beat()  # with what it did last

    def limit_stalls(self, stall_timeout_s: float) -> None:
        """From now on, end the run when no rank makes progress for that long."""
        self.progress()
        self._stall_timeout_s = stall_timeout_s

    def mark(self, step: int, doing: str) -> None:
        """Record that training begins something that every rank does."""
        beat = self._beat
        self._beat = replace(beat, mark=beat.mark + 1, progress=beat.progress + 1, step=step, doing=doing)

    def progress(self) -> None:
        """Record progress within something that takes long."""
        self._beat = replace(self._beat, progress=self._beat.progress + 1)

    def _watch(self) -> None:
        while not self._is_done.wait(BEAT_S):
            self._num_rounds += 1
            try:
                self._send_beat()
                verdict = self._find_verdict()
            except DistStoreError:  # no answer in time, perhaps because this process or the main rank was suspended
                continue
            except RuntimeError:  # the store is closed: the main rank is gone
                verdict = self._lost(0)
            self._num_answers += 1
            if verdict is not None and not self._is_done.is_set():
                self._end(verdict)

    def _watch_store(self) -> None:
        """End the run when the store no longer answers: a host that loses its power closes no connection."""
        num_answers, num_waits = 0, 0
        while not self._is_done.wait(BEAT_S):
            num_waits = num_waits + 1 if self._num_answers == num_answers else 0
            num_answers = self._num_answers
            if num_waits * BEAT_S > LOST_AFTER_S:
                self._end(self._lost(0))

    def _send_beat(self) -> None:
        self._num_beats += 1
        beat = asdict(replace(self._beat, number=self._num_beats))
        self._store.set(str(self._world.rank), orjson.dumps(beat).decode())

    def _find_verdict(self) -> Verdict | None:
        if not self._world.is_main and self._store.check(["verdict"]):
            return Verdict(**orjson.loads(self._store.get("verdict")))
        # Rounds are counted, not timed: a process that was suspended itself must not blame another.
        now = self._num_rounds * BEAT_S
        for rank, text in zip(self._watched, self._store.multi_get([str(rank) for rank in self._watched]), strict=True):
            seen, beat = self._seen.get(rank), Heartbeat(**orjson.loads(text))
            self._seen[rank] = seen = _Seen(
                beat,
                heard_at=now if seen is None or beat.number != seen.beat.number else seen.heard_at,
                progressed_at=now if seen is None or beat.progress != seen.beat.progress else seen.progressed_at,
            )
            is_near = (beat.host, beat.pid_namespace) == (self._beat.host, self._beat.pid_namespace)
            if (is_near and not _is_running(beat.pid)) or now - seen.heard_at > LOST_AFTER_S:
                return self._lost(rank)
        # A rank that waits for others makes no progress either; when one of them stalls, all stand still.
        if self._world.is_main and all(
            now - seen.progressed_at > self._stall_timeout_s for seen in self._seen.values()
        ):
            return self._stalled()
        return None

    def _lost(self, rank: int) -> Verdict:
        beat = self._seen[rank].beat if rank in self._seen else self._beat
        latest = max(beat, self._beat, key=lambda one: one.mark)  # its last heartbeat may be a second old
        return Verdict(
            [rank],
            f"rank {rank} was lost at step {latest.step} ({latest.doing}): process {beat.pid} on host {beat.host} "
            "ended or no longer answers. Its last output or the kernel's log shows the reason; a process that is "
            "killed without a message has often reached the host's memory limit. Run the same command again to "
            "continue from the newest checkpoint.",
        )

    def _stalled(self) -> Verdict:
        """The verdict on the ranks that have begun the least: all others wait for them."""
        least = min(seen.beat.mark for seen in self._seen.values())
        ranks = [rank for rank, seen in self._seen.items() if seen.beat.mark == least]
        beat = self._seen[ranks[0]].beat
        names = ", ".join(f"rank {rank} (host {self._seen[rank].beat.host})" for rank in ranks)
        return Verdict(
            ranks,
            f"{names} got no further for {self._stall_timeout_s:g} s, train.stall_timeout_s, at step {beat.step} "
            f"({beat.doing}), and all others wait. Its stack is printed as well. Run the same command again to "
            "continue from the newest checkpoint; raise the limit if a step may take that long.",
        )

    def _end(self, verdict: Verdict) -> None:
        """End this process."""
        if self._world.rank == min(set(range(self._world.size)) - set(verdict.ranks), default=0):
            print(f"error: {verdict.text}", file=sys.stderr, flush=True)
        if self._world.rank in verdict.ranks:
            faulthandler.dump_traceback(file=sys.stderr)
        if self._world.is_main:
            self._store.set("verdict", orjson.dumps(asdict(verdict)).decode())
            time.sleep(3 * BEAT_S)  # until the others have read it
        os._exit(1)


def _is_running(pid: int) -> bool:
    """Whether the process of this host runs; one that ended and was not yet collected by its parent does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
