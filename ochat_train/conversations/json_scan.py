"""JSON in a stream: the values of arrays, of rows of objects and of wrappers, one after the other; the parser of one.

Where a value ends is found by Python's own parser, on the bytes as Latin-1, so that each is one character.
"""

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
_HEAD_BYTES = 4 << 20  # of a file, to see how its objects stand
_REMEDY = "fetch the file again, or cut it after its last whole record and close what is open"


def scan_array(stream: ByteStream, *, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of every value of the array that `stream` continues with, in order.

    Memory is a small multiple of 1 MiB, or what Python needs for the largest value. The bytes may be no UTF-8.

    Raises ValueError, with name and byte, while iterating: for an array that breaks, that the file ends inside, that is
    empty or that something follows, and for a value above `max_bytes`.

    Worked example: `[{"a": 1},\\n 7]` gives (1, b'{"a": 1}') and (12, b"7").
    """
    window = _Window(stream, max_bytes)
    yield from _scan_elements(window)
    if window.next_sign():
        remedy = "keep one array in a file, or write one record a line"
        raise window.unreadable("something follows the array's ']'", remedy)


def _scan_elements(window: "_Window") -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of every value of the array at the window; afterwards the window is after its ']'."""
    window.next_sign()
    opening = window.offset
    window.at += 1  # the "["
    if window.next_sign() == "]":
        raise unreadable(window.name, opening, "the array is empty", "remove the file, or fetch it again")
    following = ","
    while following == ",":
        window.next_sign()
        yield window.offset, window.take("the file ends inside the array")
        following = window.next_sign()
        if following not in (",", "]"):
            raise window.unreadable(f"{following!r} instead of ','" if following else "the file ends inside the array")
        window.at += 1


# ---- Objects that are no lines ----

# Keys under which dumps keep their list of records. Under another key a list is one of turns, unless its objects have
# turns themselves.
WRAPPERS = ("data", "train", "rows", "examples", "records", "instances", "samples", "test", "validation", "dev", "eval")
_OF_TURNS = frozenset(("from", "role", "value", "content"))


def find_layout(stream: ByteStream, turn_lists: Collection[str]) -> str | None:
    """How the objects stand in a file that begins with one: a wrapper's key, "" for a row of objects, None for lines.

    A wrapper is one object with a list of records under one of WRAPPERS, or under any key if the list's first object
    has a list of turns itself; it is alone in the file, or does not end in the first 4 MiB. A record has its turns in
    one of `turn_lists`, so it is none.

    Objects are a row if the first one is whole JSON and does not stand alone on one line: it spans several, or another
    object follows it on its line; and it ends in the first 4 MiB. All else is lines, of which a bad one costs
    only itself.
    """
    text = stream.peek(_HEAD_BYTES).decode("latin-1")
    try:
        _, end = _DECODER.raw_decode(text)
    except ValueError as error:
        return _find_wrapper(stream, text, turn_lists) if _is_cut(error, len(text)) else None
    except RecursionError:
        return None
    line_end = text.find("\n", end) + 1 or len(text)
    if _skip_space(text, end) == len(text) and (key := _find_wrapper(stream, text, turn_lists)):
        return key
    is_one_line = text.find("\n", 0, end) < 0
    return None if is_one_line and not text[end:line_end].lstrip(_SPACE).startswith("{") else ""


def _find_wrapper(stream: ByteStream, text: str, turn_lists: Collection[str]) -> str | None:
    """The key of the list of records in the object that the file begins with, of which `text` is all or a part."""
    window = _Window(stream.through(io.BytesIO().read), len(text))
    window.text = text
    try:
        for key in _keys(window):
            start = window.at
            if window.next_sign() == "[":
                _, first = next(_scan_elements(window))
                if _is_record(key, parse_json(first)[0], turn_lists):
                    return key
            window.at = start
            window.take("")
    except ValueError:
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
    following = window.next_sign()  # the "{"
    while following != "}":
        window.at += 1
        if window.next_sign() == "}" and following == "{":
            break
        key = parse_json(window.take("the file ends inside the object"))[0]
        if isinstance(key, str) and window.next_sign() == ":":
            window.at += 1
            window.next_sign()
            yield key
        following = window.next_sign()
        if following not in (",", "}"):
            found = f"the object around the records breaks here ({following or 'the file ends'!r})"
            raise window.unreadable(found, "fetch the file again")
    window.at += 1


def scan_objects(stream: ByteStream, *, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of objects one after the other, with any or no white space between them, as `scan_array`.

    What is damaged is given as it is, up to the next whole object. Raises ValueError where none is found after it:
    what follows is then unknown.
    """
    window = _Window(stream, max_bytes)
    while following := window.next_sign():
        offset = window.offset
        try:
            if following != "{":
                found = f"{following!r} where an object should start"
                raise window.unreadable(found, "put each record on one line of its own")
            value = window.take("the file ends inside the object that starts here")
        except Unreadable:
            value = window.take_damaged()
            if not value:
                raise
        yield offset, value


def scan_wrapped(
    stream: ByteStream, key: str, turn_lists: Collection[str], beside: list[str], *, max_bytes: int
) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the records in the list under `key` of the object that the file is, as `scan_array`.

    The names of its other members that hold something are added to `beside`.
    Raises ValueError for a second list of records beside it, and for what follows the object.
    """
    window = _Window(stream, max_bytes)
    for name in _keys(window):
        if name == key:
            yield from _scan_elements(window)
            continue
        offset = window.offset
        value, _ = parse_json(window.take("the file ends inside the object"))
        if value not in (None, "", [], {}):
            beside.append(name)
        if isinstance(value, list) and value and _is_record(name, value[0], turn_lists):
            found = f"a second list of records, {name!r}, beside {key!r}"
            raise unreadable(window.name, offset, found, "write each list into a file of its own")
    if window.next_sign():
        found = "something follows the object with the list of records"
        raise window.unreadable(found, "keep one such object in a file")


def not_valid(name: str, offset: int, error: object) -> Unreadable:
    """The error for an array's value that is not valid JSON: where the next value begins is then unknown."""
    found = f"the record that starts here is not valid JSON ({error}, counted from here)"
    return unreadable(name, offset, found, _REMEDY)


# ---- The window ----

_DECODER = json.JSONDecoder()
_SPACE = SPACE.decode()
_SPACES = re.compile(r"[ \t\r\n]*+")
# Between two objects. In JSON no object follows another without a comma, and a text has its quotes escaped.
_BETWEEN = re.compile(r'(?:\}[ \t\r\n]*+|[^ \t\r\n,\[:][ \t\r]*+\n[ \t\r\n]*+)(?=\{[ \t\r\n]*+")')
_MOST_TRIES = 1000
_LONGEST_WORD = len("-Infinity")


def _is_cut(error: ValueError, end: int) -> bool:
    """Whether the parser may have failed only because the text ends at `end`, where more of the stream would follow."""
    is_at_end = isinstance(error, json.JSONDecodeError) and error.pos >= end - _LONGEST_WORD
    return is_at_end or "Unterminated string" in str(error)


def _skip_space(text: str, at: int) -> int:
    """Where from `at` on something else than space stands."""
    spaces = _SPACES.match(text, at)
    return spaces.end() if spaces else at


class _Window:
    """The part of a stream that is in memory; it slides forward, and grows only while one value does not fit.

    `text[at:]` lies ahead. Methods move `at` forward and may replace `text`.
    """

    def __init__(self, stream: ByteStream, max_bytes: int) -> None:
        self.text = ""
        self.at = 0
        self.name = stream.name
        self._stream = stream
        self._max_bytes = max_bytes
        self._text_offset = stream.offset

    @property
    def offset(self) -> int:
        """Where in the stream `at` is."""
        return self._text_offset + self.at

    def unreadable(self, found: str, remedy: str = _REMEDY) -> Unreadable:
        """The error for what is found at `at`."""
        return unreadable(self.name, self.offset, found, remedy)

    def next_sign(self) -> str:
        """The next character that is not space, at `at`; "" at the end of the stream."""
        while True:
            self.at = _skip_space(self.text, self.at)
            if self.at < len(self.text) or not self._grow():
                return self.text[self.at : self.at + 1]

    def take(self, at_end: str) -> bytes:
        """The bytes of the JSON value that starts at `at`, which moves to their end.

        Raises ValueError for what is no value, `at_end` if the stream ends in it, and for one above `max_bytes`.
        """
        if (first := self.text[self.at : self.at + 1]) in (",", "]", "}"):
            raise self.unreadable(f"not valid JSON: {first!r} where a value should start")
        while True:
            try:
                _, end = _DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or first in ("{", "[", '"'):
                    return self._take(end)
                is_cut, found = True, at_end  # `12` may be half of `123`
            except RecursionError:
                is_cut, found = False, "nested too deeply"
            except ValueError as error:
                is_cut, found = _is_cut(error, len(self.text)), str(error)
                has_ended = isinstance(error, json.JSONDecodeError) and error.pos == len(self.text)
                if has_ended or "Unterminated string" in found:
                    found = at_end
            self._check_size(len(self.text) - self.at)
            if not (is_cut and self._grow()):
                raise self.unreadable(at_end) if found == at_end else not_valid(self.name, self.offset, found)

    def take_damaged(self) -> bytes:
        """The bytes from `at` to the next whole object, where `at` moves; empty if there is none."""
        while (end := self._next_object()) == len(self.text):
            if len(self.text) - self.at > self._max_bytes or not self._grow():
                return b""
        return self._take(end).rstrip(SPACE)

    def _next_object(self) -> int:
        """Where after `at` a whole object begins that another one or the end of `text` follows; its length if none.

        Worked example: `{"a": x}{"b": 1}{"c": 2}` has one at 8, and `{"a": x} {"b": 1} and so on` has none.
        """
        for between in islice(_BETWEEN.finditer(self.text, self.at), _MOST_TRIES):
            try:
                _, end = _DECODER.raw_decode(self.text, between.end())
            except (ValueError, RecursionError):
                continue
            following = _skip_space(self.text, end)
            if self.text[following : following + 1] in ("", "{"):
                return between.end()
        return len(self.text)

    def _take(self, end: int) -> bytes:
        self._check_size(end - self.at)
        value = self.text[self.at : end].encode("latin-1")
        self.at = end
        return value

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            found = f"the record that starts here is above {self._max_bytes:,} bytes, or has no end"
            raise self.unreadable(found, "fix it or take it out")

    def _grow(self) -> bool:
        """Whether there was more to read. Doubles what is kept, so that a large value costs linear time."""
        kept = self.text[self.at :]
        more = self._stream.read(min(max(_WINDOW_BYTES, len(kept)), self._max_bytes + 1 - len(kept)))
        if more:
            self._text_offset += self.at
            self.at = 0
            self.text = kept + more.decode("latin-1")
        return bool(more)


# ---- One value ----

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
    except orjson.JSONDecodeError as error:
        if "limit" in str(error):  # of 1,024 levels; that of Python's parser differs between versions
            raise ValueError("nested too deeply") from None
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
