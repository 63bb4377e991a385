"""Files written whole or not at all, JSON lines, locks, packages of extras, and a free port.

Imports nothing of ours.
"""

import errno
import fcntl
import importlib.util
import os
import random
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import orjson

STEP_FOLDERS = "step-" + "[0-9]" * 8  # a glob for what `step_name` makes


def step_name(step: int) -> str:
    """The name of the folder of a step's checkpoint or model: step-00000100."""
    return f"step-{step:08d}"


@contextmanager
def publish_folder(final: Path) -> Iterator[Path]:
    """Give an empty folder to write into; after the block it is on the disk and stands at `final`.

    What stood at `final` is replaced. If the block raises, `final` stays as it was and the new folder is removed.
    """
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        flush_tree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    move_folder(partial, final)


def move_folder(folder: Path, final: Path) -> None:
    """Rename `folder` to `final`, and remove what stood there only once the new one has its name."""
    replaced = final.with_name(f"{final.name}.replaced")
    if os.path.lexists(final):
        remove_folder(replaced)
        final.rename(replaced)
    folder.rename(final)
    flush(final.parent)
    remove_folder(replaced)


def remove_folder(folder: Path) -> None:
    """Remove a folder as far as that is possible; of a link the link alone, not what it leads to."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def publish_file(final: Path) -> Iterator[IO[bytes]]:
    """Give a file to write to; after the block it is on the disk and stands at `final`, also in place of an older one.

    If the block raises, `final` stays as it was and the new file is removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f"{final.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(final)
    flush(final.parent)


def flush_tree(folder: Path) -> None:
    """Put every file below `folder`, and the folders' own entries, onto the disk."""
    for parent, _, files in os.walk(folder):
        for file in files:
            flush(Path(parent) / file)
        flush(Path(parent))


def flush(path: Path) -> None:
    """Put one file, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(file: IO[Any], *, shared: bool = False) -> bool:
    """Lock an open file until it is closed or the process ends; False when another process holds it.

    A shared lock only looks: it is refused by a writer's lock, not by other readers. Raises OSError on a file system
    that cannot lock. (The package filelock has no shared lock, and empties the file.)
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def require_packages(feature: str, *packages: str, extra: str, remedy: str = "") -> None:
    """Raise ValueError when packages that `feature` needs are not installed. `remedy` is what else could be done."""
    missing = [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        noun = "package" if len(missing) == 1 else "packages"
        remedies = [f"pip install 'ochat_train[{extra}]'", *([remedy] if remedy else [])]
        raise ValueError(f"{feature} needs the {noun} {', '.join(missing)}: {', or '.join(remedies)}")


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without a line that a crash cut off; none when there is no such file."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return []
    values = []
    for line in lines:
        with suppress(orjson.JSONDecodeError):
            values.append(orjson.loads(line))
    return [value for value in values if isinstance(value, dict)]


def free_port() -> int:
    """A port of this machine that nobody uses.

    It is below those that systems give to connections, one of which could have taken it by the time somebody listens.
    """
    draw = random.SystemRandom()  # leaves the seeded ones alone
    while True:
        port = draw.randrange(20_000, 32_768)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port
