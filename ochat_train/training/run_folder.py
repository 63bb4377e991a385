"""The folder of a run: one run at a time in it, on one file system of all ranks or on one of each node."""

import fcntl
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

from ochat_train.training.engine import World, gather_objects, together


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's folder as this process sees it.

    is_shared: every rank sees the main rank's folder. is_writer: this process writes what a folder holds once; it is
    the main rank, and on every other file system the first rank of the node.
    """

    path: Path
    is_shared: bool
    is_writer: bool


@contextmanager
def open_run_folder(path: Path, world: World) -> Iterator[RunFolder]:
    """The folder, made when it is not there, and held against other runs. All ranks enter it together.

    Raises Refused when nothing can be written there, or when another run holds it.
    """
    with ExitStack() as stack:
        # A new name each time: network file systems remember for a while which names were not there.
        mark = path / f".seen-{gather_objects(secrets.token_hex(8))[0]}"
        together(lambda: stack.enter_context(_held(path, mark)) if world.is_main else None)
        sees = gather_objects(mark.exists())
        is_writer = world.is_main or (not sees[world.rank] and world.local_rank == 0)
        together(lambda: _touch(mark) if is_writer else None)  # the other nodes' folders must be writable, too
        if is_writer:
            mark.unlink()
        yield RunFolder(path, is_shared=all(sees), is_writer=is_writer)


def _touch(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"written to see whether it can be")
    except OSError as error:
        raise ValueError(
            f"checkpoint.dir {file.parent} cannot be written to ({error.strerror}), so nothing could be saved; name "
            "another folder, make room, or get the right to write there"
        ) from None


@contextmanager
def _held(path: Path, mark: Path) -> Iterator[None]:
    """Hold RUN/lock, which says who does. The kernel lets go of it when the process ends, however it ends."""
    _touch(mark)
    with open(path / "lock", "ab+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run trains in checkpoint.dir {path}: {(path / 'lock').read_text()}; wait for it or stop it, "
                "or name another folder"
            ) from None
        except OSError as error:  # not all network file systems can lock
            print(f"warning: {path} cannot be locked ({error.strerror}): start no second run in it", flush=True)
        lock.truncate(0)
        lock.write(orjson.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": utc_now()}))
        lock.flush()
        yield


def utc_now() -> str:
    """Now, as 2026-11-25T20:15:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
