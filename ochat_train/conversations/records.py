"""Files to records, in two halves: the driver cuts files into chunks of whole records, a worker parses a chunk.

Nothing is lost without a name: a record that cannot be read names the reason in `damage`, one that was repaired names
its `repairs`, and a file that cannot be read further raises ValueError.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePath

import orjson

from ochat_train.conversations.containers import (
    SUFFIXES,
    ByteStream,
    escape_name,
    has_known_suffix,
    open_streams,
    unreadable,
)
from ochat_train.conversations.delimited import delimiters_of, scan_rows
from ochat_train.conversations.encodings import check_utf8, decode, refuse_wide
from ochat_train.conversations.flat import is_flat, join_messages
from ochat_train.conversations.json_scan import SPACE, find_layout, scan_array, scan_objects, scan_wrapped
from ochat_train.conversations.parts import (
    Part,
    left_out,
    parse_lines,
    parse_made,
    parse_nothing,
    parse_page,
    parse_slice,
    parse_value,
)
from ochat_train.conversations.remote import is_remote, list_remote, read_remote
from ochat_train.conversations.saved import leave_out, named_split, read_file
from ochat_train.conversations.schema import Record
from ochat_train.conversations.tables import scan_table

MAX_RECORD_BYTES = 64 << 20
# Fields that may hold a record's turns; the last is Gemini's.
TURN_LISTS = ("conversations", "items", "messages", "conversation", "contents")


# ---- Files under a path ----


def list_files(path: str, left_out: Counter[str] | None = None) -> list[str]:
    """The input files at `path`, which is a file, a folder or a glob (with `**` too).

    A folder stands for the files below it, sorted, that have a known suffix and are not hidden. Of a folder that
    `datasets` saved it is the data set's own files; FOLDER:SPLIT names one of several splits. A glob takes files
    whatever their suffix, and folders as above.

    `left_out`, if given, counts the suffixes of the files that are left out. Raises ValueError if nothing is found, or
    if a folder cannot be listed.
    """
    if is_remote(path):
        found_there, folder = list_remote(path)
        known = [file for file in found_there if folder is None or has_known_suffix(file[len(folder) :])]
        known = leave_out(found_there, known, read_remote) if folder else known
        if left_out is not None:
            left_out.update(PurePath(file).suffix or "without a suffix" for file in set(found_there) - set(known))
        if not known:
            raise ValueError(f"no file to read in {path!r}: known suffixes are {' '.join(SUFFIXES)}")
        return known
    matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True)) or named_split(path)
    found: dict[str, None] = {}
    num_left_out = 0
    for match in matches:
        if os.path.isdir(match):
            known, others = _list_folder(match)
            found.update(dict.fromkeys(known))
            num_left_out += len(others)
            if left_out is not None:
                left_out.update("".join(PurePath(other).suffixes[-2:]) or "without a suffix" for other in others)
        else:
            found[match] = None
    if found:
        return list(found)
    if not matches:
        raise ValueError(f"no file matches {path!r}; check its spelling, from the folder {os.getcwd()!r}")
    raise ValueError(
        f"no file to read in {path!r}: {num_left_out:,} are left out, hidden or of another suffix than the known ones "
        f"({' '.join(SUFFIXES)}); rename them, or name one as the path itself"
    )


def _list_folder(folder: str) -> tuple[list[str], list[str]]:
    """The files to read below `folder`, sorted, and the others."""
    files: list[str] = []

    def fail(error: OSError) -> None:
        name = escape_name(error.filename)
        raise ValueError(f"{name} cannot be listed: {error.strerror}; fix that, or leave it out") from None

    for place, _, names in os.walk(folder, onerror=fail):
        files += (os.path.join(place, name) for name in names)
    known = sorted(f for f in files if has_known_suffix(os.path.relpath(f, folder)) and os.path.isfile(f))
    known = leave_out(files, known, read_file)
    return known, sorted(set(files) - set(known))


# ---- Chunks ----


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole records, not parsed yet, to be sent to a worker: of one file, or of several files of one form.

    `form` is the form of all of them, such as "JSON lines, gzip" or "ShareGPT page in zip". `bytes_read` is how many
    bytes of the input files on disk were read up to here; for the last chunk it is their total size.
    """

    form: str
    bytes_read: int
    parts: tuple[Part, ...]

    @property
    def file(self) -> str:
        """The file of the first record."""
        return self.parts[0].file

    def records(self) -> Iterator[Record]:
        """Its records, parsed, in order. Raises ValueError for an array's value that is not valid JSON."""
        for part in self.parts:
            yield from part.records()

    def beside(self) -> Iterator[tuple[str, str]]:
        """(file, name) of each member of an object around records that is not read."""
        for part in self.parts:
            yield from ((part.file, name) for name in part.beside)


def read_chunks(
    files: Sequence[str],
    *,
    chunk_bytes: int = 8 << 20,
    encoding: str | None = None,
    columns: Sequence[str] | None = TURN_LISTS,
) -> Iterator[Chunk]:
    """All records of `files`, in order, in chunks of about `chunk_bytes`; only the borders of records are searched.

    The forms are JSON arrays, JSON lines, saved pages, parquet files and Arrow streams, the first three also in gzip,
    zstd, zip and tar. A file's first bytes decide its form, not its name, with one exception: a file named .html that
    has no known form is a page without data. Byte order marks and blank lines are skipped. JSON and pages are UTF-8, or
    in Python's `encoding` of that name. A table must have one of the `columns`; None takes any.

    The same files and `chunk_bytes` give the same chunks, and any `chunk_bytes` the same records. Memory is bounded by
    a few times `chunk_bytes` or MAX_RECORD_BYTES, and for a table by one batch of rows. A worker needs up to 30 times a
    record's bytes to parse it.

    A line that is not JSON is a record with `damage`, and so are one that is not UTF-8 in a file that otherwise is, a
    page without data, and a line, page or row above MAX_RECORD_BYTES. Raises ValueError, with name
    and byte, while iterating: for a file of another form or without records, for an array that breaks, for lines of
    which none looks like an object, for a table without the columns, for a text in another encoding, for damaged files
    and for bombs (see `containers.py`).

    Worked example: the file `[{"a": 1},\\n 7]` gives one chunk, of `Record(path, 1, 9, {"a": 1})` and
    `Record(path, 12, 13, 7)`.
    """
    pending: list[Part] = []
    num_pending = bytes_read = bytes_before = 0
    form = ""
    for file in files:
        for stream in open_streams(file):
            next_form, parts = _recognise(stream, chunk_bytes, encoding, columns)
            first = next(parts, None)
            parts = iter(()) if first is None else chain((first,), parts)
            if first is not None and is_flat(first):
                next_form, parts = f"{next_form}, messages of trees", join_messages(stream.name, parts)
            for part in parts:
                # Small parts are packed together: a shard for each of many files would cost more than their records.
                if pending and (next_form != form or num_pending + len(part.data) > chunk_bytes):
                    yield Chunk(form, bytes_read, tuple(pending))
                    pending, num_pending = [], 0
                pending.append(part)
                num_pending += len(part.data)
                form = next_form
                bytes_read = bytes_before + stream.disk.num_read
        bytes_before += stream.disk.size
    if pending:
        yield Chunk(form, bytes_before, tuple(pending))


_PAGE = "ShareGPT page"
_UTF8_BOM = b"\xef\xbb\xbf"


def _recognise(
    stream: ByteStream, chunk_bytes: int, encoding: str | None, columns: Sequence[str] | None
) -> tuple[str, Iterator[Part]]:
    """The form of `stream`, by its first bytes, and its parts."""
    head = stream.peek(6)
    if head.startswith((b"PAR1", b"\xff\xff\xff\xff")):
        form = "parquet" if head.startswith(b"PAR1") else "Arrow stream"
        if stream.packing:
            found = f"{form}{stream.packing} cannot be read"
            raise unreadable(stream.name, 0, found, "unpack it, and name the file itself")
        return form, _read_table(stream, columns, chunk_bytes)
    if head == b"ARROW1":
        found = "an Arrow IPC file (Feather); of Arrow only streams are read, as datasets writes them"
        raise unreadable(stream.name, 0, found, "write it as parquet")
    if encoding:
        unchecked = stream = decode(stream, encoding)
        first = _skip_space(stream)
    else:
        refuse_wide(stream)
        first = _skip_space(stream)
        unchecked, stream = stream, check_utf8(stream)
    if first == b"[":
        values = scan_array(stream, max_bytes=MAX_RECORD_BYTES)
        return f"JSON array{stream.packing}", _values(stream.name, values)
    if first == b"{":
        return _recognise_objects(stream, chunk_bytes)
    if first == b"<" or re.search(r"\.html?(\.gz|\.zst)?$", stream.name, re.IGNORECASE):
        return f"{_PAGE}{stream.packing}", _read_page(stream)
    if not first:
        raise unreadable(stream.name, stream.offset, "the file is empty", "remove it, or fetch it again")
    if delimiters := delimiters_of(stream.name):
        form = "tsv" if delimiters == "\t" else "csv"
        return f"{form}{stream.packing}", _read_delimited(stream, delimiters)
    if _SPEAKERS.search(unchecked.peek(1 << 16)):
        found = "plain text with the names of speakers; what a turn is cannot be told from a text that names them"
        raise unreadable(stream.name, stream.offset, found, _CONVERT)
    found = (
        f"it starts with {head[:4]!r}: no JSON array ('['), JSON objects ('{{'), page ('<'), parquet or Arrow stream"
    )
    remedy = (
        "decompress or unpack it, write plain text as a JSON line for each conversation, name it .csv or .tsv if it is "
        "a table with column names, or leave it out"
    )
    raise unreadable(stream.name, stream.offset, found, remedy)


_SPEAKERS = re.compile(
    rb"^\W*(?:user|human|q|question|### instruction)\W*:[^\0]*?^\W*(?:assistant|gpt|ai|bot|a|answer|"
    rb"### response)\W*:",
    re.IGNORECASE | re.MULTILINE,
)
_CONVERT = (
    'write a JSON line for each conversation, as in {"conversations": [{"from": "human", "value": "Hi"}, '
    '{"from": "gpt", "value": "Hello"}]}'
)


def _recognise_objects(stream: ByteStream, chunk_bytes: int) -> tuple[str, Iterator[Part]]:
    """The form of a file that begins with an object, and its parts."""
    key = find_layout(stream, TURN_LISTS)
    if key is None:
        return f"JSON lines{stream.packing}", _read_lines(stream, chunk_bytes)
    if not key:
        values = scan_objects(stream, max_bytes=MAX_RECORD_BYTES)
        return f"JSON objects{stream.packing}", _values(stream.name, values, is_row=True)
    beside: list[str] = []
    values = scan_wrapped(stream, key, TURN_LISTS, beside, max_bytes=MAX_RECORD_BYTES)
    parts = _values(stream.name, values, in_rows=key == "rows", beside=beside)
    return f"JSON object with records in {key!r}{stream.packing}", parts


def _skip_space(stream: ByteStream) -> bytes:
    """The first byte that is neither space nor byte order mark, not given out yet; b"" at the end."""
    if stream.peek(len(_UTF8_BOM)) == _UTF8_BOM:
        stream.read(len(_UTF8_BOM))
    while ahead := stream.peek(1 << 16):
        rest = ahead.lstrip(SPACE)
        stream.read(len(ahead) - len(rest))
        if rest:
            return rest[:1]
    return b""


# ---- The parts of each form ----

# A pretty-printed object is no line of its own, so it tells lines from one object over many.
_OBJECT_LINE = re.compile(rb"^[ \t\r]*+\{[^\n]*\}[ \t\r]*+$", re.MULTILINE)


def _read_lines(stream: ByteStream, chunk_bytes: int) -> Iterator[Part]:
    first_offset = offset = stream.offset
    has_object = False
    rest = b""  # of a line whose end was not read yet
    while block := stream.read(max(chunk_bytes, min(len(rest), MAX_RECORD_BYTES + 1 - len(rest)))):
        end = block.rfind(b"\n") + 1
        if not end:
            rest += block
            if len(rest) > MAX_RECORD_BYTES:
                yield left_out(stream.name, offset, offset + len(rest) + _skip_line(stream), "record_too_large")
                offset, rest, has_object = stream.offset, b"", True
            continue
        lines = b"".join((rest, memoryview(block)[:end]))
        has_object = has_object or _OBJECT_LINE.search(lines) is not None
        yield Part(stream.name, offset, lines, parse_lines, (MAX_RECORD_BYTES,))
        offset += len(lines)
        rest = block[end:]
    if rest:
        has_object = has_object or _OBJECT_LINE.search(rest) is not None
        yield Part(stream.name, offset, rest, parse_lines, (MAX_RECORD_BYTES,))
    if not has_object:
        found = "no line of the file is a JSON object, nor does it begin with a whole one"
        remedy = "put each record on one line of its own, or all of them into one JSON array"
        raise unreadable(stream.name, first_offset, found, remedy)


def _skip_line(stream: ByteStream) -> int:
    """How many bytes the line still has; reads up to after its end."""
    num_bytes = 0
    while ahead := stream.peek(1 << 20):
        end = ahead.find(b"\n")
        if end >= 0:
            stream.read(end + 1)
            return num_bytes + end
        num_bytes += len(stream.read(len(ahead)))
    return num_bytes


def _values(
    file: str,
    values: Iterable[tuple[int, bytes]],
    *,
    is_row: bool = False,
    in_rows: bool = False,
    beside: Sequence[str] = (),
) -> Iterator[Part]:
    for offset, value in values:
        yield Part(file, offset, value, parse_value, (is_row, in_rows))
    if beside:  # which is known at the end
        yield Part(file, 0, b"", parse_nothing, (), tuple(beside))


def _read_delimited(stream: ByteStream, delimiters: str) -> Iterator[Part]:
    for offset, raw, cells in scan_rows(stream, delimiters, MAX_RECORD_BYTES):
        end = offset + len(raw.rstrip(b"\r\n"))
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError:
            yield left_out(stream.name, offset, end, "not_utf8")
            continue
        if cells is None:
            yield left_out(stream.name, offset, end, "bad_row")
        else:
            yield Part(stream.name, offset, orjson.dumps(cells), parse_made, (end,))


def _read_page(stream: ByteStream) -> Iterator[Part]:
    data = stream.read(MAX_RECORD_BYTES + 1)
    while stream.read(1 << 20):
        pass
    if len(data) > MAX_RECORD_BYTES:
        yield left_out(stream.name, 0, stream.offset, "record_too_large", is_page=True)
    else:
        yield Part(stream.name, 0, data, parse_page, (stream.offset,))


def _read_table(stream: ByteStream, columns: Sequence[str] | None, chunk_bytes: int) -> Iterator[Part]:
    for row, data in scan_table(stream, columns, chunk_bytes=chunk_bytes, max_bytes=MAX_RECORD_BYTES):
        if data is None:
            yield left_out(stream.name, row, row + 1, "record_too_large")
        else:
            yield Part(stream.name, row, data, parse_slice)
