"""OpenAssistant's flat files are the trees that their messages make, wherever in the file these stand."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ochat_train.conversations import flat
from ochat_train.conversations.chats import find_chats
from ochat_train.conversations.fields import Reading
from ochat_train.conversations.records import read_chunks
from ochat_train.conversations.schema import Record
from ochat_train.conversations.sharegpt import parse_record


def message(id: str, parent: str | None, text: str, rank: int | None = None, **own: Any) -> dict[str, Any]:
    role = "assistant" if text.startswith("A") else "prompter"
    return {"message_id": id, "parent_id": parent, "text": text, "role": role, "rank": rank, **own}


ROWS = [
    message("a2", "q1", "A2", 0),  # before its parent
    message("q1", None, "Q1"),
    message("q9", None, "Q9"),
    message("a1", "q1", "A1", 1),
    message("q3", "a2", "Q3"),
    message("a3", "q3", "A3", 1),
    message("a4", "q3", "A4", 0, deleted=True),
    message("a9", "q9", "A9"),
]
LOST = [message("q5", "gone", "Q5"), message("a5", "q5", "A5"), message("x", "y", "Qx"), message("y", "x", "Ay")]


def nest(id: str) -> dict[str, Any]:
    (own,) = (row for row in ROWS if row["message_id"] == id)
    return own | {"replies": [nest(row["message_id"]) for row in ROWS if row["parent_id"] == id]}


def read(path: Path, chunk_bytes: int = 8 << 20) -> list[Record]:
    chunks = read_chunks([str(path)], chunk_bytes=chunk_bytes)
    return [record for chunk in chunks for record in chunk.records()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows, pa.Table.from_pylist([ROWS[6]]).schema), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("chunk_bytes", [100, 8 << 20])
def test_messages_of_a_file_are_the_conversations_of_its_trees(name: str, chunk_bytes: int, tmp_path: Path) -> None:
    records = read(write(tmp_path / name, ROWS), chunk_bytes)
    assert [record.damage for record in records] == [None, None]
    for record, root in zip(records, ("q1", "q9"), strict=True):
        for tree in ("best", "all"):
            got, wanted = (
                [[turn["content"] for turn in chat.turns] for chat in find_chats(fields, Reading(tree=tree))]
                for fields in (record.fields, {"prompt": nest(root)})
            )
            assert got == wanted
    assert [turn["content"] for turn in find_chats(records[0].fields)[0].turns] == ["Q1", "A2", "Q3", "A3"]


def test_what_is_of_no_tree_is_named_row_by_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, *LOST, ROWS[0]])
    with path.open("a") as file:
        file.write('{"message_id": nope}\n{"id": "other", "messages": []}\n')
    records = read(path)
    assert [parse_record(record, default_id="").reason for record in records[2:7]] == [
        record.damage for record in records[2:7]
    ]
    lines = path.read_bytes().splitlines()
    assert [(record.damage, path.read_bytes()[record.offset : record.end]) for record in records] == [
        (None, lines[1]),
        (None, lines[2]),
        *(("no_parent", line) for line in lines[8:12]),
        ("repeated_message", lines[12]),
        ("not_json", lines[13]),
        (None, lines[14]),
    ]


def test_a_file_above_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "MAX_BYTES", 600)
    with pytest.raises(ValueError, match=r"a\.jsonl, byte .* above 600 bytes.*cut it between two trees"):
        read(write(tmp_path / "a.jsonl", ROWS), 100)
