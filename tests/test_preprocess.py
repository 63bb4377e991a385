"""Dumps become a store in which every record is accounted for; a store is made once, and never by halves."""

import errno
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import ochat_train.conversations.records
from ochat_train.conversations.schema import Conversation, Message
from ochat_train.preprocess.__main__ import main
from ochat_train.preprocess.job import Job, describe_origin
from ochat_train.preprocess.ledger import Ledger
from ochat_train.preprocess.shard import Shard
from ochat_train.preprocess.shard_files import WorkFolder
from ochat_train.tokens.encode import encode
from ochat_train.tokens.store import StoreWriter, TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer
from tests.dumps import (
    ROOT,
    chat,
    contents,
    failure,
    ids_in,
    ledger_of,
    make,
    manifest_of,
    page,
    prose,
    reasons_in,
    source,
    write_lines,
    write_recipe,
)
from tests.small_tokenizers import write_base
from tests.test_docs import REASONS

KEEP_COPIES = {"exact": False, "prefix": False}


pytestmark = pytest.mark.usefixtures("keep_signal_handlers")


def no_store_is_made(folder: Path, *kept: str) -> bool:
    """Whether the folder holds only these files and maybe shards, which the next run uses or removes."""
    left = {path.name for path in folder.iterdir() if not re.fullmatch(r"store\.partial-[0-9a-f]{12}", path.name)}
    return left == {"recipe.yaml", *kept}


# ---- Every record is accounted for ----

LONG = prose(0, 150)


def talk(seed: int, num_answers: int = 2) -> list[str]:
    """Texts of turns in turn, none like any other seed's."""
    return [prose(100 * seed + turn, 40) for turn in range(2 * num_answers)]


def said(id: str, *turns: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"id": id, "messages": [{"role": role, "content": content} for role, content in turns], **fields}


REFUSAL = "I'm sorry, but as an AI language model, I cannot do that."
FRENCH = "Bonjour, pouvez-vous me dire comment préparer une bonne soupe aux légumes pour toute la famille ce soir ?"
UNLIKE = [("user", prose(90, 30)), ("assistant", prose(91, 30)), ("user", prose(92, 30)), ("assistant", prose(93, 30))]

# The ids say why each is dropped.
DROPPED: list[dict[str, Any]] = [
    {"id": "no_turns", "text": "Hi"},
    {"id": "turn_not_an_object", "conversations": ["Hi", 7]},
    said("unknown_role", ("narrator", "x"), ("assistant", "y")),
    {"id": "bad_pair", "conversation": [{"human": "x", "user": "y", "assistant": "z"}]},
    said("value_not_text", ("user", 5), ("assistant", "y")),
    said("not_text", ("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "y")),
    {"id": "bad_weight", "items": [{"role": "user", "content": "a", "weight": -1}]},
    chat("bad_condition", "a", "b", condition=4),
    chat("bad_system", "a", "b", system=["x"]),
    said("no_answer", ("user", "x"), ("user", "y")),
    chat("too_few_answers", "What is it?", "It is a test."),
    chat("other_language", *[f"{FRENCH} {number}" for number in range(4)]),
    chat("refusal", prose(80, 20), REFUSAL, *talk(8)),
    chat("repeated_answer", prose(81, 20), prose(82, 30), prose(83, 20), prose(82, 30)),
    {
        "id": "no_weight",
        "items": [{"role": role, "content": text, "weight": 0} for role, text in UNLIKE],
    },
    chat("too_long", *[prose(400 + turn, 400) for turn in range(4)]),
    chat("exact_duplicate", *[f" {text.replace(' ', '  ')}\n" for text in talk(1)]),
    chat("earlier_snapshot", *talk(2, 3)[:4]),
    chat("near_duplicate", *talk(3)[:3], talk(3)[3].rsplit(" ", 1)[0]),
]
KEPT = [
    chat("original", *talk(1), model="strong"),
    chat("longest", *talk(2, 3)),
    chat("near original", *talk(3)),
    said("blank", ("system", "You are kind."), *UNLIKE[:2], ("user", " "), ("user", "And?"), UNLIKE[3]),
    said("two users", ("user", prose(70, 9)), ("user", prose(71, 9)), *UNLIKE[1:3], ("assistant", prose(72, 30))),
    chat("unanswered", *talk(6), "And?"),
    said("greeting", ("assistant", "Welcome!"), *[(role, text[9:]) for role, text in UNLIKE]),
    chat("half", *talk(7)[:3], "caf\\ud83d"),
]
ACTIONS = {
    "blank": ["empty_turn_removed"],
    "two users": ["user_turns_joined"],
    "unanswered": ["unanswered_turn_removed"],
    "greeting": ["leading_answer_untrained"],
    "half": ["surrogate_replaced"],
    "page": ["html_converted"],
}
BAD_HTML = {"html_too_deep": "<blockquote>" * 99, "html_not_converted": "<table><td colspan=999>x</table>"}
REASON_OF_PLACE = {  # of those that have no id
    "a.jsonl:{not_json}": "not_json",
    "a.jsonl:{not_an_object}": "not_an_object",
    "a.jsonl:{too_large}": "record_too_large",
    "a.jsonl:{not_utf8}": "not_utf8",
    "a.jsonl:{truncated}": "truncated_record",
    "pages/no_content.html:0": "no_page_content",
    "pages/no_script.html:0": "no_next_data",
}
DUPLICATE_OF = {
    "exact_duplicate": "of original",
    "earlier_snapshot": "of longest",
    "near_duplicate": "of near original",
}


@dataclass(frozen=True)
class Messy:
    """A store of messy input: what was printed, and the reason of each record by its id."""

    folder: Path
    store: Path
    printed: str
    expected: dict[str, str | None]


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> Messy:
    folder = tmp_path_factory.mktemp("messy")
    records = (json.dumps(record, ensure_ascii=False) for record in (*KEPT, *DROPPED))
    lines = [record.encode().replace(b"caf\\\\ud83d", b"caf\\ud83d") for record in records]
    raw = {"not_json": b'{"id": "x", "conversations": [', "not_an_object": b'"just text"', "too_large": b"7" * 60_000}
    raw["not_utf8"] = b'{"id": "x\xff"}'
    raw["truncated"] = json.dumps(chat("cut", "Hi", "Hello")).encode()[:-9]
    (folder / "a.jsonl").write_bytes(b"\n".join([*lines, *raw.values()]))
    offsets, offset = {}, sum(len(line) + 1 for line in lines)
    for name, line in raw.items():
        offsets[name] = offset
        offset += len(line) + 1
    (folder / "pages").mkdir()
    (folder / "pages/good.html").write_text(page(chat("page", *[f"<p>{text}</p>" for text in talk(5)])))
    for id, html in BAD_HTML.items():
        (folder / f"pages/{id}.html").write_text(page(chat(id, "Hi", html)))
    (folder / "pages/no_content.html").write_text('<html><script id="__NEXT_DATA__">{"props": {}}</script>')
    (folder / "pages/no_script.html").write_text("<html><body>Please log in.</body></html>")
    sources = [
        source("strong", folder / "a.jsonl", where={"model": "strong"}),
        source("other", folder / "a.jsonl", where_not={"model": "strong"}, weight=0.25),
        source("pages", folder / "pages", weight=0.1),
    ]
    filters = {"languages": ["en"], "refusals": "drop", "repeated_answers": "drop", "min_answers": 2}
    options: dict[str, Any] = {"filters": filters, "dedupe": {"near": 0.8}, "overlong": "drop", "eval_fraction": 0.2}
    recipe = write_recipe(folder, sources, max_tokens=1024, **options)
    expected: dict[str, str | None] = {record["id"]: None for record in (*KEPT, {"id": "page"})}
    expected |= {record["id"]: record["id"] for record in DROPPED}
    expected |= {id: id for id in BAD_HTML}
    expected |= {f"{folder}/{place.format(**offsets)}": reason for place, reason in REASON_OF_PLACE.items()}
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ochat_train.conversations.records, "MAX_RECORD_BYTES", 50_000)
        patch.setattr("builtins.print", printed.append)
        store = make(recipe, num_workers=1)  # other processes would not see the smaller limit
    return Messy(folder, store, "\n".join(printed), expected)


def test_every_record_is_kept_or_dropped_under_the_name_of_its_reason(messy: Messy) -> None:
    rows = ledger_of(messy.store)
    assert {row["id"]: row["reason"] for row in rows} == messy.expected
    assert len(rows) == len(messy.expected)
    found = {reason for reason in messy.expected.values() if reason}
    of_the_bases_own_template = {"template_refused", "template_unstable", "spells_control"}
    assert found == REASONS - of_the_bases_own_template - {
        "equal_answer",
        "bad_row",
        "no_parent",
        "repeated_message",
        "in_eval_source",
    }  # test_preference.py, test_records.py, test_flat.py, test_eval_sources.py
    assert all(row["outcome"] == ("dropped" if row["reason"] else "kept") for row in rows)
    assert all(row["detail"] for row in rows if row["reason"])
    assert {row["id"]: row["detail"] for row in rows if row["id"] in DUPLICATE_OF} == DUPLICATE_OF
    assert {row["id"]: row["actions"] for row in rows if row["actions"]} == ACTIONS


def test_the_ledger_has_the_place_of_every_record_in_the_order_of_the_input(messy: Messy) -> None:
    rows = ledger_of(messy.store)
    places = [(row["file"], row["offset"]) for row in rows]
    assert places == sorted(set(places))
    raw = (messy.folder / "a.jsonl").read_bytes()
    starts = [offset for file, offset in places if file == f"{messy.folder}/a.jsonl"]
    assert starts == [0, *(match.end() for match in re.finditer(b"\n", raw))]
    for row in rows:
        if f'"id": "{row["id"]}"'.encode() in raw:
            assert raw[row["offset"] :].startswith(f'{{"id": "{row["id"]}"'.encode())


def test_the_records_in_are_those_kept_and_those_dropped_by_reason_for_each_source(messy: Messy) -> None:
    counts = manifest_of(messy.store).counts
    num_lines = (messy.folder / "a.jsonl").read_bytes().count(b"\n") + 1
    records_in = {name: of_source["in"] for name, of_source in counts.items()}
    # What is no object may be of either source of its file; what cannot be read of a page is of its only one.
    assert records_in == {"strong": 1, "other": num_lines - 6, "(unreadable)": 5, "pages": 5}
    rows = ledger_of(messy.store)
    for name, of_source in counts.items():
        mine = [row for row in rows if row["source"] == name]
        reasons = Counter(row["reason"] for row in mine if row["reason"])
        assert of_source["dropped"] == reasons
        assert of_source["in"] == len(mine) == of_source["kept"] + reasons.total()
        assert of_source["actions"] == Counter(action for row in mine for action in row["actions"])


def test_the_numbers_of_the_ledger_are_those_of_the_store(messy: Messy) -> None:
    in_store: dict[str, list[float]] = {}
    for split in ("train", "eval"):
        store = TokenStore(messy.store, split)
        for position in range(len(store)):
            weights = store[position].loss_weights
            numbers = [1, len(weights), int((weights > 0).sum()), weights.sum(dtype=np.float64)]
            in_store[store.name(position)] = numbers
    columns = ("num_examples", "num_tokens", "num_supervised_tokens", "weight_sum")
    rows = ledger_of(messy.store)
    assert {row["id"]: [row[name] for name in columns] for row in rows if not row["reason"]} == in_store
    assert {row[name] for row in rows if row["reason"] for name in columns} == {0}
    manifest = manifest_of(messy.store)
    for name, column in zip(("examples", "tokens", "supervised_tokens", "weight_sum"), columns, strict=True):
        of_splits = sum(totals["num_" + name if name != "weight_sum" else name] for totals in manifest.splits.values())
        assert sum(of_source[name] for of_source in manifest.counts.values()) == pytest.approx(of_splits, rel=1e-12)
        assert of_splits == pytest.approx(sum(row[column] for row in rows), rel=1e-12)


def test_the_table_shows_the_forms_the_reasons_and_some_ids(messy: Messy) -> None:
    lines = [" ".join(line.split()) for line in messy.printed.splitlines()]
    assert f"{messy.folder}/a.jsonl: JSON lines, from/value: 13 records" in lines
    assert f"{messy.folder}/a.jsonl: JSON lines, role/content: 5 records" in lines
    assert f"{messy.folder}/a.jsonl: JSON lines, not read: 14 records" in lines
    assert "ShareGPT page, from/value: 3 records" in lines
    assert any(line.startswith("strong 1 1 0 1 ") for line in lines)
    assert any(line.startswith(f"total {len(messy.expected)} 9 {len(messy.expected) - 9} 9 ") for line in lines)
    assert any("no_turns 1 (no_turns), turn_not_an_object 1 (turn_not_an_object)" in line for line in lines)
    assert any("empty_turn_removed 1 (blank)" in line for line in lines)


def test_many_files_are_shown_together_by_their_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(25):
        write_lines(tmp_path / f"{number}.jsonl", chat(f"{number}", f"Hi {number}", "Hello"), {"id": "x"})
        (tmp_path / f"{number}.json").write_text(json.dumps([chat(f"a {number}", f"Hi! {number}", "Hello")]))
    make(write_recipe(tmp_path, [source("s", tmp_path / "*.json*")]))
    printed = capsys.readouterr().out
    assert printed.startswith(
        "read:\n"
        "  JSON array, from/value: 25 records\n"
        "  JSON lines, from/value: 25 records\n"
        "  JSON lines, not read: 25 records\n\n"
    )


def test_a_row_that_gets_lost_stops_the_command_and_no_store_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", *(chat(str(number), prose(number, 9), "Yes.") for number in range(5)))
    recipe = write_recipe(tmp_path, [source("s", dump)])
    add = Ledger.add
    monkeypatch.setattr(Ledger, "add", lambda self, table: add(self, table.slice(1)))
    with pytest.raises(RuntimeError, match="total: 5 records in, but 4 in the ledger"):
        main([str(recipe)])
    assert not (tmp_path / "store").exists()


def test_an_example_that_gets_lost_stops_the_command_and_no_store_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", *(chat(str(number), prose(number, 9), "Yes.") for number in range(5)))
    recipe = write_recipe(tmp_path, [source("s", dump)])
    add = StoreWriter.add
    monkeypatch.setattr(StoreWriter, "add", lambda self, split, rows: add(self, split, rows.slice(1)))
    with pytest.raises(RuntimeError, match="num_examples: 4 in the store, but 5 of the records kept"):
        main([str(recipe)])
    assert not (tmp_path / "store").exists()


def test_a_record_that_is_not_utf8_is_never_trained(tmp_path: Path) -> None:
    dump = tmp_path / "dump.jsonl"
    bad = b'{"conversations": [{"from": "human", "value": "a\xff"}, {"from": "gpt", "value": "b"}]}\n'
    dump.write_bytes(bad + json.dumps(chat("good", "Hi", "Hello")).encode())
    path = make(write_recipe(tmp_path, [source("s", dump)]))
    assert [row["reason"] for row in ledger_of(path)] == ["not_utf8", None]
    assert len(TokenStore(path)) == 1


def test_a_file_whose_name_is_no_utf8_is_read_like_any_other(tmp_path: Path) -> None:
    name = tmp_path / b"caf\xe9.jsonl".decode("utf-8", "surrogateescape")
    write_lines(name, {"conversations": chat("", "Hi", "Hello")["conversations"]}, {"conversations": []})
    store = make(write_recipe(tmp_path, [source("s", tmp_path / "*.jsonl")]))
    shown = f"{tmp_path}/caf\\xe9.jsonl"
    assert ids_in(store) == [f"{shown}:0"]
    assert [row["file"] for row in ledger_of(store)] == [shown, shown]


# ---- Input that stops the run ----


@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b'[{"conversations": []},\n {"conversations": [', 25),
        (b'[{"id": "a"} {"id": "b"}]', 13),
        (b'[{"id": "a"}, {"id": tru}]', 14),
        (b"", 0),
        (b"  \n", 3),
        (b"plain text", 0),
        (b"\x1f\x8b\x08compressed", 0),
        (b'{\n "id": "a"\n}\n]', 15),
    ],
)
def test_a_file_that_is_unreadable_as_a_whole_ends_the_run_and_leaves_no_store(
    content: bytes, offset: int, tmp_path: Path
) -> None:
    good = write_lines(tmp_path / "a.jsonl", *(chat(f"{number}", "Hi", "Hello") for number in range(600)))
    bad = tmp_path / "b.json"
    bad.write_bytes(content)
    recipe = write_recipe(tmp_path, [source("s", tmp_path / "[ab].json*")])
    assert failure(recipe).startswith(f"error: {bad}, byte {offset}: ")
    assert no_store_is_made(tmp_path, good.name, bad.name)


@pytest.mark.parametrize("path", ["none.json", "none/*.jsonl"])
def test_a_path_that_matches_no_file_is_named(path: str, tmp_path: Path) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    recipe = write_recipe(tmp_path, [source("a", dump), source("b", path)])
    assert failure(recipe).startswith(f"error: data.sources.1.path: no file matches {path!r}")
    assert no_store_is_made(tmp_path, dump.name)


def test_a_folder_without_files_to_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "dumps/more").mkdir(parents=True)
    (tmp_path / "dumps/notes.txt").write_text("x")
    message = failure(write_recipe(tmp_path, [source("s", tmp_path / "dumps")]))
    assert message.startswith(f"error: data.sources.0.path: no file to read in {str(tmp_path / 'dumps')!r}: 1 ")


def test_a_language_that_nobody_knows_is_named_before_anything_is_read(tmp_path: Path) -> None:
    broken = tmp_path / "dump.json"
    broken.write_bytes(b"")
    recipe = write_recipe(tmp_path, [source("s", broken)], filters={"languages": ["en", "dee"]})
    assert "'dee' is no language that the model knows" in failure(recipe)


def test_a_base_that_cannot_be_trained_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, [source("s", write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello")))])
    base = ["model.config=null", f"model.base={tmp_path}"]
    assert (
        failure(recipe, *base)
        == f"error: the folder {tmp_path} holds no model: no config.json is in it; copy it there, or name another"
    )
    (tmp_path / "config.json").write_text("{}")
    assert f"the folder {tmp_path} holds no weights" in failure(recipe, *base)
    assert f"the folder {tmp_path} holds no tokenizer" in failure(recipe, *base, "tokenizer=null")
    assert no_store_is_made(tmp_path, "dump.jsonl", "config.json")


def test_a_store_that_cannot_be_written_is_refused_before_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    monkeypatch.setattr("ochat_train.preprocess.run.describe_origin", lambda *_: pytest.fail("files were read"))
    for place in (dump, Path("/proc/self")):
        message = failure(write_recipe(tmp_path, [source("s", dump)], store=str(place / "store")))
        assert message.startswith(
            f"error: data.store {place.resolve()}/store: nothing can be written in {place.resolve()} ("
        )


def test_the_current_folder_is_no_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    monkeypatch.chdir(tmp_path)
    message = failure(write_recipe(tmp_path, [source("s", dump)], store="."))
    assert message == "error: data.store . exists and is not a token store; name another folder"


def test_a_place_that_holds_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    (tmp_path / "store").mkdir()
    (tmp_path / "store/thesis.txt").write_text("dear")
    assert "exists and is not a token store" in failure(write_recipe(tmp_path, [source("s", dump)]))
    assert contents(tmp_path / "store") == {"thesis.txt": b"dear"}


def test_a_store_among_the_dumps_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    recipe = write_recipe(tmp_path, [source("s", tmp_path / "**/*.json*")])
    make(recipe, f"data.sources.0.path={tmp_path}/dump.jsonl")
    message = failure(recipe)
    assert f"{tmp_path}/store/dataset_dict.json lies in data.store {tmp_path}/store" in message


@pytest.mark.parametrize("then", ["complete", "as before"])
def test_a_file_that_changes_while_it_is_read_stops_the_run_and_nothing_of_it_is_used(
    then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quickstart: ChatTokenizer
) -> None:
    """Whether the change stays or goes."""
    dumps = [write_lines(tmp_path / f"{n}.jsonl", chat(f"{n}", f"Hi {n}", "Hello")) for n in range(4)]
    recipe = write_recipe(tmp_path, [source("s", tmp_path / "*.jsonl")])
    before = dumps[3].read_text()
    finish = WorkFolder.save

    def save(self: WorkFolder, number: int, shard: Shard) -> None:
        finish(self, number, shard)
        write_lines(dumps[3], chat("3", "Hi 3", "Changed"))

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save", save)
        assert failure(recipe, "--workers", "1").startswith(f"error: {dumps[3]} was changed while it was read")
    assert no_store_is_made(tmp_path, *(dump.name for dump in dumps))
    if then == "as before":
        dumps[3].write_text(before)
    text = quickstart.pretrained.decode(TokenStore(make(recipe))[3].input_ids)
    assert text.endswith(f"Assistant:{'Hello' if then == 'as before' else 'Changed'}<|end_of_turn|>")


def test_a_full_disk_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    recipe = write_recipe(tmp_path, [source("s", dump)])

    def save(self: WorkFolder, number: int, shard: Shard) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save", save)
        assert failure(recipe).startswith("error: [Errno 28] No space left on device; fix it and run the same command")
    assert ids_in(make(recipe)) == ["1"]


@pytest.mark.parametrize("number", ["0", "-1"])
def test_no_workers_at_all_are_refused(number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recipe.yaml", "--workers", number])
    assert f"--workers {number}: at least 1" in capsys.readouterr().err


# ---- Sources ----


def test_a_record_of_no_source_or_of_two_is_named(tmp_path: Path) -> None:
    records = [chat(model, "Hi", "Hello", model=model) for model in ("GPT-4", "GPT-3.5", "Bard")]
    dump = write_lines(tmp_path / "dump.jsonl", *records)
    strong, other = (
        source("strong", dump, where={"model": "GPT-4"}),
        source("weak", dump, where_not={"model": ["GPT-4", "Bard"]}),
    )
    message = failure(write_recipe(tmp_path, [strong, other]))
    assert "record 'Bard' matches no source" in message and str(dump) in message and "model='Bard'" in message
    third = source("bard", dump, where={"model": ["Bard", "GPT-4"]})
    message = failure(write_recipe(tmp_path, [strong, other, third]))
    assert "record 'GPT-4' matches 2 sources (strong, bard)" in message
    assert no_store_is_made(tmp_path, dump.name)


def test_two_sources_without_a_filter_cannot_share_a_file_however_they_spell_it(tmp_path: Path) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("r7", "Hi", "Hello"))
    (tmp_path / "link.jsonl").symlink_to(dump)
    for other in (dump, f"{tmp_path}/./dump.jsonl", f"{tmp_path}//du*.jsonl", tmp_path / "link.jsonl"):
        recipe = write_recipe(tmp_path, [source("a", dump), source("b", other)])
        assert "record 'r7' matches 2 sources (a, b)" in failure(recipe)


def test_a_file_that_one_source_names_twice_is_read_once(tmp_path: Path) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    section = source("s", dump) | {"path": [str(dump), str(tmp_path / "*.jsonl"), f"{tmp_path}/./dump.jsonl"]}
    store = make(write_recipe(tmp_path, [section], dedupe=KEEP_COPIES))
    assert ids_in(store) == ["1"]
    assert len(ledger_of(store)) == 1


def test_files_are_read_in_the_order_of_the_recipe_and_those_of_one_path_by_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_lines(tmp_path / f"{name}.jsonl", chat(f"{name}1", name, "Hello"), chat(f"{name}2", "Hi", name))
    sources = [source("two", tmp_path / "[bc].jsonl"), source("one", tmp_path / "a.jsonl")]
    store = make(write_recipe(tmp_path, sources))
    assert ids_in(store) == ["b1", "b2", "c1", "c2", "a1", "a2"]
    made_from = manifest_of(store).made_from["inputs"]
    assert made_from["num_files"] == 3 and re.fullmatch("[0-9a-f]{64}", made_from["digest"])


# ---- Weights and conditions ----


def test_the_weights_of_sources_arrive_exactly(tmp_path: Path, quickstart: ChatTokenizer) -> None:
    turns = ("Hi", "Hello there", "And?", "Yes.")
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", *turns, model="a"), chat("2", *turns, model="b"))
    sources = [
        source("a", dump, where={"model": "a"}, weight=1.0),
        source("b", dump, where={"model": "b"}, weight=0.1, condition="GPT3"),
    ]
    store = TokenStore(make(write_recipe(tmp_path, sources, dedupe=KEEP_COPIES)))
    num_answer_tokens = sum(len(ids) + 1 for ids in quickstart.encode_texts([turns[1], turns[3]]))
    for position, weight in enumerate((1.0, 0.1)):
        example = store[position]
        weights = example.loss_weights
        assert weights.dtype == np.float32
        assert set(weights.tolist()) == {0.0, float(np.float32(weight))}
        assert int((weights > 0).sum()) == num_answer_tokens
        assert weights[-1] == np.float32(weight) and example.input_ids[-1] == quickstart.end_id
        # the f64 sum of f32 weights, not their f32 sum
        assert store.weight_sums[position] == pytest.approx(num_answer_tokens * float(np.float32(weight)), rel=1e-14)
    assert store.manifest.conditions == ["GPT4", "GPT3"]
    assert store.condition_ids.tolist() == [0, 1]
    assert store.manifest.inference_condition == "GPT4"


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"GPT3": 1.0, "GPT4": 0.1}, "GPT4"),  # the template's own, whatever its weight
        ({"Hasty": 0.3, "Careful": 1.0, "": 0.5}, "Careful"),
        ({"Hasty": 0.3, "": 0.5, "GPT4": 0.0}, ""),  # what was not trained is not asked
        ({"Only": 0.1}, "Only"),
    ],
)
def test_a_model_is_asked_under_a_condition_that_it_was_trained_on(
    weights: dict[str, float], expected: str, tmp_path: Path
) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", *(chat(name, f"Hi {name}", "Hello", model=name) for name in weights))
    sources = [
        source(name or "plain", dump, where={"model": name}, weight=weight) | {"condition": name}
        for name, weight in weights.items()
    ]
    assert TokenStore(make(write_recipe(tmp_path, sources))).manifest.inference_condition == expected


def test_the_ids_are_those_of_the_template(tmp_path: Path, quickstart: ChatTokenizer) -> None:
    records = json.loads((ROOT / "data/quickstart.json").read_text())[:40]
    dump = write_lines(tmp_path / "dump.jsonl", *records)
    store = TokenStore(make(write_recipe(tmp_path, [source("s", dump, weight=0.5)], dedupe=KEEP_COPIES)))
    for position, record in enumerate(records):
        turns, system = record["conversations"], ""
        if turns[0]["from"] == "system":
            system, turns = turns[0]["value"], turns[1:]
        messages = tuple(
            Message("user", turn["value"], 0.0) if turn["from"] == "human" else Message("assistant", turn["value"], 0.5)
            for turn in turns
        )
        conversation = Conversation("", "", "GPT4", system, messages)
        (encoded,) = encode([conversation], quickstart.template, quickstart)
        assert store[position].input_ids.tolist() == encoded.example.input_ids.tolist()
        assert store[position].loss_weights.tolist() == encoded.example.loss_weights.tolist()


def test_openchats_own_lines_bring_weight_condition_and_system_of_their_own(
    tmp_path: Path, quickstart: ChatTokenizer
) -> None:
    def record(condition: str | None, user_weight: float | None, answer_weight: float | None) -> dict[str, Any]:
        items = [
            {"role": "user", "content": "Hi", "weight": user_weight},
            {"role": "assistant", "content": "Hello", "weight": answer_weight},
        ]
        return {"items": items, "condition": condition, "system": "You are kind."}

    records = [record("GPT4", None, 0.5), record("GPT3", 1.0, None), record(None, 0.0, 0.0), record("", 2.0, 0.0)]
    dump = write_lines(tmp_path / "dump.jsonl", *records)
    sources = [source("s", dump, weight=0.1) | {"condition": None}]
    path = make(write_recipe(tmp_path, sources, dedupe=KEEP_COPIES))
    store = TokenStore(path)
    assert store.manifest.conditions == ["GPT4", "GPT3", ""]

    for position, (condition, user, answer) in enumerate((("GPT4", 0.0, 0.05), ("GPT3", 0.1, 0.1), ("", 0.2, 0.0))):
        text = quickstart.pretrained.decode(store[position].input_ids)
        lead = f"{condition} " if condition else ""
        # Nothing without a loss stays at the end.
        answer_text = f"{lead}Assistant:Hello<|end_of_turn|>" if answer else ""
        assert text == f"<s>You are kind.<|end_of_turn|>{lead}User:Hi<|end_of_turn|>{answer_text}"
        expected: list[float] = []
        for words, weight in (
            ("You are kind.", 0.0),
            (f"{lead}User:", 0.0),
            ("Hi", user),
            (f"{lead}Assistant:", 0.0),
            ("Hello", answer),
        ):
            expected += [weight] * len(quickstart.encode_texts([words])[0])
            expected += [] if words.endswith(":") else [weight]  # the end token
        expected = expected[: max(i for i, weight in enumerate(expected, start=1) if weight)]
        weights = store[position].loss_weights
        assert weights.tolist() == np.array([0.0, *expected], dtype=np.float32).tolist()
    assert [row["reason"] for row in ledger_of(path)] == [None, None, "no_weight", None]


def test_a_source_of_weight_0_is_dropped_by_name(tmp_path: Path) -> None:
    dump = write_lines(
        tmp_path / "dump.jsonl", chat("a", "Hi", "Hello", good=True), chat("b", "Hi", "Hello", good=False)
    )
    sources = [
        source("good", dump, where={"good": True}),
        source("bad", dump, where={"good": False}, weight=0, condition="GPT3"),
    ]
    store = make(write_recipe(tmp_path, sources))
    assert ids_in(store) == ["a"]
    assert [(row["reason"], row["detail"]) for row in ledger_of(store)] == [
        (None, None),
        ("no_weight", "every turn has weight 0"),
    ]
    counts = manifest_of(store).counts["bad"]
    assert (counts["in"], counts["kept"], counts["dropped"]) == (1, 0, {"no_weight": 1})


def test_a_weight_that_vanishes_in_float32_is_no_weight(tmp_path: Path) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("a", "Hi", "Hello", w=1), chat("b", "Hi", "Hello", w=0))
    sources = [source("a", dump, where={"w": 1}), source("b", dump, where={"w": 0}, weight=1e-60)]
    assert reasons_in(make(write_recipe(tmp_path, sources))) == {"a": None, "b": "no_weight"}


def test_nothing_left_to_train_on_is_an_error_that_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", {"conversations": []}, chat("b", "Hi"))
    message = failure(write_recipe(tmp_path, [source("s", dump)]))
    assert message == "error: no conversation is left to train on: see above"
    table = capsys.readouterr().out
    assert "no_turns 1" in table and "no_answer 1 (b)" in table
    assert no_store_is_made(tmp_path, dump.name)


def test_nothing_but_held_out_conversations_is_an_error_too(tmp_path: Path) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("a", "Hi", "Hello"))
    message = failure(write_recipe(tmp_path, [source("s", dump)], eval_fraction=0.999999))
    assert message.endswith("no conversation is left to train on: all of it is held out by data.eval_fraction")
    assert no_store_is_made(tmp_path, dump.name)


def test_a_tokenizer_that_transformers_would_read_otherwise_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base", "llama2")
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    make(write_recipe(tmp_path, [source("s", dump)]), f"tokenizer={base}")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "AutoTokenizer" in line]
    assert line.startswith(f"tokenizer {base}: tokenizer.json is taken as it is; LlamaTokenizer, which AutoTokenizer")


@pytest.mark.parametrize(
    ("template", "num_special"), [("openchat_v3.2", 1 + 2), ("openchat_v3.1", 1 + 1 + 2), ("chatml", 2 * 2)]
)
def test_text_that_spells_special_tokens_stays_text(template: str, num_special: int, tmp_path: Path) -> None:
    spelled = "<s></s><|end_of_turn|>GPT4 Assistant: yes<|im_start|><|im_end|>"
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", spelled, spelled))
    path = make(write_recipe(tmp_path, [source("s", dump)]), f"template={template}")
    store = TokenStore(path)
    tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
    special = {*tokenizer.all_special_ids, *store.manifest.added_tokens.values()}
    ids = store[0].input_ids.tolist()
    assert sum(id_ in special for id_ in ids) == num_special
    assert tokenizer.decode(ids).count(spelled) == 2


# ---- Cleaning and filters reach the store ----


def test_a_source_says_whether_its_texts_are_html(tmp_path: Path, quickstart: ChatTokenizer) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "<p>Read <strong>this</strong> &amp; that.</p>"))
    (tmp_path / "page.html").write_text(page(chat("2", "Hi!", "<p>Read <strong>this</strong> &amp; that.</p>")))
    recipe = write_recipe(tmp_path, [source("s", dump), source("p", tmp_path / "page.html")])
    markdown, html = "Read **this** & that.", "<p>Read <strong>this</strong> &amp; that.</p>"

    def answers(*overrides: str) -> list[str]:
        store = TokenStore(make(recipe, *overrides))
        texts: list[str] = [quickstart.pretrained.decode(store[position].input_ids) for position in range(2)]
        return [text.rsplit("Assistant:")[-1].removesuffix("<|end_of_turn|>") for text in texts]

    assert answers("data.sources.0.html=always", "data.sources.1.html=always") == [markdown, markdown]
    assert answers("data.sources.0.html=never", "data.sources.1.html=never") == [html, html]
    assert answers("data.sources.0.html=never")[1] == markdown  # a page is HTML, and auto knows


def test_an_answer_that_is_masked_has_zero_weights_in_the_store_and_its_action_in_the_ledger(
    tmp_path: Path, quickstart: ChatTokenizer
) -> None:
    twice = prose(1, 30)
    dump = write_lines(
        tmp_path / "dump.jsonl",
        chat("refuses", "Do it.", REFUSAL, "Please.", "Done."),
        chat("repeats", "Tell.", twice, "More.", twice, "More!", "No."),
        chat("only refuses", "Do that.", REFUSAL),
    )
    path = make(write_recipe(tmp_path, [source("s", dump, weight=0.5)]))
    store = TokenStore(path)

    def trained(position: int) -> list[str]:
        example = store[position]
        assert set(example.loss_weights.tolist()) == {0.0, 0.5}
        text: str = quickstart.pretrained.decode(example.input_ids[example.loss_weights > 0])
        return text.split("<|end_of_turn|>")[:-1]

    assert trained(0) == ["Done."]
    assert trained(1) == [twice, "No."]
    assert REFUSAL in quickstart.pretrained.decode(store[0].input_ids)
    assert [(row["id"], row["reason"], row["actions"]) for row in ledger_of(path)] == [
        ("refuses", None, ["refusal_masked"]),
        ("repeats", None, ["repeated_answer_masked"]),
        ("only refuses", "no_weight", ["refusal_masked"]),
    ]
    kept = make(write_recipe(tmp_path, [source("s", dump)], filters={"refusals": "keep", "repeated_answers": "keep"}))
    assert set(reasons_in(kept).values()) == {None}
    assert all(row["actions"] == [] for row in ledger_of(kept))


# ---- Length ----


def long_dump(folder: Path) -> Path:
    answer = "This is a rather long answer, with many words in it. " * 2
    return write_lines(
        folder / "dump.jsonl",
        chat("short", "Hi", "Hello"),
        chat("long", *[text for number in range(8) for text in (f"Go on {number}.", answer + str(number))]),
        chat("one", "Tell me everything.", prose(1, 300)),
        chat("late", prose(2, 200), "No."),
    )


def test_with_the_last_answer_only_each_record_trains_its_own(tmp_path: Path, quickstart: ChatTokenizer) -> None:
    talk = ["Hi", "Hello!", "Bye", "Bye!"]
    weights = {"weights": [1, 1, 0, 0]}  # of the record's own: its first answer is the last with a loss
    records = [
        chat("grown", *talk),
        chat("snapshot", *talk[:2]),
        chat("weighted", "Name one.", "Red", *talk[2:]) | weights,
        chat("refused", "Who?", "Ann.", "Why?", "As an AI language model, I cannot say."),
    ]
    dump = write_lines(tmp_path / "dump.jsonl", *records)
    path = make(write_recipe(tmp_path, [source("s", dump)], filters={"last_answer_only": True}))
    trained = {}
    for position, id in enumerate(ids_in(path)):
        example = TokenStore(path)[position]
        trained[id] = quickstart.pretrained.decode(example.input_ids[example.loss_weights > 0])
    assert trained == {
        "grown": "Bye!<|end_of_turn|>",
        "snapshot": "Hello!<|end_of_turn|>",
        "weighted": "Red<|end_of_turn|>",
    }
    rows = {row["id"]: (row["reason"], row["actions"]) for row in ledger_of(path)}
    assert rows["refused"] == ("no_weight", ["earlier_answers_untrained", "refusal_masked"])
    assert (rows["grown"][1], rows["snapshot"][1]) == (["earlier_answers_untrained"], [])


def test_the_form_of_the_loss_needs_no_other_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = chat("long", "Hi", prose(1, 400), "And?", "Yes.", "Sure?", "No.")
    recipe = write_recipe(tmp_path, [source("s", write_lines(tmp_path / "a.jsonl", long), weight=0.5)], max_tokens=128)
    path = make(recipe)
    by_answer = TokenStore(path, loss="answer")
    assert len(by_answer) > 3
    # Windows of one answer and two more answers; each weight is rounded once to f32.
    assert sum(by_answer.weight_sums.tolist()) == pytest.approx(3 * 0.5, rel=2**-23)
    capsys.readouterr()
    make(recipe, "train.loss=answer")
    assert "is up to date" in capsys.readouterr().out


def test_over_long_conversations_are_cut_after_the_last_answer_that_fits(
    tmp_path: Path, quickstart: ChatTokenizer
) -> None:
    recipe = write_recipe(tmp_path, [source("s", long_dump(tmp_path))], max_tokens=128, overlong="truncate")
    path = make(recipe)
    store = TokenStore(path)
    assert ids_in(path) == ["short", "long"]
    assert store.lengths.max() <= 128

    cut = store[1]
    whole = TokenStore(make(recipe, "data.max_tokens=4096", f"data.store={tmp_path / 'whole'}"))[1]
    length = len(cut.input_ids)
    assert cut.input_ids.tolist() == whole.input_ids[:length].tolist()
    assert cut.loss_weights.tolist() == whole.loss_weights[:length].tolist()
    assert cut.input_ids[-1] == quickstart.end_id and cut.loss_weights[-1] == 1.0
    is_answer_end = (whole.input_ids == quickstart.end_id) & (whole.loss_weights == 1.0)
    ends = np.flatnonzero(is_answer_end) + 1
    assert len(ends) == 8
    assert length == ends[ends <= 128].max()

    outcomes = {row["id"]: (row["outcome"], row["reason"], row["actions"]) for row in ledger_of(path)}
    assert outcomes == {
        "short": ("kept", None, []),
        "long": ("kept", None, ["overlong_truncated"]),
        "one": ("dropped", "too_long", []),
        "late": ("dropped", "too_long", []),
    }
    detail = next(row["detail"] for row in ledger_of(path) if row["id"] == "one")
    assert "above data.max_tokens 128" in detail


def test_over_long_conversations_are_dropped_where_the_recipe_says_so(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, [source("s", long_dump(tmp_path))], max_tokens=128, overlong="drop")
    store = make(recipe)
    assert ids_in(store) == ["short"]
    assert reasons_in(store) == {"short": None, **dict.fromkeys(("long", "one", "late"), "too_long")}
    assert manifest_of(store).counts["s"]["dropped"] == {"too_long": 3}


def test_over_long_conversations_are_split_into_numbered_examples_that_train_every_answer_once(
    tmp_path: Path, quickstart: ChatTokenizer
) -> None:
    recipe = write_recipe(tmp_path, [source("s", long_dump(tmp_path))], max_tokens=128, overlong_context=32)
    path = make(recipe)
    store = TokenStore(path)
    assert store.lengths.max() <= 128
    ids = ids_in(path)
    parts = Counter(id.partition("#")[0] for id in ids)
    expected = [f"{id}#{number + 1}" for id in ("long", "one", "late") for number in range(parts[id])]
    assert ids == ["short", *[id.replace("late#1", "late") if parts["late"] == 1 else id for id in expected]]
    assert parts["long"] > 2 and parts["one"] > 2

    whole = TokenStore(make(recipe, "data.max_tokens=4096", f"data.store={tmp_path / 'whole'}"))
    for position, id in enumerate(("short", "long", "one", "late")):
        of_parts = [store[part] for part, name in enumerate(ids) if name.partition("#")[0] == id]
        trained = [example.input_ids[example.loss_weights > 0] for example in of_parts]
        answers = whole[position].input_ids[whole[position].loss_weights > 0]
        assert np.concatenate(trained).tolist() == answers.tolist()

    rows = {row["id"]: row for row in ledger_of(path)}
    assert rows["long"]["actions"] == ["overlong_split"]
    assert rows["one"]["actions"] == ["overlong_split", "answer_windowed"]
    assert rows["late"]["actions"] == ["overlong_split", "question_cut"]
    assert {id: row["num_examples"] for id, row in rows.items()} == parts


def test_the_table_says_what_each_choice_for_long_conversations_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, [source("s", long_dump(tmp_path))], max_tokens=128, overlong_context=32)
    whole = {row["id"]: row for row in ledger_of(make(recipe, "data.max_tokens=4096"))}
    assert "above data.max_tokens" not in capsys.readouterr().out
    long = [row for id, row in whole.items() if id != "short"]
    num_tokens, num_supervised = (sum(row[name] for row in long) for name in ("num_tokens", "num_supervised_tokens"))
    lines, kept = [], {}
    for choice in ("split", "truncate", "drop"):
        store = make(recipe, f"data.overlong={choice}")
        in_table = [line for line in capsys.readouterr().out.splitlines() if "above data.max_tokens" in line]
        lines += [line.replace(f"data.overlong is {choice}", "data.overlong is ?") for line in in_table]
        kept[choice] = sum(row["num_supervised_tokens"] for row in ledger_of(store) if row["id"] != "short")
        overlong = manifest_of(store).overlong
        assert (overlong["conversations"], overlong["tokens"]) == (3, num_tokens)
        assert overlong[f"{choice}_supervised_tokens"] == kept[choice]
    shares = ", ".join(f"{choice} {100 * tokens / num_supervised:.1f} %" for choice, tokens in kept.items())
    assert lines == [
        f"above data.max_tokens 128: 3 conversations of {num_tokens:,} tokens, {num_supervised:,} supervised; of these "
        f"would be kept by {shares} (data.overlong is ?)"
    ] * len(kept)
    assert kept["split"] == num_supervised > kept["truncate"] > kept["drop"] == 0


def test_a_long_copy_is_not_counted_among_what_could_be_kept(tmp_path: Path) -> None:
    with long_dump(tmp_path).open("a") as dump:
        dump.write(json.dumps(chat("copy of one", "Tell me everything.", prose(1, 300))) + "\n")
    store = make(write_recipe(tmp_path, [source("s", dump.name)], max_tokens=128))
    assert sorted(filter(None, reasons_in(store).values())) == ["exact_duplicate"]
    assert manifest_of(store).overlong["conversations"] == 3


# ---- Duplicates ----


def test_the_copy_of_the_largest_weight_stays_whatever_comes_first(tmp_path: Path) -> None:
    dump = write_lines(
        tmp_path / "dump.jsonl",
        chat("weak", "Hi", "Hello", model="weak"),
        chat("strong", " Hi", "Hello\n", model="strong"),
        chat("other", "Hi", "Hello!", model="weak"),
    )
    sources = [
        source("weak", dump, where={"model": "weak"}, weight=0.1, condition="GPT3"),
        source("strong", dump, where={"model": "strong"}),
    ]
    store = make(write_recipe(tmp_path, sources))
    assert ids_in(store) == ["strong", "other"]
    assert [(row["reason"], row["detail"]) for row in ledger_of(store)] == [
        ("exact_duplicate", "of strong"),
        (None, None),
        (None, None),
    ]


def test_copies_stay_where_the_recipe_keeps_them(tmp_path: Path) -> None:
    *most, last = talk(1)
    near = chat("near", *most, last.rsplit(" ", 1)[0])
    copies = [chat("short", *most[:2]), chat("long", *most, last), chat("copy", *most, last), near]
    recipe = write_recipe(tmp_path, [source("s", write_lines(tmp_path / "dump.jsonl", *copies))])

    def dropped(*overrides: str) -> dict[str, str]:
        return {id: reason for id, reason in reasons_in(make(recipe, *overrides)).items() if reason}

    assert dropped("data.dedupe={exact: false, prefix: false}") == {}
    assert dropped("data.dedupe={exact: false}") == {"short": "earlier_snapshot"}
    assert list(dropped("data.dedupe={prefix: false}").values()) == ["exact_duplicate"]
    assert sorted(dropped().values()) == ["earlier_snapshot", "exact_duplicate"]
    assert sorted(dropped("data.dedupe={near: 0.8}").values()) == [
        "earlier_snapshot",
        "exact_duplicate",
        "near_duplicate",
    ]
    only_near = dropped("data.dedupe={exact: false, prefix: false, near: 0.8}")
    assert len(only_near) == 2 and set(only_near.values()) == {"near_duplicate"}


# ---- Made once ----


def test_a_second_run_says_up_to_date_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    recipe = write_recipe(tmp_path, [source("s", dump)])
    store = make(recipe)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    main([str(recipe), "train.epochs=9", "optim.lr=1e-3"])  # what is not of the data does not make it stale
    assert f"token store {store} is up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("input", "an input file"),
        ("more input", "an input file"),
        ("data.sources.0.weight=0.5", "the recipe's data section"),
        ("data.max_tokens=256", "the recipe's data section"),
        ("data.filters.refusals=keep", "the recipe's data section"),
        ("template=openchat_v3.1", "the template"),
        ("tokenizer", "the tokenizer"),
    ],
)
def test_a_change_makes_the_store_stale_and_it_is_made_anew(
    change: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    recipe = write_recipe(tmp_path, [source("s", tmp_path / "*.jsonl")])
    store = make(recipe)
    old = TokenStore(store)
    overrides = []
    if change == "input":
        stat = dump.stat()
        write_lines(dump, chat("1", "Hi", "Hellu"))
        os.utime(dump, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size and time: only the content tells
    elif change == "more input":
        write_lines(tmp_path / "dump2.jsonl", chat("2", "Hi", "Hello"))
    elif change == "tokenizer":
        folder = tmp_path / "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/quickstart_tokenizer")
        tokenizer.add_tokens(["Hello"])
        tokenizer.save_pretrained(folder)
        overrides = [f"tokenizer={folder}"]
    else:
        overrides = [change]
    capsys.readouterr()
    make(recipe, *overrides)
    printed = capsys.readouterr().out
    assert f"is stale ({named} changed)" in printed
    new = TokenStore(store)
    assert new.fingerprint != old.fingerprint
    assert not list(tmp_path.glob("store?*"))
    make(recipe, *overrides)
    assert "is up to date" in capsys.readouterr().out


def test_what_moved_is_the_same_by_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "dump.jsonl", chat("", name, "Hello"), chat(name, "Hi", name))
    recipe = write_recipe(tmp_path, [source("a", tmp_path / "one"), source("b", tmp_path / "two/*.jsonl")])
    store = make(recipe)
    (tmp_path / "one").rename(tmp_path / "z")  # its files stay before those of the second source
    shutil.copytree(ROOT / "data/quickstart_tokenizer", tmp_path / "tokenizer")
    moved = [f"data.sources.0.path={tmp_path / 'z'}", f"tokenizer={tmp_path / 'tokenizer'}"]
    before = contents(store)
    capsys.readouterr()
    make(recipe, *moved)
    printed = capsys.readouterr().out
    for key, was, now in (
        ("data.sources.0.path", tmp_path / "one", tmp_path / "z"),
        ("tokenizer", ROOT / "data/quickstart_tokenizer", tmp_path / "tokenizer"),
    ):
        assert printed.count(f"moved, and the same by what it holds: {key}: {was} -> {now}\n") == 1
    assert "is up to date" in printed and contents(store) == before
    main(["--explain", "one", str(recipe), *moved])  # the ledger has the old names
    assert f"== {tmp_path}/z/dump.jsonl, offset" in capsys.readouterr().out
    (tmp_path / "two/dump.jsonl").rename(tmp_path / "two/renamed.jsonl")
    make(recipe, *moved)
    assert "is up to date" in capsys.readouterr().out
    write_lines(tmp_path / "z/dump.jsonl", chat("", "one", "Hallo"), chat("one", "Hi", "one"))
    make(recipe, *moved)
    assert "is stale (an input file changed)" in capsys.readouterr().out
    assert contents(store) != before


def test_a_complete_store_is_used_when_its_dumps_are_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dumps").mkdir()
    dump = write_lines(tmp_path / "dumps/dump.jsonl", chat("1", "Hi", "Hello"))
    recipe = write_recipe(tmp_path, [source("s", dump.parent)])
    store = make(recipe)
    whole = contents(store)
    dump.unlink()  # as where a disk is no longer mounted
    capsys.readouterr()
    main([str(recipe)])
    printed = capsys.readouterr().out
    assert (
        f"the dumps are out of reach; token store {store} (" in printed
        and "is complete and is used as it is\n" in printed
    )
    for arguments, told in (
        (["data.max_tokens=256"], r"is stale \(the recipe's data section changed\), and cannot be made anew"),
        (["data.sources.0.path=elsewhere"], r"made from another path \(data.sources.0.path: .*dumps -> elsewhere\)"),
        (["--dry-run"], "no file to read in"),
        ([f"data.store={tmp_path / 'other'}"], "there is no whole token store at"),
        (["data.sources.0.path=memory://gone/x.json"], "is not there; check its spelling"),
    ):
        with pytest.raises(SystemExit, match=told):
            main([str(recipe), *arguments])
    assert contents(store) == whole


def test_a_store_of_another_version_is_named_when_its_dumps_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    recipe = write_recipe(tmp_path, [source("s", dump)])

    def describe_as_before(job: Job) -> dict[str, Any]:
        made_from = describe_origin(job)
        del made_from["base_chat_template"], made_from["places"]
        return made_from | {"code": "0" * 64, "libraries": made_from["libraries"] | {"rensa": "0.0.1"}}

    with monkeypatch.context() as patch:
        patch.setattr("ochat_train.preprocess.run.describe_origin", describe_as_before)
        make(recipe)
    dump.unlink()
    capsys.readouterr()
    main([str(recipe)])
    printed = capsys.readouterr().out
    assert "WARNING: data.sources.0.path: no file matches" in printed
    named = f"the base's chat template, the version of ochat_train, rensa 0.0.1 -> {version('rensa')}"
    assert f"is used as it is, though it would be made anew from them, since {named} changed" in printed


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train/lengths.npy", "train/lengths.npy has other bytes than were written"),
        ("manifest.json", "manifest.json does not agree with its own digest"),
    ],
)
def test_a_damaged_store_is_named_and_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"), chat("2", "Hi", "Well"))
    recipe = write_recipe(tmp_path, [source("s", dump)])
    store = make(recipe)
    whole = contents(store)
    data = bytearray((store / file).read_bytes())
    data[-8] ^= 1
    (store / file).write_bytes(data)
    main([str(recipe), "data.verify=false"])  # which looks at sizes alone, and at the manifest
    assert ("is up to date" in capsys.readouterr().out) == (file != "manifest.json")
    main([str(recipe)])
    if file != "manifest.json":
        assert f"WARNING: token store {store} is damaged: {damage}" in capsys.readouterr().out
    assert contents(store) == whole
    (store / "train/weight_sums.npy").unlink()
    main([str(recipe), "data.verify=false"])
    assert "train/weight_sums.npy is not there" in capsys.readouterr().out
    assert contents(store) == whole


def test_a_link_to_a_store_stays_and_what_it_leads_to_is_made_anew(tmp_path: Path) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    recipe = write_recipe(tmp_path, [source("s", dump)])
    (tmp_path / "disk/deep").mkdir(parents=True)
    (tmp_path / "store").symlink_to(tmp_path / "disk/deep")
    make(recipe)
    make(recipe, "data.max_tokens=256")
    assert (tmp_path / "store").is_symlink()
    assert ids_in(tmp_path / "store") == ["1"]
    assert os.listdir(tmp_path / "disk") == ["deep"]


def test_a_store_of_an_older_format_is_replaced(tmp_path: Path) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    recipe = write_recipe(tmp_path, [source("s", dump)])
    store = make(recipe)
    (store / "manifest.json").write_text('{"format_version": 1, "fingerprint": "", "made_from": {}}')
    (store / "ledger.jsonl").write_text("")
    make(recipe)
    assert ids_in(store) == ["1"]
    assert not (store / "ledger.jsonl").exists()
    assert not list(tmp_path.glob("store?*"))


def test_equal_runs_in_different_folders_make_equal_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = []
    for name, store_name in (("a", "store"), ("b/deeper", "stores/other")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "quickstart.json").write_bytes((ROOT / "data/quickstart.json").read_bytes())
        monkeypatch.chdir(folder)
        recipe = write_recipe(folder, [source("s", "quickstart.json")], store=store_name, eval_fraction=0.2)
        stores.append(contents(make(recipe)))
    assert {"manifest.json", "ledger.parquet", "train/lengths.npy", "eval/lengths.npy"} < stores[0].keys()
    assert stores[0] == stores[1]


def test_the_store_opens_and_trains_with_its_own_tokenizer(tmp_path: Path, quickstart: ChatTokenizer) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    store = make(write_recipe(tmp_path, [source("s", dump)]))
    saved = load_tokenizer(str(store / "tokenizer"), quickstart.template)
    assert saved.digest == quickstart.digest == TokenStore(store).manifest.made_from["tokenizer"]
    assert TokenStore(store).manifest.added_tokens == {"<|end_of_turn|>": quickstart.end_id}


# ---- Dry run ----


def test_a_dry_run_prints_the_table_of_the_real_run_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    dump = long_dump(folder)
    with dump.open("a") as file:
        file.write(json.dumps(chat("copy", "Hi", " Hello")) + "\nnot JSON\n")
    recipe = write_recipe(folder, [source("s", dump)], max_tokens=128, eval_fraction=0.3)

    def listing() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = listing()
    main(["--dry-run", str(recipe)])
    *table, last = capsys.readouterr().out.splitlines()
    assert last == "dry run: nothing was written"
    assert listing() == before

    store = make(recipe)
    assert capsys.readouterr().out.splitlines()[:-1] == table
    assert any("exact_duplicate 1 (" in line for line in table) and any("not_json 1 (" in line for line in table)

    before = listing()
    main(["--dry-run", str(recipe)])  # though the store is up to date
    assert capsys.readouterr().out.splitlines() == [*table, last]
    assert listing() == before
    assert len(TokenStore(store)) > 0


def test_a_dry_run_says_what_is_wrong_with_the_input(tmp_path: Path) -> None:
    dump = tmp_path / "dump.json"
    dump.write_text('[{"id": 1},')
    assert failure("--dry-run", write_recipe(tmp_path, [source("s", dump)])).startswith(f"error: {dump}, byte ")
    assert no_store_is_made(tmp_path, dump.name)


# ---- Held out ----


def test_the_held_out_split_is_disjoint_complete_and_the_same_every_time(tmp_path: Path) -> None:
    records = json.loads((ROOT / "data/quickstart.json").read_text())
    splits = []
    for name, order in (("first", records), ("second", records[::-1])):
        dump = tmp_path / f"{name}.json"
        dump.write_text(json.dumps(order))
        recipe = write_recipe(tmp_path, [source("s", dump)], eval_fraction=0.2, store=str(tmp_path / f"{name} store"))
        store = make(recipe)
        train, held_out = ids_in(store), ids_in(store, "eval")
        kept = [id for id, reason in reasons_in(store).items() if reason is None]
        assert sorted(train + held_out) == sorted(kept)
        splits.append((set(train), set(held_out)))
    assert splits[0] == splits[1]
    # A share of 0.2 of the groups of like texts; five standard deviations of a fair draw of 400 are 0.1.
    assert 0.1 < len(splits[0][1]) / len(records) < 0.3


def test_a_larger_held_out_share_contains_the_smaller_one(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, [source("s", ROOT / "data/quickstart.json")])
    small, large = (set(ids_in(make(recipe, f"data.eval_fraction={share}"), "eval")) for share in (0.1, 0.4))
    assert small < large


def test_like_texts_and_the_parts_of_one_land_in_the_same_split(tmp_path: Path) -> None:
    """Equal texts of two sources, near-duplicates, chats that begin alike, and what a long one was split into."""
    groups = 60
    records = []
    for group in range(groups):
        question, answer = prose(10 * group, 60), prose(10 * group + 1, 120)
        records += [
            chat(f"{group} original", question, answer, model="a"),
            chat(f"{group} copy", question, answer, model="b"),
            chat(f"{group} near", f"Please: {question}", answer, model="a"),
            chat(f"{group} begin", question, answer, prose(10 * group + 2, 200), "No.", model="b"),
        ]
    np.random.default_rng(0).shuffle(records)
    dump = write_lines(tmp_path / "dump.jsonl", *records)
    sources = [
        source("a", dump, where={"model": "a"}),
        source("b", dump, where={"model": "b"}, condition="GPT3", weight=0.1),
    ]
    recipe = write_recipe(tmp_path, sources, max_tokens=256, overlong_context=0, eval_fraction=0.3, dedupe=KEEP_COPIES)
    store = make(recipe)
    of_split = {split: ids_in(store, split) for split in ("train", "eval")}
    assert any("#2" in id for id in of_split["eval"])
    members = {split: {id.partition("#")[0] for id in ids} for split, ids in of_split.items()}
    assert len(members["train"]) + len(members["eval"]) == len(records)
    by_group = {split: {id.partition(" ")[0] for id in ids} for split, ids in members.items()}
    assert not by_group["train"] & by_group["eval"]
    # Five standard deviations of a fair draw of 60 are 0.3.
    assert 0 < len(by_group["eval"]) / groups < 0.6


def test_without_a_share_nothing_is_held_out(tmp_path: Path) -> None:
    store = make(write_recipe(tmp_path, [source("s", ROOT / "data/quickstart.json")]))
    assert len(TokenStore(store, "eval")) == 0
    assert manifest_of(store).counts["s"]["kept"] == len(TokenStore(store))
