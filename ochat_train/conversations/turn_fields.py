"""The fields of one turn: in which it has its role, its text, its reasoning and its calls."""

from collections.abc import Mapping
from typing import Any

from ochat_train.conversations.fields import first_name, get_value, is_empty_json

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
    return all(
        isinstance(p, dict) and p.get("type") in TEXT_PARTS[1:] and isinstance(p.get("text"), str) for p in parts
    )


def find_reasoning(turn: Mapping[str, Any]) -> tuple[str, str]:
    """(field, text) of the reasoning beside the text, or two empty strings."""
    for name in _REASONING_KEYS:
        said = turn.get(name)
        if isinstance(said, list) and said and are_texts(said):
            said = "".join(part["text"] for part in said)
        if isinstance(said, str) and said:
            return name, said
    return "", ""


def find_calls(turn: Mapping[str, Any]) -> Any:
    """The tool calls beside the text, or None."""
    values = (get_value(turn, name) for name in CALL_KEYS)
    return next((calls for calls in values if not is_empty_json(calls)), None)
