"""The ledger accounts for every record, and writes a line for those that were repaired or dropped."""

import json
from pathlib import Path
from typing import Any

import pytest

from ochat_train.conversations.ledger import Ledger


def keep(ledger: Ledger, id: str, source: str = "gpt4", **more: Any) -> None:
    where = {"id": id, "file": "a.json", "offset": 5, "source": source}
    numbers = {"num_tokens": 1000, "num_supervised_tokens": 400, "weight_sum": 400.0}
    ledger.received(source)
    ledger.kept(**{**where, "repairs": (), **numbers, **more})


def drop(ledger: Ledger, id: str, reason: str = "no_answer", source: str = "gpt4", **more: Any) -> None:
    ledger.received(source)
    where = {"id": id, "file": "a.json", "offset": 5, "source": source}
    ledger.dropped(**{**where, "reason": reason, "detail": "turns: user", "repairs": (), **more})


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_only_repaired_and_dropped_records_get_a_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(str(path)) as ledger:
        keep(ledger, "untouched")
        keep(ledger, "repaired é", repairs=("empty_turn_removed",))
        drop(ledger, "dropped", offset=77, repairs=("invalid_utf8_replaced",))
    same = {"file": "a.json", "source": "gpt4"}
    repaired = {"id": "repaired é", "offset": 5, "outcome": "kept", "reason": None, "detail": None}
    dropped = {
        "id": "dropped",
        "offset": 77,
        "outcome": "dropped",
        "reason": "no_answer",
        "detail": "turns: user",
    }
    assert lines_of(path) == [
        {**same, **repaired, "repairs": ["empty_turn_removed"]},
        {**same, **dropped, "repairs": ["invalid_utf8_replaced"]},
    ]
    assert list(lines_of(path)[0]) == [
        "id",
        "file",
        "offset",
        "source",
        "outcome",
        "reason",
        "detail",
        "repairs",
    ]


def test_counts_and_json_add_up_by_source(tmp_path: Path) -> None:
    with Ledger(str(tmp_path / "ledger.jsonl")) as ledger:
        keep(ledger, "a")
        keep(ledger, "b", repairs=("user_turns_joined", "empty_turn_removed"))
        drop(ledger, "c")
        drop(ledger, "d", "unknown_role", repairs=("invalid_utf8_replaced",))
        keep(ledger, "e", "gpt3", weight_sum=40.0)
        ledger.check()
        counts = ledger.counts["gpt4"]
        assert (counts.num_in, counts.num_kept, counts.num_dropped) == (4, 2, 2)
        as_json = json.loads(json.dumps(ledger.to_json()))
    assert as_json["gpt4"] == {
        "in": 4,
        "kept": 2,
        "dropped": {"no_answer": 1, "unknown_role": 1},
        "repaired": {"user_turns_joined": 1, "empty_turn_removed": 1, "invalid_utf8_replaced": 1},
        "tokens": 2000,
        "supervised_tokens": 800,
        "weight_sum": 800.0,
    }
    assert as_json["gpt3"]["weight_sum"] == 40.0


def test_a_record_that_got_lost_is_noticed(tmp_path: Path) -> None:
    with Ledger(str(tmp_path / "ledger.jsonl")) as ledger:
        keep(ledger, "a")
        ledger.received("gpt4")
        with pytest.raises(RuntimeError, match="gpt4: 2 records in, but 1 kept and 0 dropped"):
            ledger.check()


def test_a_record_counted_twice_is_noticed(tmp_path: Path) -> None:
    with Ledger(str(tmp_path / "ledger.jsonl")) as ledger:
        keep(ledger, "a")
        ledger.dropped(id="a", file="f", offset=0, source="gpt4", reason="r", detail="", repairs=())
        with pytest.raises(RuntimeError, match="1 kept and 1 dropped"):
            ledger.check()


def test_the_table_is_aligned_and_shows_reasons_with_examples(tmp_path: Path) -> None:
    with Ledger(str(tmp_path / "ledger.jsonl")) as ledger:
        for number in range(1200):
            keep(ledger, f"k{number}")
        for number in range(4):
            drop(ledger, f"d{number}")
        keep(ledger, "e", "gpt3", weight_sum=40.0, repairs=("user_turns_joined",))
        drop(ledger, "f", "not_an_object", "(unmatched)")
        table = ledger.table()
    assert [" ".join(line.split()) for line in table.splitlines()] == [
        "source conversations in kept dropped tokens supervised tokens share supervised mean weight",
        "gpt4 1,204 1,200 4 1,200,000 480,000 40.0 % 1.0000",
        "dropped: no_answer 4 (d0, d1, d2)",
        "gpt3 1 1 0 1,000 400 40.0 % 0.1000",
        "repaired: user_turns_joined 1 (e)",
        "(unmatched) 1 0 1 0 0 - -",
        "dropped: not_an_object 1 (f)",
        "total 1,206 1,201 5 1,201,000 480,400 40.0 % 0.9993",
    ]
    rows = [line for line in table.splitlines() if not line.startswith("  ")]
    for title in ("conversations in", "kept", "supervised tokens", "mean weight"):
        end = rows[0].index(title) + len(title)
        assert all(row[end - 1] != " " and row[end : end + 1] in (" ", "") for row in rows)


def test_an_empty_ledger_has_a_table_too(tmp_path: Path) -> None:
    with Ledger(str(tmp_path / "ledger.jsonl")) as ledger:
        ledger.check()
        assert ledger.table().splitlines()[1].split() == ["total", "0", "0", "0", "0", "0", "-", "-"]


def test_strange_ids_and_file_names_break_neither_lines_nor_table(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    name = b"caf\xe9.json".decode("utf-8", "surrogateescape")
    ids = ["two\nlines", "x" * 1000, "\u2028"]
    with Ledger(str(path)) as ledger:
        for id in ids:
            drop(ledger, id, file=name)
        table = ledger.table()
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert [line["id"] for line in lines] == ids
    assert {line["file"] for line in lines} == {name}
    assert len(table.splitlines()) == 4
    assert max(map(len, table.splitlines())) < 200
