"""Pairs, ranked lists and scores become conversations with conditions and weights of their own."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ochat_train.conversations.dedupe import KEEP, find_duplicates
from ochat_train.conversations.schema import Conversation, Message
from ochat_train.conversations.sources import Range, Source, match_source
from ochat_train.conversations.text_keys import text_keys
from ochat_train.preprocess.__main__ import main
from ochat_train.tokens.store import TokenStore
from tests.dumps import (
    ROOT,
    ids_in,
    ledger_of,
    make,
    manifest_of,
    prose,
    reasons_in,
    source,
    unread_in,
    write_lines,
    write_recipe,
)

pytestmark = pytest.mark.usefixtures("keep_signal_handlers")


def pair(id: str, prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"id": id, "prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def sources_of(dump: Path) -> list[dict[str, Any]]:
    return [
        source("good", dump, where={"preference": "chosen"}, condition="Good"),
        source("bad", dump, where={"preference": "rejected"}, condition="Bad", weight=0.25),
    ]


def weights_in(store: Path) -> dict[str, tuple[str, set[float]]]:
    """Condition and weights above 0 of each example, by its id."""
    opened, manifest = TokenStore(store), manifest_of(store)
    return {
        id: (manifest.conditions[opened.condition_ids[place]], set(opened[place].loss_weights.tolist()) - {0.0})
        for place, id in enumerate(ids_in(store))
    }


def test_fields_show_the_values_of_a_label_beside_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    dump = tmp_path / "dump.jsonl"
    dump.write_text("\n".join(json.dumps({"messages": turns, "label": good}) for good in (True, False, True)))
    main(["--fields", str(dump)])
    lines = {line.split()[0]: line.split(maxsplit=2)[2] for line in capsys.readouterr().out.splitlines()[3:5]}
    assert lines == {"messages": "the turns", "label": "true 2, false 1"}


def test_the_pages_commands_make_the_conditions_and_weights_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/preference.md").read_text()
    monkeypatch.chdir(tmp_path)
    for name in ("recipes", "data"):
        os.symlink(ROOT / name, name)
    exec(page.partition("```python\n")[2].partition("```")[0], {})
    (command,) = [line for line in page.splitlines() if "model.config.model_type=llama" in line]
    main(["--fields", "dumps/pairs.jsonl"])
    assert 'preference (of an answer)           6  "chosen" 3, "rejected" 3' in capsys.readouterr().out
    main(command.split()[2:])
    said = capsys.readouterr().out
    assert "dumps/pairs.jsonl: JSON lines, prompt / chosen + rejected: 3 records\n" in said
    assert "3 records are 6 conversations, which are counted here\n" in said
    assert "trained alike" not in said
    store = Path("stores/preference-pairs")
    assert manifest_of(store).inference_condition == "Good"
    place = "dumps/pairs.jsonl:0"
    found = weights_in(store)
    assert len(found) == 6
    assert found[f"{place}/chosen"] == ("Good", {1.0})
    assert found[f"{place}/rejected"] == ("Bad", {float(np.float32(0.1))})
    assert [(row["conversation"], row["source"]) for row in ledger_of(store)] == [(1, "chosen"), (2, "rejected")] * 3
    main(["--explain", f"{place}/rejected", *command.split()[2:]])
    said = capsys.readouterr().out
    assert "== conversation 2 of 2: " in said and "conversation 1 of 2" not in said
    main(["--explain", place, *command.split()[2:]])
    assert capsys.readouterr().out.count("== in the store: 1 example(s)") == 2


def test_the_answers_of_a_record_lose_none_to_duplicates_and_stay_on_one_side(tmp_path: Path) -> None:
    long = [prose(seed, 60) for seed in range(40)]
    records = [pair(f"r{n}", "Hi", f"{text} apple", f"{text} pear") for n, text in enumerate(long)]
    dump = write_lines(tmp_path / "a.jsonl", *records)
    dedupe = {"exact": True, "prefix": True, "near": 0.6}
    store = make(write_recipe(tmp_path, [source("all", dump)], dedupe=dedupe, eval_fraction=0.5))
    assert set(reasons_in(store).values()) == {None}
    train, held_out = set(ids_in(store)), set(ids_in(store, "eval"))
    assert train and held_out and len(train) + len(held_out) == 80
    for n in range(40):
        assert {f"r{n}/chosen", f"r{n}/rejected"} <= train or {f"r{n}/chosen", f"r{n}/rejected"} <= held_out


def test_near_copies_are_dropped_in_other_records_only() -> None:
    text = prose(1, 80)

    def said(id: str, more: str, record: str) -> Conversation:
        messages = (Message("user", "Say it.", 0.0), Message("assistant", f"{text} {more}", 1.0))
        return Conversation(id, "s", "", "", messages, record=record)

    for records, num_kept in ((("r", "r"), 2), (("r", "other"), 1), (("", ""), 1)):
        keys = text_keys([said("a", "one", records[0]), said("b", "two", records[1])], minhash=True)
        decisions = find_duplicates([keys], exact=True, prefix=True, near=0.6, eval_fraction=0)
        assert (decisions.status == KEEP).sum() == num_kept


def test_what_is_dropped_of_a_pair_is_named_and_the_other_stays(tmp_path: Path) -> None:
    records = [
        pair("same", "Name a fruit.", "Apple.", "Apple."),
        pair("refused", "Name a tree.", "Oak.", "I'm sorry, but as an AI language model I cannot do that."),
        pair("empty", "Name a dog.", "Rex.", ""),
        pair("spaces", "Name a cat.", "Tom cat.", "Tom  cat."),
    ]
    dump = write_lines(tmp_path / "a.jsonl", *records)
    store = make(write_recipe(tmp_path, sources_of(dump)))
    assert reasons_in(store) == {
        "same/chosen": None,
        "same/rejected": "equal_answer",
        "refused/chosen": None,
        "refused/rejected": "no_weight",
        "empty/chosen": None,
        "spaces/chosen": None,
        "spaces/rejected": "exact_duplicate",
    }
    assert pq.read_table(store / "ledger.parquet")["conversation"].to_pylist() == [1, 2, 1, 2, 1, 1, 2]


def test_scores_split_by_ranges_and_weigh_each_answer(tmp_path: Path) -> None:
    answers = [{"response": f"Answer {score}.", "overall_score": score} for score in (0.9, 0.5, "0.25", None)]
    dump = write_lines(tmp_path / "a.jsonl", {"id": "r", "instruction": "Say it.", "completions": answers})
    sources = [
        source("good", dump, where={"score": {"min": 0.5}}, condition="Good", weight_field="score", weight=2.0),
        source("fair", dump, where={"score": {"max": 0.5}}, condition="Fair", weight_field="score"),
        source("none", dump, where={"score": None}, condition="None"),
    ]
    assert weights_in(make(write_recipe(tmp_path, sources))) == {
        "r/1": ("Good", {float(np.float32(1.8))}),
        "r/2": ("Good", {1.0}),
        "r/3": ("Fair", {0.25}),
        "r/4": ("None", {1.0}),
    }


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0.8, "high"),
        ("0.8", "high"),
        (" 8e-1 ", "high"),
        (0.79, "low"),
        (-1, "low"),
        *[(value, "rest") for value in (True, "x", float("nan"), "nan", None, [0.9])],
    ],
)
def test_two_ranges_and_the_rest_take_every_value_once(value: Any, name: str) -> None:
    at, below = Range(min=0.8), Range(max=0.8)
    found = match_source(
        {"score": value},
        [
            Source("high", None, 1.0, {"score": at}, {}),
            Source("low", None, 1.0, {"score": below}, {}),
            Source("rest", None, 1.0, {}, {"score": Range(min=-1e300)}),
        ],
        file="a",
        offset=0,
        id="r",
    )
    assert found is not None and found.name == name


def test_answers_that_are_trained_alike_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = write_lines(tmp_path / "a.jsonl", pair("r", "Hi", "Hello", "No", score_chosen=9, score_rejected=1))
    store = make(write_recipe(tmp_path, [source("all", dump)]))
    said = capsys.readouterr().out
    assert f"WARNING: {dump}: chosen and rejected answers are trained alike; give each a source, with where: " in said
    assert f"  {dump}: answer fields preference 2, score 2\n" in said
    assert unread_in(store) == {str(dump): {"answer field": {"preference": 2, "score": 2}}}


def test_sources_that_read_a_file_in_two_ways_share_it_by_its_records(tmp_path: Path) -> None:
    records = [
        {"id": "a", "kind": 1, "q": "Hi", "good": "Hello"},
        {"id": "b", "kind": 2, "q": "Hi", "x": "A", "y": "B"},
    ]
    dump = write_lines(tmp_path / "a.jsonl", *records)
    sources = [
        source("one", dump, where={"kind": 1}, fields={"question": "q", "answer": "good"}),
        source("two", dump, where={"kind": 2}, fields={"question": "q", "answers": ["x", "y"]}),
    ]
    assert ids_in(make(write_recipe(tmp_path, sources))) == ["a", "b/x", "b/y"]
    sources[1]["where"] = {}
    with pytest.raises(ValueError, match=r"'a' is taken by sources that read it in different ways \(one, two\)"):
        make(write_recipe(tmp_path, sources))


def test_explain_finds_a_conversation_without_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = write_lines(tmp_path / "a.jsonl", pair("r", "Hi", "Hello", "No"), pair("r/chosen", "Bye", "Bye!", "No!"))
    recipe = write_recipe(tmp_path, sources_of(dump))
    main(["--explain", "r/rejected", str(recipe)])
    said = capsys.readouterr().out
    assert "-- source bad, condition 'Bad'" in said and "'Hello'" not in said
    assert json.dumps("Hello") in said  # of the record
