"""OpenAssistant's flat files: one message a row, joined over the whole file into the trees that they are of."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import orjson

from ochat_train.conversations.containers import unreadable
from ochat_train.conversations.parts import Part, left_out, parse_made
from ochat_train.conversations.tables import MESSAGE

MAX_BYTES = 1 << 30  # of the messages of a file, which are all held
_MAX_DEPTH = 400  # of a tree; JSON that is nested deeper is not parsed everywhere


def is_flat(part: Part) -> bool:
    """Whether the first record of a file's first part is a message without its replies."""
    head = part.data[: 1 << 16]
    if not all(name.encode() in head for name in MESSAGE):
        return False
    fields = next((record.fields for record in part.records()), None)
    return isinstance(fields, dict) and fields.keys() >= MESSAGE and "replies" not in fields


def join_messages(file: str, parts: Iterator[Part]) -> Iterator[Part]:
    """The trees of a file's messages, in the order of their first ones: {"prompt": message with its `replies`}.

    A message whose parent is not in the file, and those after it, are records with the damage "no_parent"; one of an id
    that was there before has "repeated_message". Holds the whole file: raises ValueError above MAX_BYTES.
    """
    found: list[Part] = []
    places: dict[str, tuple[int, int]] = {}
    messages: dict[str, bytes] = {}
    children: dict[str | None, list[str]] = {None: []}
    num_bytes = 0
    for part in parts:
        num_bytes += len(part.data)
        if num_bytes > MAX_BYTES:
            problem = f"its messages are above {MAX_BYTES:,} bytes, and those of a tree may stand anywhere in the file"
            raise unreadable(file, part.offset, problem, "cut it between two trees")
        for record in part.records():
            fields, place = record.fields, (record.offset, record.end)
            if record.is_row and isinstance(fields, dict):
                fields = {name: value for name, value in fields.items() if value is not None}
            data = b"" if record.damage else orjson.dumps(fields, default=str)
            id = _read_id(fields, "message_id") if isinstance(fields, dict) and "replies" not in fields else None
            if id is None:
                found.append(Part(file, record.offset, data, parse_made, (record.end, record.damage)))
            elif id in places:
                found.append(left_out(file, *place, "repeated_message"))
            else:
                places[id], messages[id] = place, data
                children.setdefault(_read_id(fields, "parent_id"), []).append(id)
    for root in children[None]:
        offset, end = places[root]
        found.append(Part(file, offset, _nest(root, messages, children), parse_made, (end,)))
    found += [left_out(file, *places[id], "no_parent") for id in messages]
    yield from sorted(found, key=lambda part: part.offset)


def _read_id(fields: dict[str, Any], name: str) -> str | None:
    id = fields.get(name)
    return str(id) if isinstance(id, str | int) and id != "" else None


def _nest(root: str, messages: dict[str, bytes], children: dict[str | None, list[str]]) -> bytes:
    """A tree as the JSON of a record. Takes its messages out."""
    order, waiting = [], deque([(root, 0)])
    while waiting:
        id, depth = waiting.popleft()
        order.append(id)
        if depth < _MAX_DEPTH:  # what is deeper is of no tree then
            waiting.extend((child, depth + 1) for child in children.get(id, ()))
    nested: dict[str, bytes] = {}
    for id in reversed(order):
        replies = b",".join(nested.pop(child) for child in children.get(id, ()) if child in nested)
        nested[id] = messages.pop(id)[:-1] + b',"replies":[' + replies + b"]}"
    return b'{"prompt":' + nested[root] + b"}"
