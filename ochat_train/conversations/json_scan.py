"""JSON in bytes: where the values of an array begin and end, without parsing them, and the parser of one value."""

import json
import re
from collections.abc import Iterator
from typing import Any

import orjson

from ochat_train.conversations.containers import ByteStream, Unreadable, unreadable

SPACE = b" \t\r\n"  # JSON's own white space, no other

_WINDOW_BYTES = 1 << 20
_MAX_DEPTH = 1024  # orjson's own limit
_REMEDY = "fetch the file again, or cut it after its last whole record and close it with ']'"


def scan_array(stream: ByteStream, *, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of every value of the array that `stream` continues with, in order, not parsed.

    Takes linear time; memory is a small multiple of the largest value or of 1 MiB. Whether a value is valid JSON is
    left to the parser.

    Raises ValueError, with name and byte, while iterating: for an array that breaks, that the file ends inside, that is
    empty or that something follows, and for a value above `max_bytes`.

    Worked example: `[{"a": 1},\\n 7]` gives (1, b'{"a": 1}') and (12, b"7").
    """
    window = _Window(stream, max_bytes)
    window.next_byte()
    opening = window.offset
    window.at += 1  # the "[" by which the form was recognised
    if window.next_byte() == b"]":
        raise unreadable(stream.name, opening, "the array is empty", "remove the file, or fetch it again")
    more = True
    while more:
        window.next_byte()
        offset = window.offset
        try:
            value = window.take_value()
        except Unreadable:
            raise
        except EOFError:
            raise unreadable(stream.name, offset, "the file ends inside the array", _REMEDY) from None
        except ValueError as error:
            raise not_valid(stream.name, offset, error) from None
        yield offset, value
        following = window.next_byte()
        if following not in (b",", b"]"):
            found = f"{following!r} instead of ','" if following else "the file ends inside the array"
            raise unreadable(stream.name, window.offset, found, _REMEDY)
        window.at += 1
        more = following == b","
    if window.next_byte():
        remedy = "keep one array in a file, or write one record a line"
        raise unreadable(stream.name, window.offset, "something follows the array's ']'", remedy)


def not_valid(name: str, offset: int, error: ValueError) -> ValueError:
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
