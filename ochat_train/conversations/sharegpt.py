"""ShareGPT files to turns: a streaming reader of JSON arrays and JSON lines, and the parser of one record.

Nothing is lost on the way without a name: a record that cannot be used becomes a `Drop` with its reason, one
that was repaired says by which rules, and a file that cannot be read as a whole is a `ValueError`.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson

from ochat_train.conversations.clean import repair_turns
from ochat_train.conversations.schema import Message, Role

# Calls of tools, and what the tools answered, are kept as context, without a loss.
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function_call": "tool",
    "function_response": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file: `file[offset:end]` in bytes, without the space, comma or line end around it.

    `fields` is the parsed JSON value. Where it could not be parsed, `fields` is None and `damage` is the
    reason of its drop, "not_json" or "truncated_record". `repairs` names what was done to its bytes before it
    could be parsed.
    """

    file: str
    offset: int
    end: int
    fields: Any
    damage: str | None
    repairs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Turns:
    """What one usable record says, before a source gives it condition and weight.

    `condition` is the record's own, None where it has none; a message's `weight` is the record's own
    likewise.
    """

    id: str
    condition: str | None
    system: str
    messages: tuple[Message, ...]
    repairs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """Why one record cannot be used: `reason` is a fixed name to count by, `detail` is for a person."""

    id: str
    reason: str
    detail: str
    repairs: tuple[str, ...]


# ---- Reading a file ----

_SPACE = b" \t\r\n"  # JSON's own white space, no other
_UTF8_BOM = b"\xef\xbb\xbf"


def read_records(path: str, *, chunk_bytes: int = 1 << 20) -> Iterator[Record]:
    """Every record of a JSON array or JSON lines file, in order, each with its exact place in bytes.

    The first byte that is not space tells the form: `[` an array, `{` lines. A UTF-8 byte order mark is
    skipped, and so are blank lines. Memory is bounded by the largest record (a small multiple of it, or of
    `chunk_bytes`), whatever the file's size. Bytes that are not UTF-8, and surrogates without their other
    half, become U+FFFD, and the record's `repairs` then says "invalid_utf8_replaced".

    A line that is not JSON is a record with `damage` "not_json", or "truncated_record" where it is the file's
    last and has no line end. An array has no such border behind which to go on, so the first bad byte ends
    it.

    Raises ValueError, with file and byte offset, while iterating: for an array that breaks, that the file
    ends inside, or that something follows; for a file of another form, one without records, or lines of which
    none is an object.

    Worked example: the file `[{"a": 1},\\n 7]` gives `Record(path, 1, 9, {"a": 1}, None, ())` and
    `Record(path, 12, 13, 7, None, ())`.
    """
    with open(path, "rb", buffering=1 << 20) as file:
        offset, first = _find_first_byte(file)
        file.seek(offset)
        if first == b"[":
            yield from _read_array(path, _Window(file, offset, chunk_bytes))
        elif first == b"{":
            yield from _read_lines(path, file, offset)
        elif not first:
            raise _unreadable(path, offset, "the file is empty", "remove it, or fetch it again")
        else:
            found = f"the file starts with {first!r}, neither '[' (a JSON array) nor '{{' (JSON lines)"
            raise _unreadable(path, offset, found, "decompress it, or save it as UTF-8 JSON")


def _find_first_byte(file: BinaryIO) -> tuple[int, bytes]:
    """Offset and value of the first byte that is neither space nor byte order mark; b"" at the file's end."""
    offset = len(_UTF8_BOM) if file.read(len(_UTF8_BOM)) == _UTF8_BOM else 0
    file.seek(offset)
    while chunk := file.read(1 << 16):
        if rest := chunk.lstrip(_SPACE):
            return offset + len(chunk) - len(rest), rest[:1]
        offset += len(chunk)
    return offset, b""


def _read_lines(path: str, file: BinaryIO, offset: int) -> Iterator[Record]:
    num_objects = 0
    first_offset = offset
    for line in file:
        raw = line.lstrip(_SPACE)
        start = offset + len(line) - len(raw)
        raw = raw.rstrip(_SPACE)
        offset += len(line)
        if not raw:
            continue
        try:
            fields, repairs = _parse_json(raw)
        except ValueError:
            damage = "not_json" if line.endswith(b"\n") else "truncated_record"
            yield Record(path, start, start + len(raw), None, damage, ())
        else:
            # Not every value counts: a pretty-printed object has lines, such as `"x"`, that are JSON by
            # chance.
            num_objects += isinstance(fields, dict)
            yield Record(path, start, start + len(raw), fields, None, repairs)
    if not num_objects:
        remedy = "put each record on one line of its own, or all of them into one JSON array"
        raise _unreadable(path, first_offset, "no line of the file is a JSON object", remedy)


def _read_array(path: str, window: "_Window") -> Iterator[Record]:
    remedy = "fetch the file again, or cut it behind its last whole record and close it with ']'"
    window.next_byte()
    opening = window.offset
    window.at += 1  # the "[" that told the form
    if window.next_byte() == b"]":
        raise _unreadable(path, opening, "the array is empty", "remove the file, or fetch it again")
    more = True
    while more:
        window.next_byte()
        offset = window.offset
        try:
            fields, repairs = _parse_json(window.take_value())
        except EOFError:
            raise _unreadable(path, offset, "the file ends inside the array", remedy) from None
        except ValueError as error:
            found = f"the record that starts here is not valid JSON ({error}, counted from here)"
            raise _unreadable(path, offset, found, remedy) from None
        yield Record(path, offset, window.offset, fields, None, repairs)
        following = window.next_byte()
        if following not in (b",", b"]"):
            found = f"{following!r} instead of ','" if following else "the file ends inside the array"
            raise _unreadable(path, window.offset, found, remedy)
        window.at += 1
        more = following == b","
    if window.next_byte():
        remedy = "keep one array in a file, or write one record a line"
        raise _unreadable(path, window.offset, "something follows the array's ']'", remedy)


def _unreadable(path: str, offset: int, found: str, remedy: str) -> ValueError:
    return ValueError(f"{path}, byte {offset}: {found}; {remedy}")


# Where a value ends is found without parsing it, so that only whole records are ever parsed, and by one
# parser. Bytes above 127 never look like one of JSON's own signs, so nothing has to be decoded for it.
# Possessive (`*+`), so that a match never goes back: time is linear and no stack grows with the text.
_FLAT_TEXT = rb'[^"{}\[\]]*+(?:"[^"]*+"[^"{}\[\]]*+)*+'
# An object without another in it, such as a turn, is stepped over at once.
_TO_BRACKET = re.compile(_FLAT_TEXT + rb"(?:\{" + _FLAT_TEXT + rb"\}" + _FLAT_TEXT + rb")*+([{}\[\]]?)")
_DEPTH_CHANGE = {b"{": 1, b"[": 1, b"}": -1, b"]": -1}
# A string, number or literal that has a byte behind it: where what was read ends, `12` may be half of `123`.
_FLAT_VALUE = re.compile(rb'(?:"[^"]*+"|[^ \t\r\n"{}\[\],]++)(?=.)', re.DOTALL)
_SPACES = re.compile(rb"[ \t\r\n]*+")


class _Window:
    """The part of a file that is in memory; it slides forward, and grows only while one value does not fit.

    `data[at:]` lies ahead. Methods move `at` forward and may replace `data`.
    """

    def __init__(self, file: BinaryIO, offset: int, chunk_bytes: int) -> None:
        self.data = b""
        self.at = 0
        # `data` with each escaped backslash and quote made `__`, so that every quote left bounds a string
        self._masked = b""
        self._file = file
        self._chunk_bytes = chunk_bytes
        self._data_offset = offset

    @property
    def offset(self) -> int:
        """Where in the file `at` is."""
        return self._data_offset + self.at

    def next_byte(self) -> bytes:
        """The next byte that is not space, not yet taken; b"" at the end of the file."""
        while True:
            spaces = _SPACES.match(self.data, self.at)
            assert spaces is not None
            self.at = spaces.end()
            if self.at < len(self.data) or not self._grow():
                return self.data[self.at : self.at + 1]

    def take_value(self) -> bytes:
        """The bytes of the JSON value that starts at `at`, which moves behind them.

        Only its end is found here; that it is valid JSON is left to the parser. Raises EOFError if the file
        ends first, ValueError if no value starts here, or if it is seen to be broken before its end is found.
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
            # In a broken file the end may never come. Ask before holding more of it than one chunk, and then
            # again each time that what is held has doubled.
            if len(self.data) - self.at > self._chunk_bytes:
                _check_beginning(self.data[self.at :])
            if not self._grow():
                raise EOFError

    def _take(self, end: int) -> bytes:
        value = self.data[self.at : end]
        self.at = end
        return value

    def _grow(self) -> bool:
        """Whether there was more to read. Doubles what is kept, so that a large value costs linear time."""
        kept = self.data[self.at :]
        more = self._file.read(max(self._chunk_bytes, len(kept)))
        self._data_offset += self.at
        self.at = 0
        self.data = kept + more
        # `at` is never inside a string, so backslashes pair up from there as JSON pairs them
        self._masked = self.data.replace(rb"\\", b"__").replace(rb"\"", b"__")
        return bool(more)


def _check_beginning(raw: bytes) -> None:
    """Raises ValueError if `raw` cannot be the beginning of a JSON value, whatever follows."""
    text = raw.decode("utf-8", "surrogateescape")
    try:
        _BEGINNING.raw_decode(text)
    except json.JSONDecodeError as error:
        # An end that cuts a value shows as a string without its end, or as an error at the end: the longest
        # sign that can be cut, `-Infinity`, is shorter than 16.
        if error.pos < len(text) - 16 and not error.msg.startswith("Unterminated string"):
            raise
    except RecursionError:
        raise ValueError("nested too deeply") from None


# Numbers stay text, since int() refuses very long ones.
_BEGINNING = json.JSONDecoder(parse_int=str, parse_float=str)

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is not UTF-8
_ESCAPE = re.compile(
    r"(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.",
    re.DOTALL,
)


def _parse_json(raw: bytes) -> tuple[Any, tuple[str, ...]]:
    """The JSON value of `raw` and the repairs it needed. Raises ValueError if they do not make it JSON."""
    try:
        return orjson.loads(raw), ()
    except orjson.JSONDecodeError:
        text = raw.decode("utf-8", "surrogateescape")
        repaired = _ESCAPED_BYTE.sub("\ufffd", text)
        repaired = _ESCAPE.sub(lambda escape: "\ufffd" if escape[2] else escape[0], repaired)
        if repaired == text:
            raise
        # Parsed again rather than walked through, so that one parser decides what JSON is, and no depth of
        # nesting is too much for us that is not for it.
        return orjson.loads(repaired), ("invalid_utf8_replaced",)


# ---- Parsing a record ----


def parse_record(record: Record, *, default_id: str) -> Turns | Drop:
    """The record's turns, repaired by the rules of `clean.py`, or why there are none; never raises.

    Understands `conversations` or `items`, a list of `{from, value}` or `{role, content, weight?}` (told
    apart turn by turn), and beside it `id`, `condition` and `system`. The id is the record's own, a text or
    whole number, or else `default_id`.

    Reasons of a drop: the record's `damage`; not_an_object; no_turns (no such list, or an empty one);
    turn_not_an_object; unknown_role (not in ROLES); value_not_text; bad_weight (not a finite number of at
    least 0); bad_condition and bad_system (neither text nor null); no_answer.

    Worked example: `{"id": 7, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value":
    "Hello"}]}` gives `Turns("7", None, "", (Message("user", "Hi"), Message("assistant", "Hello")), ())`.
    """
    fields = record.fields
    if record.damage is not None:
        detail = f"bytes {record.offset} to {record.end} are not JSON"
        return Drop(default_id, record.damage, detail, record.repairs)
    if not isinstance(fields, dict):
        return Drop(default_id, "not_an_object", f"the record is {_kind(fields)}", record.repairs)

    own_id = fields.get("id")
    is_id = isinstance(own_id, str | int) and not isinstance(own_id, bool) and own_id != ""
    id = str(own_id) if is_id else default_id
    parsed = _parse_turns(fields)
    if isinstance(parsed, _Refusal):
        return Drop(id, parsed.reason, parsed.detail, record.repairs)
    condition = fields.get("condition")
    if condition is not None and not isinstance(condition, str):
        return Drop(id, "bad_condition", f"condition is {_kind(condition)}", record.repairs)
    system = fields.get("system")
    if system is not None and not isinstance(system, str):
        return Drop(id, "bad_system", f"system is {_kind(system)}", record.repairs)

    repaired = repair_turns(system or "", parsed)
    if isinstance(repaired, str):
        roles = " ".join(message.role for message in parsed[:8]) + (" ..." if len(parsed) > 8 else "")
        return Drop(id, repaired, f"turns: {roles}", record.repairs)
    system, messages, repairs = repaired
    return Turns(id, condition, system, messages, record.repairs + repairs)


@dataclass(frozen=True, slots=True)
class _Refusal:
    reason: str
    detail: str


def _parse_turns(fields: dict[str, Any]) -> tuple[Message, ...] | _Refusal:
    turns = fields.get("conversations") or fields.get("items")
    if not isinstance(turns, list) or not turns:
        return _Refusal("no_turns", "neither conversations nor items is a list with turns")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            return _Refusal("turn_not_an_object", f"turn {number} is {_kind(turn)}")
        # By null, not by absence: a table writes every column into every record.
        name = turn.get("role") if turn.get("from") is None else turn["from"]
        role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
        if role is None:
            shown = f"{name!r:.80}" if isinstance(name, str) else _kind(name)
            return _Refusal("unknown_role", f"the role of turn {number} is {shown}")
        text = turn.get("content") if turn.get("value") is None else turn["value"]
        if not isinstance(text, str):
            return _Refusal("value_not_text", f"the text of turn {number} is {_kind(text)}")
        weight = turn.get("weight")
        if weight is not None and not _is_weight(weight):
            shown = f"{weight!r:.80}" if isinstance(weight, str | int | float) else _kind(weight)
            return _Refusal("bad_weight", f"the weight of turn {number} is {shown}")
        messages.append(Message(role, text, None if weight is None else float(weight)))
    return tuple(messages)


def _is_weight(value: object) -> bool:
    # true and false are numbers to Python, not to the person who wrote them as a weight
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return value >= 0 and math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _kind(value: object) -> str:
    """What JSON calls it."""
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"
