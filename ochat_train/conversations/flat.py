"""OpenAssistant's flat files: one message a row, joined over the whole file into the trees that they are of."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import orjson

from ochat_train.conversations.containers import unreadable
from ochat_train.conversations.parts import Part, parse_made
from ochat_train.conversations.schema import Record
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


@dataclass(slots=True)
class _Row:
    """A message as JSON; or what is left out, and why."""

    offset: int
    end: int
    parent: str | None
    data: bytes
    damage: str | None = None


def join_messages(file: str, parts: Iterator[Part]) -> Iterator[Part]:
    """The trees of a file's messages, in the order of their first ones: {"prompt": message with its `replies`}.

    A message whose parent is not in the file, and those after it, are records with the damage "no_parent"; one of an id
    that was there before has "repeated_message". Holds the whole file: raises ValueError above MAX_BYTES.
    """
    rows: dict[str, _Row] = {}
    others: list[_Row] = []
    num_bytes = 0
    for part in parts:
        num_bytes += len(part.data)
        if num_bytes > MAX_BYTES:
            problem = f"its messages are above {MAX_BYTES:,} bytes, and those of a tree may stand anywhere in the file"
            raise unreadable(
                file, rows[next(reversed(rows))].offset if rows else 0, problem, "cut it between two trees"
            )
        for record in part.records():
            row, id = _row_of(record)
            if id is not None and id in rows:
                row.damage, row.data = "repeated_message", b""
            if id is None or row.damage:
                others.append(row)
            else:
                rows[id] = row
    children: dict[str | None, list[str]] = {}
    for id, row in rows.items():
        children.setdefault(row.parent, []).append(id)
    trees = [(rows[root], _nest(root, rows, children)) for root in children.get(None, ())]
    found = [(row.offset, row.end, data, row.damage) for row, data in trees]
    found += [(row.offset, row.end, row.data, row.damage) for row in others]
    found += [(row.offset, row.end, b"", "no_parent") for row in rows.values() if row.data]  # _nest takes it
    for offset, end, data, damage in sorted(found, key=lambda one: one[0]):
        yield Part(file, offset, data, parse_made, (end, damage))


def _row_of(record: Record) -> tuple[_Row, str | None]:
    """The row, and the message's id, None where it is no message."""
    fields = record.fields
    if record.is_row and isinstance(fields, dict):
        fields = {name: value for name, value in fields.items() if value is not None}
    data = b"" if record.damage else orjson.dumps(fields, default=str)
    if not isinstance(fields, dict):
        return _Row(record.offset, record.end, None, data, record.damage), None
    id, parent = fields.get("message_id"), fields.get("parent_id")
    is_message = isinstance(id, str | int) and id != "" and "replies" not in fields
    parent = str(parent) if isinstance(parent, str | int) and parent != "" else None
    return _Row(record.offset, record.end, parent, data), str(id) if is_message else None


def _nest(root: str, rows: dict[str, _Row], children: dict[str | None, list[str]]) -> bytes:
    """A tree as the JSON of a record. Takes `data` out of its rows."""
    order, waiting = [], deque([(root, 0)])
    while waiting:
        id, depth = waiting.popleft()
        order.append(id)
        if depth < _MAX_DEPTH:  # what is deeper is of no tree then
            waiting.extend((child, depth + 1) for child in children.get(id, ()))
    nested: dict[str, bytes] = {}
    for id in reversed(order):
        replies = b",".join(nested.pop(child) for child in children.get(id, ()) if child in nested)
        nested[id] = rows[id].data[:-1] + b',"replies":[' + replies + b"]}"
        rows[id].data = b""
    return b'{"prompt":' + nested[root] + b"}"
