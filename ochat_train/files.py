"""Writing that survives a power loss."""

import os
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
