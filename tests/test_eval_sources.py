"""data.eval_sources: sources that are held out whole, and what is in them too is not trained."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ochat_train.preprocess.__main__ import main
from ochat_train.report.page import as_text
from ochat_train.report.store import read_store
from ochat_train.report.store_sections import store_document
from ochat_train.tokens.store import TokenStore
from tests.dumps import chat, contents, failure, ids_in, ledger_of, manifest_of, prose, source, write_lines
from tests.dumps import make as make_with
from tests.dumps import write_recipe as write_recipe_with

pytestmark = pytest.mark.usefixtures("keep_signal_handlers")


def talk(seed: int, num_turns: int = 2) -> list[str]:
    """Texts of turns in turn, none like any other seed's."""
    return [prose(100 * seed + turn, 40) for turn in range(num_turns)]


def near(*texts: str) -> list[str]:
    """The texts with another last word."""
    return [*texts[:-1], f"{texts[-1].rpartition(' ')[0]} indeed"]


LONG = talk(50, 6)
HELD_OUT = [chat(f"asked {n}", *talk(n)) for n in range(20)] + [chat("long", *LONG[:4])]
LEAKS = [
    chat("equal", *[f" {text.replace(' ', '  ')}\n" for text in talk(0)]),
    chat("begins it", *LONG[:2]),
    chat("goes on", *LONG),
    {**chat("other system", *talk(1)), "system": "You are kind."},
    {
        "id": "other loss",
        "items": [{"role": "user", "content": talk(2)[0], "weight": 1}, {"from": "gpt", "value": talk(2)[1]}],
    },
    chat("other condition", *talk(3), model="weak"),
]
NEARS = [chat(f"near {n}", *near(*talk(n))) for n in range(4, 20)] + [chat("weak near", *near(*talk(3)), model="weak")]
OTHERS = [chat(f"other {n}", *talk(100 + n), model=("strong", "weak")[n % 2]) for n in range(20)]
OTHERS += [chat("other answer", talk(0)[0], prose(7, 40)), chat("begins alike", *LONG[:2], *talk(8))]
TRAINED_IDS = {record["id"] for record in OTHERS}


def write_recipe(folder: Path, **data: Any) -> Path:
    """All of the above, with the held-out ones in a source that weighs least."""
    dump = write_lines(folder / "dump.jsonl", *LEAKS, *NEARS, *OTHERS)
    sources = [
        source("strong", dump, where_not={"model": "weak"}),
        source("weak", dump, where={"model": "weak"}, condition="GPT3", weight=0.5),
    ]
    held_out = source("questions", write_lines(folder / "questions.jsonl", *HELD_OUT), weight=0.25)
    return write_recipe_with(folder, sources, eval_sources=[held_out], **data)


def make(recipe: Path, *overrides: str) -> Path:
    return make_with(recipe, *overrides, num_workers=1)


def dropped_for(store: Path) -> dict[str, str]:
    return {row["id"]: row["detail"] for row in ledger_of(store) if row["reason"] == "in_eval_source"}


def test_what_is_in_an_eval_source_is_not_trained_and_is_counted_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, dedupe={"exact": False, "prefix": False})
    store = make(recipe)
    found = {"other system": "of asked 1", "other loss": "of asked 2", "other condition": "of asked 3"}
    of_long = {"begins it": "of long", "goes on": "of long"}
    # "begins alike" shares a first answer with "long", and goes on otherwise.
    assert dropped_for(store) == {"equal": "of asked 0", **of_long, **found}
    assert set(ids_in(store)) == TRAINED_IDS | {record["id"] for record in NEARS}
    assert ids_in(store, "eval") == [record["id"] for record in HELD_OUT]
    held_out = TokenStore(store, "eval")
    assert {held_out.manifest.sources[id] for id in held_out.source_ids} == {"questions"}
    assert held_out[0].loss_weights.max() == 0.25
    counts = manifest_of(store).counts
    assert counts["strong"]["dropped"]["in_eval_source"] == 5 and counts["weak"]["dropped"]["in_eval_source"] == 1
    printed = capsys.readouterr().out
    assert "in data.eval_sources too, and so not trained: 6 conversations (" in printed
    assert "dropped: in_eval_source 5 (equal, 'begins it', 'goes on')" in printed
    assert "21 held out (" in printed and "data.eval_fraction 0, data.eval_sources questions)" in printed

    report = read_store(store)
    assert list(report.lengths) == ["strong", "weak"]
    text = as_text(store_document(report))
    assert "Held out whole: questions." in text
    assert re.search(r"in_eval_source .* 6 \(.* 5 \(.* 1 \(", text)
    assert re.search(r"questions +21 .* 100(\.0)? %", text)


def test_with_near_what_is_nearly_in_an_eval_source_is_not_trained_under_any_condition(tmp_path: Path) -> None:
    plain = make(write_recipe(tmp_path))
    store = make(write_recipe(tmp_path, dedupe={"near": 0.8}))
    assert dropped_for(store).items() >= {"near 4": "of asked 4", "weak near": "of asked 3"}.items()
    assert set(dropped_for(store)) == {record["id"] for record in (*LEAKS, *NEARS)}
    assert set(ids_in(store)) == TRAINED_IDS
    assert ids_in(store, "eval") == [record["id"] for record in HELD_OUT] == ids_in(plain, "eval")


def test_a_leak_drops_no_other_conversation_as_its_duplicate(tmp_path: Path) -> None:
    """The longer snapshot is in the eval source nearly, what it begins with is not."""
    snapshots = [chat("longer", *talk(30), *near(*talk(31, 6))), chat("shorter", *talk(30))]
    dump = write_lines(tmp_path / "dump.jsonl", *snapshots)
    asked = write_lines(tmp_path / "asked.jsonl", chat("asked", "So?", "Yes.", *talk(30), *talk(31, 6)))
    twice = write_lines(tmp_path / "twice.jsonl", chat("asked", "So?", "Yes.", *talk(30), *talk(31, 6)))
    held_out = [source("e", asked), source("f", twice)]
    store = make(write_recipe_with(tmp_path, [source("s", dump)], eval_sources=held_out, dedupe={"near": 0.8}))
    assert dropped_for(store) == {"longer": "of asked"}
    assert ids_in(store) == ["shorter"]
    assert [row["reason"] for row in ledger_of(store)[2:]].count("exact_duplicate") == 1  # among eval sources, too


def test_a_split_of_a_parquet_file_is_held_out_beside_a_fraction_of_the_other(tmp_path: Path) -> None:
    records = [chat(f"{split} {n}", *talk(200 + n), split=split) for n, split in enumerate(["train", "test"] * 40)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "all.parquet")

    def write(**eval_sources: Any) -> Path:
        return write_recipe_with(
            tmp_path, [source("train", tmp_path / "all.parquet", where={"split": "train"})], **eval_sources
        )

    held_out = source("test", tmp_path / "all.parquet", where={"split": "test"})
    store = make(write(eval_sources=[held_out], eval_fraction=0.3))
    tests = {record["id"] for record in records if record["split"] == "test"}
    of_eval = set(ids_in(store, "eval"))
    assert tests < of_eval and not of_eval & set(ids_in(store)) and 0 < len(of_eval - tests) < 40
    # The sources do not change which conversations a fraction holds out.
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records if one["split"] == "train"))
    alone = make(write_recipe_with(tmp_path, [source("train", tmp_path / "train.jsonl")], eval_fraction=0.3))
    assert set(ids_in(alone, "eval")) == of_eval - tests

    both = source("test", tmp_path / "all.parquet")
    assert "matches 2 sources (train, test)" in failure(write(eval_sources=[both]))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"condition": "GPT5"},
            "eval source questions has the condition 'GPT5', under which nothing is trained ('GPT3'",
        ),
        ({"condition": None}, "data.eval_sources.0: source questions has conversations under the condition '', under"),
        ({"name": "weak"}, "two sources are named 'weak'"),
        ({"weight": 0}, "eval source questions has weight 0"),
        ({"epochs": 2}, "data.eval_sources.0.epochs: unknown key (value 2)"),
        ({"path": "none.jsonl"}, "data.eval_sources.0.path: no file matches 'none.jsonl'"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    recipe = write_recipe(tmp_path)
    options = [f"data.eval_sources.0.{key}={json.dumps(value)}" for key, value in change.items()]
    assert line in failure(recipe, *options)
    if change == {"condition": None}:
        assert line in failure("--dry-run", recipe, *options)
    assert not (tmp_path / "store").exists()


def test_the_store_is_that_of_the_eval_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    before = contents(make(recipe))

    def made_again(*overrides: str) -> str:
        capsys.readouterr()
        make(recipe, *overrides)
        return capsys.readouterr().out

    assert "is up to date" in made_again()
    moved = (tmp_path / "questions.jsonl").rename(tmp_path / "moved.jsonl")
    printed = made_again(f"data.eval_sources.0.path={moved}")
    assert f"by what it holds: data.eval_sources.0.path: {tmp_path / 'questions.jsonl'} -> {moved}" in printed
    assert "is up to date" in printed
    assert contents(tmp_path / "store") == before
    assert "the recipe's data section changed" in made_again(
        f"data.eval_sources.0.path={moved}", "data.eval_sources.0.weight=1"
    )
    write_lines(moved, *HELD_OUT[:-1])
    printed = made_again(f"data.eval_sources.0.path={moved}", "data.eval_sources.0.weight=1")
    assert "is stale (an input file changed)" in printed
    assert "goes on" in ids_in(tmp_path / "store")  # "long" is not asked any more
    assert "eval_sources" not in manifest_of(make(recipe, "data.eval_sources=[]")).made_from["data"]


def test_a_record_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    make(recipe)
    main(["--explain", "equal", str(recipe)])
    main(["--explain", "asked 0", str(recipe)])
    printed = capsys.readouterr().out
    assert "== not in the store: in_eval_source: of asked 0" in printed
    assert "-- source questions, held out whole, condition 'GPT4'" in printed


def test_a_file_that_is_all_in_an_eval_source_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    copy = write_lines(tmp_path / "copy.jsonl", *HELD_OUT)
    make(recipe, f"data.sources.0.path=[{tmp_path / 'dump.jsonl'}, {copy}]", "data.sources.0.where_not={model: weak}")
    assert f"WARNING: nothing is kept of {copy} " in capsys.readouterr().out
    only = [f"data.sources=[{{name: s, path: {copy}, condition: GPT4}}]", f"data.store={tmp_path / 'other'}"]
    assert failure(recipe, *only) == "error: no conversation is left to train on: see above"
