"""Answers on disk, by their requests: a run that was cut goes on from them."""

import hashlib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer. is_cut: it ended at the limit of tokens. tokens: None where the server does not report them.

    time: seconds since 1970.
    """

    text: str
    is_cut: bool
    prompt_tokens: int | None
    completion_tokens: int | None
    time: float = field(default_factory=time.time)


def key_of(request: dict[str, Any]) -> str:
    """A digest of all that decides the answer to a request."""
    return hashlib.sha256(orjson.dumps(request, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


class Journal:
    """The answers in an SQLite file, by the keys of their requests. Each is on the disk when `add` returns."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def get(self, key: str) -> Answer | None:
        """The answer, if it is there."""
        row = self._database.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Answer(**orjson.loads(row[0]))

    def add(self, key: str, answer: Answer) -> None:
        """Write an answer."""
        self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, orjson.dumps(answer).decode()))


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Open the journal in a file, for one process at a time.

    Raises ValueError when another process has it open, or when the file is something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as database:  # commits each statement
        journal = Journal(database)
        try:
            database.execute("PRAGMA locking_mode = EXCLUSIVE")  # the first transaction's lock lasts until the end
            database.execute("BEGIN EXCLUSIVE")
            database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            journal.get("")
            database.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                raise ValueError(f"another process writes {path}; wait for it, or name another file") from None
            raise ValueError(f"{path} does not hold answers of an earlier run ({error}); move it away") from None
        yield journal
