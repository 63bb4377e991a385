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
