"""Dumps become a store in which every record is accounted for; a store is made once, and never by halves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from ochat_train.conversations.schema import Conversation, Message
from ochat_train.preprocess import main, preprocess
from ochat_train.recipe import load_recipe
from ochat_train.tokens.encode import encode
from ochat_train.tokens.store import TokenStore, read_manifest
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def keep_signal_handlers() -> Iterator[None]:
    """`main` sets its own handler for SIGTERM, which is not for pytest."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def source(name: str, path: Path | str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "path": str(path), "condition": "GPT4", **fields}


def write_recipe(folder: Path, sources: Sequence[dict[str, Any]], *, store: str | None = None, **data: Any) -> Path:
    """A recipe in folder/recipe.yaml whose store is folder/store."""
    recipe = {
        "name": "test",
        "data": {"store": store or str(folder / "store"), "sources": list(sources), "max_tokens": 512, **data},
        "template": "openchat_v3.2",
        "tokenizer": str(ROOT / "data/quickstart_tokenizer"),
        "model": {"config": {"model_type": "llama"}},
        "packing": {"tokens_per_gpu": 4096},
        "train": {"epochs": 1},
        "checkpoint": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def make(recipe: Path, *overrides: str) -> Path:
    """Preprocess in this process; returns the store's path."""
    loaded = load_recipe(recipe, overrides)
    preprocess(loaded)
    return Path(loaded.data.store)


def failure(recipe: Path, *overrides: str) -> str:
    """The message with which the command ends."""
    with pytest.raises(SystemExit) as error:
        main([str(recipe), *overrides])
    assert isinstance(error.value.code, str)
    return error.value.code


def chat(id: str, *texts: str, **fields: Any) -> dict[str, Any]:
    """A ShareGPT record in which human and gpt take turns."""
    turns = [{"from": ("human", "gpt")[position % 2], "value": text} for position, text in enumerate(texts)]
    return {"id": id, "conversations": turns, **fields}


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def ledger_of(store: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store / "ledger.jsonl").read_text().splitlines()]


def ids_in(store: Path, split: str = "train") -> list[str]:
    opened = datasets.load_from_disk(str(store))
    return list(opened[split]["id"][:]) if split in opened else []


def counts_of(store: Path) -> dict[str, Any]:
    manifest = read_manifest(store)
    assert manifest is not None
    return manifest.counts


def nothing_is_left(folder: Path, *kept: str) -> bool:
    """Whether there is neither a store nor a half one in the folder."""
    return {path.name for path in folder.iterdir()} == {"recipe.yaml", *kept}


# ---- Every record is accounted for ----


def bad_turns(*turns: Any) -> list[Any]:
    return [turn if isinstance(turn, dict) else {"from": turn[0], "value": turn[1]} for turn in turns]


BAD_RECORDS: dict[str, tuple[Any, str | None, list[str]]] = {  # the record, why it is dropped, how it is repaired
    "no turns": ({"conversations": []}, "no_turns", []),
    "no list": ({"text": "Hi"}, "no_turns", []),
    "unknown role": ({"conversations": bad_turns(("narrator", "x"), ("gpt", "y"))}, "unknown_role", []),
    "value no text": ({"conversations": bad_turns(("human", 5), ("gpt", "y"))}, "value_not_text", []),
    "turn no object": ({"conversations": ["Hi", "Hello"]}, "turn_not_an_object", []),
    "bad weight": (
        {"items": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": -1}]},
        "bad_weight",
        [],
    ),
    "bad condition": ({**chat("", "a", "b"), "condition": 4}, "bad_condition", []),
    "no answer": ({"conversations": bad_turns(("human", "x"), ("human", "y"))}, "no_answer", []),
    "empty text": (
        {"conversations": bad_turns(("human", "a"), ("gpt", " "), ("gpt", "b"))},
        None,
        ["empty_turn_removed"],
    ),
    "two users": (
        {"conversations": bad_turns(("human", "a"), ("human", "b"), ("gpt", "c"))},
        None,
        ["user_turns_joined"],
    ),
    "unanswered": (
        {"conversations": bad_turns(("human", "a"), ("gpt", "b"), ("human", "c"))},
        None,
        ["unanswered_turn_removed"],
    ),
    "leading answer": (
        {"conversations": bad_turns(("gpt", "z"), ("human", "a"), ("gpt", "b"))},
        None,
        ["leading_answer_removed"],
    ),
}


def test_every_kind_of_bad_record_is_counted_under_its_name_with_its_id(tmp_path: Path) -> None:
    dump = tmp_path / "dump.jsonl"
    good = chat("good", "Hi", "Hello")
    lines = [json.dumps(good).encode()]
    lines += [json.dumps(fields | {"id": name}).encode() for name, (fields, _, _) in BAD_RECORDS.items()]
    lines += [b'{"id": "no JSON", "conversations": [', b'"just text"']
    lines += [json.dumps(chat("latin 1", "caf\u00e9?", "yes"), ensure_ascii=False).encode("latin-1")]
    start = sum(len(line) + 1 for line in lines)
    dump.write_bytes(b"\n".join([*lines, json.dumps(chat("cut", "Hi", "Hello")).encode()[:-9]]))
    store = make(write_recipe(tmp_path, [source("s", dump)]))

    not_json = f"{dump}:{sum(len(line) + 1 for line in lines[:-3])}"
    not_object = f"{dump}:{sum(len(line) + 1 for line in lines[:-2])}"
    expected = {name: (reason, repairs) for name, (_, reason, repairs) in BAD_RECORDS.items()} | {
        not_json: ("not_json", []),
        not_object: ("not_an_object", []),
        "latin 1": (None, ["invalid_utf8_replaced"]),
        f"{dump}:{start}": ("truncated_record", []),
    }
    ledger = ledger_of(store)
    assert {line["id"]: (line["reason"], line["repairs"]) for line in ledger} == expected
    assert len(ledger) == len(expected)
    assert all(line["outcome"] == ("dropped" if line["reason"] else "kept") for line in ledger)
    assert all(line["file"] == str(dump) and line["source"] == "s" for line in ledger)
    raw = dump.read_bytes()
    assert all(raw[: line["offset"]].endswith(b"\n") for line in ledger)

    reasons = [reason for reason, _ in expected.values() if reason]
    counts = counts_of(store)["s"]
    assert counts["in"] == len(lines) + 1 == counts["kept"] + sum(counts["dropped"].values())
    assert counts["dropped"] == {reason: reasons.count(reason) for reason in reasons}
    assert counts["repaired"] == {repair: 1 for _, repairs in expected.values() for repair in repairs}
    kept = ["good", *(name for name, (reason, _) in expected.items() if not reason)]
    assert ids_in(store) == kept
    assert counts["kept"] == len(kept)
    assert counts["tokens"] == int(TokenStore(store).lengths.sum())


def test_bytes_that_are_no_utf8_are_marked_in_the_text(tmp_path: Path, quickstart: ChatTokenizer) -> None:
    dump = tmp_path / "dump.jsonl"
    dump.write_bytes(b'{"conversations": [{"from": "human", "value": "a\xff"}, {"from": "gpt", "value": "b"}]}\n')
    store = TokenStore(make(write_recipe(tmp_path, [source("s", dump)])))
    assert "GPT4 User:a\ufffd<|end_of_turn|>" in quickstart.pretrained.decode(store[0].input_ids)


@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b'[{"conversations": []},\n {"conversations": [', 25),
        (b'[{"id": "a"} {"id": "b"}]', 13),
        (b"", 0),
        (b"  \n", 3),
        (b"<html>", 0),
        (b"\x1f\x8b\x08compressed", 0),
        (b'{\n "conversations": []\n}\n', 0),
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
    assert nothing_is_left(tmp_path, good.name, bad.name)


@pytest.mark.parametrize("path", ["none.json", "none/*.jsonl"])
def test_a_path_that_matches_no_file_is_named(path: str, tmp_path: Path) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    recipe = write_recipe(tmp_path, [source("a", dump), source("b", path)])
    assert failure(recipe) == f"error: data.sources.1.path: no file matches {path!r}"
    assert nothing_is_left(tmp_path, dump.name)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "dumps/more").mkdir(parents=True)
    message = failure(write_recipe(tmp_path, [source("s", tmp_path / "dumps/*")]))
    assert f"{tmp_path / 'dumps/more'} cannot be read" in message


def test_a_place_that_holds_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    (tmp_path / "store").mkdir()
    (tmp_path / "store/thesis.txt").write_text("dear")
    assert "exists and is not a token store" in failure(write_recipe(tmp_path, [source("s", dump)]))
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["thesis.txt"]


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
    assert nothing_is_left(tmp_path, dump.name)


def test_two_sources_without_a_filter_cannot_share_a_file_however_they_spell_it(tmp_path: Path) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("r7", "Hi", "Hello"))
    (tmp_path / "link.jsonl").symlink_to(dump)
    for other in (dump, f"{tmp_path}/./dump.jsonl", f"{tmp_path}//du*.jsonl", tmp_path / "link.jsonl"):
        recipe = write_recipe(tmp_path, [source("a", dump), source("b", other)])
        assert "record 'r7' matches 2 sources (a, b)" in failure(recipe)


def test_a_file_that_one_source_names_twice_is_read_once(tmp_path: Path) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    section = source("s", dump) | {"path": [str(dump), str(tmp_path / "*.jsonl"), f"{tmp_path}/./dump.jsonl"]}
    assert ids_in(make(write_recipe(tmp_path, [section]))) == ["1"]


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_lines(tmp_path / f"{name}.jsonl", chat(f"{name}1", "Hi", "Hello"), chat(f"{name}2", "Hi", "Hello"))
    sources = [source("two", tmp_path / "[bc].jsonl"), source("one", tmp_path / "a.jsonl")]
    assert ids_in(make(write_recipe(tmp_path, sources))) == ["a1", "a2", "b1", "b2", "c1", "c2"]


# ---- Weights and conditions ----


def test_the_weights_of_sources_arrive_exactly(tmp_path: Path, quickstart: ChatTokenizer) -> None:
    turns = ("Hi", "Hello there", "And?", "Yes.")
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", *turns, model="a"), chat("2", *turns, model="b"))
    sources = [
        source("a", dump, where={"model": "a"}, weight=1.0),
        source("b", dump, where={"model": "b"}, weight=0.1, condition="GPT3"),
    ]
    store = TokenStore(make(write_recipe(tmp_path, sources)))
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
    dump = write_lines(tmp_path / "dump.jsonl", *(chat(name, "Hi", "Hello", model=name) for name in weights))
    sources = [
        source(name or "plain", dump, where={"model": name}, weight=weight) | {"condition": name}
        for name, weight in weights.items()
    ]
    assert TokenStore(make(write_recipe(tmp_path, sources))).manifest.inference_condition == expected


def test_the_ids_are_those_of_the_template(tmp_path: Path, quickstart: ChatTokenizer) -> None:
    records = json.loads((ROOT / "data/quickstart.json").read_text())[:40]
    dump = write_lines(tmp_path / "dump.jsonl", *records)
    store = TokenStore(make(write_recipe(tmp_path, [source("s", dump, weight=0.5)])))
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
    path = make(write_recipe(tmp_path, [source("s", dump, weight=0.1) | {"condition": None}]))
    store = TokenStore(path)
    assert store.manifest.conditions == ["GPT4", "GPT3", ""]

    for position, (condition, user, answer) in enumerate((("GPT4", 0.0, 0.05), ("GPT3", 0.1, 0.1), ("", 0.2, 0.0))):
        text = quickstart.pretrained.decode(store[position].input_ids)
        lead = f"{condition} " if condition else ""
        assert text == (
            f"<s>You are kind.<|end_of_turn|>{lead}User:Hi<|end_of_turn|>{lead}Assistant:Hello<|end_of_turn|>"
        )
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
        weights = store[position].loss_weights
        assert weights.tolist() == np.array([0.0, *expected], dtype=np.float32).tolist()
    assert [line["reason"] for line in ledger_of(path)] == ["no_weight"]


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
    assert [(line["id"], line["source"], line["reason"]) for line in ledger_of(store)] == [("b", "bad", "no_weight")]
    counts = counts_of(store)["bad"]
    assert (counts["in"], counts["kept"], counts["dropped"]) == (1, 0, {"no_weight": 1})


def test_a_weight_that_vanishes_in_float32_is_no_weight(tmp_path: Path) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("a", "Hi", "Hello", w=1), chat("b", "Hi", "Hello", w=0))
    sources = [source("a", dump, where={"w": 1}), source("b", dump, where={"w": 0}, weight=1e-60)]
    store = make(write_recipe(tmp_path, sources))
    assert [(line["id"], line["reason"]) for line in ledger_of(store)] == [("b", "no_weight")]


def test_nothing_left_to_train_on_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", {"conversations": []}, chat("b", "Hi"))
    assert "no conversation is left to train on" in failure(write_recipe(tmp_path, [source("s", dump)]))
    assert nothing_is_left(tmp_path, dump.name)
    printed = capsys.readouterr().out
    assert "no_turns 1" in printed and "no_answer 1 (b)" in printed


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


# ---- Length ----


def long_dump(folder: Path) -> Path:
    answer = "This is a rather long answer, with many words in it. " * 2
    return write_lines(
        folder / "dump.jsonl",
        chat("short", "Hi", "Hello"),
        chat("long", *["Go on.", answer] * 8),
        chat("one", "Tell me everything.", answer * 20),
        chat("late", "Tell me everything. " * 50, "No."),
    )


def test_over_long_conversations_are_cut_behind_the_last_answer_that_fits(
    tmp_path: Path, quickstart: ChatTokenizer
) -> None:
    recipe = write_recipe(tmp_path, [source("s", long_dump(tmp_path))], max_tokens=128)
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

    outcomes = {line["id"]: (line["outcome"], line["reason"], line["repairs"]) for line in ledger_of(path)}
    assert outcomes == {
        "long": ("kept", None, ["overlong_truncated"]),
        "one": ("dropped", "too_long", []),
        "late": ("dropped", "too_long", []),
    }
    detail = next(line["detail"] for line in ledger_of(path) if line["id"] == "one")
    assert "above data.max_tokens 128" in detail


def test_over_long_conversations_are_dropped_where_the_recipe_says_so(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, [source("s", long_dump(tmp_path))], max_tokens=128, overlong="drop")
    store = make(recipe)
    assert ids_in(store) == ["short"]
    assert {line["id"]: line["reason"] for line in ledger_of(store)} == dict.fromkeys(
        ("long", "one", "late"), "too_long"
    )
    assert counts_of(store)["s"]["dropped"] == {"too_long": 3}


# ---- Made once ----


def test_a_second_run_says_up_to_date_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    recipe = write_recipe(tmp_path, [source("s", dump)])
    store = make(recipe)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    capsys.readouterr()
    main([str(recipe), "train.epochs=9", "optim.lr=1e-3"])  # what is not of the data does not make it stale
    assert "is up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("input", "an input file"),
        ("more input", "an input file"),
        ("data.sources.0.weight=0.5", "the recipe's data section"),
        ("data.max_tokens=256", "the recipe's data section"),
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
    assert f"is stale ({named}" in printed
    new = TokenStore(store)
    assert new.fingerprint != old.fingerprint
    assert {path.name for path in tmp_path.iterdir()} >= {"store"}
    assert not list(tmp_path.glob("store.partial*"))
    make(recipe, *overrides)
    assert "is up to date" in capsys.readouterr().out


def test_equal_runs_in_different_folders_make_equal_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[dict[str, bytes]] = []
    fingerprints = set()
    for name, store_name in (("a", "store"), ("b/deeper", "stores/other")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "quickstart.json").write_bytes((ROOT / "data/quickstart.json").read_bytes())
        monkeypatch.chdir(folder)
        recipe = write_recipe(folder, [source("s", "quickstart.json")], store=store_name, eval_fraction=0.2)
        store = make(recipe)
        fingerprints.add(TokenStore(store).fingerprint)
        written = [path for pattern in ("*.arrow", "*.npy", "ledger.jsonl") for path in store.rglob(pattern)]
        files.append({str(path.relative_to(store)): path.read_bytes() for path in written})
    assert len(fingerprints) == 1
    assert len(files[0]) == 2 + 6 + 1
    assert files[0] == files[1]


def test_the_store_opens_and_trains_with_its_own_tokenizer(tmp_path: Path, quickstart: ChatTokenizer) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("1", "Hi", "Hello"))
    store = make(write_recipe(tmp_path, [source("s", dump)]))
    saved = load_tokenizer(str(store / "tokenizer"), quickstart.template)
    assert saved.digest == quickstart.digest == TokenStore(store).manifest.made_from["tokenizer"]
    assert TokenStore(store).manifest.added_tokens == {"<|end_of_turn|>": quickstart.end_id}


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
        assert sorted(train + held_out) == sorted(record["id"] for record in order)
        splits.append(set(held_out))
    assert splits[0] == splits[1]
    # A share of 0.2 of the distinct texts; five standard deviations of a fair draw of 400 are 0.1.
    assert 0.1 < len(splits[0]) / len(records) < 0.3


def test_a_larger_held_out_share_contains_the_smaller_one(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, [source("s", ROOT / "data/quickstart.json")])
    small, large = (set(ids_in(make(recipe, f"data.eval_fraction={share}"), "eval")) for share in (0.1, 0.4))
    assert small < large


def test_equal_texts_land_in_the_same_split_whatever_their_id_source_and_condition(tmp_path: Path) -> None:
    turns = [(f"What is {number} plus 1?", f"It is {number + 1}.") for number in range(100)]
    dump = write_lines(
        tmp_path / "dump.jsonl",
        *(chat(f"a{number}", *texts, model="a") for number, texts in enumerate(turns)),
        *(chat(f"b{number}", *texts, model="b") for number, texts in enumerate(turns)),
    )
    sources = [
        source("a", dump, where={"model": "a"}),
        source("b", dump, where={"model": "b"}, condition="GPT3", weight=0.1),
    ]
    store = make(write_recipe(tmp_path, sources, eval_fraction=0.3))
    held_out = ids_in(store, "eval")
    by_source = [{id_[1:] for id_ in held_out if id_[0] == name} for name in "ab"]
    assert by_source[0] == by_source[1]
    assert 0 < len(by_source[0]) < 100


def test_without_a_share_nothing_is_held_out(tmp_path: Path) -> None:
    store = make(write_recipe(tmp_path, [source("s", ROOT / "data/quickstart.json")]))
    assert len(TokenStore(store, "eval")) == 0
    assert counts_of(store)["s"]["kept"] == len(TokenStore(store))


# ---- Stopped in the middle ----


@pytest.fixture(scope="module")
def large_dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20 MB of text: some seconds of work, so that a signal meets it."""
    path = tmp_path_factory.mktemp("dump") / "large.jsonl"
    random = np.random.default_rng(0)
    with path.open("w") as file:
        for number in range(25_000):
            words = " ".join(f"word{word}" for word in random.integers(0, 10**6, 65).tolist())
            file.write(json.dumps(chat(str(number), words[:200], words[200:])) + "\n")
    assert 18e6 < path.stat().st_size < 22e6
    return path


def stop_in_the_middle(recipe: Path, folder: Path, how: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Start the command, and send it the signal as soon as there are examples in its half store."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ochat_train.preprocess", str(recipe)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it puts into the background with SIGINT ignored, and pytest may run there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    half = folder / f"store.partial-{process.pid}"
    try:
        deadline = time.monotonic() + 60
        while sum(path.stat().st_size for path in half.glob("train/*")) < 100_000:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(how)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess([], process.returncode, out, err)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_leaves_nothing(how: signal.Signals, tmp_path: Path, large_dump: Path) -> None:
    result = stop_in_the_middle(write_recipe(tmp_path, [source("s", large_dump)]), tmp_path, how)
    assert result.returncode == 1
    assert "interrupted; the store was not touched" in result.stderr and "Traceback" not in result.stderr
    assert nothing_is_left(tmp_path)


def test_a_run_that_is_killed_leaves_no_store_and_the_next_one_cleans_up(tmp_path: Path, large_dump: Path) -> None:
    small = write_lines(tmp_path / "small.jsonl", chat("1", "Hi", "Hello"))
    recipe = write_recipe(tmp_path, [source("s", large_dump)])
    result = stop_in_the_middle(recipe, tmp_path, signal.SIGKILL)
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "store").exists()
    (leftover,) = tmp_path.glob("store.partial-*")
    assert not (leftover / "manifest.json").exists()
    with pytest.raises(ValueError, match="no complete token store"):
        TokenStore(tmp_path / "store")

    store = make(recipe, f"data.sources.0.path={small}")
    assert ids_in(store) == ["1"]
    assert nothing_is_left(tmp_path, "store", small.name)


def test_an_older_store_survives_a_run_that_is_interrupted(tmp_path: Path, large_dump: Path) -> None:
    small = write_lines(tmp_path / "small.jsonl", chat("1", "Hi", "Hello"))
    recipe = write_recipe(tmp_path, [source("s", large_dump)])
    store = make(recipe, f"data.sources.0.path={small}")
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    assert stop_in_the_middle(recipe, tmp_path, signal.SIGINT).returncode == 1
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    assert nothing_is_left(tmp_path, "store", small.name)
