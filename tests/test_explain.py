"""One record is followed through all stages, to its tokens or to the reason why there are none."""

import gzip
import json
import os
import zipfile
from pathlib import Path

import pytest

from ochat_train.preprocess.__main__ import main
from ochat_train.preprocess.ledger import show_id
from ochat_train.tokens.store import TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer
from tests.dumps import chat, failure, ids_in, ledger_of, make, prose, source, write_lines, write_recipe

REFUSAL = "As an AI language model, I cannot."
TALK = [prose(turn, 30) for turn in range(4)]


pytestmark = pytest.mark.usefixtures("keep_signal_handlers")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe without a store."""
    folder = tmp_path_factory.mktemp("explain")
    records = [
        chat("kept", "Hi", "Hello", model="strong"),
        chat("repaired", "", "Welcome!", "Hi", "Hello there", "Bye", model="strong"),
        chat("masked", "Do it.", REFUSAL, "Please.", "Done."),
        chat("split", *[prose(50 + turn, 25) for turn in range(8)]),
        chat("copy", *TALK),
        chat("original", *[f" {text}" for text in TALK], model="strong"),
        chat("snapshot", *TALK[:2]),
        chat("unweighted", "Do it.", REFUSAL),
        chat(
            "other language", *["Guten Tag, wie geht es Ihnen heute und was möchten Sie gern zum Frühstück essen?"] * 2
        ),
        {"id": "bad role", "conversations": [{"from": "narrator", "value": "x"}]},
        chat("unanswered", "Hi"),
        chat("twice", "One?", "One."),
        chat("twice", "Two?", "Two."),
    ]
    dump = write_lines(folder / "a.jsonl", *records)
    with dump.open("ab") as file:
        file.write(
            json.dumps(chat("half", "Le caf", "Oui", "?")).encode().replace(b"caf", b"caf\\ud83d") + b"\nnot JSON\n"
        )
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"\n" + json.dumps(chat("gzipped", "Where?", "There.")).encode()))
    with zipfile.ZipFile(folder / "c.zip", "w") as archive:
        archive.writestr("README.txt", "no dump")
        archive.writestr("deep/chats.json", json.dumps([chat("first", "One", "1"), chat("zipped", "Where?", "Here.")]))
    sources = [
        source("strong", "", where={"model": "strong"}),
        source("weak", "", where_not={"model": "strong"}, condition="GPT3", weight=0.25),
    ]
    for section in sources:
        section["path"] = [str(folder / name) for name in ("a.jsonl", "b.jsonl.gz", "c.zip")]
    return write_recipe(folder, sources, max_tokens=128, overlong_context=32, filters={"languages": ["en"]})


@pytest.fixture(scope="module")
def made(recipe: Path) -> Path:
    """The same recipe with its store."""
    make(recipe)
    return recipe


def explained(recipe: Path, id: str, capsys: pytest.CaptureFixture[str], *overrides: str) -> list[str]:
    capsys.readouterr()
    main(["--explain", id, str(recipe), *overrides])
    return capsys.readouterr().out.splitlines()


def test_a_kept_record_is_shown_before_after_each_stage_and_as_weighted_tokens(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explained(made, "kept", capsys) == [
        f"== {made.parent}/a.jsonl, offset 0",
        "{",
        '  "id": "kept",',
        '  "conversations": [',
        "    {",
        '      "from": "human",',
        '      "value": "Hi"',
        "    },",
        "    {",
        '      "from": "gpt",',
        '      "value": "Hello"',
        "    }",
        "  ],",
        '  "model": "strong"',
        "}",
        "-- read as from/value",
        "   1 user: 'Hi'",
        "   2 assistant: 'Hello'",
        "-- cleaned",
        "-- source strong, condition 'GPT4'",
        "-- filtered",
        "   1 user, weight 0",
        "   2 assistant, weight 1",
        "-- tokens: 19, limit 128",
        "   loss token: each token of an answer has the answer's weight",
        "   example 1: 19 tokens, 3 with a loss",
        "     0.0000  <s> G P T 4 ĠUser : H i <|end_of_turn|> G P T 4 ĠAssistant :",
        "     1.0000  Hell o <|end_of_turn|>",
        "== in the store: 1 example(s), 19 tokens",
    ]


def test_the_tokens_shown_are_those_of_the_store(
    made: Path, quickstart: ChatTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    store = TokenStore(made.parent / "store")
    ids = ids_in(made.parent / "store")
    for id in ("masked", "split", "zipped"):
        lines = explained(made, id, capsys)
        shown = [line.split() for line in lines if line.startswith("     ") and line[5].isdecimal() and line[6] == "."]
        examples = [store[position] for position, name in enumerate(ids) if name.partition("#")[0] == id]
        assert [token for _, *tokens in shown for token in tokens] == [
            token
            for example in examples
            for token in quickstart.pretrained.convert_ids_to_tokens(example.input_ids.tolist())
        ]
        weights = [weight for weight, *tokens in shown for _ in tokens]
        assert weights == [f"{weight:.4f}" for example in examples for weight in example.loss_weights]


def test_weights_are_shown_as_the_form_of_the_loss_has_them(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = explained(made, "kept", capsys, "train.loss=answer")
    assert lines[-2:] == ["      0.333  Hell o <|end_of_turn|>", "== in the store: 1 example(s), 19 tokens"]
    assert any(line.startswith("   loss answer: an answer's weight is spread evenly") for line in lines)


def test_repairs_are_named_at_the_stage_that_made_them(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = explained(made, "repaired", capsys)
    read, cleaned = lines.index("-- read as from/value"), lines.index("-- source strong, condition 'GPT4'")
    assert lines[read + 1 : read + 6] == [
        "   1 user: ''",
        "   2 assistant: 'Welcome!'",
        "   3 user: 'Hi'",
        "   4 assistant: 'Hello there'",
        "   5 user: 'Bye'",
    ]
    assert lines[read + 6 : cleaned] == [
        "-- cleaned (empty_turn_removed, leading_answer_untrained, unanswered_turn_removed)",
        "   1 assistant, weight 0: 'Welcome!'",
        "   2 user: 'Hi'",
        "   3 assistant: 'Hello there'",
    ]


def test_each_repair_is_named_once(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = explained(made, "half", capsys)
    assert "-- read as from/value (surrogate_replaced)" in lines
    assert "-- cleaned (unanswered_turn_removed)" in lines


def test_a_masked_answer_is_shown_with_its_weight_gone(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = explained(made, "masked", capsys)
    filtered = lines.index("-- filtered (refusal_masked)")
    assert lines[filtered + 1 : filtered + 5] == [
        "   1 user, weight 0",
        "   2 assistant, weight 0",
        "   3 user, weight 0",
        "   4 assistant, weight 0.25",
    ]
    assert lines[-2].split() == ["0.2500", "D", "on", "e", ".", "<|end_of_turn|>"]


def test_a_split_record_is_shown_in_its_examples(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = explained(made, "split", capsys)
    (row,) = (row for row in ledger_of(made.parent / "store") if row["id"] == "split")
    titles = [line for line in lines if line.startswith("   example ")]
    assert [title.split(":")[0] for title in titles] == [f"   example {n + 1}" for n in range(row["num_examples"])]
    assert row["num_examples"] > 1
    assert next(line for line in lines if line.startswith("-- tokens: ")).endswith(", limit 128 (overlong_split)")
    assert lines[-1] == f"== in the store: {row['num_examples']} example(s), {row['num_tokens']} tokens"


@pytest.mark.parametrize(
    ("id", "stage", "outcome"),
    [
        ("bad role", "-- read: dropped, unknown_role: the role of turn 1 is 'narrator'", "unknown_role: "),
        ("unanswered", "-- cleaned: dropped, no_answer: ", "no_answer: "),
        ("other language", "-- filtered: dropped, other_language: de ", "other_language: de "),
        ("unweighted", "   dropped, no_weight: every turn has weight 0", "no_weight: every turn has weight 0"),
        ("copy", "-- tokens: ", "exact_duplicate: of original"),
        ("snapshot", "-- tokens: ", "earlier_snapshot: of original"),
    ],
)
def test_a_dropped_record_is_followed_to_where_it_ends(
    id: str, stage: str, outcome: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = explained(made, id, capsys)
    assert any(line.startswith(stage) for line in lines)
    assert lines[-1].startswith(f"== not in the store: {outcome}")


def test_a_record_that_is_too_long_says_so(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = explained(recipe, "split", capsys, "data.overlong=drop", f"data.store={recipe.parent}/other")
    assert lines[-1].startswith("   dropped, too_long: ") and lines[-1].endswith(" tokens, above data.max_tokens 128")


@pytest.mark.parametrize(
    ("id", "place"), [("gzipped", "b.jsonl.gz, offset 1"), ("zipped", "c.zip/deep/chats.json, offset ")]
)
@pytest.mark.parametrize("has_store", [True, False])
def test_a_record_of_a_packed_file_is_found_with_a_store_and_without(
    id: str, place: str, has_store: bool, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [] if has_store else [f"data.store={made.parent}/other"]
    lines = explained(made, id, capsys, *other)
    (found,) = (line for line in lines if line.startswith("== /"))
    assert found.startswith(f"== {made.parent}/{place}")
    assert lines[-1].startswith("== in the store: 1 example(s)") == has_store
    assert sum(line.startswith("   example 1: ") for line in lines) == 1


def test_without_a_store_duplicates_are_said_to_be_unknown_and_none_is_made(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir(made.parent))
    for stale in (f"data.store={made.parent}/other", "data.max_tokens=127"):
        lines = explained(made, "copy", capsys, stale)
        assert lines[0].startswith("no store is made from this recipe and these files yet")
        assert "whether it is a duplicate" in lines[1]
        assert not any("in the store" in line for line in lines)
        assert any(line.startswith("   example 1: ") for line in lines)
    assert sorted(os.listdir(made.parent)) == before


def test_all_records_of_an_id_are_shown(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, outcomes in (([], 2), ([f"data.store={made.parent}/other"], 0)):
        lines = explained(made, "twice", capsys, *overrides)
        assert [line for line in lines if line.startswith("   1 user: ")] == ["   1 user: 'One?'", "   1 user: 'Two?'"]
        assert sum(line.startswith("== in the store: ") for line in lines) == outcomes


def test_a_record_without_an_id_is_found_by_its_place(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made.parent / "a.jsonl"
    place = f"{path}:{path.read_bytes().index(b'not JSON')}"
    for overrides in ([], [f"data.store={made.parent}/other"]):
        lines = explained(made, place, capsys, *overrides)
        assert "-- read: dropped, not_json: it is not JSON" in lines


def test_an_id_of_no_record_is_an_error(made: Path) -> None:
    with_store = failure("--explain", "nobody", made)
    assert with_store.startswith("error: no record has the id 'nobody' in the store's ledger; ")
    without = failure("--explain", "nobody", made, f"data.store={made.parent}/other")
    assert without.startswith("error: no record has the id 'nobody' in the input files; ")


def test_an_id_is_taken_as_the_table_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = ["--dry-run", "two\nlines", f"{'long ' * 30}id"]
    records = [*(chat(id, "Hi") for id in ids), chat("kept", "Hi", "Hello")]
    recipe = write_recipe(tmp_path, [source("s", write_lines(tmp_path / "a.jsonl", *records))])
    main(["--dry-run", str(recipe)])
    assert f"no_answer 3 ({', '.join(map(show_id, ids))})" in capsys.readouterr().out
    for id in ids:
        lines = explained(recipe, id, capsys)
        assert sum(line.startswith("== ") for line in lines) == 1


def test_the_name_of_a_part_means_its_record(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explained(made, "split#2", capsys) == explained(made, "split", capsys)
    assert failure("--explain", "nobody#2", made).startswith("error: no record has the id 'nobody' in ")


def test_long_texts_are_cut_for_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("long", "x" * 3000, "Hello"))
    lines = explained(write_recipe(tmp_path, [source("s", dump)], max_tokens=4096), "long", capsys)
    assert f"   1 user: '{'x' * 2000}… (3,000 characters)'" in lines
    assert f'      "value": "{"x" * 2000}… (3,000 characters)"' in lines


def test_what_is_nested_deeply_is_cut_for_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = json.dumps(chat("deep", "Hi", "Hello", more="DEEP")).replace('"DEEP"', "[" * 900 + "]" * 900)
    (tmp_path / "dump.jsonl").write_text(deep)
    lines = explained(write_recipe(tmp_path, [source("s", tmp_path / "dump.jsonl")]), "deep", capsys)
    assert any(line.endswith('"…"') for line in lines)
    assert lines[-1].startswith("     1.0000  ")
