"""Records to turns: the dialects in which chats are written down, and the names that their roles have there."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import orjson

from ochat_train.conversations.own_weights import (
    LISTS,
    OF_A_TURN,
    BadWeight,
    says_weight,
    weight_of_record,
    weight_of_turn,
    weights_of_turns,
)
from ochat_train.conversations.records import MAX_RECORD_BYTES, TURN_LISTS, Record
from ochat_train.conversations.schema import Message, Role

# Compared in lower case, without "-", "_" and white space. What a tool answered is context without a loss.
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
    "function_call": "assistant",  # in which it calls a tool, and says nothing else
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "tool_output": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_result": "tool",
    "function_output": "tool",
    "observation": "tool",
    "ipython": "tool",  # Llama 3
}
CALL_ROLES = ("function_call", "tool_call", "tool_calls")

# The keys of a pair: one of each side.
USER_KEYS = ("human", "user", "input", "instruction", "prompt", "question", "query")
ANSWER_KEYS = ("assistant", "gpt", "bot", "output", "response", "answer", "completion")

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
_EMPTY_JSON = ("", "[]", "{}", "null", "None")
_CALL_KEYS = ("tool_calls", "function_call")
TOOL_KEYS = ("tools", "functions")  # definitions of the tools that may be called, beside the turns
# Fields, of the record, a turn or a part, that hold pictures, sound or video, and files of these.
_MEDIA = re.compile(
    r"(?:image|img|picture|photo|audio|video|media|pixel_value|inline_?data|file_?data)s?"
    r"(?:_?(?:base64|bytes|id|path|url|uri|file|name|filename))?s?",
    re.IGNORECASE,
)
_SURE_MEDIA = re.compile(r"(?:image|audio|video)s?(?:_?(?:base64|bytes|path|file))?s?", re.IGNORECASE)
_ABSENT = ("", "none", "null", "nan", "n/a", "no", "false", "0", "-1", "[]", "{}")
_MEDIA_FILE = re.compile(
    r"data:(?:image|audio|video)/|.*\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|wav|mp3|flac|ogg|m4a|mp4|avi|mov|mkv|webm)"
    r"(?:[?#].*)?\Z",
    re.IGNORECASE | re.DOTALL,
)
_PLACEHOLDER = re.compile(r"<\|?(?:image|audio|video)(?:_\d+|_pad)?\|?>\n?|<(img|audio|video)>[^<>\n]+\.\w+</\1>\n?")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a recipe says of how the records of a source are written.

    fields: the names that parts of a record have there: turns, role, text, question (one or several), answer, system.
    roles: names of roles besides ROLES. weight_field: the field that holds a record's own weight, None for none.
    media: what becomes of a record with pictures, sound or video: it is dropped, or its text is taken alone.
    """

    fields: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    roles: Mapping[str, Role] = field(default_factory=dict)
    weight_field: str | None = "weight"
    media: Literal["drop", "text"] = "drop"


# What was met and not read: ("record field" | "turn field" | "part field" | "role", its name), once for each time.
Unread = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Turns:
    """What one usable record says, before its turns are cleaned and a source gives it condition and weight.

    `dialect` is how it is written: "from/value", "role/content", "pairs", or several of them with " + " between.
    `is_page` is whether it comes from a saved ShareGPT page. `condition` is the record's own, None where it has none; a
    message's `weight`, and the `weight` of the whole, are the record's own likewise. `tools` are the definitions of
    tools, as the record writes them, or empty.
    """

    id: str
    dialect: str
    is_page: bool
    condition: str | None
    system: str
    messages: tuple[Message, ...]
    repairs: tuple[str, ...]
    weight: float = 1.0
    tools: str = ""
    unread: Unread = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Drop:
    """Why one record cannot be used: `reason` is a fixed name to count by, `detail` is for a person.

    `hint` is a line of a recipe with which it would be read, or empty where there is none.
    """

    id: str
    reason: str
    detail: str
    repairs: tuple[str, ...]
    hint: str = field(default="", compare=False)
    unread: Unread = field(default=(), compare=False)


_DAMAGES = {
    "not_json": "it is not JSON",
    "not_utf8": "it is not UTF-8",
    "truncated_record": "it is not one JSON value; it is the last line, and may have been cut off",
    "record_too_large": f"it is above {MAX_RECORD_BYTES:,} bytes",
    "no_next_data": "the page has no script __NEXT_DATA__",
    "no_page_content": "the page's data has no props.pageProps.content",
}


def parse_record(record: Record, *, default_id: str, reading: Reading = Reading()) -> Turns | Drop:
    """The record's turns as they are written, or why there are none; never raises.

    The turns are the first list that is not empty under `conversations`, `items`, `messages`, `conversation` or
    `contents`. Each turn is one of:

    - `{from, value}` or `{role, content}`, with the weights of `own_weights`. The text may be parts, `{"type": "text",
      "text": ...}` or text: these are joined as they are. What an assistant thought (REASONING_KEYS) and calls
      (`tool_calls`, `function_call`, or a turn of CALL_ROLES) stands beside its text. What a tool says may be any JSON.
    - a pair: `[user, answer]`, or an object with one of USER_KEYS and one of ANSWER_KEYS, and maybe `system`. A side
      that is null makes no turn. `instruction` and `input` are one text together, with a blank line between.

    Beside the list stand `id`, `condition`, `system`, `tools` and the weights of `own_weights`. A null is as good as
    nothing anywhere, since a table writes every column into every record, and so is NaN but for a weight. The id is the
    record's own, a text or a number, or else `default_id`. `reading` says where parts have other names.

    Reasons of a drop: the record's `damage`; not_an_object; no_turns (no such list); turn_not_an_object; unknown_role;
    bad_pair (not two sides, or two texts for one side); value_not_text; not_text (pictures, sound, video or another
    part that is no text); bad_weight (see `own_weights`); bad_condition and bad_system (neither text nor null).

    Worked example: `{"id": 7, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value":
    "Hello"}]}` gives `Turns("7", "from/value", False, None, "", (Message("user", "Hi"), Message("assistant",
    "Hello")), ())`.
    """
    fields = record.fields
    if record.damage is not None:
        return Drop(default_id, record.damage, _DAMAGES[record.damage], record.repairs)
    if not isinstance(fields, dict):
        return Drop(default_id, "not_an_object", f"the record is {_kind(fields)}", record.repairs)
    if record.is_row:
        fields = {name: _without_nulls(value) for name, value in fields.items()}
    id = own_id(fields) or default_id
    list_name, turns = find_turns(fields, reading)
    unread: Unread = ()
    repairs = record.repairs
    try:
        unread = tuple(_find_unread(fields, list_name, turns, reading))
        if not turns and "answer" in reading.fields:
            name = str(reading.fields["answer"])
            raise _Refusal("value_not_text", f"{name}, which the source names as answer, is missing or null")
        if not turns:
            names = ", ".join(TURN_LISTS)
            if "turns" in reading.fields:
                names = f"{reading.fields['turns']}, {names}"
            raise _Refusal("no_turns", f"none of {names} is a list with turns")
        media = find_media(fields, turns)
        if media and reading.media == "drop":
            raise _Refusal("not_text", f"{media} is no text", _MEDIA_HINT)
        dialect, messages, has_other_parts = _parse_turns(fields, turns, reading)
        if media or has_other_parts:
            messages = tuple(replace(message, text=_PLACEHOLDER.sub("", message.text)) for message in messages)
            repairs += ("media_left_out",)
        condition = _parse_text_field(fields, "condition")
        system = _parse_text_field(fields, str(reading.fields.get("system", "system"))) or ""
        weight = weight_of_record(fields, reading.weight_field)
        tools = _find_tools(fields)
    except _Refusal as refusal:
        hint = refusal.hint
        if refusal.reason == "unknown_role":
            unknown = [name for turn in turns if (name := _role_name(turn)) and find_role(name, reading) is None]
            unread += tuple(("role", name[:80]) for name in unknown)
            hint = _hint_roles(turns, reading)
        if refusal.reason in _OTHER_NAMES:
            hint = hint or hint_fields(fields)
        return Drop(id, refusal.reason, refusal.detail, repairs, hint, unread)
    except BadWeight as error:
        return Drop(id, "bad_weight", str(error), repairs, "", unread)
    except RecursionError:
        return Drop(id, "value_not_text", "something in it is nested too deeply", repairs, "", unread)
    return Turns(id, dialect, record.is_page, condition, system, messages, repairs, weight, tools, unread)


def _without_nulls(value: Any) -> Any:
    """The value without nulls inside of its objects."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def own_id(fields: Mapping[str, Any]) -> str | None:
    """The record's own id as text; None where it has none."""
    own = fields.get("id")
    is_id = isinstance(own, str | int | float) and not isinstance(own, bool) and own == own and own != ""
    return str(own) if is_id else None


_OTHER_NAMES = ("no_turns", "unknown_role", "value_not_text")  # drops of records whose parts may have other names


class _Refusal(Exception):
    def __init__(self, reason: str, detail: str, hint: str = "") -> None:
        self.reason = reason
        self.detail = detail
        self.hint = hint


def _get(fields: Mapping[str, Any], name: str) -> Any:
    """The field's value, None for NaN too, which pandas writes for what is missing."""
    value = fields.get(name)
    return None if isinstance(value, float) and value != value else value


def _parse_text_field(fields: dict[str, Any], name: str) -> str | None:
    text = _get(fields, name)
    if text is not None and not isinstance(text, str):
        raise _Refusal(f"bad_{name}", f"{name} is {_kind(text)}")
    return text


# ---- What was met and is not read ----

_READ_FIELDS = frozenset(("id", "condition", *LISTS, "masked"))
_PART_FIELDS = frozenset(("type", "text", "thinking", "thought", *OF_A_TURN))
_PAIR_KEYS = frozenset(USER_KEYS + ANSWER_KEYS)
_SHAREGPT, _OPENAI = {"from", "value"}, {"role", "content"}  # turns of nearly all records


def _find_unread(
    fields: dict[str, Any], list_name: str, turns: Sequence[Any], reading: Reading
) -> Iterator[tuple[str, str]]:
    names = reading.fields
    named = {str(name) for value in names.values() for name in ([value] if isinstance(value, str) else value)}
    read = {list_name, str(names.get("system", "system")), reading.weight_field, _first(fields, TOOL_KEYS), *named}
    for name in sorted(fields.keys() - _READ_FIELDS - read):
        if _get(fields, name) is not None:
            yield "record field", name
    if reading.weight_field != "weight" and not isinstance(_get(fields, "weight"), list | None):
        yield "record field", "weight"
    for name in sorted(fields.keys() & (LISTS | {"masked"})):
        is_unsaid = not says_weight(name, fields[name]) and not _is_mask_of_users(name, fields[name])
        if name not in ("weight", reading.weight_field) and is_unsaid and fields[name] not in (None, ""):
            yield "record field", name
    if _get(fields, "id") is not None and own_id(fields) is None and fields["id"] != "":
        yield "record field", "id"
    for turn, renamed in zip(fields[list_name] if list_name else turns, turns, strict=True):
        if not isinstance(turn, dict) or turn.keys() == _SHAREGPT or turn.keys() == _OPENAI:
            continue
        text = renamed.get(_text_field(renamed))
        unsaid = {name for name in turn.keys() & OF_A_TURN if not says_weight(name, turn[name])}
        for name in sorted(turn.keys() - (_read_of(renamed) - unsaid) - named):
            is_copy = isinstance(turn[name], str) and turn[name] == text
            if _get(turn, name) not in (None, "") and not is_copy:
                yield "turn field", name
        for part in _parts_of(text):
            for name in sorted(part.keys() - _PART_FIELDS):
                if _get(part, name) is not None:
                    yield "part field", name


def _read_of(turn: dict[str, Any]) -> set[str]:
    """The names of the fields of a turn that are read."""
    role = _first(turn, ("from", "role"))
    if not role and _is_pair(turn):
        return {name for name in turn if name.strip().lower() in _PAIR_KEYS} | {"system", *OF_A_TURN}
    read = {role, _text_field(turn), *OF_A_TURN}
    if find_role(turn.get(role), Reading()) == "assistant":
        read |= {_find_reasoning(turn)[0], _first(turn, _CALL_KEYS)}
    return read


def _is_mask_of_users(name: str, value: object) -> bool:
    return name == "mask" and isinstance(value, str) and value.strip().lower() in ("user", "human")


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of the names whose field holds something; empty where none does."""
    return next((name for name in names if _get(fields, name)), "")


def _text_field(turn: Mapping[str, Any]) -> str:
    """The name of the field that holds the turn's text, an empty one only where no other does."""
    names = [name for name in ("value", "content", "parts") if turn.get(name) is not None]
    return next((name for name in names if turn[name] != ""), names[0] if names else "content")


# ---- Pictures, sound, video ----

_MEDIA_HINT = "data.media: text"


def find_media(fields: Mapping[str, Any], turns: Sequence[Any]) -> str:
    """The name of a field, of the record or of a turn, that holds pictures, sound or video; empty where there is none.

    That is one that is named so, or any with the name of a media file where a text has a placeholder such as <image>.
    """
    objects = [fields, *(turn for turn in turns if isinstance(turn, dict))]
    for part in objects:
        if part.keys() == _SHAREGPT or part.keys() == _OPENAI:
            continue
        for name, value in part.items():
            if _is_media_name(name) and _is_media(value, is_sure=_SURE_MEDIA.fullmatch(name) is not None):
                return str(name)
    texts = [text for part in objects for text in part.values() if isinstance(text, str) and "<" in text]
    for text in texts:
        if "</img>" in text or "</audio>" in text or "</video>" in text:
            for found in _PLACEHOLDER.finditer(text):
                if found[1]:
                    return found[0].strip()
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        is_file = bool(values) and all(isinstance(one, str) and _MEDIA_FILE.match(one) for one in values)
        is_named = _is_media_name(name) and _holds_something(value)
        if (is_file or is_named) and any(map(_PLACEHOLDER.search, texts)):
            return name
    return ""


def _is_media(value: Any, *, is_sure: bool) -> bool:
    """Whether a field that is named so holds pictures, sound or video, and not a note about them.

    is_sure: the name can mean nothing else, so that any text is taken for a file's name.
    """
    if isinstance(value, dict):
        return _holds_something(value)
    if isinstance(value, list):
        return any(_is_media(one, is_sure=is_sure) for one in value)
    if isinstance(value, str):
        return value.strip().lower() not in _ABSENT and (is_sure or _MEDIA_FILE.match(value) is not None)
    return isinstance(value, bytes) and bool(value)


@lru_cache(maxsize=4096)
def _is_media_name(name: str) -> bool:
    return _MEDIA.fullmatch(name) is not None


def _holds_something(value: object) -> bool:
    """Whether it is more than nulls and emptiness."""
    if isinstance(value, dict):
        return any(map(_holds_something, value.values()))
    if isinstance(value, list):
        return any(map(_holds_something, value))
    return value is not None and value != "" and value == value


# ---- Turns ----


def find_turns(fields: dict[str, Any], reading: Reading) -> tuple[str, Sequence[Any]]:
    """The name of the list of turns and its turns; without a name where question and answer are fields of the record.

    Parts that have other names get those that we know.
    """
    names = reading.fields
    if "answer" in names and (answer := _get(fields, str(names["answer"]))) is not None:
        asked = names.get("question", ())
        questions = [_get(fields, name) for name in ([asked] if isinstance(asked, str) else asked)]
        said = [question for question in questions if question not in (None, "")]
        others = [question for question in said if not isinstance(question, str)]  # refused by whoever reads the turns
        question = others[0] if others else "\n\n".join(said) if said else next(iter(questions), None)
        user = [{"role": "user", "content": question}] if asked else []
        return "", [*user, {"role": "assistant", "content": answer}]
    lists = ([str(names["turns"])] if "turns" in names else []) + list(TURN_LISTS)
    for list_name in lists:
        turns = fields.get(list_name)
        if isinstance(turns, list) and turns:
            break
    else:
        return "", ()
    if "role" in names or "text" in names:
        turns = [_rename(turn, names) if isinstance(turn, dict) else turn for turn in turns]
    return list_name, turns


def _rename(turn: dict[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """The turn under the usual names; as it is where it has no others."""
    renamed = dict(turn)
    if "role" in names and names["role"] in turn:
        renamed |= {"from": None, "role": turn[names["role"]]}
    if "text" in names and names["text"] in turn:
        renamed |= {"value": None, "content": turn[names["text"]]}
    return renamed


def _parse_turns(
    fields: dict[str, Any], turns: Sequence[Any], reading: Reading
) -> tuple[str, tuple[Message, ...], bool]:
    """The dialect, the messages, and whether parts were left out that are no text."""
    dialects: dict[str, None] = {}
    messages: list[Message] = []
    listed = weights_of_turns(fields, len(turns))
    parts = _Parts(reading)
    for number, (turn, weight) in enumerate(zip(turns, listed, strict=True), start=1):
        if isinstance(turn, list | tuple):
            dialect = "pairs"
            if len(turn) != 2:
                raise _Refusal("bad_pair", f"turn {number} is a list of {len(turn)}, not of [user, answer]")
            said = _parse_pair({"user": turn[0], "assistant": turn[1]}, number, parts)
        elif not isinstance(turn, dict):
            raise _Refusal("turn_not_an_object", f"turn {number} is {_kind(turn)}")
        else:
            own = weight_of_turn(turn, f"turn {number}")
            weight = own if weight is None else weight * (1.0 if own is None else own)
            if _get(turn, "from") is not None:
                dialect = "from/value"
                said = [_parse_message(turn, turn["from"], number, parts)]
            elif _get(turn, "role") is not None or not _is_pair(turn):
                dialect = "role/content"
                said = [_parse_message(turn, _get(turn, "role"), number, parts)]
            else:
                dialect = "pairs"
                said = _parse_pair(turn, number, parts)
        if weight is not None and (dialect != "pairs" or said[-1].role == "assistant"):  # of a pair the answer's
            said[-1] = replace(said[-1], weight=weight)
        messages += said
        dialects[dialect] = None
    return " + ".join(dialects), tuple(messages), parts.has_others


def _parse_message(turn: dict[str, Any], name: object, number: int, parts: "_Parts") -> Message:
    role = find_role(name, parts.reading)
    text = turn.get("value", turn.get("content"))
    if len(turn) == 2 and role is not None and role != "call" and isinstance(text, str):
        return Message(role, text)  # nearly always
    if role is None:
        shown = f"{name!r:.80}" if isinstance(name, str) else _kind(name)
        raise _Refusal("unknown_role", f"the role of turn {number} is {shown}")
    value = turn.get(_text_field(turn))
    if role == "call":
        return Message("assistant", "", calls=_write_json(value, f"the call of turn {number}"))
    has_pictures = isinstance(value, list) and any(part.get("type") in _MEDIA_PARTS for part in _parts_of(value))
    if role == "tool" and not isinstance(value, str) and not _are_texts(value) and not has_pictures:
        return Message("tool", _write_json(value, f"the text of turn {number}"))
    if role != "assistant":
        return Message(role, parts.text(value, number)[0])
    reasoning = _find_reasoning(turn)[1]
    calls = _find_calls(turn)
    written = "" if calls is None else _write_json(calls, f"the calls of turn {number}")
    if value is None and (written or reasoning):
        return Message("assistant", "", reasoning=reasoning, calls=written)
    text, thought = parts.text(value, number)
    return Message("assistant", text, reasoning=reasoning or thought, calls=written)


def find_role(name: object, reading: Reading) -> Role | Literal["call"] | None:
    """The role of that name, "call" where the assistant does nothing but call tools, or None."""
    if not isinstance(name, str):
        return None
    if name in ROLES and name not in CALL_ROLES and not reading.roles:  # nearly always
        return ROLES[name]
    as_written = name.strip().lower()
    letters = re.sub(r"[\s_-]+", "", as_written)
    for own, role in reading.roles.items():
        if re.sub(r"[\s_-]+", "", own.lower()) == letters:
            return role
    return _ROLE_BY_LETTERS.get(letters)


_ROLE_BY_LETTERS: dict[str, Role | Literal["call"]] = {
    name.replace("_", ""): "call" if name in CALL_ROLES else role for name, role in ROLES.items()
}


class _Parts:
    """How the texts of one record are read; `has_others` is whether parts were left out."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.has_others = False

    def text(self, value: Any, number: int) -> tuple[str, str]:
        """(text, reasoning) of a text or of parts."""
        if isinstance(value, str):
            return value, ""
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) or (isinstance(item, dict) and item) for item in items):
            raise _Refusal("value_not_text", f"the text of turn {number} is {_kind(value)}")
        texts, thoughts = [], []
        for part in items:
            if isinstance(part, str):
                texts.append(part)
                continue
            if weight_of_turn(part, f"a part of turn {number}") is not None:
                raise BadWeight(f"a part of turn {number} has a weight; give the whole turn one, or split the turn")
            kind = part.get("type")
            if _is_media_part(part):
                if self.reading.media == "drop":
                    raise _Refusal(
                        "not_text", f"a part of turn {number} is no text; it is {_name_of(part)}", _MEDIA_HINT
                    )
                self.has_others = True
                texts.append(part["text"] if isinstance(part.get("text"), str) else "")
            elif kind in ("thinking", "reasoning") and isinstance(part.get("thinking", part.get("text")), str):
                thoughts.append(part.get("thinking", part.get("text")))
            elif kind in _TEXT_PARTS and isinstance(part.get("text"), str):
                (thoughts if part.get("thought") in (True, "true") else texts).append(part["text"])
            else:
                raise _Refusal("not_text", f"a part of turn {number} is no text; it is {_name_of(part)}")
        return "".join(texts), "".join(thoughts)


_MEDIA_PARTS = tuple(
    f"{before}{kind}{after}"
    for kind in ("image", "audio", "video", "file")
    for before in ("", "input_")
    for after in ("", "_url")
)
_TEXT_PARTS = (None, "text", "input_text", "output_text")  # Gemini's have no type, those of OpenAI's responses another


def _parts_of(value: object) -> list[dict[str, Any]]:
    return [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, dict)]


def _are_texts(value: object) -> bool:
    """Whether this is a part of text or a list of them, and nothing that only looks like one."""
    parts = value if isinstance(value, list) and value else [value]
    return all(
        isinstance(p, dict) and p.get("type") in _TEXT_PARTS[1:] and isinstance(p.get("text"), str) for p in parts
    )


def _is_media_part(part: Mapping[str, Any]) -> bool:
    if isinstance(part.get("type"), str) and part["type"] in _MEDIA_PARTS:
        return True
    return any(_is_media_name(name) and _is_media(part[name], is_sure=True) for name in part)


def _name_of(part: Mapping[str, Any]) -> str:
    """What a part is, for a person: its type, or else its fields."""
    return f"{part['type']!r:.80}" if "type" in part else f"an object with {', '.join(map(repr, part)):.80}"


def _find_reasoning(turn: Mapping[str, Any]) -> tuple[str, str]:
    """(field, text) of the reasoning beside the text; two empty texts where there is none."""
    for name in REASONING_KEYS:
        said = turn.get(name)
        if isinstance(said, list) and said and _are_texts(said):
            said = "".join(part["text"] for part in said)
        if isinstance(said, str) and said:
            return name, said
    return "", ""


def _find_calls(turn: dict[str, Any]) -> object:
    """What an assistant calls in this turn, or None."""
    for name in _CALL_KEYS:
        calls = _get(turn, name)
        is_empty = re.sub(r"\s", "", calls) in _EMPTY_JSON if isinstance(calls, str) else not _holds_something(calls)
        if not is_empty:
            return calls
    return None


def _find_tools(fields: Mapping[str, Any]) -> str:
    """The definitions of tools as the record writes them; empty where there are none."""
    tools = _get(fields, _first(fields, TOOL_KEYS))
    if isinstance(tools, str):
        return "" if re.sub(r"\s", "", tools) in _EMPTY_JSON else tools
    if not isinstance(tools, list | dict | None):
        raise _Refusal("value_not_text", f"the definitions of tools are {_kind(tools)}")
    return _write_json(tools, "the definitions of tools") if _holds_something(tools) else ""


def _write_json(value: object, name: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        raise _Refusal("value_not_text", f"{name} is {_kind(value)}")
    try:
        return orjson.dumps(value, default=str).decode()
    except TypeError:  # a number above 64 bits, or nested more deeply than orjson writes
        pass
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    except (RecursionError, TypeError, ValueError) as error:
        raise _Refusal("value_not_text", f"{name} cannot be written as JSON ({error})") from None


def _is_pair(turn: dict[str, Any]) -> bool:
    return any(turn[key] is not None and key.strip().lower() in _PAIR_KEYS for key in turn)


def _parse_pair(turn: dict[str, Any], number: int, parts: _Parts) -> list[Message]:
    sides = {key.strip().lower(): value for key in turn if (value := _get(turn, key)) is not None}
    asked = [key for key in USER_KEYS if key in sides]
    answered = [key for key in ANSWER_KEYS if key in sides]
    is_instruction = asked == ["input", "instruction"]
    if (len(asked) > 1 and not is_instruction) or len(answered) > 1 or not asked + answered:
        shown = ", ".join(asked + answered) or "nothing"
        raise _Refusal("bad_pair", f"turn {number} is no pair of a user's text and an answer; it holds {shown}")
    messages = [Message("system", parts.text(sides["system"], number)[0])] if sides.get("system") else []
    if is_instruction:
        texts = [parts.text(sides[key], number)[0] for key in ("instruction", "input")]
        messages.append(Message("user", "\n\n".join(text for text in texts if text)))
    elif asked:
        messages.append(Message("user", parts.text(sides[asked[0]], number)[0]))
    if answered:
        messages.append(Message("assistant", parts.text(sides[answered[0]], number)[0]))
    return messages


def _kind(value: object) -> str:
    """What JSON calls it."""
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"


# ---- The line of a recipe that would read a record ----

_ROLE_FIELDS = ("role", "from", "speaker", "author", "sender", "user", "name", "type")
_TEXT_FIELDS = ("content", "value", "text", "message", "body", "utterance", "msg")
_SYSTEM_FIELDS = ("system_prompt", "system_message", "sys")


def hint_fields(fields: Mapping[str, Any]) -> str:
    """The line `fields: {...}` for a record whose turns have other names, or empty where none can be guessed.

    Worked example: {"chat": [{"speaker": "user", "text": "Hi"}, {"speaker": "bot", "text": "Hello"}]} gives "fields:
    {turns: chat, role: speaker, text: text}", and {"instruction": "Add.", "output": "3"} gives "fields: {question:
    instruction, answer: output}".
    """
    system = next((f", system: {name}" for name in _SYSTEM_FIELDS if isinstance(fields.get(name), str)), "")
    for name, turns in fields.items():
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            role = next((key for key in _ROLE_FIELDS if isinstance(turns[0].get(key), str)), None)
            text = next((key for key in _TEXT_FIELDS if key != role and isinstance(turns[0].get(key), str)), None)
            is_known = name in TURN_LISTS and role in ("role", "from") and text in ("content", "value")
            roles = [find_role(turn.get(role), Reading()) for turn in turns if isinstance(turn, dict) and role]
            # Where there is but one side, the other stands elsewhere.
            has_both = roles[:1] != ["assistant"] and not {"user", "system"} >= set(roles)
            if role and text and not is_known and has_both:
                return f"fields: {{turns: {_yaml(name)}, role: {_yaml(role)}, text: {_yaml(text)}{system}}}"
    answers = [key for key in ANSWER_KEYS if isinstance(fields.get(key), str)]
    questions = [key for key in ("instruction", *USER_KEYS) if isinstance(fields.get(key), str)]
    if len(answers) == 1 and questions:
        asked = "[instruction, input]" if {"instruction", "input"} <= set(questions) else questions[0]
        return f"fields: {{question: {asked}, answer: {answers[0]}{system}}}"
    return ""


def _hint_roles(turns: Sequence[Any], reading: Reading) -> str:
    """The line `roles: {...}` for unknown names, the first of which is taken for the user's where no other is."""
    names = [_role_name(turn) for turn in turns]
    unknown = list(dict.fromkeys(name for name in names if name and find_role(name, reading) is None))
    known = {find_role(name, reading) for name in names}
    guesses = ["user"] * ("user" not in known) + ["assistant"] * len(unknown)
    roles = ", ".join(f"{_yaml(name)}: {role}" for name, role in zip(unknown, guesses, strict=False))
    return f"roles: {{{roles}}}  # or system, tool" if unknown and len(roles) < 200 else ""


def _role_name(turn: object) -> str:
    """The name of a turn's role, or empty."""
    name = turn.get(_first(turn, ("from", "role"))) if isinstance(turn, dict) else None
    return name if isinstance(name, str) else ""


def _yaml(name: str) -> str:
    """A name as a YAML scalar."""
    is_plain = re.fullmatch(r"[^\W\d][\w-]*", name) and name.lower() not in _YAML_WORDS
    return name if is_plain else json.dumps(name, ensure_ascii=False)


_YAML_WORDS = ("yes", "no", "on", "off", "true", "false", "null", "y", "n")
