"""The conversations of a record: which turns each has, before these are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ochat_train.conversations.answers import Answer, find_list, find_pair, find_single, preference_of
from ochat_train.conversations.fields import ANSWER_KEYS, AS_USUAL, Reading, get_value, is_pair, role_field
from ochat_train.conversations.forms import BESIDE_TURNS, Parts, is_there, parts_of
from ochat_train.conversations.records import TURN_LISTS
from ochat_train.conversations.roles import find_role
from ochat_train.conversations.schema import Unread
from ochat_train.conversations.trees import Node, Tree, path_to, read_mapping, read_replies, turns_on
from ochat_train.conversations.turns import NO_TURNS, Turns, look_up, turns_of_list, turns_of_side

_NO_NAMES: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Chat:
    """One conversation of a record.

    fields: the record's, and the answer's own: what `where` tests. turns: under the usual names of their fields. form:
    the names of the fields they were read from, in words; empty where they are one list. read: these names. is_text:
    whether the turns were made of plain texts. suffix: what its id adds to the record's, such as "/chosen"; empty where
    the record is one conversation. own: the names of its answer's own fields. num_context: turns at the beginning whose
    answers are context, since the record rates only what comes after. same_as: the suffix of the answer before it in
    the record that it equals, or None.
    """

    fields: Any
    turns: Sequence[Any] = ()
    form: str = ""
    read: frozenset[str] = _NO_NAMES
    is_text: bool = False
    suffix: str = ""
    own: frozenset[str] = _NO_NAMES
    num_context: int = 0
    repairs: tuple[str, ...] = ()
    unread: Unread = ()
    same_as: str | None = None


@dataclass(frozen=True, slots=True)
class _Beginning:
    """What a record has before its answers, and the names of the fields it is of."""

    turns: Turns = NO_TURNS
    name: str = ""
    read: frozenset[str] = _NO_NAMES
    num_context: int = 0
    is_list: bool = False


def find_chats(fields: Any, reading: Reading = AS_USUAL) -> list[Chat]:
    """The conversations of a record, at least one; it has no turns where none are found.

    Worked example: {"prompt": "Hi", "chosen": "Hello", "rejected": "No"} is two, with the suffixes /chosen and
    /rejected and the own field `preference`.
    """
    if not isinstance(fields, dict):
        return [Chat(fields)]
    if not reading.fields and fields.keys().isdisjoint(BESIDE_TURNS):  # nearly always
        for name in TURN_LISTS:
            turns = fields.get(name)
            if isinstance(turns, list) and turns and not isinstance(turns[0], str):
                return [Chat(fields, turns, read=frozenset((name,)))]
    chats = _find(fields, reading)
    if not chats[0].turns and not reading.fields:  # "Question", " answer"
        names = {name.strip().lower().replace(" ", "_"): name for name in reversed(fields)}
        if names.keys() != fields.keys():
            again = _find({lowered: fields[name] for lowered, name in names.items()}, reading)
            if again[0].turns:
                chats = [replace(chat, read=frozenset(names.get(name, name) for name in chat.read)) for chat in again]
    return chats


def _find(fields: dict[str, Any], reading: Reading) -> list[Chat]:
    parts = parts_of(reading)
    for row in parts["tree"]:
        value = fields.get(row[0])
        if isinstance(value, dict):
            tree = read_replies(value) if "replies" in value else read_mapping(value, fields.get("current_node"))
            if tree is not None:
                return _chats_of_tree(fields, row[0], tree, reading)
    beginning = _find_beginning(fields, parts, reading)
    is_named = not reading.fields.keys().isdisjoint(("chosen", "rejected", "answers"))
    is_complete = _ends_with_answer(beginning, reading)
    name, answers = find_pair(fields, parts)
    if not answers and not is_named and not is_complete:
        name, answers = find_single(fields, parts, beginning.read, reading)
    if not answers and (is_named or not is_complete):
        name, answers = find_list(fields, parts, reading.fields)
    if answers:
        chats = _chats_of_answers(fields, name, answers, beginning, reading)
    elif beginning.is_list and not is_named:
        turns, is_text, repairs = beginning.turns
        is_written = isinstance(look_up(fields, beginning.name), str)
        form = f"{beginning.name} as a text" if is_written else beginning.name if is_text else ""
        chats = [Chat(fields, turns, form, beginning.read, is_text, repairs=repairs)]
    else:
        return [Chat(fields)]
    label, preference = preference_of(fields, parts, is_message_list=not answers)
    if label and chats[0].turns and not chats[0].suffix:
        own = {"preference": preference} | fields
        read, num_context = chats[0].read | {label}, len(chats[0].turns) - 1
        return [replace(chats[0], fields=own, own=frozenset(("preference",)), read=read, num_context=num_context)]
    return chats


# ---- A beginning ----


def _find_beginning(fields: dict[str, Any], parts: Parts, reading: Reading) -> _Beginning:
    for (name,) in parts["turns"]:
        turns = turns_of_list(look_up(fields, name), reading.fields)
        if turns.turns:
            return _Beginning(turns, name, frozenset((name,)), is_list=True)
    history, read = NO_TURNS, _NO_NAMES
    for (name,) in parts["history"]:
        if (name,) not in parts["question"] and is_there(value := look_up(fields, name)):
            history = turns_of_list(value, reading.fields)
            history = history if history.turns else turns_of_side(value, "user", reading.fields)
            read = frozenset((name,))
    for row in parts["question"]:
        values = [look_up(fields, name) for name in row]
        is_named = "question" in reading.fields
        if not is_named and any(value is None for value in values):
            continue
        asked = turns_of_side(_join(values), "user", reading.fields)
        is_text = asked.is_text and (history.is_text or not history.turns)
        turns = Turns([*history.turns, *asked.turns], is_text, history.repairs + asked.repairs)
        num_context = len(turns.turns) if not history.turns else 0  # of a prompt
        return _Beginning(turns, " + ".join((*read, *row)), read | set(row), num_context)
    return _Beginning(history, " + ".join(read), read)


def _join(values: Sequence[Any]) -> Any:
    """The texts, a blank line between them; the first value that is no text."""
    said = [value for value in values if value not in (None, "")]
    others = [value for value in said if not isinstance(value, str)]
    return others[0] if others else "\n\n".join(said) if said else values[0]


def _ends_with_answer(beginning: _Beginning, reading: Reading) -> bool:
    if not beginning.is_list:
        return False
    last = beginning.turns.turns[-1]
    if not isinstance(last, dict):
        return True
    role = find_role(last.get(role_field(last)), reading.roles)
    is_question = role in ("user", "system", "tool")
    if role is None and is_pair(last):
        is_question = not any(key.strip().lower() in ANSWER_KEYS for key in last if last[key] is not None)
    return not is_question


# ---- Answers ----


def _chats_of_answers(
    fields: dict[str, Any], name: str, answers: Sequence[Answer], beginning: _Beginning, reading: Reading
) -> list[Chat]:
    """A conversation for each answer: after the beginning, or a whole conversation itself."""
    start, last = _split_last_answer(beginning, reading)
    said = [Turns(last) if answer.value is None else _turns_of_answer(answer, reading) for answer in answers]
    # The one answer of a record always follows its beginning.
    whole = [bool(answer.suffix) and _is_whole(turns, reading) for answer, turns in zip(answers, said, strict=True)]
    is_lost = bool(last) and last not in [turns.turns for turns in said]
    unread: Unread = (("turn field", f"the last answer of {beginning.name}"),) if is_lost else ()
    common = _num_common([turns.turns for turns, is_whole in zip(said, whole, strict=True) if is_whole])
    is_copied = all(whole) and _is_copy(beginning, said)
    chats: list[Chat] = []
    for answer, turns, is_whole in zip(answers, said, whole, strict=True):
        before = NO_TURNS if is_whole else start
        if not turns.turns or not (is_whole or before.turns or "answer" in reading.fields):
            continue
        num_before = len(before.turns) or (min(common, len(turns.turns) - 1) if common else len(turns.turns) - 1)
        num_context = num_before if answer.suffix else beginning.num_context
        same = next((c.suffix for c in chats if list(c.turns) == [*before.turns, *turns.turns]), None)
        has_read_beginning = not is_whole or is_copied
        chats.append(
            Chat(
                fields | answer.own,
                [*before.turns, *turns.turns],
                " / ".join(filter(None, (beginning.name if not is_whole else "", name))),
                answer.read | (beginning.read if has_read_beginning else _NO_NAMES),
                turns.is_text and (not before.turns or before.is_text),
                answer.suffix,
                frozenset(answer.own),
                num_context,
                before.repairs + turns.repairs,
                unread if not is_whole else (),
                same,
            )
        )
    read = frozenset().union(*(chat.read for chat in chats))
    return [replace(chat, read=read) for chat in chats] or [Chat(fields)]


def _turns_of_answer(answer: Answer, reading: Reading) -> Turns:
    """The turns of an answer: of a text, of an object with one, or of messages; of one of several also of pairs."""
    value = answer.value
    if answer.suffix and isinstance(value, list) and value and all(isinstance(turn, list | dict) for turn in value):
        return turns_of_list(value, reading.fields)
    return turns_of_side(value, "assistant", reading.fields)


def _split_last_answer(beginning: _Beginning, reading: Reading) -> tuple[Turns, Sequence[Any]]:
    """(the beginning without the answers at its end, these): other answers stand in their place."""
    turns = beginning.turns.turns
    end = len(turns)
    while end and beginning.is_list and _role_of(turns[end - 1], reading) == "assistant":
        end -= 1
    return beginning.turns._replace(turns=turns[:end]), turns[end:]


def _role_of(turn: Any, reading: Reading) -> str | None:
    return find_role(turn.get(role_field(turn)), reading.roles) if isinstance(turn, dict) else None


def _is_whole(turns: Turns, reading: Reading) -> bool:
    """Whether the turns of an answer begin with a user's, so that they are the whole conversation."""
    for turn in turns.turns:
        if not isinstance(turn, dict) or (not role_field(turn) and is_pair(turn)):
            return True
        role = _role_of(turn, reading)
        if role != "system":
            return role == "user"
    return False


def _num_common(conversations: Sequence[Sequence[Any]]) -> int:
    """With how many equal turns all of several conversations begin; 0 of fewer than two."""
    if len(conversations) < 2:
        return 0
    num = 0
    for turns in zip(*conversations, strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        num += 1
    return num


def _is_copy(beginning: _Beginning, said: Sequence[Turns]) -> bool:
    """Whether the turns of the answers hold what the beginning does."""
    texts = [turn.get("content") or turn.get("value") for turn in beginning.turns.turns if isinstance(turn, dict)]
    held = [
        turn.get("content") or turn.get("value") for turns in said for turn in turns.turns if isinstance(turn, dict)
    ]
    return bool(texts) and all(text in held for text in texts)


# ---- Trees ----


def _chats_of_tree(fields: dict[str, Any], name: str, tree: Tree, reading: Reading) -> list[Chat]:
    """The best path of a tree as one conversation; or with `tree: all` one for each answer, in which it is trained."""
    read = frozenset((name, "current_node"))

    def chat(node: Node) -> Chat:
        path = path_to(node)
        own = tree.root.own | node.own
        unread = tuple(item for step in path for item in step.unread)
        turns = list(turns_on(path))
        return Chat(fields | own, turns, name, read, True, own=frozenset(own), unread=unread)

    if reading.tree == "best":
        return [chat(tree.last)]
    chats = [chat(node) for node in tree.answers()]
    return [
        replace(chat, suffix=f"/{number}", num_context=max(len(chat.turns) - 1, 0))
        for number, chat in enumerate(chats, 1)
    ] or [Chat(fields)]


def get_system(fields: Mapping[str, Any], parts: Parts) -> tuple[str, Any]:
    """(the field, its value) of the system text; the first of its names where there is none."""
    for (name,) in parts["system"]:
        if (value := get_value(fields, name)) is not None:
            return name, value
    return parts["system"][0][0], None
