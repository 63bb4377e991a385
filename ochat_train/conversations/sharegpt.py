"""Records to turns: the dialects in which chats are written down, and the names that their roles have there."""

from dataclasses import dataclass
from typing import Any

import orjson

from ochat_train.conversations.records import MAX_RECORD_BYTES, TURN_LISTS, Record
from ochat_train.conversations.schema import Message, Role

# Calls of tools, and what the tools answered, are kept as context, without a loss.
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "prompter": "user",  # OpenAssistant
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "assistant": "assistant",
    "model": "assistant",  # Gemini, Gemma
    "bot": "assistant",
    "chatbot": "assistant",  # Cohere
    "ai": "assistant",  # LangChain
    "system": "system",
    "developer": "system",  # OpenAI
    "tool": "tool",
    "tool_call": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_call": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",  # Llama 3
}

# The keys of a pair: one of each side.
USER_KEYS = ("human", "user", "input", "instruction", "prompt", "question", "query")
ANSWER_KEYS = ("assistant", "gpt", "bot", "output", "response", "answer", "completion")


@dataclass(frozen=True, slots=True)
class Turns:
    """What one usable record says, before its turns are cleaned and a source gives it condition and weight.

    `dialect` is how it is written: "from/value", "role/content", "pairs", or several of them with " + " between.
    `is_page` is whether it comes from a saved ShareGPT page. `condition` is the record's own, None where it has none; a
    message's `weight` is the record's own likewise.
    """

    id: str
    dialect: str
    is_page: bool
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


_DAMAGES = {
    "not_json": "it is not JSON",
    "truncated_record": "it is not JSON, and the file ends inside it",
    "record_too_large": f"it is above {MAX_RECORD_BYTES:,} bytes",
    "no_next_data": "the page has no script __NEXT_DATA__",
    "no_page_content": "the page's data has no props.pageProps.content",
}


def parse_record(record: Record, *, default_id: str) -> Turns | Drop:
    """The record's turns as they are written, or why there are none; never raises.

    The turns are the first list that is not empty under `conversations`, `items`, `messages` or `conversation`. A turn
    is one of, told apart turn by turn:

    - `{from, value}` or `{role, content, weight?}`. The text may be a list of `{"type": "text", "text": ...}`: these
      are joined as they are. What an assistant calls (`tool_calls`, `function_call`) follows its text, if it has any,
      as a tool turn whose text is the calls in JSON.
    - a pair: `[user, answer]`, or an object with one of USER_KEYS and one of ANSWER_KEYS, and maybe `system`. A side
      that is null makes no turn. `instruction` and `input` are one text together, with a blank line between.

    Beside the list stand `id`, `condition` and `system`. A null is as good as nothing anywhere, since a table writes
    every column into every record. The id is the record's own, a text or whole number, or else `default_id`.

    Reasons of a drop: the record's `damage`; not_an_object; no_turns (no such list); turn_not_an_object; unknown_role
    (not in ROLES); bad_pair (not two sides, or two texts for one side); value_not_text; not_text_part (a part that is
    no text, such as a picture); bad_weight (not a finite float32 of at least 0); bad_condition and bad_system (neither
    text nor null).

    Worked example: `{"id": 7, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value":
    "Hello"}]}` gives `Turns("7", "from/value", False, None, "", (Message("user", "Hi"), Message("assistant",
    "Hello")), ())`.
    """
    fields = record.fields
    if record.damage is not None:
        return Drop(default_id, record.damage, _DAMAGES[record.damage], record.repairs)
    if not isinstance(fields, dict):
        return Drop(default_id, "not_an_object", f"the record is {_kind(fields)}", record.repairs)

    own_id = fields.get("id")
    is_id = isinstance(own_id, str | int) and not isinstance(own_id, bool) and own_id != ""
    id = str(own_id) if is_id else default_id
    try:
        dialect, messages = _parse_turns(fields)
        condition = _parse_text_field(fields, "condition")
        system = _parse_text_field(fields, "system") or ""
    except _Refusal as refusal:
        return Drop(id, refusal.reason, refusal.detail, record.repairs)
    return Turns(id, dialect, record.is_page, condition, system, messages, record.repairs)


class _Refusal(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail


def _parse_text_field(fields: dict[str, Any], name: str) -> str | None:
    text = fields.get(name)
    if text is not None and not isinstance(text, str):
        raise _Refusal(f"bad_{name}", f"{name} is {_kind(text)}")
    return text


def _parse_turns(fields: dict[str, Any]) -> tuple[str, tuple[Message, ...]]:
    lists = (fields.get(name) for name in TURN_LISTS)
    turns = next((turns for turns in lists if isinstance(turns, list) and turns), None)
    if turns is None:
        raise _Refusal("no_turns", f"none of {', '.join(TURN_LISTS)} is a list with turns")
    dialects: dict[str, None] = {}
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        if isinstance(turn, list | tuple):
            dialect = "pairs"
            if len(turn) != 2:
                raise _Refusal("bad_pair", f"turn {number} is a list of {len(turn)}, not of [user, answer]")
            messages += _parse_pair({"user": turn[0], "assistant": turn[1]}, number)
        elif not isinstance(turn, dict):
            raise _Refusal("turn_not_an_object", f"turn {number} is {_kind(turn)}")
        elif turn.get("from") is not None:
            dialect = "from/value"
            messages += _parse_message(turn, turn["from"], number)
        elif turn.get("role") is not None or not _is_pair(turn):
            dialect = "role/content"
            messages += _parse_message(turn, turn.get("role"), number)
        else:
            dialect = "pairs"
            messages += _parse_pair(turn, number)
        dialects[dialect] = None
    return " + ".join(dialects), tuple(messages)


def _parse_message(turn: dict[str, Any], name: object, number: int) -> list[Message]:
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        shown = f"{name!r:.80}" if isinstance(name, str) else _kind(name)
        raise _Refusal("unknown_role", f"the role of turn {number} is {shown}")
    weight = turn.get("weight")
    if weight is not None and not _is_weight(weight):
        shown = f"{weight!r:.80}" if isinstance(weight, str | int | float) else _kind(weight)
        raise _Refusal("bad_weight", f"the weight of turn {number} is {shown}")
    value = turn.get("content") if turn.get("value") is None else turn["value"]
    calls = _find_calls(turn) if role == "assistant" else None
    if calls is None:
        return [Message(role, _parse_text(value, number), None if weight is None else float(weight))]
    text = "" if value is None else _parse_text(value, number)
    said = [Message(role, text, None if weight is None else float(weight))] if text else []
    return [*said, Message("tool", _write_calls(calls, number))]


def _parse_text(value: object, number: int) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise _Refusal("value_not_text", f"the text of turn {number} is {_kind(value)}")
    for part in value:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            shown = f"{part['type']!r:.80}" if isinstance(part.get("type"), str) else _kind(part.get("type"))
            raise _Refusal("not_text_part", f"a part of turn {number} is no text; its type is {shown}")
    return "".join(part["text"] for part in value)


def _find_calls(turn: dict[str, Any]) -> object:
    """What an assistant calls in this turn, or None."""
    for name in ("tool_calls", "function_call"):
        calls = turn.get(name)
        # an object of nulls is an empty cell of a table
        if calls and not (isinstance(calls, dict) and all(value is None for value in calls.values())):
            return calls
    return None


def _write_calls(calls: object, number: int) -> str:
    if isinstance(calls, str):
        return calls
    try:
        return orjson.dumps(calls, default=str).decode()
    except TypeError as error:  # orjson's own: nested more deeply than it writes, though it could read it
        raise _Refusal("value_not_text", f"the calls of turn {number} cannot be written as JSON ({error})") from None


def _is_pair(turn: dict[str, Any]) -> bool:
    return any(turn[key] is not None and key.strip().lower() in _PAIR_KEYS for key in turn)


_PAIR_KEYS = frozenset(USER_KEYS + ANSWER_KEYS)


def _parse_pair(turn: dict[str, Any], number: int) -> list[Message]:
    sides = {key.strip().lower(): value for key, value in turn.items() if value is not None}
    asked = [key for key in USER_KEYS if key in sides]
    answered = [key for key in ANSWER_KEYS if key in sides]
    is_instruction = asked == ["input", "instruction"]
    if (len(asked) > 1 and not is_instruction) or len(answered) > 1 or not asked + answered:
        shown = ", ".join(asked + answered) or "nothing"
        raise _Refusal("bad_pair", f"turn {number} is no pair of a user's text and an answer; it holds {shown}")
    messages = [Message("system", _parse_text(sides["system"], number))] if sides.get("system") else []
    if is_instruction:
        texts = [_parse_text(sides[key], number) for key in ("instruction", "input")]
        messages.append(Message("user", "\n\n".join(text for text in texts if text)))
    elif asked:
        messages.append(Message("user", _parse_text(sides[asked[0]], number)))
    if answered:
        messages.append(Message("assistant", _parse_text(sides[answered[0]], number)))
    return messages


_MAX_FLOAT32 = (2 - 2**-23) * 2.0**127


def _is_weight(value: object) -> bool:
    # true and false are numbers to Python, not to the person who wrote them as a weight
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MAX_FLOAT32


def _kind(value: object) -> str:
    """What JSON calls it."""
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"
