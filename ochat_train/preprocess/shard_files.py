"""The work folder of a preprocess run: finished shards on disk, from which an interrupted run goes on.

STORE.partial-FINGERPRINT/lock             held while a process works here
STORE.partial-FINGERPRINT/shards/000012/   one shard, complete from the moment it has this name
STORE.partial-FINGERPRINT/...              what the run writes besides: the duplicates' keys, the store to be
"""

import fcntl
import re
import shutil
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import orjson
import pyarrow as pa

from ochat_train.conversations.dedupe import TextKeys
from ochat_train.files import flush_tree
from ochat_train.preprocess.shard import Shard


class WorkFolder:
    """Shards by number. As a context manager it holds a lock; `remove` takes it away, leaving it keeps the shards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "shards").mkdir(parents=True, exist_ok=True)
        self._lock = (path / "lock").open("wb")

    @classmethod
    def beside(cls, store: Path, fingerprint: str) -> Self:
        """The folder in which the store of this fingerprint is made."""
        return cls(store.with_name(f"{store.name}.partial-{fingerprint[:12]}"))

    def __enter__(self) -> Self:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is making this store, in {self.path}; wait for it or end it") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def remove(self) -> None:
        """Take the folder away."""
        shutil.rmtree(self.path)

    def folder(self, name: str) -> Path:
        """An empty folder of this name in the work folder."""
        path = self.path / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def has(self, number: int) -> bool:
        """Whether the shard of this number is complete."""
        return self.shard_folder(number).is_dir()

    def shard_folder(self, number: int) -> Path:
        """Where the shard of this number is."""
        return self.path / "shards" / f"{number:06}"

    def num_keys(self, number: int) -> int:
        """How many conversations of the shard have keys."""
        return len(np.load(self.shard_folder(number) / "key_records.npy", mmap_mode="r"))

    def load_keys(self, number: int) -> TextKeys:
        """The keys of the shard."""
        return TextKeys.load(self.shard_folder(number) / "keys.npz")

    def save(self, number: int, shard: Shard) -> None:
        """Write a shard, so that `has` says so only once all of it is on the disk."""
        folder = self.shard_folder(number)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write_table(partial / "rows.arrow", shard.rows)
        _write_table(partial / "records.arrow", shard.records)
        np.save(partial / "key_records.npy", shard.key_records)
        np.save(partial / "overlong.npy", shard.overlong)
        for name, counts in (("dialects", shard.dialects), ("unread", shard.unread)):
            (partial / f"{name}.json").write_bytes(orjson.dumps([[*key, count] for key, count in counts.items()]))
        shard.keys.save(partial / "keys.npz")
        flush_tree(partial)
        partial.rename(folder)

    def load(self, number: int) -> Shard:
        """Read a shard back, its tables memory-mapped."""
        folder = self.shard_folder(number)
        dialects, unread = (orjson.loads((folder / f"{name}.json").read_bytes()) for name in ("dialects", "unread"))
        return Shard(
            rows=_read_table(folder / "rows.arrow"),
            records=_read_table(folder / "records.arrow"),
            keys=self.load_keys(number),
            key_records=np.load(folder / "key_records.npy"),
            overlong=np.load(folder / "overlong.npy"),
            dialects=Counter({(file, form, dialect): count for file, form, dialect, count in dialects}),
            unread=Counter({(file, kind, name): count for file, kind, name, count in unread}),
        )


def find_leftovers(store: Path) -> list[Path]:
    """The work folders beside a store in which no process works."""
    name = re.compile(re.escape(store.name) + r"\.partial-[0-9a-f]{12}")
    folders = store.parent.iterdir() if store.parent.is_dir() else ()
    ours = (path for path in folders if name.fullmatch(path.name) and (path / "lock").is_file())
    return sorted(filter(_is_free, ours))


def _is_free(folder: Path) -> bool:
    with (folder / "lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _write_table(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def _read_table(path: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
