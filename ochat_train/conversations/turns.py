"""The turns that the value of a field stands for: lists of them, lists written as text, and plain text."""

import ast
import io
import re
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ochat_train.conversations.fields import get_value
from ochat_train.conversations.json_scan import parse_json
from ochat_train.conversations.records import TURN_LISTS

# Where the turns of a text begin that is a whole conversation: the user's and the assistant's. The first are those of
# Anthropic's hh-rlhf, the second those of openassistant-guanaco.
MARKS = (("\n\nHuman:", "\n\nAssistant:"), ("### Human:", "### Assistant:"))
TEXT_NAMES = ("content", "value", "text", "response", "answer", "completion", "output", "generation", "message", "body")


class Turns(NamedTuple):
    """Turns under the usual names of their fields. `is_text`: whether they were made of plain texts.

    repairs: "python_literal_read" where a list was written as Python writes it.
    """

    turns: Sequence[Any] = ()
    is_text: bool = False
    repairs: tuple[str, ...] = ()


NO_TURNS = Turns()


def turns_of_list(value: Any, names: Mapping[str, Any]) -> Turns:
    """The turns of a list of them; none if the value is no such list.

    It may be written as text, as JSON or as Python writes it, be a text with MARKS, or an object of lists, as
    `datasets` has it. Of a list of texts the first is the user's, the next the assistant's, and so on. `names` are
    those of the recipe.
    """
    repairs: tuple[str, ...] = ()
    if isinstance(value, str):
        if marked := split_marked(value):
            return Turns(marked)
        value, repairs = read_written(value)
    turns = zip_lists(value) if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns:
        return NO_TURNS
    if len(turns) > 1 and all(isinstance(turn, str) for turn in turns):
        return Turns([_say(("user", "assistant")[place % 2], turn) for place, turn in enumerate(turns)], True, repairs)
    return Turns(rename(turns, names), False, repairs)


def turns_of_side(value: Any, role: str, names: Mapping[str, Any]) -> Turns:
    """The turns of a question or an answer: one of `role` for a text; or those of messages, of one or of a list."""
    messages: Any = value
    repairs: tuple[str, ...] = ()
    if isinstance(value, str):
        is_marked = value.startswith("\n\nHuman:") or value.lstrip().startswith("### Human:")
        if is_marked and (marked := split_marked(value)):
            return Turns(marked)
        messages, repairs = read_written(value)
    elif isinstance(value, dict):
        messages = [value]
    if _are_messages(messages, names):
        return Turns(rename(messages, names), False, repairs)
    if isinstance(value, dict):
        for name in TURN_LISTS:
            if isinstance(value.get(name), list) and value[name]:
                return turns_of_list(value[name], names)
        value = value.get(text_name(value, names), value)
    return Turns([_say(role, value)], True)


def text_name(answer: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    """The field with the text of an answer that is an object, or empty."""
    wanted = (str(names["text"]), *TEXT_NAMES) if "text" in names else TEXT_NAMES
    return next((name for name in wanted if isinstance(answer.get(name), str | list)), "")


def _say(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


def _are_messages(value: Any, names: Mapping[str, Any]) -> bool:
    """Whether a value is a list of turns that say whose they are."""
    roles = ("role", "from", str(names.get("role", "role")))
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and any(get_value(turn, name) is not None for name in roles) for turn in value)
    )


def rename(turns: Sequence[Any], names: Mapping[str, Any]) -> Sequence[Any]:
    """The turns with role and text under the usual names too."""
    if "role" not in names and "text" not in names:
        return turns
    renamed = []
    for turn in turns:
        if isinstance(turn, dict):
            if (role := look_up(turn, str(names.get("role", "")))) is not None:
                turn = turn | {"from": None, "role": role}
            if (text := look_up(turn, str(names.get("text", "")))) is not None:
                turn = turn | {"value": None, "content": text}
        renamed.append(turn)
    return renamed


def look_up(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a field, or of a field in objects as in `author.role`; None where there is none."""
    if name in fields or "." not in name:
        return get_value(fields, name)
    first, _, rest = name.partition(".")
    inner = fields.get(first)
    return look_up(inner, rest) if isinstance(inner, dict) else None


def zip_lists(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects of which `datasets` made an object of lists of one length; none of another object."""
    columns = [column for column in value.values() if column is not None]
    if not columns or not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return []
    names = [name for name, column in value.items() if column is not None]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


# ---- Texts that are lists ----


def split_marked(text: str) -> list[dict[str, str]]:
    """The turns of a text that is a conversation with MARKS; none of another text.

    Worked example: "\\n\\nHuman: Hi\\n\\nAssistant: Hello" gives a user's "Hi" and an assistant's "Hello". A last turn
    that is empty, which asks for the answer, is left out.
    """
    for asked, answered in MARKS:
        if text.lstrip().startswith(asked.lstrip()) and answered in text:
            rest = text.lstrip()[len(asked.lstrip()) :]
            pieces = re.split(f"({re.escape(asked)}|{re.escape(answered)})", asked + rest)
            turns = [
                _say("user" if mark == asked else "assistant", said.strip(" \n"))
                for mark, said in zip(pieces[1::2], pieces[2::2], strict=True)
            ]
            return turns[: len(turns) - (turns[-1]["content"] == "")]
    return []


def read_written(text: str) -> tuple[Any, tuple[str, ...]]:
    """(value, repairs) of a list or object written as text, as JSON or as Python; (None, ()) for another text."""
    if not text.lstrip().startswith(("[", "{")):
        return None, ()
    try:
        value, repairs = parse_json(text.encode("utf-8", "surrogatepass"))
        return value, repairs
    except ValueError:
        pass
    try:
        return ast.literal_eval(_with_commas(text.strip())), ("python_literal_read",)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
        return None, ()


# numpy, whose arrays pandas writes into csv, puts nothing between the values of an array. Two texts without a comma are
# one for Python.
_NO_COMMA = re.compile(r"""[}'"\]]\s+['"{\[]|\}\{""")


def _with_commas(text: str) -> str:
    """The Python literal with a comma between each two values."""
    if _NO_COMMA.search(text) is None:
        return text
    pieces = []
    was_value = False
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.NL, tokenize.NEWLINE):
            begins = token.type == tokenize.STRING or token.string in ("{", "[")
            pieces += [", "] * (was_value and begins) + [token.string]
            was_value = token.type == tokenize.STRING or token.string in ("}", "]")
    return " ".join(pieces)
