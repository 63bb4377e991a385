"""LLaMA-Factory's list of data sets: each is read as it says, what is not read is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from ochat_train.conversations.chats import find_chats
from ochat_train.conversations.dataset_list import expand
from ochat_train.conversations.fields import Reading
from ochat_train.conversations.records import list_files, read_chunks
from ochat_train.conversations.sharegpt import parse_record
from tests.dumps import ledger_of, make, source, write_recipe

LISTED: dict[str, Any] = {
    "plain": {"file_name": "plain.json"},
    "named": {
        "file_name": "named.json",
        "columns": {"prompt": "ask", "query": "more", "response": "say", "history": "before", "system": "rule"},
    },
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "columns": {"prompt": "ask", "chosen": "good", "rejected": "bad"},
    },
    "chats": {
        "file_name": "chats.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "system": "rule", "images": "pics", "tools": "kit"},
        "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "asker", "assistant_tag": "expert"},
        "num_samples": 5,
    },
    "far": {"hf_hub_url": "ann/far", "subset": "en", "split": "test"},
    "script": {"script_url": "loader"},
    "gone": {"file_name": "gone.json"},
    "odd": {"file_name": "plain.json", "formatting": "parquet9"},
    "texts": {"file_name": "texts.json", "columns": {"prompt": "text"}},
}
FILES: dict[str, Any] = {
    "plain.json": [{"id": "p", "instruction": "Hi", "input": "there", "output": "Hello"}],
    "named.json": [{"id": "n", "ask": "Hi", "more": "you", "say": "Hello", "before": [["A", "B"]], "rule": "Be brief"}],
    "pairs.json": [{"id": "r", "ask": "Hi", "good": "Hello", "bad": "No"}],
    "chats.jsonl": {"id": "c", "talk": [{"who": "asker", "what": "Hi"}, {"who": "expert", "what": "Hello"}]},
    "texts.json": [{"text": "Once"}],
    "other.json": [{"text": "Once"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "lf"
    folder.mkdir()
    (folder / "dataset_info.json").write_text(json.dumps(LISTED))
    for name, value in FILES.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def turns(path: str) -> dict[str, list[tuple[str, str]]]:
    """The turns of each conversation by its id, with the system text first."""
    found = {}
    for place, reading in expand(path, Reading()):
        for record in (record for chunk in read_chunks(list_files(place)) for record in chunk.records()):
            for chat in find_chats(record.fields, reading):
                parsed = parse_record(record, default_id="", reading=reading, chat=chat)
                system = [("system", parsed.system)] if parsed.system else []
                found[parsed.id] = system + [(message.role, message.text) for message in parsed.messages]
    return found


def test_each_set_is_read_as_the_list_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hello = [("user", "Hi"), ("assistant", "Hello")]
    assert turns(str(folder)) == {
        "p": [("user", "Hi\n\nthere"), ("assistant", "Hello")],
        "n": [
            *(("system", "Be brief"), ("user", "A"), ("assistant", "B")),
            *(("user", "Hi\n\nyou"), ("assistant", "Hello")),
        ],
        "r/chosen": hello,
        "r/rejected": [("user", "Hi"), ("assistant", "No")],
        "c": hello,
    }
    first, *warnings = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{folder}/dataset_info.json: data sets plain, named, pairs, chats; not read: far (it lies")
    for words in ("script (script_url: a script is", "gone (gone.json is", "odd (formatting parquet9", "texts (its"):
        assert words in first
    assert first.endswith("files of no data set that is read: other.json, texts.json")
    assert warnings == [
        f"WARNING: {folder}/dataset_info.json: of data set chats is not read: num_samples, images: pics, tools: kit"
    ]
    assert list(turns(f"{folder}:named")) == list(turns(f"{folder}/dataset_info.json:named")) == ["n"]
    assert [place for place, _ in expand(f"{folder}:far", Reading())] == ["hf://ann/far/en:test"]
    with pytest.raises(ValueError, match=r"no data set nope; .* has plain, named"):
        list(expand(f"{folder}:nope", Reading()))
    with pytest.raises(ValueError, match=r"script of .* is not read: script_url: a script is not run"):
        list(expand(f"{folder}:script", Reading()))


def test_two_sets_of_one_file_must_be_named(folder: Path) -> None:
    listed = {"a": {"file_name": "plain.json"}, "b": {"file_name": "plain.json", "formatting": "sharegpt"}}
    (folder / "dataset_info.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"a, b are of one file.*:a"):
        list(expand(str(folder), Reading()))


def test_a_recipe_reads_the_sets_and_a_changed_list_makes_the_store_stale(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, [source("a", f"{folder}:named"), source("b", f"{folder}:chats")])
    assert {row["id"]: row["source"] for row in ledger_of(make(recipe)) if not row["reason"]} == {"n": "a", "c": "b"}
    columns = LISTED["named"]["columns"] | {"query": "rule"}
    (folder / "dataset_info.json").write_text(
        json.dumps(LISTED | {"named": {"file_name": "named.json", "columns": columns}})
    )
    capsys.readouterr()
    make(recipe)
    assert "is stale (an input file changed)" in capsys.readouterr().out
