"""Text tables, csv and tsv with a header of column names: where rows begin, and their parser."""

import csv
from collections.abc import Iterator, Sequence
from typing import Any

from ochat_train.conversations.containers import ByteStream, unreadable

_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}
_BLOCK_BYTES = 1 << 20


def delimiters_of(name: str) -> str:
    """The characters that may stand between the cells of a file of this name; "" for a name of another form."""
    stem = name.lower().removesuffix(".gz").removesuffix(".zst")
    return next((signs for suffix, signs in _DELIMITERS.items() if stem.endswith(suffix)), "")


def scan_rows(stream: ByteStream, delimiters: str, max_bytes: int) -> Iterator[tuple[int, bytes, str, list[str]]]:
    """(offset, bytes, delimiter, column names) of each row after the header, not parsed; a quoted cell may have lines.

    The delimiter is the one that gives the header the most columns. Memory is one row or 1 MiB. Raises ValueError, with
    name and byte, while iterating: for a header with a name twice, quotation marks that do not pair, a row above
    `max_bytes`, and a table without rows.
    """
    lines = _Lines(stream, max_bytes)
    rows = {sign: next(csv.reader([lines.first], delimiter=sign), []) for sign in delimiters}
    delimiter = max(rows, key=lambda sign: len(rows[sign]))
    offset = stream.offset
    columns: list[str] = []
    limit = csv.field_size_limit(max_bytes)
    try:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while (cells := next(reader, None)) is not None:
            raw = lines.take()
            if not columns:
                columns = cells
                if len(set(columns)) < len(columns):
                    found = f"the header has a name twice: {', '.join(columns)[:200]}"
                    raise unreadable(stream.name, offset, found, "give each column a name of its own")
            elif cells:
                yield offset, raw, delimiter, columns
            offset += len(raw)
    except csv.Error as error:
        found = f"the row that starts here is no row of a table ({error})"
        raise unreadable(
            stream.name, offset, found, "quote cells as csv does, and double each quotation mark"
        ) from None
    finally:
        csv.field_size_limit(limit)


def parse_row(raw: bytes, delimiter: str, columns: Sequence[str], max_bytes: int) -> dict[str, Any] | None:
    """The cells of a row of `scan_rows` by their columns' names; None for another number of cells than columns.

    Raises UnicodeDecodeError for a row that is not UTF-8.
    """
    limit = csv.field_size_limit(max_bytes)
    try:
        lines = [f"{line}\n" for line in raw.decode("utf-8").removesuffix("\n").split("\n")]
        (cells,) = csv.reader(lines, delimiter=delimiter, strict=True)
    finally:
        csv.field_size_limit(limit)
    return dict(zip(columns, cells, strict=True)) if len(cells) == len(columns) else None


class _Lines(Iterator[str]):
    """The lines of a stream as text, and the bytes of those that were given out since the last `take`."""

    def __init__(self, stream: ByteStream, max_bytes: int) -> None:
        self._stream, self._max_bytes = stream, max_bytes
        self._block = b""
        self._at = 0
        self._taken: list[bytes] = []
        head = stream.peek(_BLOCK_BYTES)
        self.first = head.partition(b"\n")[0].decode("utf-8", "replace").rstrip("\r")

    def take(self) -> bytes:
        """The bytes of the lines that were given out, and none from now on."""
        raw = b"".join(self._taken)
        self._taken.clear()
        return raw

    def __next__(self) -> str:
        while (end := self._block.find(b"\n", self._at) + 1) == 0:
            rest = self._block[self._at :]
            more = self._stream.read(_BLOCK_BYTES) if len(rest) <= self._max_bytes else b""
            if not more:
                if not rest:
                    raise StopIteration
                end = len(self._block)
                break
            self._block, self._at = rest + more, 0
        line = self._block[self._at : end]
        self._at = end
        self._taken.append(line)
        return line.decode("utf-8", "surrogateescape")
