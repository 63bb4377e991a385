"""Where the lines about requests go."""

import logging
from logging.handlers import WatchedFileHandler
from pathlib import Path


def open_log(file: Path | None) -> logging.Logger:
    """A log into the file, or to stderr. A file that is moved away, as logrotate does, is opened anew.

    Raises ValueError when it cannot be written to.
    """
    log = logging.getLogger("ochat_train.requests")
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        handler = WatchedFileHandler(file) if file is not None else logging.StreamHandler()
    except OSError as error:
        raise ValueError(f"--log-file {file} cannot be written to: {error.strerror}") from error
    log.handlers = [handler]
    return log
