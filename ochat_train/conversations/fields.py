"""The fields of a record: the names that a source gives them, what counts as nothing, how an error shows a value."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import Repr
from typing import Any, Literal

from ochat_train.conversations.schema import Role


@dataclass(frozen=True, slots=True)
class Reading:
    """What a recipe says about how the records of a source are written.

    fields: the names of the parts of a record: turns, role, text, history, question (one or several), answer, answers
    (one or several), chosen, rejected, system. roles: names of roles besides `roles.ROLES`. weight_field: the field
    with a record's own weight, None for none. media: what happens to a record with pictures, sound or video: it is
    dropped, or only its text is read. tree: whether a tree of messages is its best path, or each answer of it.
    """

    fields: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    roles: Mapping[str, Role] = field(default_factory=dict)
    weight_field: str | None = "weight"
    media: Literal["drop", "text"] = "drop"
    tree: Literal["best", "all"] = "best"


AS_USUAL = Reading()


def get_value(fields: Mapping[str, Any], name: str) -> Any:
    """The field's value; None where it is missing or NaN, which pandas writes for missing values."""
    value = fields.get(name)
    return None if isinstance(value, float) and value != value else value


def own_id(fields: Mapping[str, Any]) -> str | None:
    """The record's own id as text; None where it has none."""
    id = get_value(fields, "id")
    is_id = isinstance(id, str | int | float) and not isinstance(id, bool) and id != ""
    return str(id) if is_id else None


def first_name(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of the names whose field is truthy, or an empty string."""
    return next((name for name in names if get_value(fields, name)), "")


def holds_something(value: object) -> bool:
    """Whether a value is more than null, NaN, an empty text, or lists and objects of these."""
    if isinstance(value, dict):
        return any(map(holds_something, value.values()))
    if isinstance(value, list):
        return any(map(holds_something, value))
    return value is not None and value != "" and value == value


def is_empty_json(value: object) -> bool:
    """Whether a value, or the JSON in a text, holds nothing: null, "", [], {}."""
    if isinstance(value, str):
        return re.sub(r"\s", "", value) in ("", "[]", "{}", "null", "None")
    return not holds_something(value)


def kind_of(value: object) -> str:
    """The JSON type of a value in words, for messages: "a number", "a list", "missing or null"."""
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"


_SHORT = Repr()  # limits length and depth, whatever a record holds
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def show(value: object) -> str:
    """The value as Python writes it, shortened, for an error."""
    return _SHORT.repr(value)


# ---- Of a turn: in which fields it has its role, its text, its reasoning and its calls ----

# The keys of a pair: one of each side.
USER_KEYS = ("human", "user", "input", "instruction", "prompt", "question", "query")
ANSWER_KEYS = ("assistant", "gpt", "bot", "output", "response", "answer", "completion")
PAIR_KEYS = frozenset(USER_KEYS + ANSWER_KEYS)

CALL_KEYS = ("tool_calls", "function_call")
TOOL_KEYS = ("tools", "functions")  # definitions of the tools that may be called, beside the turns
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
TEXT_PARTS = (None, "text", "input_text", "output_text")  # Gemini's have no type, OpenAI's responses have the last two

_SHAREGPT, _OPENAI = {"from", "value"}, {"role", "content"}


def is_plain(fields: Mapping[str, Any]) -> bool:
    """Whether an object has nothing but a role and a text, as nearly all turns do."""
    return fields.keys() == _SHAREGPT or fields.keys() == _OPENAI


def is_pair(turn: Mapping[str, Any]) -> bool:
    """Whether a turn has a side of a pair."""
    return any(turn[key] is not None and key.strip().lower() in PAIR_KEYS for key in turn)


def role_field(turn: Mapping[str, Any]) -> str:
    """The name of the field with the turn's role, or empty."""
    return first_name(turn, ("from", "role"))


def text_field(turn: Mapping[str, Any]) -> str:
    """The name of the field with the turn's text: one that is empty only where no other has a text."""
    names = [name for name in ("value", "content", "parts") if turn.get(name) is not None]
    return next((name for name in names if turn[name] != ""), names[0] if names else "content")


def parts_of_text(value: object) -> list[dict[str, Any]]:
    """The parts of a text that are objects."""
    return [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, dict)]


def are_texts(value: object) -> bool:
    """Whether a value is a part of type text or a list of them. A part without a type only looks like one."""
    parts = value if isinstance(value, list) and value else [value]
    return all(isinstance(p, dict) and p.get("type") in TEXT_PARTS[1:] and text_of_part(p) is not None for p in parts)


def text_of_part(part: Mapping[str, Any]) -> str | None:
    """The text of a part of a text or of reasoning, or None. LLaMA-Factory's second form has it in `value`."""
    names = ("text", "thinking", "value") if "type" in part else ("text",)
    return next((part[name] for name in names if isinstance(part.get(name), str)), None)


def find_reasoning(turn: Mapping[str, Any]) -> tuple[str, str]:
    """(field, text) of the reasoning beside the text, or two empty strings."""
    for name in _REASONING_KEYS:
        said = turn.get(name)
        if isinstance(said, list) and said and are_texts(said):
            said = "".join(text_of_part(part) or "" for part in said)
        if isinstance(said, str) and said:
            return name, said
    return "", ""


def find_calls(turn: Mapping[str, Any]) -> Any:
    """The tool calls beside the text, or None."""
    values = (get_value(turn, name) for name in CALL_KEYS)
    return next((calls for calls in values if not is_empty_json(calls)), None)
