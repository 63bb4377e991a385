"""No run hangs: a rank that is lost or stalls is named, with its step, and every process ends.

A thread of each rank tells a key-value store of the main rank, once a second, that the rank lives and what its training
does. The main rank watches all others and writes its verdict into the store; the others watch the main rank. A process
of the watching rank's own host that is gone is noticed within seconds, one of another host when nothing was heard of it
for LOST_AFTER_S.
"""

import faulthandler
import math
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import orjson
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, not re-exported

from ochat_train.training.engine import Failed, Refused, World, gather_objects

BEAT_S = 1.0
LOST_AFTER_S = 30.0


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank tells. number: of the beat. mark counts what its training has begun, which is the same on all ranks;
    moves counts also what it got on with.

    pid_namespace: with the host's name, where the pid means something (containers may share a name).
    """

    number: int
    mark: int
    moves: int
    step: int
    doing: str
    host: str
    pid_namespace: str
    pid: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why the run ends, and because of which ranks."""

    ranks: list[int]
    text: str


class Watchdog:
    """Watches the ranks while it is entered, by all of them together. Training calls `mark` when it begins something.

    Lost ranks are noticed from the first moment, stalls once `limit_stalls` was called: a start may take long.

    On a verdict every process ends with code 1, whatever its training waits for; one of them prints the verdict, and a
    rank that stalls prints where it is.
    """

    def __init__(self, world: World) -> None:
        self._world, self._stall_timeout_s = world, math.inf
        self._beat = Beat(0, 0, 0, 0, "starting", socket.gethostname(), os.readlink("/proc/self/ns/pid"), os.getpid())
        self._watched = list(range(world.size)) if world.is_main else [0]
        self._number = 0
        self._seen: dict[int, _Seen] = {}
        self._is_done = threading.Event()
        self._num_answers = 0
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        address, patience = os.environ["MASTER_ADDR"], timedelta(seconds=LOST_AFTER_S)
        is_main = self._world.is_main
        if is_main:
            self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=patience)
        port = gather_objects(self._store.port if is_main else 0)[0]
        if not is_main:
            self._store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)
        self._tell()
        self._num_hosts = len(set(gather_objects(self._beat.host)))  # behind it the beats of all ranks are there
        self._thread.start()
        threading.Thread(target=self._await_answers, name="watchdog's", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError) and self._world.size > 1:
            # A collective fails when another rank is gone. Who it was is known in a moment; then the thread ends all.
            self._thread.join(4 * BEAT_S if self._num_hosts == 1 else LOST_AFTER_S + 4 * BEAT_S)
        self._is_done.set()
        self._thread.join(LOST_AFTER_S)
        if error is None or isinstance(error, (Failed, Refused)):  # which all ranks raise
            gather_objects(None)  # no rank leaves, and seems lost, before all have stopped watching
        else:
            with suppress(RuntimeError):
                self._tell()  # what it did last

    def limit_stalls(self, stall_timeout_s: float) -> None:
        """From now on the run ends when no rank gets further for so long."""
        self.move()
        self._stall_timeout_s = stall_timeout_s

    def mark(self, step: int, doing: str) -> None:
        """Training begins something that every rank does."""
        self._beat = replace(self._beat, mark=self._beat.mark + 1, moves=self._beat.moves + 1, step=step, doing=doing)

    def move(self) -> None:
        """What was begun is long, and goes on."""
        self._beat = replace(self._beat, moves=self._beat.moves + 1)

    def _run(self) -> None:
        while not self._is_done.wait(BEAT_S):
            try:
                self._tell()
                verdict = self._judge()
            except RuntimeError:  # the store is closed: the main rank is gone
                verdict = self._lost(0)
            self._num_answers += 1
            if verdict is not None and not self._is_done.is_set():
                self._end(verdict)

    def _await_answers(self) -> None:
        """A store whose host lost its power closes nothing, and whoever asks it waits.

        Waits are counted, not timed: a process that gets no time itself must not blame another.
        """
        num_answers, num_waits = 0, 0
        while not self._is_done.wait(BEAT_S):
            num_waits = num_waits + 1 if self._num_answers == num_answers else 0
            num_answers = self._num_answers
            if num_waits * BEAT_S > LOST_AFTER_S:
                self._end(self._lost(0))

    def _tell(self) -> None:
        self._number += 1
        self._store.set(str(self._world.rank), orjson.dumps(asdict(replace(self._beat, number=self._number))).decode())

    def _judge(self) -> Verdict | None:
        if not self._world.is_main and self._store.check(["verdict"]):
            return Verdict(**orjson.loads(self._store.get("verdict")))
        now = time.monotonic()
        for rank, text in zip(self._watched, self._store.multi_get([str(rank) for rank in self._watched]), strict=True):
            seen, beat = self._seen.get(rank), Beat(**orjson.loads(text))
            self._seen[rank] = seen = _Seen(
                beat,
                heard_at=now if seen is None or beat.number != seen.beat.number else seen.heard_at,
                moved_at=now if seen is None or beat.moves != seen.beat.moves else seen.moved_at,
            )
            is_near = (beat.host, beat.pid_namespace) == (self._beat.host, self._beat.pid_namespace)
            is_gone = is_near and not _is_running(beat.pid)
            if is_gone or now - seen.heard_at > LOST_AFTER_S:
                return self._lost(rank)
        # A rank that waits for others stands still; all do when one of them gets no further.
        if self._world.is_main and all(now - seen.moved_at > self._stall_timeout_s for seen in self._seen.values()):
            return self._stalled()
        return None

    def _lost(self, rank: int) -> Verdict:
        beat = self._seen[rank].beat if rank in self._seen else self._beat
        latest = max(beat, self._beat, key=lambda one: one.mark)  # what was seen of it may be a second old
        return Verdict(
            [rank],
            f"rank {rank} was lost at step {latest.step} ({latest.doing}): process {beat.pid} on host {beat.host} "
            "ended or no longer answers. What it printed last, or the kernel's log, says why; a process that was "
            "killed without a word has often met the host's memory limit. Run the same command again to go on from the "
            "newest checkpoint.",
        )

    def _stalled(self) -> Verdict:
        """All wait for the ranks that have begun the least."""
        least = min(seen.beat.mark for seen in self._seen.values())
        ranks = [rank for rank, seen in self._seen.items() if seen.beat.mark == least]
        beat = self._seen[ranks[0]].beat
        names = ", ".join(f"rank {rank} (host {self._seen[rank].beat.host})" for rank in ranks)
        return Verdict(
            ranks,
            f"{names} got no further for {self._stall_timeout_s:g} s, train.stall_timeout_s, at step {beat.step} "
            f"({beat.doing}), and all others wait. Where it is stands beside this. Run the same command again to go on "
            "from the newest checkpoint; raise the limit if a step may take so long.",
        )

    def _end(self, verdict: Verdict) -> None:
        """The end of this process."""
        if self._world.rank == min(set(range(self._world.size)) - set(verdict.ranks), default=0):
            print(f"error: {verdict.text}", file=sys.stderr, flush=True)
        if self._world.rank in verdict.ranks:
            faulthandler.dump_traceback(file=sys.stderr)
        if self._world.is_main:
            self._store.set("verdict", orjson.dumps(asdict(verdict)).decode())
            time.sleep(3 * BEAT_S)  # until the others have read it
        os._exit(1)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A rank's last beat, and when, on this process's clock, it was last another and last further."""

    beat: Beat
    heard_at: float
    moved_at: float


def _is_running(pid: int) -> bool:
    """Whether the process of this host runs; one that ended and was not yet collected by its parent does not."""
    try:
        # The state stands behind the name, which may hold anything, and its bracket.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")
