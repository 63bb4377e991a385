"""What a record holds that is not read, so that the summary can name it."""

from collections.abc import Iterator
from typing import Any

from ochat_train.conversations.chats import Chat, get_system
from ochat_train.conversations.fields import Reading, first_name, get_value, own_id
from ochat_train.conversations.forms import as_names, parts_of
from ochat_train.conversations.own_weights import EXCLUSION, LISTS, OF_A_TURN, says_weight
from ochat_train.conversations.roles import find_role
from ochat_train.conversations.turn_fields import (
    CALL_KEYS,
    PAIR_KEYS,
    TOOL_KEYS,
    find_reasoning,
    is_pair,
    is_plain,
    parts_of_text,
    role_field,
    text_field,
)

_READ_FIELDS = frozenset(("id", "condition", *LISTS, EXCLUSION))
_PART_FIELDS = frozenset(("type", "text", "thinking", "thought", *OF_A_TURN))


def find_unread(chat: Chat, reading: Reading) -> Iterator[tuple[str, str]]:
    """What holds something and is not read, as in Unread: fields of the record, of its turns, parts and answers."""
    fields, names = chat.fields, reading.fields
    yield from chat.unread
    named = {name for value in names.values() for name in as_names(value)}
    named |= {name.partition(".")[0] for name in named}  # author.role
    system, _ = get_system(fields, parts_of(reading))
    read = {system, reading.weight_field, first_name(fields, TOOL_KEYS), *named, *chat.read}
    for name in sorted(fields.keys() - _READ_FIELDS - read):
        if get_value(fields, name) is not None:
            yield ("answer field" if name in chat.own else "record field"), name
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
    for turn in chat.turns:
        if isinstance(turn, dict) and not is_plain(turn):
            yield from _find_unread_of_turn(turn, named)


def _find_unread_of_turn(turn: dict[str, Any], named: set[str]) -> Iterator[tuple[str, str]]:
    text = turn.get(text_field(turn))
    other_weights = {name for name in turn.keys() & OF_A_TURN if not says_weight(name, turn[name])}
    for name in sorted(turn.keys() - (_read_fields(turn) - other_weights) - named):
        is_copy = isinstance(turn[name], str) and turn[name] == text
        if get_value(turn, name) not in (None, "") and not is_copy:
            yield "turn field", name
    for part in parts_of_text(text):
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
