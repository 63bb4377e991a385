"""What a record holds that is not read, so that the summary can name it."""

from collections.abc import Iterator, Sequence
from typing import Any

from ochat_train.conversations.fields import Reading, first_name, get_value, own_id
from ochat_train.conversations.forms import (
    CALL_KEYS,
    PAIR_KEYS,
    TOOL_KEYS,
    find_reasoning,
    is_pair,
    is_plain,
    parts_of,
    role_field,
    text_field,
)
from ochat_train.conversations.own_weights import EXCLUSION, LISTS, OF_A_TURN, says_weight
from ochat_train.conversations.roles import find_role

_READ_FIELDS = frozenset(("id", "condition", *LISTS, EXCLUSION))
_PART_FIELDS = frozenset(("type", "text", "thinking", "thought", *OF_A_TURN))


def find_unread(
    fields: dict[str, Any], list_name: str, turns: Sequence[Any], reading: Reading
) -> Iterator[tuple[str, str]]:
    """The fields of the record, of its turns and of their parts that hold something and are not read, as in Unread.

    `list_name` and `turns` are those of `find_turns`.
    """
    names = reading.fields
    named = {str(name) for value in names.values() for name in ([value] if isinstance(value, str) else value)}
    read = {list_name, str(names.get("system", "system")), reading.weight_field, first_name(fields, TOOL_KEYS), *named}
    for name in sorted(fields.keys() - _READ_FIELDS - read):
        if get_value(fields, name) is not None:
            yield "record field", name
    if reading.weight_field != "weight" and not isinstance(get_value(fields, "weight"), list | None):
        yield "record field", "weight"
    for name in sorted(fields.keys() & (LISTS | {EXCLUSION})):
        value = fields[name]
        is_mask_of_users = name == "mask" and isinstance(value, str) and value.strip().lower() in ("user", "human")
        is_read = says_weight(name, value) or is_mask_of_users or name in ("weight", reading.weight_field)
        if not is_read and value not in (None, ""):
            yield "record field", name
    if get_value(fields, "id") is not None and own_id(fields) is None and fields["id"] != "":
        yield "record field", "id"
    for turn, renamed in zip(fields[list_name] if list_name else turns, turns, strict=True):
        if isinstance(turn, dict) and not is_plain(turn):
            yield from _find_unread_of_turn(turn, renamed, named)


def _find_unread_of_turn(turn: dict[str, Any], renamed: dict[str, Any], named: set[str]) -> Iterator[tuple[str, str]]:
    text = renamed.get(text_field(renamed))
    other_weights = {name for name in turn.keys() & OF_A_TURN if not says_weight(name, turn[name])}
    for name in sorted(turn.keys() - (_read_fields(renamed) - other_weights) - named):
        is_copy = isinstance(turn[name], str) and turn[name] == text
        if get_value(turn, name) not in (None, "") and not is_copy:
            yield "turn field", name
    for part in parts_of(text):
        for name in sorted(part.keys() - _PART_FIELDS):
            if get_value(part, name) is not None:
                yield "part field", name


def _read_fields(turn: dict[str, Any]) -> set[str]:
    """The names of the fields of a turn that are read."""
    role = role_field(turn)
    if not role and is_pair(turn):
        return {name for name in turn if name.strip().lower() in PAIR_KEYS} | {"system", *OF_A_TURN}
    read = {role, text_field(turn), *OF_A_TURN}
    if find_role(turn.get(role)) == "assistant":
        read |= {find_reasoning(turn)[0], first_name(turn, CALL_KEYS)}
    return read
