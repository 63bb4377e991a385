"""JSON in bytes: where values begin and end, in arrays, rows and wrappers, without parsing them; the parser of one."""

import io
import json
import re
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any

import orjson

from ochat_train.conversations.containers import ByteStream, Unreadable, unreadable

SPACE = b" \t\r\n"  # JSON's own white space, no other

_WINDOW_BYTES = 1 << 20
_MAX_DEPTH = 1024  # orjson's own limit
_REMEDY = "fetch the file again, or cut it after its last whole record and close what is open"


def scan_array(stream: ByteStream, *, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of every value of the array that `stream` continues with, in order, not parsed.

    Takes linear time; memory is a small multiple of the largest value or of 1 MiB. Whether a value is valid JSON is
    left to the parser.

    Raises ValueError, with name and byte, while iterating: for an array that breaks, that the file ends inside, that is
    empty or that something follows, and for a value above `max_bytes`.

    Worked example: `[{"a": 1},\\n 7]` gives (1, b'{"a": 1}') and (12, b"7").
    """
    window = _Window(stream, max_bytes)
    yield from _scan_elements(window)
    if window.next_byte():
        remedy = "keep one array in a file, or write one record a line"
        raise unreadable(stream.name, window.offset, "something follows the array's ']'", remedy)


def _scan_elements(window: "_Window") -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of every value of the array at the window; afterwards the window is after its ']'."""
    window.next_byte()
    opening = window.offset
    window.at += 1  # the "["
    if window.next_byte() == b"]":
        raise unreadable(window.name, opening, "the array is empty", "remove the file, or fetch it again")
    more = True
    while more:
        window.next_byte()
        offset = window.offset
        yield offset, window.take_whole("the file ends inside the array")
        following = window.next_byte()
        if following not in (b",", b"]"):
            found = f"{following!r} instead of ','" if following else "the file ends inside the array"
            raise unreadable(window.name, window.offset, found, _REMEDY)
        window.at += 1
        more = following == b","


# ---- Objects that are no lines ----

# Keys under which dumps keep their list of records. Under another key a list is one of turns, unless its objects have
# turns themselves.
WRAPPERS = ("data", "train", "rows", "examples", "records", "instances", "samples", "test", "validation", "dev", "eval")
_HEAD_BYTES = 1 << 16
_MOST_AHEAD = 4 << 20  # of the first object, to see whether it is whole
_OF_TURNS = frozenset(("from", "role", "value", "content"))


def find_layout(stream: ByteStream, turn_lists: Collection[str]) -> str | None:
    """How the objects stand in a file that begins with one: a wrapper's key, "" for a row of objects, None for lines.

    A wrapper is one object with a list of records under one of WRAPPERS, or under any key if the list's first object
    has a list of turns itself; it is alone in the file, or does not end in the first 64 KiB. A record has its turns in
    one of `turn_lists`, so it is none.

    Objects are a row if the first one is whole JSON and does not stand alone on one line: it spans several, or another
    object follows it on its line; and it ends in the first 4 MiB. All else is lines, of which a bad one costs
    only itself.
    """
    num_bytes = _HEAD_BYTES
    while True:
        head = stream.peek(num_bytes)
        window = _Window(stream.through(io.BytesIO(head).read), _MOST_AHEAD)
        window.next_byte()
        start = window.at
        try:
            first = window.take_value()
            break
        except EOFError:
            if num_bytes == _HEAD_BYTES and (key := _find_wrapper(stream, head, turn_lists)):
                return key
            if len(head) < num_bytes or num_bytes >= _MOST_AHEAD:
                return None
            num_bytes *= 4
        except ValueError:
            return None
    rest = head[start + len(first) :]
    line, _, _ = rest.partition(b"\n")
    follows = (line if line.strip(SPACE) else rest).lstrip(SPACE)
    if not follows and len(head) < num_bytes and (key := _find_wrapper(stream, head, turn_lists)):
        return key
    is_row = b"\n" in first or line.lstrip(SPACE).startswith(b"{")
    try:
        return "" if is_row and isinstance(parse_json(first)[0], dict) else None
    except ValueError:
        return None


def _find_wrapper(stream: ByteStream, head: bytes, turn_lists: Collection[str]) -> str | None:
    """The key of the list of records in the object that the file begins with, or None."""
    window = _Window(stream.through(io.BytesIO(head).read), len(head))
    try:
        for key in _keys(window):
            if window.next_byte() == b"[":
                copy = _Window(stream.through(io.BytesIO(window.data[window.at :]).read), len(head))
                _, first = next(_scan_elements(copy))
                if _is_record(key, parse_json(first)[0], turn_lists):
                    return key
            window.take_value()
    except (ValueError, EOFError):
        pass  # what is broken is found by the reader of lines
    return None


def _is_record(key: str, value: object, turn_lists: Collection[str]) -> bool:
    if not isinstance(value, dict):
        return False
    row = value.get("row")
    inner = row if key == "rows" and isinstance(row, dict) else value
    if any(isinstance(inner.get(name), list) for name in turn_lists):
        return True
    return key in WRAPPERS and key not in turn_lists and not _OF_TURNS & set(inner)


def _keys(window: "_Window") -> Iterator[str]:
    """The keys of the object at the window, which is at the value of each; whoever asks for the next has taken it."""
    window.next_byte()
    window.at += 1  # the "{"
    following = window.next_byte()
    while following != b"}":
        key = parse_json(window.take_value())[0]
        if not isinstance(key, str) or window.next_byte() != b":":
            raise ValueError("no key where one should be")
        window.at += 1
        yield key
        following = window.next_byte()
        if following not in (b",", b"}"):
            raise ValueError(f"{following!r} instead of ','")
        window.at += following == b","
        following = window.next_byte() if following == b"," else following
    window.at += 1


def scan_objects(stream: ByteStream, *, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of objects one after the other, with any or no white space between them, as `scan_array`.

    What is damaged is given as it is, up to the next whole object. Raises ValueError where none is found after it:
    what follows is then unknown.
    """
    window = _Window(stream, max_bytes)
    while following := window.next_byte():
        offset = window.offset
        try:
            if following != b"{":
                found = f"{following!r} where an object should start"
                raise unreadable(window.name, offset, found, "put each record on one line of its own")
            value = window.take_whole("the file ends inside the object that starts here")
            _check_whole(window.name, offset, value)
        except Unreadable:
            window.go_back(offset)
            value = window.take_damaged()
            if not value:
                raise
        yield offset, value


def _check_whole(name: str, offset: int, value: bytes) -> None:
    """Raise ValueError unless it is JSON, whatever its bytes mean: a missing quote may end a value at a wrong place."""
    try:
        parse_json(value)
    except ValueError as error:
        try:
            json.loads(value.decode("latin-1"))
        except (ValueError, RecursionError):
            raise not_valid(name, offset, error) from None


# Between two objects. In JSON no object follows another without a comma, and a text has its quotes escaped.
_BETWEEN = re.compile(rb'(?:\}[ \t\r\n]*+|[^ \t\r\n,\[:][ \t\r]*+\n[ \t\r\n]*+)(?=\{[ \t\r\n]*+")')
_MOST_TRIES = 1000


def _next_object(data: bytes, start: int) -> int:
    """Where after `start` a whole object begins that another one or the end of `data` follows; len(data) if none does.

    Worked example: `{"a": x}{"b": 1}{"c": 2}` has one at 8, and `{"a": x} {"b": 1} and so on` has none.
    """
    text = data.decode("latin-1")  # so that characters are bytes
    for between in islice(_BETWEEN.finditer(data, start), _MOST_TRIES):
        try:
            _, end = json.JSONDecoder().raw_decode(text, between.end())
        except (ValueError, RecursionError):
            continue
        if text[end : end + _HEAD_BYTES].lstrip(" \t\r\n")[:1] in ("", "{"):
            return between.end()
    return len(data)


def scan_wrapped(
    stream: ByteStream, key: str, turn_lists: Collection[str], beside: list[str], *, max_bytes: int
) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the records in the list under `key` of the object that the file is, as `scan_array`.

    The names of its other members that hold something are added to `beside`.
    Raises ValueError for a second list of records beside it, and for what follows the object.
    """
    window = _Window(stream, max_bytes)
    try:
        for name in _keys(window):
            window.next_byte()
            if name == key:
                yield from _scan_elements(window)
                continue
            offset = window.offset
            value = window.take_whole("the file ends inside the object")
            if value.translate(None, SPACE) not in (b"null", b'""', b"[]", b"{}"):
                beside.append(name)
            if value.startswith(b"["):
                others = parse_json(value)[0]
                if others and _is_record(name, others[0], turn_lists):
                    found = f"a second list of records, {name!r}, beside {key!r}"
                    raise unreadable(window.name, offset, found, "write each list into a file of its own")
    except Unreadable:
        raise
    except (ValueError, EOFError) as error:
        found = f"the object around the records breaks here ({error or 'the file ends'})"
        raise unreadable(window.name, window.offset, found, "fetch the file again") from None
    if window.next_byte():
        found = "something follows the object with the list of records"
        raise unreadable(window.name, window.offset, found, "keep one such object in a file")


def not_valid(name: str, offset: int, error: ValueError) -> Unreadable:
    """The error for an array's value that is not valid JSON: where the next value begins is then unknown."""
    found = f"the record that starts here is not valid JSON ({error}, counted from here)"
    return unreadable(name, offset, found, _REMEDY)


# The end of a value is found without parsing it, so that only whole records are parsed, by one parser. Bytes above 127
# never look like JSON's own signs, so nothing has to be decoded. Possessive (`*+`): a match never goes back, so time is
# linear and no stack grows with the text.
_FLAT_TEXT = rb'[^"{}\[\]]*+(?:"[^"]*+"[^"{}\[\]]*+)*+'
# An object without another in it, such as a turn, is one step.
_TO_BRACKET = re.compile(_FLAT_TEXT + rb"(?:\{" + _FLAT_TEXT + rb"\}" + _FLAT_TEXT + rb")*+([{}\[\]]?)")
_DEPTH_CHANGE = {b"{": 1, b"[": 1, b"}": -1, b"]": -1}
# A string, number or literal with a byte after it: where the window ends, `12` may be half of `123`.
_FLAT_VALUE = re.compile(rb'(?:"[^"]*+"|[^ \t\r\n"{}\[\],]++)(?=.)', re.DOTALL)
_SPACES = re.compile(rb"[ \t\r\n]*+")


class _Window:
    """The part of a stream that is in memory; it slides forward, and grows only while one value does not fit.

    `data[at:]` lies ahead. Methods move `at` forward and may replace `data`.
    """

    def __init__(self, stream: ByteStream, max_bytes: int) -> None:
        self.data = b""
        self.at = 0
        # `data` with each escaped backslash and quote made `__`, so that every quote left bounds a string
        self._masked = b""
        self.name = stream.name
        self._stream = stream
        self._max_bytes = max_bytes
        self._data_offset = stream.offset

    @property
    def offset(self) -> int:
        """Where in the stream `at` is."""
        return self._data_offset + self.at

    def next_byte(self) -> bytes:
        """The next byte that is not space, at `at`; b"" at the end of the stream."""
        while True:
            spaces = _SPACES.match(self.data, self.at)
            assert spaces is not None
            self.at = spaces.end()
            if self.at < len(self.data) or not self._grow():
                return self.data[self.at : self.at + 1]

    def take_value(self) -> bytes:
        """The bytes of the JSON value that starts at `at`, which moves to their end.

        Raises EOFError if the stream ends first, ValueError if no value starts here, or one that is nested too deeply
        or above `max_bytes`.
        """
        first = self.data[self.at : self.at + 1]
        if first in (b",", b"]", b"}"):
            raise ValueError(f"{first!r} where a value should start")
        depth = 1
        scanned = 1  # from `at`, which growing moves
        while True:
            if first not in (b"{", b"["):
                flat = _FLAT_VALUE.match(self._masked, self.at)
                if flat:
                    return self._take(flat.end())
            else:
                for step in _TO_BRACKET.finditer(self._masked, self.at + scanned):
                    bracket = step[1]
                    if not bracket:
                        scanned = step.start() - self.at
                        break
                    depth += _DEPTH_CHANGE[bracket]
                    if depth == 0:
                        return self._take(step.end())
                    if depth > _MAX_DEPTH:
                        raise ValueError("nested too deeply")
            self._check_size(len(self.data) - self.at)
            if not self._grow():
                raise EOFError

    def take_whole(self, at_end: str) -> bytes:
        """As `take_value`, but what is wrong names the file and the byte; `at_end` says what it is if the file ends."""
        offset = self.offset
        try:
            return self.take_value()
        except Unreadable:
            raise
        except EOFError:
            raise unreadable(self.name, offset, at_end, _REMEDY) from None
        except ValueError as error:
            raise not_valid(self.name, offset, error) from None

    def go_back(self, offset: int) -> None:
        """Move `at` to an offset that lies at or before it, not before the last value that was taken."""
        self.at = offset - self._data_offset

    def take_damaged(self) -> bytes:
        """The bytes from `at` to the next whole object, where `at` moves; empty if there is none."""
        while (end := _next_object(self.data, self.at)) == len(self.data):
            if len(self.data) - self.at > self._max_bytes or not self._grow():
                return b""
        value = self.data[self.at : end].rstrip(SPACE)
        self.at = end
        return value

    def _take(self, end: int) -> bytes:
        self._check_size(end - self.at)
        value = self.data[self.at : end]
        self.at = end
        return value

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            found = f"the record that starts here is above {self._max_bytes:,} bytes, or has no end"
            raise unreadable(self._stream.name, self.offset, found, "fix it or take it out")

    def _grow(self) -> bool:
        """Whether there was more to read. Doubles what is kept, so that a large value costs linear time."""
        kept = self.data[self.at :]
        wanted = max(_WINDOW_BYTES, len(kept))
        more = self._stream.read(min(wanted, self._max_bytes + 1 - len(kept)))
        self._data_offset += self.at
        self.at = 0
        self.data = kept + more
        # `at` is never inside a string, so backslashes pair up from there as JSON pairs them
        self._masked = self.data.replace(rb"\\", b"__").replace(rb"\"", b"__")
        return bool(more)


_ESCAPE = re.compile(
    r"(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.",
    re.DOTALL,
)


class NotUtf8(ValueError):
    """Bytes that are not UTF-8; the message says where."""


def parse_json(raw: bytes) -> tuple[Any, tuple[str, ...]]:
    """The JSON value of `raw` and the repairs it needed; raises ValueError if they do not make it JSON.

    Surrogates without their other half become U+FFFD: "surrogate_replaced". The words NaN, Infinity and -Infinity,
    which Python's own `json` writes for numbers that JSON does not have, become those numbers: "nan_read". A number
    that is too large for a float becomes infinite, as JSON allows. Raises NotUtf8 for bytes that are not UTF-8.
    """
    try:
        value = orjson.loads(raw)
        if not isinstance(value, dict) or not isinstance(value.get("id"), float):
            return value, ()
    except orjson.JSONDecodeError:
        pass
    # Python's own parser, 5 times slower, reads what orjson refuses, and keeps all digits of a long id.
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotUtf8(f"byte {error.start} is not UTF-8") from None
    whole = _ESCAPE.sub(lambda escape: "\ufffd" if escape[2] else escape[0], text)
    words: list[str] = []

    def read_word(word: str) -> float:
        words.append(word)
        return float(word)

    try:
        value = json.loads(whole, parse_constant=read_word)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value, ("surrogate_replaced",) * (whole != text) + ("nan_read",) * bool(words)
