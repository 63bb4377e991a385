"""Files that survive a power loss; a free port. Imports nothing of ours."""

import os
import socket
from pathlib import Path


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


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
