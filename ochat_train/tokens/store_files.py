"""Checksums of a store's files, taken in blocks, so that many processes can share the reading of one large file.

The hash is XXH3 of 128 bits: it finds damage, at more than 10 GB/s, so that the disk decides how long it takes. It is
no proof against somebody who changes a store on purpose.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash
from tqdm import tqdm

_BLOCK_BYTES = 64 << 20
_CHECKED = (".arrow", ".npy")  # what training reads


@dataclass(frozen=True, slots=True)
class StoreFile:
    """A file of a store as it was written: its size in bytes, and the XXH3 of each block of 64 MiB, in hexadecimal."""

    size: int
    blocks: list[str]


class StoreDamaged(ValueError):
    """A store that differs from what was written."""


def describe_files(store: Path) -> dict[str, StoreFile]:
    """The files of a store that training reads, by their names in it; each is read whole."""
    files = sorted(file for file in store.rglob("*") if file.suffix in _CHECKED)
    return {
        str(file.relative_to(store)): StoreFile(file.stat().st_size, [digest for _, digest in _read_blocks(file)])
        for file in files
    }


def check_sizes(store: Path, files: dict[str, StoreFile]) -> None:
    """Raise StoreDamaged with the name of a file that is missing or has another size."""
    for name, expected in files.items():
        file = store / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected.size:
            found = "is not there" if size is None else f"has {size:,} bytes, not {expected.size:,}"
            raise _damaged(store, name, found)


def check_blocks(
    store: Path,
    files: dict[str, StoreFile],
    *,
    part: int = 0,
    parts: int = 1,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Read the `part`-th of `parts` shares of a store's blocks, the first of them under a progress bar.

    progress: called after each block. Raises StoreDamaged with the name of a damaged file.
    """
    check_sizes(store, files)
    num_blocks = sum(len(expected.blocks) for expected in files.values())
    before = 0
    with tqdm(total=num_blocks, desc="verify the store", unit="block", delay=5, disable=part > 0) as bar:
        for name, expected in files.items():
            mine = range((part - before) % parts, len(expected.blocks), parts)
            for number, (num_bytes, digest) in zip(mine, _read_blocks(store / name, mine), strict=True):
                if digest != expected.blocks[number]:
                    place = f"bytes {number * _BLOCK_BYTES:,} to {number * _BLOCK_BYTES + num_bytes:,}"
                    raise _damaged(store, name, f"has other bytes than were written, among its {place}")
                progress()
                bar.update(parts)  # the others are about as far
            before += len(expected.blocks)


def _read_blocks(file: Path, numbers: range | None = None) -> Iterator[tuple[int, str]]:
    """The size and digest of these blocks of a file; of all for None."""
    with open(file, "rb") as opened:
        for number in range(-(-file.stat().st_size // _BLOCK_BYTES)) if numbers is None else numbers:
            opened.seek(number * _BLOCK_BYTES)
            block = opened.read(_BLOCK_BYTES)
            yield len(block), xxhash.xxh3_128_hexdigest(block)


def _damaged(store: Path, name: str, what: str) -> StoreDamaged:
    return StoreDamaged(
        f"token store {store} is damaged: {name} {what}; run ochat preprocess with its recipe, which "
        "makes it anew, or copy the file again"
    )
