"""The forms of records: the table of the fields in which records have their parts.

A record has its conversations in a tree, or it has a beginning (turns, or a history and a question) and answers after
it, or turns that hold the answers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ochat_train.conversations.fields import ANSWER_KEYS, USER_KEYS, Reading
from ochat_train.conversations.records import TURN_LISTS

# For each part the fields that may hold it, in the order in which they are looked for: the first that is there counts.
# Several fields in one row stand together. The parts are in the order in which a record is looked through.
FORMS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "tree": (("mapping",), ("prompt",)),  # ChatGPT's export; OpenAssistant's messages with `replies`
    "pair": (
        ("chosen", "rejected"),
        ("chosen_messages", "rejected_messages"),  # LLaMA-Factory's second form
        ("preferred_output", "non_preferred_output"),  # OpenAI
        ("chosen_response", "rejected_response"),  # ms-swift has the second alone: the chosen one ends the turns
    ),
    "turns": (*((name,) for name in TURN_LISTS), ("data",), ("dialogue",), ("dialog",)),
    "answer": tuple((name,) for name in ("solution", *ANSWER_KEYS, "targets")),
    "answers": (
        *((name,) for name in ("completions", "responses", "answers", "candidates", "generations", "outputs")),
        *((name,) for name in ("output", "response", "answer", "completion")),  # where they are lists of texts
    ),
    "history": (("history",),),
    "question": (
        ("instruction", "input"),
        ("instruction", "context"),
        ("context", "question"),
        *((name,) for name in ("instruction", *USER_KEYS, "problem", "inputs")),
    ),
    "system": (("system",), ("system_prompt",), ("system_message",)),
    "label": (("label",), ("kto_tag",)),
    "score": tuple((name,) for name in ("score", "overall_score", "rating", "reward")),
}
TURN_FIELDS = tuple(dict.fromkeys(name for part in ("turns", "answer", "answers") for (name,) in FORMS[part]))
# A table has its turns in one of these columns.
COLUMNS = tuple(
    dict.fromkeys((*TURN_FIELDS, *(name for part in ("tree", "pair") for row in FORMS[part] for name in row)))
)
# Fields that make more of a record than its list of turns.
BESIDE_TURNS = frozenset(
    name for part in ("tree", "pair", "answer", "answers", "label") for row in FORMS[part] for name in row
)

Parts = Mapping[str, tuple[tuple[str, ...], ...]]


def parts_of(reading: Reading) -> Parts:
    """The table with the rows that a source's `fields` put in the place of its own."""
    names = reading.fields
    if not names or not names.keys() & _NAMED_PARTS:
        return FORMS
    parts = dict(FORMS)
    if "turns" in names:
        parts["turns"] = ((str(names["turns"]),), *FORMS["turns"])
    if "question" in names or "answer" in names:
        parts |= {"tree": (), "turns": (), "question": ()}
    if names.keys() & _ANSWER_PARTS:
        parts |= {"tree": (), "pair": (), "answer": (), "answers": ()}
    if "chosen" in names or "rejected" in names:
        parts["pair"] = ((str(names.get("chosen", "")), str(names.get("rejected", ""))),)
    for part in ("answer", "history", "system"):
        if part in names:
            parts[part] = ((str(names[part]),),)
    for part in ("question", "answers"):
        if part in names:
            parts[part] = (as_names(names[part]),)
    return parts


_NAMED_PARTS = frozenset(("turns", "question", "answer", "answers", "chosen", "rejected", "history", "system"))
_ANSWER_PARTS = frozenset(("answer", "answers", "chosen", "rejected"))


def as_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """The names that a recipe gives as one or as a list."""
    return (names,) if isinstance(names, str) else tuple(names)


def is_there(value: Any) -> bool:
    """Whether a part's value can hold it: a text, a list or an object with something in it."""
    return isinstance(value, str | list | dict) and bool(value)
