"""What was answered already: a file of one JSON line an answer, from which a cut run goes on."""

import fcntl
import hashlib
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer. is_cut: it ended at the limit of tokens. tokens: None where the server did not tell them.

    time: seconds since 1970.
    """

    text: str
    is_cut: bool
    prompt_tokens: int | None
    completion_tokens: int | None
    time: float = field(default_factory=time.time)


def key_of(request: dict[str, Any]) -> str:
    """By what a request is known again: all that decides its answer."""
    return hashlib.sha256(orjson.dumps(request, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


class Journal:
    """The answers in a file, by the keys of their requests.

    Each is written at once. A last line that a crash cut off is removed. One process at a time has the file; entering
    raises ValueError when another has it, or when it is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)  # closed by __exit__
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._answers = self._read()
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"another process writes {self.path}; wait for it, or name another file") from None
        except ValueError:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def get(self, key: str) -> Answer | None:
        """The answer, if it is there."""
        return self._answers.get(key)

    def add(self, key: str, answer: Answer) -> None:
        """Write an answer."""
        self._answers[key] = answer
        self._file.write(orjson.dumps({"key": key, **asdict(answer)}, option=orjson.OPT_APPEND_NEWLINE))

    def _read(self) -> dict[str, Answer]:
        self._file.seek(0)
        data = self._file.readall()
        whole = data.rfind(b"\n") + 1
        try:
            rows = [orjson.loads(line) for line in data[:whole].splitlines()]
            answers = {row.pop("key"): Answer(**row) for row in rows}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self.path} does not hold answers of an earlier run ({error}); move it away") from None
        os.ftruncate(self._file.fileno(), whole)
        return answers
