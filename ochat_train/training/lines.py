"""metrics.jsonl: lines that a run adds to its file, and that wait in memory while the disk does not take them."""

import os
from pathlib import Path
from typing import Any

import orjson

from ochat_train.files import publish_file


class LineFile:
    """Appends JSON lines to a file; those that cannot be written are written with a later one.

    A run that goes on after `step` keeps the whole lines up to there, none for step 0. The others are appended to
    NAME.old before the file is replaced, so that each line is in one of the two at any moment. earlier: what is kept.
    num_undone: how many steps are not.
    """

    def __init__(self, file: Path, step: int) -> None:
        self._file, self._old = file, file.with_name(f"{file.name}.old")
        content = file.read_bytes() if file.exists() else b""
        kept, undone = [], []
        self.earlier: list[dict[str, Any]] = []
        self.num_undone = 0
        for line in content.splitlines(keepends=True):
            event = _read(line)
            if step and event is not None and event["step"] <= step:
                kept.append(line)
                self.earlier.append(event)
            else:
                undone.append(line)
                self.num_undone += event is not None and event["event"] == "step"
        self._kept, self._undone = b"".join(kept), b"".join(undone)
        self._is_replaced = self._kept == content
        self._size = len(self._kept)
        self._old_size = self._old.stat().st_size if self._old.exists() else 0
        self.waiting: list[bytes] = []

    def add(self, line: dict[str, Any]) -> OSError | None:
        """Append a line, after those that wait; returns why they still do."""
        self.waiting.append(orjson.dumps(line) + b"\n")
        return self.write()

    def write(self) -> OSError | None:
        """Write the lines that wait; returns why they still do."""
        lines = b"".join(self.waiting)
        try:
            self._replace()
            _append(self._file, self._size, lines)
        except OSError as error:
            return error
        self._size += len(lines)
        self.waiting.clear()
        return None

    def _replace(self) -> None:
        if self._undone:
            _append(self._old, self._old_size, self._undone)
            self._undone = b""
        if not self._is_replaced:
            with publish_file(self._file) as new:
                new.write(self._kept)
            self._is_replaced = True


def _append(file: Path, size: int, content: bytes) -> None:
    """Append to the first `size` bytes of a file. What is beyond is half a line that a full disk left."""
    with open(file, "ab") as opened:
        if opened.tell() > size:
            opened.truncate(size)
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def _read(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None for one that a crash cut off."""
    try:
        event = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return event if isinstance(event, dict) and "step" in event and line.endswith(b"\n") else None
