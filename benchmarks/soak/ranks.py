"""The processes of a run: forks of this one, which has imported all they need, so that a start takes a second."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  # as the next one: what training imports late, and each fork would anew
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import numpy as np
import orjson
from tqdm import tqdm

from ochat_train.files import free_port
from ochat_train.train import Trainer
from ochat_train.train import main as main_of_training
from ochat_train.training import stopping
from ochat_train.training.checkpoint import find_checkpoints

# The silence after which a rank counts as lost; shorter than the product's, so that faults can outlast it.
LOST_AFTER_S = stopping.LOST_AFTER_S = 8.0
# When one rank has ended, the launcher kills the others after 30 s. They end by themselves before, unless they still
# wait for it to join them: only then does the watchdog begin.
_PATIENCE_S = 3 * LOST_AFTER_S
_HANG_S = 300.0


@dataclass(frozen=True, slots=True)
class Run:
    """A run: its folder, the folder of what the soak notes of it, and its recipe as arguments."""

    folder: Path
    notes: Path
    arguments: list[str]

    def trained(self) -> list[dict[str, Any]]:
        """Number and examples of each step that was trained, those that a fault undid included."""
        file = self.notes / "trained"
        # A rank that was killed may have left half a line.
        lines = file.read_bytes().splitlines() if file.exists() else []
        return [orjson.loads(line) for line in lines if line.endswith(b"}")]

    def checkpoints(self) -> list[Path]:
        """The whole ones, the oldest first."""
        return find_checkpoints(self.folder)


class Ranks:
    """The processes of one start of a run. enter: called first in each with its rank; adds to its environment."""

    def __init__(
        self, run: Run, size: int, enter: Callable[[int], dict[str, str]], arguments: Sequence[str] = ()
    ) -> None:
        run.notes.mkdir(exist_ok=True)
        self._trained = run.notes / "trained"
        start = len(list(run.notes.glob("log-*-0")))
        self._logs = [run.notes / f"log-{start:05d}-{rank}" for rank in range(size)]
        self._logs[0].touch()
        command = [*run.arguments, *arguments, f"checkpoint.dir={run.folder}"]
        world = {"WORLD_SIZE": str(size), "MASTER_PORT": str(free_port())}
        self.pids = [os.fork() or self._be(rank, command, world, enter) for rank in range(size)]
        self.codes: dict[int, int] = {}
        self.num_left_behind = 0

    def is_running(self) -> bool:
        """Whether no rank has ended."""
        for pid in set(self.pids) - self.codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return not self.codes

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send it, unless that rank has ended."""
        self.is_running()
        if self.pids[rank] not in self.codes:
            os.kill(self.pids[rank], number)

    def await_steps(self, num_steps: int) -> None:
        """Wait until that many steps more are trained, or a rank has ended."""
        before = self._num_steps()
        self._await(lambda: self._num_steps() >= before + num_steps)

    def await_end(self) -> None:
        """Wait until a rank has ended."""
        self._await(lambda: False)

    def wait(self) -> list[int]:
        """The exit codes. Ranks that do not end in time after the first are counted, and killed as a launcher would."""
        began, first_ended_at = time.monotonic(), None
        while len(self.codes) < len(self.pids):
            now = time.monotonic()
            if not self.is_running() and first_ended_at is None:
                first_ended_at = now
            if now - began > _HANG_S or (first_ended_at is not None and now - first_ended_at > _PATIENCE_S):
                for pid in set(self.pids) - self.codes.keys():
                    self.num_left_behind += 1
                    os.kill(pid, signal.SIGKILL)
                    self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            time.sleep(0.01)
        return [self.codes[pid] for pid in self.pids]

    def told(self) -> str:
        """What they printed."""
        return "".join(log.read_text(errors="replace") for log in self._logs if log.exists())

    def _await(self, is_so: Callable[[], bool]) -> None:
        began = time.monotonic()
        while self.is_running() and not is_so() and time.monotonic() - began < _HANG_S:
            time.sleep(0.005)

    def _num_steps(self) -> int:
        return self._trained.read_bytes().count(b"\n") if self._trained.exists() else 0

    def _be(self, rank: int, command: list[str], world: dict[str, str], enter: Callable[[int], dict[str, str]]) -> int:
        """What a forked process does; it does not return. The examples of each step go into the notes."""
        log = os.open(self._logs[rank], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # tqdm's own is shared by forks: a rank that is killed while it holds it would hold up all others.
        tqdm.set_lock(threading.RLock())
        code: Any = 1
        try:
            os.environ |= world | {"RANK": str(rank)} | enter(rank)
            if rank == 0:
                _note_steps(self._trained)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python starts
            main_of_training(command)
            code = 0
        except SystemExit as error:
            code = error.code
            if isinstance(code, str):
                print(code, flush=True)
                code = 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)


def _note_steps(file: Path) -> None:
    original = Trainer.train_one_step

    def train_one_step(trainer: Trainer, ready: Any, *others: Any, **options: Any) -> Any:
        done = original(trainer, ready, *others, **options)
        line = {"step": trainer.state.step, "positions": np.concatenate(ready.item.bins).tolist()}
        with open(file, "ab", buffering=0) as out:
            out.write(orjson.dumps(line) + b"\n")
        return done

    Trainer.train_one_step = train_one_step  # type: ignore[method-assign]
