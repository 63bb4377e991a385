"""The log of requests: one line of JSON for each, without any text of a user or a model."""

import logging
import os
import secrets
import time
from dataclasses import dataclass, field
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

import orjson


@dataclass(slots=True)
class RequestRecord:
    """What the log says of one request. route: "other" for what is not a route. status: 0 until it is known."""

    id: str = field(default_factory=lambda: secrets.token_hex(16))
    route: str = "other"
    model: str | None = None
    condition: str | None = None
    status: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    ignored: list[str] = field(default_factory=list)  # fields without an effect, named at their first request
    started: float = field(default_factory=time.monotonic)

    def to_json(self) -> str:
        """The line. `time` is the end in UTC, `seconds` the duration."""
        line: dict[str, Any] = {
            "time": _now(),
            "id": self.id,
            "route": self.route,
            "model": self.model,
            "condition": self.condition,
            "status": self.status,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": round(time.monotonic() - self.started, 3),
        }
        if self.error is not None:
            line["error"] = self.error
        if self.ignored:
            line["ignored"] = self.ignored
        return orjson.dumps(line).decode()


def open_log(file: Path | None) -> logging.Logger:
    """Open a log that writes to the file, or to stderr. A file that logrotate moves away is opened again.

    Raises ValueError when it cannot be written to.
    """
    log = logging.getLogger("ochat_train.requests")
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        if file is not None:  # it says who asked when and how much: for its owner alone
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        handler = WatchedFileHandler(file) if file is not None else logging.StreamHandler()
    except OSError as error:
        raise ValueError(f"--log-file {file} cannot be written to: {error.strerror}") from error
    log.handlers = [handler]
    return log


def log_engine(log: logging.Logger, line: str) -> None:
    """Write a line that an engine printed."""
    log.info(orjson.dumps({"time": _now(), "engine": line}).decode())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
