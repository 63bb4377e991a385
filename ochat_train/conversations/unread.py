"""What a record holds that is not read, so that the summary can name it, and what would read it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ochat_train.conversations.chats import Chat, get_system
from ochat_train.conversations.fields import (
    CALL_KEYS,
    PAIR_KEYS,
    TOOL_KEYS,
    Reading,
    find_reasoning,
    first_name,
    get_value,
    is_pair,
    is_plain,
    own_id,
    parts_of_text,
    role_field,
    text_field,
)
from ochat_train.conversations.forms import as_names, parts_of
from ochat_train.conversations.own_weights import EXCLUSION, LISTS, OF_A_TURN, says_weight
from ochat_train.conversations.records import TURN_LISTS
from ochat_train.conversations.roles import find_role

_READ_FIELDS = frozenset(("id", "condition", *LISTS, EXCLUSION))
_PART_FIELDS = frozenset(("type", "text", "thinking", "value", "thought", *OF_A_TURN))


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


# ---- The line of a recipe with which a record would be read that was dropped ----

_ROLE_FIELDS = ("role", "from", "speaker", "author", "sender", "user", "name", "type")
_TEXT_FIELDS = ("content", "value", "text", "message", "body", "utterance", "msg")
_SYSTEM_FIELDS = ("sys",)


def find_hint(reason: str, fields: Mapping[str, Any], turns: Sequence[Any], reading: Reading) -> str:
    """The line for a record that was dropped for `reason`, or empty where none can be guessed."""
    if reason not in ("no_turns", "unknown_role", "value_not_text"):  # other names cannot be what was wrong
        return ""
    return (reason == "unknown_role" and hint_roles(turns, reading)) or hint_fields(fields)


def hint_fields(fields: Mapping[str, Any]) -> str:
    """The line `fields: {...}` for a record whose parts have other names, or empty where none can be guessed.

    Worked example: {"chat": [{"speaker": "user", "text": "Hi"}, {"speaker": "bot", "text": "Hello"}]} gives "fields:
    {turns: chat, role: speaker, text: text}".
    """
    system = next((f", system: {name}" for name in _SYSTEM_FIELDS if isinstance(fields.get(name), str)), "")
    for name, turns in fields.items():
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            role = next((key for key in _ROLE_FIELDS if isinstance(turns[0].get(key), str)), None)
            text = next((key for key in _TEXT_FIELDS if key != role and isinstance(turns[0].get(key), str)), None)
            is_known = name in TURN_LISTS and role in ("role", "from") and text in ("content", "value")
            roles = [find_role(turn.get(role)) for turn in turns if isinstance(turn, dict) and role]
            # Where there is only one side, the other is somewhere else.
            has_both = roles[:1] != ["assistant"] and not {"user", "system"} >= set(roles)
            if role and text and not is_known and has_both:
                return f"fields: {{turns: {_yaml(name)}, role: {_yaml(role)}, text: {_yaml(text)}{system}}}"
    return ""


def hint_roles(turns: Sequence[Any], reading: Reading) -> str:
    """The line `roles: {...}` for unknown names. The first is taken for the user's unless another name is."""
    unknown = list(dict.fromkeys(unknown_roles(turns, reading)))
    known = {find_role(name, reading.roles) for name in map(_role_name, turns)}
    guesses = ["user"] * ("user" not in known) + ["assistant"] * len(unknown)
    roles = ", ".join(f"{_yaml(name)}: {role}" for name, role in zip(unknown, guesses, strict=False))
    return f"roles: {{{roles}}}  # or system, tool" if unknown and len(roles) < 200 else ""


def unknown_roles(turns: Sequence[Any], reading: Reading) -> list[str]:
    """The names of roles that are not known, once for each turn."""
    names = map(_role_name, turns)
    return [name for name in names if name and find_role(name, reading.roles) is None]


def _role_name(turn: object) -> str:
    name = turn.get(role_field(turn)) if isinstance(turn, dict) else None
    return name if isinstance(name, str) else ""


def _yaml(name: str) -> str:
    """A name as a YAML scalar."""
    is_plain = re.fullmatch(r"[^\W\d][\w-]*", name) and name.lower() not in _YAML_WORDS
    return name if is_plain else json.dumps(name, ensure_ascii=False)


_YAML_WORDS = ("yes", "no", "on", "off", "true", "false", "null", "y", "n")
