"""Text tables, csv and tsv with a header of column names, row by row."""

import csv
from collections.abc import Iterator

from ochat_train.conversations.containers import ByteStream, unreadable

_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}
_BLOCK_BYTES = 1 << 20


def delimiters_of(name: str) -> str:
    """The characters that may stand between the cells of a file of this name; "" for a name of another form."""
    stem = name.lower().removesuffix(".gz").removesuffix(".zst")
    return next((signs for suffix, signs in _DELIMITERS.items() if stem.endswith(suffix)), "")


def scan_rows(
    stream: ByteStream, delimiters: str, max_bytes: int
) -> Iterator[tuple[int, bytes, dict[str, str] | None]]:
    """(offset, bytes, cells) of each row after the header; a quoted cell may have lines.

    The cells are None where there are not as many as columns; in them a byte that is not UTF-8 is escaped. The
    delimiter is the one that gives the header the most columns. Memory is one row or 1 MiB. Raises ValueError, with
    name and byte, while iterating: for a header with a name twice, quotation marks that do not pair, a row above
    `max_bytes`, and a table without rows.
    """
    start = offset = stream.offset
    first = stream.peek(_BLOCK_BYTES).partition(b"\n")[0].decode("utf-8", "replace").rstrip("\r")
    delimiter = max(delimiters, key=lambda sign: len(next(csv.reader([first], delimiter=sign), [])))
    taken: list[bytes] = []
    columns: list[str] = []
    has_row = False
    limit = csv.field_size_limit(max_bytes)
    try:
        for cells in csv.reader(_lines(stream, taken, max_bytes), delimiter=delimiter, strict=True):
            raw = b"".join(taken)
            taken.clear()
            if not columns:
                columns = cells
                if len(set(columns)) < len(columns):
                    found = f"the header has a name twice: {', '.join(columns)[:200]}"
                    raise unreadable(stream.name, offset, found, "give each column a name of its own")
            elif cells:
                has_row = True
                yield offset, raw, dict(zip(columns, cells, strict=True)) if len(cells) == len(columns) else None
            offset += len(raw)
    except csv.Error as error:
        found = f"the row that starts here is no row of a table ({error})"
        remedy = "quote cells as csv does, and double each quotation mark"
        raise unreadable(stream.name, offset, found, remedy) from None
    finally:
        csv.field_size_limit(limit)
    if not has_row:
        raise unreadable(stream.name, start, "the table has no rows", "remove it, or fetch it again")


def _lines(stream: ByteStream, taken: list[bytes], max_bytes: int) -> Iterator[str]:
    """The lines of a stream as text, and their bytes into `taken`; of a line above `max_bytes` a longer beginning."""
    rest = b""
    while block := stream.read(_BLOCK_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        if len(rest) > max_bytes:
            lines, rest = [*lines, rest], b""
        for line in lines:
            taken.append(line + b"\n")
            yield taken[-1].decode("utf-8", "surrogateescape")
    if rest:
        taken.append(rest)
        yield rest.decode("utf-8", "surrogateescape")
