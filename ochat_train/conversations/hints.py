"""The line of a recipe with which a record would be read that was dropped."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ochat_train.conversations.fields import Reading
from ochat_train.conversations.records import TURN_LISTS
from ochat_train.conversations.roles import find_role
from ochat_train.conversations.turn_fields import role_field

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
