"""The ledger accounts for every record, with a row for each."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ochat_train.preprocess.ledger import (
    LEDGER_SCHEMA,
    Ledger,
    LedgerRow,
    drop_rows,
    ledger_table,
    read_rows,
    show_id,
)


def keep(id: str, source: str = "gpt4", actions: tuple[str, ...] = (), **more: Any) -> LedgerRow:
    numbers = {"num_examples": 1, "num_tokens": 1000, "num_supervised_tokens": 400, "weight_sum": 400.0}
    return LedgerRow(id, "a.json", 5, source, actions, **{**numbers, **more})


def drop(id: str, reason: str = "no_answer", source: str = "gpt4", actions: tuple[str, ...] = ()) -> LedgerRow:
    return LedgerRow(id, "a.json", 77, source, actions, reason, "turns: user")


def ledger_of(*shards: Sequence[LedgerRow], path: Path | None = None) -> Ledger:
    with Ledger(str(path) if path is not None else None) as ledger:
        for entries in shards:
            ledger.add(ledger_table(entries))
    return ledger


def test_every_record_gets_a_row_in_order_over_all_shards(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    changed = keep("changed é", actions=("empty_turn_removed", "refusal_masked"), num_examples=2, weight_sum=0.5)
    ledger_of([keep("untouched"), changed], [], [drop("dropped", actions=("user_turns_joined",))], path=path)
    table = pq.read_table(path)
    assert table.schema.equals(LEDGER_SCHEMA)
    kept = {
        "file": "a.json",
        "offset": 5,
        "conversation": 1,
        "source": "gpt4",
        "outcome": "kept",
        "reason": None,
        "detail": None,
    }
    numbers = {"num_examples": 1, "num_tokens": 1000, "num_supervised_tokens": 400, "weight_sum": 400.0}
    assert table.to_pylist() == [
        {"id": "untouched", **kept, "actions": [], **numbers},
        {
            **{"id": "changed é", **kept, "actions": ["empty_turn_removed", "refusal_masked"]},
            **{**numbers, "num_examples": 2, "weight_sum": 0.5},
        },
        {
            **{"id": "dropped", **kept, "offset": 77, "outcome": "dropped", "reason": "no_answer"},
            **{"detail": "turns: user", "actions": ["user_turns_joined"], **dict.fromkeys(numbers, 0)},
        },
    ]


def test_without_a_path_it_counts_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ledger_of([keep("a"), drop("b")]).total.num_in == 2
    assert list(tmp_path.iterdir()) == []


def test_rows_are_found_by_id(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    ledger_of([keep("a"), keep("b")], [drop("a"), keep("aa")], path=path)
    assert [(row["id"], row["outcome"]) for row in read_rows(str(path), "a")] == [("a", "kept"), ("a", "dropped")]
    assert read_rows(str(path), "c") == []


def test_dropping_rows_later_takes_their_numbers_and_leaves_the_others_alone() -> None:
    table = ledger_table([keep("a", actions=("x",)), drop("b", actions=("y",)), keep("c")])
    changed = drop_rows(table, {0: ("near_duplicate", "of c")})
    assert changed.schema.equals(LEDGER_SCHEMA)
    first = LedgerRow("a", "a.json", 5, "gpt4", ("x",), "near_duplicate", "of c")
    assert changed.equals(ledger_table([first, drop("b", actions=("y",)), keep("c")]))


def test_counts_and_json_add_up_by_source() -> None:
    ledger = ledger_of(
        [keep("a"), keep("b", actions=("user_turns_joined", "empty_turn_removed"), num_examples=3), drop("c")],
        [drop("d", "unknown_role", actions=("user_turns_joined",)), keep("e", "gpt3", weight_sum=40.0)],
    )
    ledger.check(5)
    counts = ledger.counts["gpt4"]
    assert (counts.num_in, counts.num_kept, counts.num_dropped) == (4, 2, 2)
    total = ledger.total
    assert (total.num_in, total.num_kept, total.num_dropped, total.num_examples) == (5, 3, 2, 5)
    assert (total.num_tokens, total.num_supervised_tokens, total.weight_sum) == (3000, 1200, 840.0)
    as_json = json.loads(json.dumps(ledger.to_json()))
    assert as_json["gpt4"] == {
        "in": 4,
        "kept": 2,
        "dropped": {"no_answer": 1, "unknown_role": 1},
        "actions": {"user_turns_joined": 2, "empty_turn_removed": 1},
        "examples": 4,
        "tokens": 2000,
        "supervised_tokens": 800,
        "weight_sum": 800.0,
    }
    assert as_json["gpt3"]["weight_sum"] == 40.0


def test_a_record_that_got_lost_or_counted_twice_is_noticed() -> None:
    ledger = ledger_of([keep("a"), drop("b")])
    ledger.check(2)
    for num_records in (1, 3):
        with pytest.raises(RuntimeError, match=rf"total: {num_records} records in, but 2 in the ledger; .*a bug"):
            ledger.check(num_records)


def test_a_row_of_neither_outcome_is_noticed_by_source() -> None:
    table = ledger_table([keep("a"), keep("b", "gpt3")])
    outcomes = pa.array(["kept", "lost"])
    ledger = Ledger(None)
    ledger.add(table.set_column(table.schema.get_field_index("outcome"), LEDGER_SCHEMA.field("outcome"), outcomes))
    with pytest.raises(RuntimeError, match="gpt3: 1 records in, but 0 kept and 0 dropped"):
        ledger.check(2)


def test_a_source_without_a_record_is_in_the_table() -> None:
    with Ledger(None, ["gpt4", "empty"]) as ledger:
        ledger.add(ledger_table([keep("a", "late"), keep("b")]))
    rows = [line.split() for line in ledger.table().splitlines()]
    assert [row[:2] for row in rows[1:]] == [["gpt4", "1"], ["empty", "0"], ["late", "1"], ["total", "2"]]
    ledger.check(2)


def test_a_store_that_holds_other_examples_than_were_kept_is_noticed() -> None:
    ledger = ledger_of([keep("a"), keep("b", "gpt3", num_examples=2), drop("c")])
    train = {"num_examples": 2, "num_tokens": 1500, "num_supervised_tokens": 700, "weight_sum": 700.0}
    eval_ = {"num_examples": 1, "num_tokens": 500, "num_supervised_tokens": 100, "weight_sum": 100.0}
    ledger.check_examples([train, eval_])
    for name in ("num_examples", "num_tokens", "num_supervised_tokens"):
        with pytest.raises(RuntimeError, match=rf"{name}: .* in the store, but .* of the records kept; this is a bug"):
            ledger.check_examples([train, {**eval_, name: eval_[name] - 1}])


def test_the_table_is_aligned_and_shows_reasons_with_examples() -> None:
    ledger = ledger_of(
        [keep(f"k{number}") for number in range(1200)],
        [drop(f"d{number}") for number in range(2)],
        [drop(f"d{number}") for number in range(2, 5)],
        [keep("e", "gpt3", weight_sum=40.0, actions=("user_turns_joined",), num_examples=2)],
        [drop("f", "not_an_object", "(unreadable)")],
    )
    table = ledger.table()
    assert [" ".join(line.split()) for line in table.splitlines()] == [
        "source records in kept dropped examples tokens supervised tokens share supervised mean weight",
        "gpt4 1,205 1,200 5 1,200 1,200,000 480,000 40.0 % 1.0000",
        "dropped: no_answer 5 (d0, d1, d2)",
        "gpt3 1 1 0 2 1,000 400 40.0 % 0.1000",
        "changed: user_turns_joined 1 (e)",
        "(unreadable) 1 0 1 0 0 0 - -",
        "dropped: not_an_object 1 (f)",
        "total 1,207 1,201 6 1,202 1,201,000 480,400 40.0 % 0.9993",
    ]
    rows = [line for line in table.splitlines() if not line.startswith("  ")]
    for title in ("records in", "kept", "supervised tokens", "mean weight"):
        end = rows[0].index(title) + len(title)
        assert all(row[end - 1] != " " and row[end : end + 1] in (" ", "") for row in rows)


def test_an_empty_ledger_has_a_table_too(tmp_path: Path) -> None:
    ledger = ledger_of(path=tmp_path / "ledger.parquet")
    ledger.check(0)
    assert ledger.table().splitlines()[1].split() == ["total", "0", "0", "0", "0", "0", "0", "-", "-"]
    assert pq.read_table(tmp_path / "ledger.parquet").num_rows == 0


def test_strange_ids_and_file_names_break_neither_rows_nor_table(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    name = "caf\\xe9.json"  # as the readers show a name that is not UTF-8
    ids = ["two\nlines", "x" * 1000, "\u2028"]
    entries = [LedgerRow(id, name, 0, "gpt4", (), "no_answer", "") for id in (*ids, f"{name}:12")]
    table = ledger_of(entries, path=path).table()
    rows = pq.read_table(path).to_pylist()
    assert [row["id"] for row in rows] == [*ids, "caf\\xe9.json:12"]
    assert {row["file"] for row in rows} == {"caf\\xe9.json"}
    assert len(table.splitlines()) == 4


def test_an_id_is_shown_whole_as_a_shell_reads_it_back() -> None:
    ids = [
        *("abc_12", "dumps/" + "deep/" * 20 + "chats.jsonl:123456", "x" * 1000, "two words", "it's $HOME `ls`", "-r#2"),
        *("two\nlines", "tab\tand 'quote' and \\", "no\xa0break\u2028🦙", "\x1b[31mred", "größe", ""),
    ]
    for id in ids:
        shown = show_id(id)
        assert shown.isprintable() and f"no_answer 1 ({shown})" in ledger_of([drop(id)]).table()
        read = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, text=True, check=True)
        assert read.stdout == id
    assert (show_id("abc_12"), show_id("two\nlines")) == ("abc_12", "$'two\\nlines'")
