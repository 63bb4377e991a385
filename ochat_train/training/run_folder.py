"""The folder of a run: one run at a time in it, on one file system of all ranks or on one of each node."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch

import ochat_train
from ochat_train.files import try_lock
from ochat_train.recipe import Recipe, to_json
from ochat_train.training.engine import World, gather_objects, together


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's folder as this process sees it.

    is_shared: every rank sees the main rank's folder. is_writer: this process writes what the folder holds once; it is
    the main rank, and on every other file system the first rank of the node.
    """

    path: Path
    is_shared: bool
    is_writer: bool


@contextmanager
def open_run_folder(path: Path, world: World) -> Iterator[RunFolder]:
    """Make the folder if it does not exist, and lock it against other runs. All ranks enter it together.

    Raises Refused when it cannot be written to, or when another run has locked it.
    """
    with ExitStack() as stack:
        # A new name each time: network file systems remember for a while which names did not exist.
        mark = path / f".seen-{gather_objects(secrets.token_hex(8))[0]}"
        together(lambda: stack.enter_context(_locked(path, mark)) if world.is_main else None)
        sees = gather_objects(mark.exists())
        is_writer = world.is_main or (not sees[world.rank] and world.local_rank == 0)
        together(lambda: _check_writable(mark) if is_writer else None)  # on the other nodes' file systems, too
        if is_writer:
            mark.unlink()
        yield RunFolder(path, is_shared=all(sees), is_writer=is_writer)


def _check_writable(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"written to see whether it can be")
    except OSError as error:
        raise ValueError(
            f"checkpoint.dir {file.parent} cannot be written to ({error.strerror}), so nothing could be saved; name "
            "another folder, make room, or get the right to write there"
        ) from None


@contextmanager
def _locked(path: Path, mark: Path) -> Iterator[None]:
    """Lock RUN/lock and write into it who holds it. The kernel releases the lock when the process ends in any way."""
    _check_writable(mark)
    with open(path / "lock", "ab+") as lock:
        try:
            if not try_lock(lock):
                raise ValueError(
                    f"another run trains in checkpoint.dir {path}: {(path / 'lock').read_text()}; wait for it or stop "
                    "it, or name another folder"
                )
        except OSError as error:  # not all network file systems can lock
            print(f"warning: {path} cannot be locked ({error.strerror}): start no second run in it", flush=True)
        lock.truncate(0)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": utc_now()}
        # By these a launch knows its own run; on the port this run's processes meet.
        holder |= {"launch": os.environ.get("OCHAT_LAUNCH"), "port": os.environ.get("MASTER_PORT")}
        lock.write(orjson.dumps(holder))
        lock.flush()
        yield


def utc_now() -> str:
    """The time now, as 2026-11-25T20:15:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def device_name() -> str:
    """The name of the device that this process trains on, as torch gives it."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def describe_run(recipe: Recipe, world_size: int, *, attention: str, checkpointing: str) -> dict[str, Any]:
    """What is saved with every checkpoint: the resolved recipe, the commit of the code, versions, hardware."""
    packages = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy")
    imported = {name: sys.modules[name] for name in packages if name in sys.modules}
    return {
        "recipe": to_json(recipe),
        "commit": _git_commit(),
        "versions": {name: str(module.__version__) for name, module in imported.items()}
        | {"ochat_train": ochat_train.__version__},
        "device": device_name(),
        "num_processes": world_size,
        "attention": attention,
        "checkpointing": checkpointing,
        "started": utc_now(),
    }


def _git_commit() -> str | None:
    """The commit of the code, followed by + when files differ from it; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        options: dict[str, Any] = {"cwd": here, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
        is_dirty = subprocess.run(["git", "diff", "HEAD", "--name-only"], **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+" if is_dirty else str(commit)
