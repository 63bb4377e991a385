"""Records with several answers, or with one that is rated: each answer, and the fields that are its own."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ochat_train.conversations.fields import Reading, get_value
from ochat_train.conversations.forms import FORMS, Parts, is_there
from ochat_train.conversations.turns import look_up, text_name, zip_lists

_LISTED = ("model", "rank", "ranking", *(name for (name,) in FORMS["score"]))  # also as lists beside the answers
_YES_OR_NO = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the answers of a record. `value` None: the answer that ends the turns.

    suffix: of its conversation's id, such as "/chosen". own: its fields besides those of the record. read: the record's
    fields that these are of.
    """

    suffix: str
    value: Any
    own: dict[str, Any] = field(default_factory=dict)
    read: frozenset[str] = frozenset()


def find_pair(fields: Mapping[str, Any], parts: Parts) -> tuple[str, list[Answer]]:
    """(the names of the fields, the chosen and the rejected answer); an empty name where there is no pair.

    A rejected one alone stands against the answer that ends the turns. Each has `preference`, chosen or rejected, and
    what fields of the record say of it by their names: `score_chosen` and `chosen_score` are the chosen one's `score`.
    """
    for names in parts["pair"]:
        sides = dict(zip(("chosen", "rejected"), names, strict=True))
        values = {side: look_up(fields, name) for side, name in sides.items()}
        if not any(map(is_there, values.values())):
            continue
        tags = dict(zip(sides, _tags(tuple(fields), names if all(names) else tuple(sides)), strict=True))
        answers = []
        for side, name in sides.items():
            if is_there(values[side]) or side == "chosen":
                own = {"preference": side} | {part: fields[of] for of, part in tags[side].items()}
                read = frozenset((name, *tags[side]))
                answers.append(
                    Answer(f"/{side}", values[side] if is_there(values[side]) else None, _with_score(own), read)
                )
        return " + ".join(name for side, name in sides.items() if is_there(values[side])), answers
    return "", []


def find_single(
    fields: Mapping[str, Any], parts: Parts, beginning: Collection[str], reading: Reading
) -> tuple[str, list[Answer]]:
    """(the name of the field, the record's one answer), in no field of its beginning; a list of texts is several."""
    for (name,) in parts["answer"]:
        value = look_up(fields, name)
        is_several = isinstance(value, list) and all(isinstance(text, str) for text in value)
        if value is not None and name not in beginning and (not is_several or "answer" in reading.fields):
            return name, [Answer("", value, read=frozenset((name,)))]
    return "", []


def find_list(fields: Mapping[str, Any], parts: Parts, names: Mapping[str, Any]) -> tuple[str, list[Answer]]:
    """(the names of the fields, the answers) of a list of answers, or of several fields that hold one each.

    Each has its `number` from 1, the fields of its own object, and its entry of lists beside the answers, such as
    `scores`. A list is of texts or of objects, or an object of lists.
    """
    for row in parts["answers"]:
        if len(row) > 1:
            return " + ".join(row), _of_fields(fields, row)
        value = look_up(fields, row[0])
        entries = zip_lists(value) if isinstance(value, dict) else value
        if not isinstance(entries, list) or not any(_text_or_turns(entry, names) for entry in entries):
            continue
        listed = _listed(fields, len(entries))
        answers = []
        for number, entry in enumerate(entries, start=1):
            own = {name: values[number - 1] for name, values in listed.items()} | {"number": number}
            if isinstance(entry, dict):
                own |= {name: inner for name, inner in entry.items() if name != text_name(entry, names)}
            own = {"rank": own["ranking"]} | own if "ranking" in own else own
            read = frozenset((row[0], *(name for name in listed), *(f"{name}s" for name in listed)))
            answers.append(Answer(f"/{number}", entry, _with_score(own), read))
        return row[0], answers
    return "", []


def preference_of(fields: Mapping[str, Any], parts: Parts, *, is_message_list: bool) -> tuple[str, str]:
    """(the field, chosen or rejected) of a record whose one answer is labelled, KTO's form; two empty strings if none.

    Beside a list of turns only true and false are such a label: 1 and 0 may be a class of something.
    """
    for (name,) in parts["label"]:
        value = get_value(fields, name)
        if isinstance(value, str | int) and (isinstance(value, bool) or not is_message_list):
            label = _YES_OR_NO.get(str(value).strip().lower())
            if label is not None:
                return name, "chosen" if label else "rejected"
    return "", ""


def _of_fields(fields: Mapping[str, Any], names: Sequence[str]) -> list[Answer]:
    """The answers in several fields."""
    answers = []
    for number, (name, tags) in enumerate(zip(names, _tags(tuple(fields), tuple(names)), strict=True), start=1):
        value = look_up(fields, name)
        if is_there(value):
            own = {"answer": name, "number": number} | {part: fields[of] for of, part in tags.items()}
            answers.append(Answer(f"/{name}", value, _with_score(own), frozenset((name, *tags))))
    return answers


@lru_cache(maxsize=1024)
def _tags(fields: tuple[str, ...], names: tuple[str, ...]) -> tuple[Mapping[str, str], ...]:
    """For each answer the record's fields that speak of it alone: {name: what is left of it without the answer's}.

    Worked example: for `response_0` and `response_1`, `is_response_0_safe` is `is_safe` of the first, and `score_0` its
    `score`, if the record has the same of `response_1`.
    """
    found: list[dict[str, str]] = [{} for _ in names]
    by_pieces = {tuple(name.replace("-", "_").split("_")): name for name in fields if name not in names}
    num_common = next((at for at, signs in enumerate(zip(*names, strict=False)) if len(set(signs)) > 1), 0)
    ends = [name[num_common:] for name in names]
    for marks in (names, ends):
        first, *_ = pieces_of_marks = [tuple(mark.split("_")) for mark in marks]
        for pieces in by_pieces:
            start = next((at for at in range(len(pieces)) if pieces[at : at + len(first)] == first), None)
            if start is None or len(pieces) == len(first):
                continue
            before, after = pieces[:start], pieces[start + len(first) :]
            same = [by_pieces.get((*before, *mark, *after)) for mark in pieces_of_marks]
            for tags, name in zip(found, same, strict=True):
                if all(same) and name is not None:
                    tags.setdefault(name, "_".join((*before, *after)))
    return tuple(found)


def _listed(fields: Mapping[str, Any], num_answers: int) -> dict[str, list[Any]]:
    """The lists beside the answers that have an entry for each."""
    found = {}
    for name in _LISTED:
        values = next((fields[key] for key in (f"{name}s", name) if isinstance(fields.get(key), list)), ())
        if len(values) == num_answers and not any(isinstance(value, list | dict) for value in values):
            found[name] = list(values)
    return found


def _with_score(own: dict[str, Any]) -> dict[str, Any]:
    """The fields with `score`, the first of its other names that they have."""
    if "score" in own:
        return own
    others = [own[name] for (name,) in FORMS["score"] if name in own]
    return own | {"score": others[0]} if others else own


def _text_or_turns(entry: Any, names: Mapping[str, Any]) -> bool:
    if isinstance(entry, dict):
        return bool(text_name(entry, names)) or "role" in entry or "from" in entry
    return isinstance(entry, str) or (isinstance(entry, list) and bool(entry))
