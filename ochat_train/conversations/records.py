"""Files to records, in two halves: the driver cuts files into chunks of whole records, a worker parses a chunk.

Nothing is lost without a name: a record that cannot be read names the reason in `damage`, one that was repaired names
its `repairs`, and a file that cannot be read further raises ValueError.
"""

import glob
import io
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePath
from typing import Any

from ochat_train.conversations.containers import (
    SUFFIXES,
    ByteStream,
    escape_name,
    explain,
    has_known_suffix,
    open_streams,
    unreadable,
)
from ochat_train.conversations.delimited import delimiters_of, parse_row, scan_rows
from ochat_train.conversations.encodings import check_utf8, decode, refuse_wide
from ochat_train.conversations.flat import Part, is_flat, join_messages
from ochat_train.conversations.json_scan import (
    SPACE,
    NotUtf8,
    find_layout,
    not_valid,
    parse_json,
    scan_array,
    scan_objects,
    scan_wrapped,
)
from ochat_train.conversations.remote import is_remote, list_remote, read_remote
from ochat_train.conversations.saved import leave_out, named_split, read_file
from ochat_train.conversations.schema import Record
from ochat_train.conversations.tables import parse_rows, scan_table

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
            yield from ((part.file, name) for name in getattr(part, "beside", ()))


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
                next_form, parts = f"{next_form}, messages of trees", join_messages(stream.name, parts, chunk_bytes)
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
        return f"JSON array{stream.packing}", _pack_values(stream.name, values, chunk_bytes)
    if first == b"{":
        return _recognise_objects(stream, chunk_bytes)
    if first == b"<" or re.search(r"\.html?(\.gz|\.zst)?$", stream.name, re.IGNORECASE):
        return f"{_PAGE}{stream.packing}", _read_page(stream)
    if not first:
        raise unreadable(stream.name, stream.offset, "the file is empty", "remove it, or fetch it again")
    if delimiters := delimiters_of(stream.name):
        form = "tsv" if delimiters == "\t" else "csv"
        return f"{form}{stream.packing}", _read_delimited(stream, delimiters, chunk_bytes)
    if _SPEAKERS.search(unchecked.peek(1 << 16)):
        found = "plain text with the names of speakers; what a turn is cannot be told from a text that names them"
        raise unreadable(stream.name, stream.offset, found, _CONVERT)
    found = (
        f"it starts with {head[:4]!r}: no JSON array ('['), JSON objects ('{{'), page ('<'), parquet or Arrow stream"
    )
    remedy = "decompress or unpack it, name it .csv or .tsv if it is a table with column names, or leave it out"
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
        return f"JSON objects{stream.packing}", _pack_values(stream.name, values, chunk_bytes, is_row=True)
    beside: list[str] = []
    values = scan_wrapped(stream, key, TURN_LISTS, beside, max_bytes=MAX_RECORD_BYTES)
    parts = _pack_values(stream.name, values, chunk_bytes, in_rows=key == "rows", beside=beside)
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


# ---- JSON lines ----


@dataclass(frozen=True, slots=True)
class _Lines:
    """Whole lines of a file, the first at `offset`; only at the end of the file the last has no line end."""

    file: str
    offset: int
    data: bytes

    def records(self) -> Iterator[Record]:
        offset = self.offset
        for line in io.BytesIO(self.data):
            raw = line.lstrip(SPACE)
            start = offset + len(line) - len(raw)
            raw = raw.rstrip(SPACE)
            end = start + len(raw)
            has_end = line.endswith(b"\n")
            if len(line) - has_end > MAX_RECORD_BYTES:
                yield Record(self.file, offset, offset + len(line) - has_end, None, "record_too_large")
            elif raw:
                try:
                    fields, repairs = parse_json(raw)
                except ValueError as error:
                    damage = "not_utf8" if isinstance(error, NotUtf8) else "not_json"
                    damage = damage if has_end else "truncated_record"
                    beginning = raw[:2000].decode("utf-8", "backslashreplace")
                    yield Record(self.file, start, end, None, damage, raw=beginning)
                else:
                    yield Record(self.file, start, end, fields, None, repairs)
            offset += len(line)


@dataclass(frozen=True, slots=True)
class _TooLarge:
    """A record that is left out for its size."""

    file: str
    offset: int
    end: int
    is_page: bool = False
    data: bytes = b""

    def records(self) -> Iterator[Record]:
        yield Record(self.file, self.offset, self.end, None, "record_too_large", is_page=self.is_page)


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
                end = offset + len(rest) + _skip_line(stream)
                yield _TooLarge(stream.name, offset, end)
                offset, rest, has_object = stream.offset, b"", True
            continue
        lines = _Lines(stream.name, offset, b"".join((rest, memoryview(block)[:end])))
        has_object = has_object or _OBJECT_LINE.search(lines.data) is not None
        yield lines
        offset += len(lines.data)
        rest = block[end:]
    if rest:
        has_object = has_object or _OBJECT_LINE.search(rest) is not None
        yield _Lines(stream.name, offset, rest)
    if not has_object:
        remedy = "put each record on one line of its own, or all of them into one JSON array"
        raise unreadable(
            stream.name,
            first_offset,
            "no line of the file is a JSON object, nor does it begin with a whole one",
            remedy,
        )


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


# ---- JSON arrays, rows of objects, wrappers ----


@dataclass(frozen=True, slots=True)
class _Values:
    """Values of an array or a row: `data` is one after the other, without the commas and spaces between them.

    `in_rows` is whether each record is the field `row` of its value, as the hub's viewer gives rows. `beside` names
    what is not read of the object around the records, with the last ones. `is_row` is whether they are a row of
    objects, of which a damaged one costs only itself.
    """

    file: str
    offsets: "array[int]"
    lengths: "array[int]"
    data: bytes
    in_rows: bool = False
    beside: tuple[str, ...] = ()
    is_row: bool = False

    def records(self) -> Iterator[Record]:
        at = 0
        for offset, length in zip(self.offsets, self.lengths, strict=True):
            try:
                fields, repairs = parse_json(self.data[at : at + length])
            except ValueError as error:
                damage = "not_utf8" if isinstance(error, NotUtf8) else "not_json"
                if not self.is_row and damage == "not_json":
                    raise not_valid(self.file, offset, error) from None
                beginning = self.data[at : at + min(length, 2000)].decode("utf-8", "backslashreplace")
                yield Record(self.file, offset, offset + length, None, damage, raw=beginning)
            else:
                if self.in_rows and isinstance(fields, dict) and isinstance(fields.get("row"), dict):
                    fields = fields["row"]
                yield Record(self.file, offset, offset + length, fields, None, repairs)
            at += length


def _pack_values(
    file: str,
    scanned: Iterable[tuple[int, bytes]],
    chunk_bytes: int,
    *,
    in_rows: bool = False,
    beside: Sequence[str] = (),
    is_row: bool = False,
) -> Iterator[Part]:
    offsets, lengths = array("q"), array("q")
    values: list[bytes] = []
    num_bytes = 0
    for offset, value in scanned:
        if values and num_bytes + len(value) > chunk_bytes:
            yield _Values(file, offsets, lengths, b"".join(values), in_rows, (), is_row)
            offsets, lengths, values, num_bytes = array("q"), array("q"), [], 0
        offsets.append(offset)
        lengths.append(len(value))
        values.append(value)
        num_bytes += len(value)
    yield _Values(file, offsets, lengths, b"".join(values), in_rows, tuple(beside), is_row)


# ---- csv and tsv ----


@dataclass(frozen=True, slots=True)
class _TextRows:
    """Rows of a csv or tsv file: `data` is one after the other, with their line ends and blank lines."""

    file: str
    delimiter: str
    columns: tuple[str, ...]
    offsets: "array[int]"
    lengths: "array[int]"
    data: bytes

    def records(self) -> Iterator[Record]:
        at = 0
        for offset, length in zip(self.offsets, self.lengths, strict=True):
            raw = self.data[at : at + length]
            end = offset + len(raw.rstrip(b"\r\n"))
            fields: dict[str, Any] | None = None
            damage: str | None = "not_utf8"
            with suppress(UnicodeDecodeError):
                fields = parse_row(raw, self.delimiter, self.columns, MAX_RECORD_BYTES)
                damage = "bad_row" if fields is None else None
            yield Record(self.file, offset, end, fields, damage)
            at += length


def _read_delimited(stream: ByteStream, delimiters: str, chunk_bytes: int) -> Iterator[Part]:
    offsets, lengths = array("q"), array("q")
    rows: list[bytes] = []
    num_bytes = 0
    start = stream.offset
    for offset, raw, delimiter, columns in scan_rows(stream, delimiters, MAX_RECORD_BYTES):
        if rows and num_bytes + len(raw) > chunk_bytes:
            yield _TextRows(stream.name, delimiter, tuple(columns), offsets, lengths, b"".join(rows))
            offsets, lengths, rows, num_bytes = array("q"), array("q"), [], 0
        offsets.append(offset)
        lengths.append(len(raw))
        rows.append(raw)
        num_bytes += len(raw)
    if not rows:
        raise unreadable(stream.name, start, "the table has no rows", "remove it, or fetch it again")
    yield _TextRows(stream.name, delimiter, tuple(columns), offsets, lengths, b"".join(rows))


# ---- Saved ShareGPT pages ----


@dataclass(frozen=True, slots=True)
class _Page:
    """A saved page of `num_bytes`, without the space before it."""

    file: str
    num_bytes: int
    data: bytes

    def records(self) -> Iterator[Record]:
        fields, damage, repairs = _parse_page(self.data)
        yield Record(self.file, 0, self.num_bytes, fields, damage, repairs, is_page=True)


def _read_page(stream: ByteStream) -> Iterator[Part]:
    data = stream.read(MAX_RECORD_BYTES + 1)
    while stream.read(1 << 20):
        pass
    if len(data) > MAX_RECORD_BYTES:
        yield _TooLarge(stream.name, 0, stream.offset, is_page=True)
    else:
        yield _Page(stream.name, stream.offset, data)


# Next.js writes no `<` or `>` into the attributes of this tag.
_NEXT_DATA = re.compile(rb"""<script\s[^<>]*?\bid\s*=\s*["']?__NEXT_DATA__["']?(?=[\s/>])[^<>]*>""", re.IGNORECASE)
_SCRIPT_END = re.compile(rb"</script", re.IGNORECASE)


def _parse_page(data: bytes) -> tuple[dict[str, Any] | None, str | None, tuple[str, ...]]:
    """The fields of a saved page, the damage if there are none, and the repairs."""
    opening = _NEXT_DATA.search(data)
    if opening is None:
        return None, "no_next_data", ()
    closing = _SCRIPT_END.search(data, opening.end())
    try:
        page, repairs = parse_json(data[opening.end() : closing.start() if closing else len(data)])
    except NotUtf8:
        return None, "not_utf8", ()
    except ValueError:
        return None, "not_json", ()
    try:
        page_props = page["props"]["pageProps"]
        content = page_props["content"]
    except (KeyError, TypeError):
        content = None
    if not isinstance(content, dict):
        return None, "no_page_content", repairs
    return {key: page_props[key] for key in ("id", "views") if key in page_props} | content, None, repairs


# ---- Tables ----


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a table from row `first` on, as `scan_table` gives them."""

    file: str
    first: int
    data: bytes

    def records(self) -> Iterator[Record]:
        try:
            rows = parse_rows(self.data)
        except Exception as error:  # times out of Python's range, types of other libraries
            found, remedy = f"a row from here on: {explain(error)}", "write the table again without that column"
            raise unreadable(self.file, self.first, found, remedy, unit="row") from None
        for row, fields in enumerate(rows, start=self.first):
            yield Record(self.file, row, row + 1, fields, is_row=True)


def _read_table(stream: ByteStream, columns: Sequence[str] | None, chunk_bytes: int) -> Iterator[Part]:
    for row, data in scan_table(stream, columns, chunk_bytes=chunk_bytes, max_bytes=MAX_RECORD_BYTES):
        if data is None:
            yield _TooLarge(stream.name, row, row + 1)
        else:
            yield _Rows(stream.name, row, data)
