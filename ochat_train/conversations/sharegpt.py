"""Records to turns: the dialects in which chats are written down.

`chats` finds the turns. Each turn is one of:

- `{from, value}` or `{role, content}`, with the weights of `own_weights`. The text may be parts, `{"type": "text",
  "text": ...}` or text, which are joined as they are. An assistant's reasoning and tool calls (`tool_calls`,
  `function_call`, a turn of CALL_ROLES, or parts of these types) are kept beside its text. A tool's output may be any
  JSON.
- a pair: `[user, answer]`, or an object with one of USER_KEYS and one of ANSWER_KEYS, and possibly `system`. A side
  that is null makes no turn. `instruction` and `input` together are one text, with a blank line between them.

Beside the list are `id`, `condition`, `system`, `tools` and the weights of `own_weights`. A null means nothing
anywhere, since a table writes every column into every record, and so does NaN except as a weight. The id is the
record's own, a text or a number, or else `default_id`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import orjson

from ochat_train.conversations.chats import Chat, find_chats, get_system
from ochat_train.conversations.fields import (
    ANSWER_KEYS,
    AS_USUAL,
    TEXT_PARTS,
    TOOL_KEYS,
    USER_KEYS,
    Reading,
    are_texts,
    find_calls,
    find_reasoning,
    first_name,
    get_value,
    is_empty_json,
    is_pair,
    kind_of,
    own_id,
    parts_of_text,
    show,
    text_field,
    text_of_part,
)
from ochat_train.conversations.forms import FORMS, parts_of
from ochat_train.conversations.media import (
    MEDIA_HINT,
    find_media,
    is_media_part,
    is_media_type,
    remove_placeholders,
)
from ochat_train.conversations.own_weights import product, weight_of_record, weight_of_turn, weights_of_turns
from ochat_train.conversations.records import MAX_RECORD_BYTES
from ochat_train.conversations.roles import CALL_ROLES, find_role
from ochat_train.conversations.schema import Drop, Message, ParsedRecord, Record, RecordError, Role, Unread
from ochat_train.conversations.unread import find_hint, find_unread, unknown_roles

_DAMAGES = {
    "not_json": "it is not JSON",
    "not_utf8": "it is not UTF-8",
    "truncated_record": "it is not one JSON value; it is the last line, and may have been cut off",
    "record_too_large": f"it is above {MAX_RECORD_BYTES:,} bytes",
    "bad_row": "its row has another number of cells than the header has names",
    "no_parent": "the message that it answers is not in the file",
    "repeated_message": "a message before it in the file has the same id",
    "no_next_data": "the page has no script __NEXT_DATA__",
    "no_page_content": "the page's data has no props.pageProps.content",
}


def chats_of(record: Record, reading: Reading) -> list[Chat]:
    """The conversations of a record, at least one."""
    fields = record.fields
    if record.is_row and isinstance(fields, dict):
        fields = {name: _remove_nulls(value) for name, value in fields.items()}
    try:
        return find_chats(fields, reading)
    except RecursionError:
        return [Chat(fields)]


def parse_record(
    record: Record, *, default_id: str, reading: Reading = AS_USUAL, chat: Chat | None = None
) -> ParsedRecord | Drop:
    """The turns of one of the record's conversations as they are written, or why it cannot be used; never raises.

    `chat` is one of `chats_of(record, reading)`, None for the first. `reading` says where parts have other names.
    Reasons of a drop: the record's `damage`; not_an_object; no_turns (no field has turns); turn_not_an_object;
    unknown_role; bad_pair (not two sides, or two texts for one side); value_not_text; not_text (pictures, sound, video
    or another part that is no text); equal_answer (one before it in the record is the same); bad_weight (see
    `own_weights`); bad_condition and bad_system (neither text nor null).

    Worked example: `{"id": 7, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value":
    "Hello"}]}` gives `ParsedRecord("7", "from/value", False, None, "", (Message("user", "Hi"), Message("assistant",
    "Hello")), ())`.
    """
    if record.damage is not None:
        return Drop(default_id, record.damage, _DAMAGES[record.damage], record.repairs)
    if not isinstance(record.fields, dict):
        return Drop(default_id, "not_an_object", f"the record is {kind_of(record.fields)}", record.repairs)
    chat = chat or chats_of(record, reading)[0]
    fields, turns = chat.fields, chat.turns
    own = own_id(record.fields) or default_id
    id = f"{own}{chat.suffix}"
    repairs = record.repairs + chat.repairs
    unread: Unread = ()
    try:
        unread = tuple(find_unread(chat, reading))
        if not turns:
            raise _no_turns(fields, reading)
        if chat.same_as is not None:
            raise RecordError("equal_answer", f"the answer is that of {own}{chat.same_as}")
        media = find_media(fields, turns)
        if media and reading.media == "drop":
            raise RecordError("not_text", f"{media} is no text", MEDIA_HINT)
        reader = _TurnReader(reading)
        dialect, messages = reader.read_all(chat)
        if media or reader.has_left_out_media:
            messages = tuple(replace(message, text=remove_placeholders(message.text)) for message in messages)
            repairs += ("media_left_out",)
        if reader.has_context_answer:
            repairs += ("earlier_answer_untrained",)
        condition = _read_text_field(fields, "condition")
        system = _read_system(fields, messages, reading)
        weight = weight_of_record(fields, reading.weight_field)
        tools = _read_tools(fields)
    except RecordError as error:
        if error.reason == "unknown_role":
            unread += tuple(("role", name[:80]) for name in unknown_roles(turns, reading))
        hint = error.hint or find_hint(error.reason, fields, turns, reading)
        return Drop(id, error.reason, error.detail, repairs, hint, unread)
    except RecursionError:
        return Drop(id, "value_not_text", "something in it is nested too deeply", repairs, "", unread)
    return ParsedRecord(id, dialect, record.is_page, condition, system, messages, repairs, weight, tools, unread)


def _remove_nulls(value: Any) -> Any:
    """The value without nulls in its objects."""
    if isinstance(value, dict):
        return {key: _remove_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_remove_nulls(inner) for inner in value] if isinstance(value, list) else value


def _no_turns(fields: Mapping[str, Any], reading: Reading) -> RecordError:
    names = reading.fields
    named = {part: names[part] for part in ("chosen", "rejected", "answers", "answer") if part in names}
    for part, name in named.items():
        return RecordError("value_not_text", f"{name}, the source's {part}, is missing or null")
    lists = [names["turns"]] if "turns" in names else []
    lists += [name for (name,) in FORMS["turns"]]
    return RecordError("no_turns", f"none of {', '.join(map(str, lists))} is a list with turns")


def _read_system(fields: dict[str, Any], messages: Sequence[Message], reading: Reading) -> str:
    """The record's system text; empty where its turns begin with the same."""
    name, _ = get_system(fields, parts_of(reading))
    system = _read_text_field(fields, name) or ""
    is_copy = bool(messages) and messages[0].role == "system" and messages[0].text == system
    return "" if is_copy else system


def _read_text_field(fields: dict[str, Any], name: str) -> str | None:
    text = get_value(fields, name)
    if text is not None and not isinstance(text, str):
        raise RecordError("bad_condition" if name == "condition" else "bad_system", f"{name} is {kind_of(text)}")
    return text


def _read_tools(fields: dict[str, Any]) -> str:
    """The definitions of tools as the record writes them; empty where there are none."""
    tools = get_value(fields, first_name(fields, TOOL_KEYS))
    if not isinstance(tools, str | list | dict | None):
        raise RecordError("value_not_text", f"the definitions of tools are {kind_of(tools)}")
    return "" if is_empty_json(tools) else _write_json(tools, "the definitions of tools")


class _TurnReader:
    """Reads the turns of one conversation, and notes whether it left out media, or answers became context."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.has_left_out_media = False
        self.has_context_answer = False

    def read_all(self, chat: Chat) -> tuple[str, tuple[Message, ...]]:
        """(dialect, messages) of all turns, each message with the weight that the record gives it."""
        fields, turns = chat.fields, chat.turns
        dialects: dict[str, None] = {}
        messages: list[Message] = []
        listed = weights_of_turns(fields, len(turns))
        for number, (turn, weight) in enumerate(zip(turns, listed, strict=True), start=1):
            own = weight_of_turn(turn, f"turn {number}") if isinstance(turn, dict) else None
            weight = own if weight is None else product((weight, own))
            dialect, said = self._read_turn(turn, number)
            if weight is not None and (dialect != "pairs" or said[-1].role == "assistant"):  # of a pair the answer's
                said[-1] = replace(said[-1], weight=weight)
            if number <= chat.num_context and said[-1].role == "assistant" and said[-1].weight is None:
                said[-1] = replace(said[-1], weight=0.0)
                self.has_context_answer = True
            messages += said
            dialects[dialect] = None
        written = [chat.form] if chat.form else []
        written += [] if chat.is_text else [" + ".join(dialects)]
        return ", ".join(written), tuple(messages)

    def _read_turn(self, turn: Any, number: int) -> tuple[str, list[Message]]:
        """(dialect, messages) of one turn."""
        if isinstance(turn, list | tuple):
            if len(turn) != 2:
                raise RecordError("bad_pair", f"turn {number} is a list of {len(turn)}, not of [user, answer]")
            return "pairs", self._read_pair({"user": turn[0], "assistant": turn[1]}, number)
        if not isinstance(turn, dict):
            raise RecordError("turn_not_an_object", f"turn {number} is {kind_of(turn)}")
        if get_value(turn, "from") is not None:
            return "from/value", [self._read_message(turn, turn["from"], number)]
        if get_value(turn, "role") is not None or not is_pair(turn):
            return "role/content", [self._read_message(turn, get_value(turn, "role"), number)]
        return "pairs", self._read_pair(turn, number)

    def _read_message(self, turn: dict[str, Any], name: object, number: int) -> Message:
        role = find_role(name, self.reading.roles)
        text = turn.get("value", turn.get("content"))
        if len(turn) == 2 and role is not None and role != "call" and isinstance(text, str):
            return Message(role, text)  # nearly always
        if role is None:
            shown = show(name) if isinstance(name, str) else kind_of(name)
            raise RecordError("unknown_role", f"the role of turn {number} is {shown}")
        value = turn.get(text_field(turn))
        if role == "call":
            return Message("assistant", "", calls=_write_json(value, f"the call of turn {number}"))
        if role == "tool":
            has_media = isinstance(value, list) and any(map(is_media_type, parts_of_text(value)))
            if not isinstance(value, str) and not are_texts(value) and not has_media:
                return Message("tool", _write_json(value, f"the text of turn {number}"))
        if role != "assistant":
            return Message(role, self._read_text(value, number).text)
        _, reasoning = find_reasoning(turn)
        calls = find_calls(turn)
        said = _Said() if value is None and (calls or reasoning) else self._read_text(value, number, "assistant")
        calls = said.calls if calls is None else calls
        written = _write_json(calls, f"the calls of turn {number}") if calls else ""
        return Message("assistant", said.text, reasoning=reasoning or said.reasoning, calls=written)

    def _read_pair(self, turn: dict[str, Any], number: int) -> list[Message]:
        sides = {key.strip().lower(): value for key in turn if (value := get_value(turn, key)) is not None}
        asked = [key for key in USER_KEYS if key in sides]
        answered = [key for key in ANSWER_KEYS if key in sides]
        is_instruction = asked == ["input", "instruction"]
        if (len(asked) > 1 and not is_instruction) or len(answered) > 1 or not asked + answered:
            shown = ", ".join(asked + answered) or "nothing"
            raise RecordError("bad_pair", f"turn {number} is no pair of a user's text and an answer; it holds {shown}")
        messages = [Message("system", self._read_text(sides["system"], number).text)] if sides.get("system") else []
        if asked:
            texts = [self._read_text(sides[key], number).text for key in reversed(asked)]  # the instruction first
            question = "\n\n".join(text for text in texts if text) if is_instruction else texts[0]
            messages.append(Message("user", question))
        if answered:
            messages.append(Message("assistant", self._read_text(sides[answered[0]], number).text))
        return messages

    def _read_text(self, value: Any, number: int, role: Role | None = None) -> "_Said":
        """What a text or its parts say; only an assistant's have calls."""
        if isinstance(value, str):
            return _Said(value)
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str) or (isinstance(part, dict) and part) for part in parts):
            raise RecordError("value_not_text", f"the text of turn {number} is {kind_of(value)}")
        texts, thoughts, calls = [], [], []
        for part in parts:
            if isinstance(part, str):
                texts.append(part)
                continue
            name = f"a part of turn {number}"
            if weight_of_turn(part, name) is not None:
                raise RecordError("bad_weight", f"{name} has a weight; give the whole turn one, or split the turn")
            kind, text = part.get("type"), text_of_part(part)
            if is_media_part(part):
                if self.reading.media == "drop":
                    raise RecordError("not_text", f"{name} is no text; it is {_describe_part(part)}", MEDIA_HINT)
                self.has_left_out_media = True
                texts.append(part["text"] if isinstance(part.get("text"), str) else "")
            elif kind in ("thinking", "reasoning") and text is not None:
                thoughts.append(text)
            elif kind in TEXT_PARTS and text is not None:
                (thoughts if part.get("thought") in (True, "true") else texts).append(text)
            elif kind in CALL_ROLES and role == "assistant" and not is_empty_json(part.get("value")):
                calls.append(part["value"])
            else:
                raise RecordError("not_text", f"{name} is no text; it is {_describe_part(part)}")
        if len(calls) > 1:  # one list, as beside a text
            try:
                calls = [[orjson.loads(call) if isinstance(call, str) else call for call in calls]]
            except ValueError:
                raise RecordError("value_not_text", f"a call of turn {number} is not JSON") from None
        return _Said("".join(texts), "".join(thoughts), calls[0] if calls else None)


class _Said(NamedTuple):
    """A text, and the reasoning and the calls among its parts."""

    text: str = ""
    reasoning: str = ""
    calls: Any = None


def _describe_part(part: dict[str, Any]) -> str:
    return show(part["type"]) if "type" in part else f"an object with {', '.join(map(repr, part)):.80}"


def _write_json(value: object, name: str) -> str:
    """A value as JSON, a text as it is; `name` is the value's, for errors."""
    if isinstance(value, str):
        return value
    if value is None:
        raise RecordError("value_not_text", f"{name} is {kind_of(value)}")
    try:
        return orjson.dumps(value, default=str).decode()
    except TypeError:  # a number above 64 bits, or nested more deeply than orjson writes
        pass
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    except (RecursionError, TypeError, ValueError) as error:
        raise RecordError("value_not_text", f"{name} cannot be written as JSON ({error})") from None
