"""Calls of tools in an answer: what training wrote as text becomes the `tool_calls` of the API."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from ochat_train.conversations.schema import Message, ParsedRecord
from ochat_train.conversations.spell_out import Spelling, read_calls, spell_out

_PROBE = '{"name": "look", "arguments": {"at": "it"}}'
_FIRST, _ON_A_LINE = r"(?:\A|\n)\s*(?=[\[{])", r"\n\s*(?=[\[{])"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class CallForm:
    """How an answer calls tools: in JSON between two texts; without them from the beginning of a line to the end."""

    before: str
    after: str


def find_form(spelling: Spelling) -> CallForm | None:
    """The form in which training wrote calls; None where it is not JSON between two texts."""
    # As an argument of the base's own template, a call may have special tokens around it.
    special_tokens = () if "calls" in spelling.arguments else spelling.special_tokens
    spelling = replace(spelling, special_tokens=special_tokens, arguments=frozenset())
    called = ParsedRecord("", "", False, None, "", (Message("assistant", "", 1.0, "", _PROBE),), ())
    written = spell_out(called, spelling).messages[-1].text
    for found in re.finditer(r"[\[{]", written):
        start, end = found.start(), _end_of_json(written, found.start())
        if end is not None and read_calls(written[start:end]) == read_calls(_PROBE):
            return CallForm(written[:start].strip(), written[end:].strip())
    return None


def _end_of_json(text: str, start: int) -> int | None:
    """Where the JSON value that begins at `start` ends; None where there is none, or a part of one."""
    try:
        return _DECODER.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


class CallReader:
    """Divides an answer into text and calls while it grows. form: None leaves all in the text.

    names: the tools of the request; what calls another one, or is no call after all, stays in the text.
    """

    def __init__(self, form: CallForm | None, names: Collection[str]) -> None:
        self._form, self._names = form if names else None, names
        self._held = ""
        self._has_text = self._has_calls = False

    def read(self, piece: str, *, is_last: bool = False) -> list[str | dict[str, Any]]:
        """What is certain after the next piece of text: texts, and calls as {name, arguments}."""
        self._held += piece
        parts: list[str | dict[str, Any]] = []
        while (start := self._find_start()) is not None:
            called = self._read_calls(start[1], is_last=is_last)
            if called is None:
                break
            calls, end = called
            parts += [text] if (text := self._held[: start[0]].rstrip()) else []
            parts += calls
            self._has_calls, self._held = True, self._held[end:]
        num_ready = len(self._held) if is_last else self._num_ready(start)
        text, self._held = self._held[:num_ready], self._held[num_ready:]
        self._has_text |= bool(text)
        return [*parts, text] if text.strip() or (text and not self._has_calls) else parts

    def _find_start(self) -> tuple[int, int] | None:
        """Where a call may begin, and where its JSON does."""
        if self._form is None:
            return None
        bare = _ON_A_LINE if self._has_text else _FIRST
        found = re.search(re.escape(self._form.before) if self._form.before else bare, self._held)
        return found.span() if found is not None else None

    def _read_calls(self, start: int, *, is_last: bool) -> tuple[list[dict[str, Any]], int] | None:
        """The calls whose JSON begins at `start`, and where what follows them does; None: not yet, or not at all."""
        assert self._form is not None
        after = self._form.after
        if not is_last and (not after or after not in self._held[start:]):
            return None
        calls: list[dict[str, Any]] = []
        while True:
            start += len(self._held[start:]) - len(self._held[start:].lstrip())
            if after and calls and self._held.startswith(after, start):
                return calls, start + len(after)
            if start == len(self._held):
                return (calls, start) if is_last and calls else None
            end = _end_of_json(self._held, start)
            called = [] if end is None else read_calls(self._held[start:end])
            if end is None or not called or any(call["name"] not in self._names for call in called):
                return None
            calls, start = calls + called, end

    def _num_ready(self, start: tuple[int, int] | None) -> int:
        """How many characters held are text for certain: those before a call, and before what may begin one."""
        if self._form is None:
            return len(self._held)
        if start is not None:
            end = start[0]
        else:
            before = self._form.before
            partial = (n for n in range(min(len(before), len(self._held)), 0, -1) if before.startswith(self._held[-n:]))
            end = len(self._held) - next(partial, 0)
        return len(self._held[:end].rstrip())
