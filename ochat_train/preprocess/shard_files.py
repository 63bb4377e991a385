"""The work folder of a preprocess run: finished shards on disk, from which an interrupted run goes on.

STORE.partial-FINGERPRINT/lock             held while a process works here
STORE.partial-FINGERPRINT/shards/000012/   one shard, complete from the moment it has this name
STORE.partial-FINGERPRINT/...              what the run writes besides: the duplicates' keys, the store to be
"""

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Self

import numpy as np
import orjson
import pyarrow as pa

from ochat_train.conversations.text_keys import TextKeys
from ochat_train.files import publish_folder, try_lock
from ochat_train.preprocess.shard import Shard


class WorkFolder:
    """Shards by number. As a context manager it holds a lock; leaving it keeps the shards, `remove` deletes them.

    A driver holds the lock while its workers write shards without it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "shards").mkdir(parents=True, exist_ok=True)
        self._lock = (path / "lock").open("wb")

    @classmethod
    def beside(cls, store: Path, fingerprint: str) -> Self:
        """The folder in which the store of this fingerprint is made."""
        return cls(store.with_name(f"{store.name}.partial-{fingerprint[:12]}"))

    def __enter__(self) -> Self:
        if not try_lock(self._lock):
            raise ValueError(f"another process is making this store, in {self.path}; wait for it or end it")
        return self

    def __exit__(self, *_error: object) -> None:
        self._lock.close()

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path)

    def folder(self, name: str) -> Path:
        """An empty folder of this name in the work folder."""
        path = self.path / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def shard_folder(self, number: int) -> Path:
        """Where the shard of this number is; the folder is there once the shard is complete."""
        return self.path / "shards" / f"{number:06}"

    def save(self, number: int, shard: Shard) -> None:
        """Write a shard; its folder is there only once all of it is on the disk."""
        with publish_folder(self.shard_folder(number)) as folder:
            for name in ("rows", "records"):
                table: pa.Table = getattr(shard, name)
                with pa.ipc.new_stream(str(folder / f"{name}.arrow"), table.schema) as stream:
                    stream.write_table(table)
            for name in ("dialects", "unread"):
                counts: Counter[tuple[str, str, str]] = getattr(shard, name)
                (folder / f"{name}.json").write_bytes(orjson.dumps([*counts.items()]))
            np.save(folder / "overlong.npy", shard.overlong)
            shard.keys.save(folder / "keys.npz")

    def load(self, number: int) -> Shard:
        """Read a shard back, its tables memory-mapped."""
        folder = self.shard_folder(number)

        def table(name: str) -> pa.Table:
            return pa.ipc.open_stream(pa.memory_map(str(folder / f"{name}.arrow"))).read_all()

        def counts(name: str) -> Counter[tuple[str, str, str]]:
            return Counter({tuple(key): count for key, count in orjson.loads((folder / f"{name}.json").read_bytes())})

        return Shard(
            rows=table("rows"),
            records=table("records"),
            keys=self.load_keys(number),
            overlong=np.load(folder / "overlong.npy"),
            dialects=counts("dialects"),
            unread=counts("unread"),
        )

    def load_keys(self, number: int) -> TextKeys:
        """The keys of a shard alone."""
        return TextKeys.load(self.shard_folder(number) / "keys.npz")


def find_leftovers(store: Path) -> list[Path]:
    """The work folders beside a store in which no process works."""
    name = re.compile(re.escape(store.name) + r"\.partial-[0-9a-f]{12}")
    leftovers = []
    for path in sorted(store.parent.iterdir()) if store.parent.is_dir() else ():
        if name.fullmatch(path.name) and (path / "lock").is_file():
            with (path / "lock").open("wb") as lock:
                if try_lock(lock):
                    leftovers.append(path)
    return leftovers
