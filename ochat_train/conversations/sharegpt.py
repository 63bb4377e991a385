"""Records to turns: the dialects in which chats are written down, and the names that their roles have there."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import orjson

from ochat_train.conversations import own_weights
from ochat_train.conversations.own_weights import BadWeight, weight_of_record, weight_of_turn, weights_of_turns
from ochat_train.conversations.records import MAX_RECORD_BYTES, TURN_LISTS, Record
from ochat_train.conversations.schema import Message, Role

# Compared in lower case, with "-" and white space as "_". What a tool answered is context without a loss.
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
TOOL_KEYS = ("tools", "functions")  # definitions of the tools that may be called, beside the turns
MEDIA_KEYS = frozenset(
    f"{kind}{more}" for kind in ("image", "audio", "video") for more in ("", "s", "_path", "_paths", "_url", "_urls")
)
_MEDIA_SUFFIXES = tuple(f".{kind}" for kind in re.split(" ", "jpg jpeg png gif webp bmp wav mp3 flac ogg mp4 mov webm"))
_PLACEHOLDER = re.compile(r"<\|?(?:image|audio|video)(?:_\d+|_pad)?\|?>\n?")


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


# What of a record was met and not read: ("record field" | "turn field" | "role", its name), once for each time.
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
    "truncated_record": "it is not JSON, and the file ends inside it",
    "record_too_large": f"it is above {MAX_RECORD_BYTES:,} bytes",
    "no_next_data": "the page has no script __NEXT_DATA__",
    "no_page_content": "the page's data has no props.pageProps.content",
}


def parse_record(record: Record, *, default_id: str, reading: Reading = Reading()) -> Turns | Drop:
    """The record's turns as they are written, or why there are none; never raises.

    The turns are the first list that is not empty under `conversations`, `items`, `messages`, `conversation` or
    `contents`. A turn is one of, told apart turn by turn:

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
        hint = "encoding: cp1252   (or whatever the file is in)" if record.damage == "not_utf8" else ""
        return Drop(default_id, record.damage, _DAMAGES[record.damage], record.repairs, hint)
    if not isinstance(fields, dict):
        return Drop(default_id, "not_an_object", f"the record is {_kind(fields)}", record.repairs)
    id = own_id(fields) or default_id
    list_name, turns = find_turns(fields, reading)
    unread = tuple(_find_unread(fields, list_name, turns, reading))
    repairs = record.repairs
    try:
        if not turns:
            names = ", ".join(TURN_LISTS)
            if "turns" in reading.fields:
                names = f"{reading.fields['turns']}, {names}"
            raise _Refusal("no_turns", f"none of {names} is a list with turns")
        media = find_media(fields, turns)
        if media and reading.media == "drop":
            raise _Refusal("not_text", f"{media} is no text", _MEDIA_HINT)
        dialect, messages, has_other_parts = _parse_turns(fields, turns, reading)
        if media:
            messages = tuple(replace(message, text=_PLACEHOLDER.sub("", message.text)) for message in messages)
        if media or has_other_parts:
            repairs += ("media_left_out",)
        condition = _parse_text_field(fields, "condition")
        system = _parse_text_field(fields, str(reading.fields.get("system", "system"))) or ""
        weight = weight_of_record(fields, reading.weight_field)
        definitions = next((fields[name] for name in TOOL_KEYS if _get(fields, name)), "")
        tools = _write_json(definitions, "tools") if definitions else ""
    except _Refusal as refusal:
        if refusal.reason == "unknown_role":
            unread += tuple(("role", name) for turn in turns if (name := _unknown_role(turn, reading)))
        hint = refusal.hint or (hint_fields(fields) if refusal.reason in _OTHER_NAMES else "")
        return Drop(id, refusal.reason, refusal.detail, repairs, hint, unread)
    except BadWeight as error:
        return Drop(id, "bad_weight", str(error), record.repairs, "", unread)
    return Turns(id, dialect, record.is_page, condition, system, messages, repairs, weight, tools, unread)


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

_READ_FIELDS = frozenset(("id", "condition", *TOOL_KEYS, *own_weights.LISTS, *own_weights.RECORD_FLAGS))
_MESSAGE_FIELDS = frozenset(
    (
        *("from", "value", "role", "content", "parts", "tool_calls", "function_call", *REASONING_KEYS),
        *(*own_weights.WEIGHTS, *own_weights.FLAGS, *own_weights.EXCLUSIONS, *own_weights.PARTS),
    )
)
_PAIR_KEYS = frozenset(USER_KEYS + ANSWER_KEYS)
_SHAREGPT, _OPENAI = {"from", "value"}, {"role", "content"}  # turns of nearly all records


def _find_unread(
    fields: dict[str, Any], list_name: str, turns: Sequence[Any], reading: Reading
) -> Iterator[tuple[str, str]]:
    named = {str(name) for value in reading.fields.values() for name in ([value] if isinstance(value, str) else value)}
    read = {list_name, str(reading.fields.get("system", "system")), reading.weight_field, *named}
    for name in fields.keys() - _READ_FIELDS - read:
        if _get(fields, name) is not None:
            yield "record field", name
    if fields.get("weight") is not None and reading.weight_field != "weight" and not isinstance(fields["weight"], list):
        yield "record field", "weight"
    for turn in turns:
        if not isinstance(turn, dict) or turn.keys() == _SHAREGPT or turn.keys() == _OPENAI:
            continue
        if _get(turn, "from") is None and _get(turn, "role") is None and _is_pair(turn):
            names = {name for name in turn if name.strip().lower() not in _PAIR_KEYS} - {"system"}
            names -= _MESSAGE_FIELDS - {"content", "value", "parts"}
        else:
            names = turn.keys() - _MESSAGE_FIELDS - named
            for first, second in (("from", "role"), ("value", "content")):
                if turn.get(first) is not None and turn.get(second) not in (None, turn[first]):
                    yield "turn field", second
        for name in names:
            if _get(turn, name) is not None:
                yield "turn field", name


# ---- Pictures, sound, video ----

_MEDIA_HINT = "data.media: text"


def find_media(fields: Mapping[str, Any], turns: Sequence[Any]) -> str:
    """The name of a field, of the record or of a turn, that holds pictures, sound or video; empty where there is none.

    That is one of MEDIA_KEYS, or any field with a media file's name where a text has a placeholder such as <image>.
    """
    objects = [fields, *(turn for turn in turns if isinstance(turn, dict))]
    for part in objects:
        if not part.keys().isdisjoint(MEDIA_KEYS):
            for name in sorted(part.keys() & MEDIA_KEYS):
                if _get(part, name):
                    return str(name)
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        if all(isinstance(one, str) and one.lower().endswith(_MEDIA_SUFFIXES) for one in values) and values:
            texts = (text for part in objects for text in part.values() if isinstance(text, str))
            if any(_PLACEHOLDER.search(text) for text in texts):
                return name
    return ""


# ---- Turns ----


def find_turns(fields: dict[str, Any], reading: Reading) -> tuple[str, Sequence[Any]]:
    """The name of the list of turns and its turns; without a name where question and answer are fields of the record.

    Parts that have other names get those that we know.
    """
    names = reading.fields
    if "answer" in names:
        asked = names.get("question", ())
        questions = [fields.get(name) for name in ([asked] if isinstance(asked, str) else asked)]
        said = [question for question in questions if question not in (None, "")]
        is_text = all(isinstance(question, str) for question in said)
        question = "\n\n".join(map(str, said)) if is_text and said else next(iter(questions), None)
        answer = fields.get(str(names["answer"]))
        user = [{"role": "user", "content": question}] if asked else []
        return "", [*user, {"role": "assistant", "content": answer}] if answer is not None else []
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
    renamed = dict(turn)
    if "role" in names:
        renamed |= {"from": None, "role": turn.get(names["role"])}
    if "text" in names:
        renamed |= {"value": None, "content": turn.get(names["text"])}
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
        if weight is not None and said:
            said[-1] = replace(said[-1], weight=weight)  # of a pair the answer's
        messages += said
        dialects[dialect] = None
    return " + ".join(dialects), tuple(messages), parts.has_others


def _parse_message(turn: dict[str, Any], name: object, number: int, parts: "_Parts") -> Message:
    role = find_role(name, parts.reading)
    if role is None:
        shown = f"{name!r:.80}" if isinstance(name, str) else _kind(name)
        hint = f"roles: {{{_yaml(name)}: assistant}}   (or user, system, tool)" if isinstance(name, str) else ""
        raise _Refusal("unknown_role", f"the role of turn {number} is {shown}", hint)
    value = turn.get("value")
    for other in ("content", "parts"):
        value = turn.get(other) if value is None else value
    if role == "call":
        return Message("assistant", "", calls=_write_json(value, f"the call of turn {number}"))
    if role == "tool" and not isinstance(value, str) and not _are_parts(value):
        return Message("tool", _write_json(value, f"the text of turn {number}"))
    if role != "assistant":
        return Message(role, parts.text(value, number)[0])
    reasoning: object = ""
    if not turn.keys().isdisjoint(REASONING_KEYS):
        reasoning = next((said for key in REASONING_KEYS if (said := _get(turn, key))), "")
    if not isinstance(reasoning, str):
        raise _Refusal("value_not_text", f"the reasoning of turn {number} is {_kind(reasoning)}")
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
    for own, role in reading.roles.items():
        if own.strip().lower() == as_written:
            return role
    key = re.sub(r"[\s-]+", "_", as_written)
    return "call" if key in CALL_ROLES else ROLES.get(key)


def _unknown_role(turn: object, reading: Reading) -> str:
    """The name of a turn's role where it is unknown, or empty."""
    if not isinstance(turn, dict):
        return ""
    name = turn.get("role") if _get(turn, "from") is None else turn["from"]
    return name if isinstance(name, str) and find_role(name, reading) is None else ""


class _Parts:
    """How the texts of one record are read; `has_others` is whether parts were left out."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.has_others = False

    def text(self, value: Any, number: int) -> tuple[str, str]:
        """(text, reasoning) of a text or of parts."""
        if isinstance(value, str):
            return value, ""
        if not _are_parts(value):
            raise _Refusal("value_not_text", f"the text of turn {number} is {_kind(value)}")
        texts, thoughts = [], []
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, str):
                texts.append(part)
                continue
            kind = part.get("type")
            if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
                texts.append(part["text"])
            elif kind in ("thinking", "reasoning") and isinstance(part.get("thinking", part.get("text")), str):
                thoughts.append(part.get("thinking", part.get("text")))
            elif self.reading.media == "text" and any(medium in str(kind) for medium in ("image", "audio", "video")):
                self.has_others = True
            else:
                shown = f"{kind!r:.80}" if isinstance(kind, str) else _kind(kind)
                detail = f"a part of turn {number} is no text; its type is {shown}"
                raise _Refusal("not_text", detail, _MEDIA_HINT)
        return "".join(texts), "".join(thoughts)


_TEXT_PARTS = (None, "text", "input_text", "output_text")  # Gemini's have no type, those of OpenAI's responses another


def _are_parts(value: object) -> bool:
    """Whether this is one part or a list of them."""
    parts = value if isinstance(value, list) else [value]
    return all(isinstance(p, str) or (isinstance(p, dict) and ("type" in p or "text" in p)) for p in parts)


def _find_calls(turn: dict[str, Any]) -> object:
    """What an assistant calls in this turn, or None."""
    for name in ("tool_calls", "function_call"):
        calls = _get(turn, name)
        # an object of nulls is an empty cell of a table
        if calls and not (isinstance(calls, dict) and all(value is None for value in calls.values())):
            return calls
    return None


def _write_json(value: object, name: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        raise _Refusal("value_not_text", f"{name} is {_kind(value)}")
    try:
        return orjson.dumps(value, default=str).decode()
    except TypeError as error:  # orjson's own: nested more deeply than it writes, though it could read it
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
        messages.append(Message("assistant", *parts.text(sides[answered[0]], number)[:1]))
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


def hint_fields(fields: Mapping[str, Any]) -> str:
    """The line `fields: {...}` for a record whose turns have other names, or empty where none can be guessed.

    Worked example: {"chat": [{"speaker": "user", "text": "Hi"}]} gives "fields: {turns: chat, role: speaker, text:
    text}", and {"instruction": "Add.", "output": "3"} gives "fields: {question: instruction, answer: output}".
    """
    for name, turns in fields.items():
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            role = next((key for key in _ROLE_FIELDS if isinstance(turns[0].get(key), str)), None)
            text = next((key for key in _TEXT_FIELDS if key != role and isinstance(turns[0].get(key), str)), None)
            is_known = name in TURN_LISTS and role in ("role", "from") and text in ("content", "value")
            if role and text and not is_known:
                return f"fields: {{turns: {_yaml(name)}, role: {_yaml(role)}, text: {_yaml(text)}}}"
    answers = [key for key in ANSWER_KEYS if isinstance(fields.get(key), str)]
    questions = [key for key in ("instruction", *USER_KEYS) if isinstance(fields.get(key), str)]
    if len(answers) == 1 and questions:
        asked = "[instruction, input]" if {"instruction", "input"} <= set(questions) else questions[0]
        return f"fields: {{question: {asked}, answer: {answers[0]}}}"
    return ""


def _yaml(name: str) -> str:
    """A name as a YAML scalar."""
    return name if re.fullmatch(r"[^\W\d][\w-]*", name) else orjson.dumps(name).decode()
