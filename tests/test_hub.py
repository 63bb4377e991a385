"""Data sets of the hub: one split at one commit, read as its files are, with the client's own packages."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import constants, snapshot_download

from ochat_train.conversations import remote
from ochat_train.conversations.records import list_files, read_chunks
from tests.dumps import chat, contents, failure, make, prose, source, write_recipe
from tests.hub_server import Hub, serve_hub

pytestmark = pytest.mark.usefixtures("keep_signal_handlers")

RECORDS = [chat(str(number), prose(number, 20), prose(1000 + number, 20)) for number in range(40)]
LINES = [json.dumps(record).encode() + b"\n" for record in RECORDS]
TWO_CONFIGS = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/*.jsonl
  - split: held
    path: other/held.jsonl
- config_name: table
  data_files: table/*.parquet
---
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01, 0.01))
    with serve_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(RECORDS), sink, row_group_size=10)
        hub.commit(
            "ann/two",
            {
                "README.md": TWO_CONFIGS,
                "en/a.jsonl": b"".join(LINES[:30]),
                "en/b.jsonl": b"".join(LINES[30:]),
                "other/held.jsonl": LINES[0],
                "table/a.parquet": sink.getvalue().to_pybytes(),
            },
        )
        hub.commit("ann/plain", {"train.jsonl": b"".join(LINES), "test.jsonl": LINES[0]})
        hub.commit("ann/script", {"script.py": b"", "a.jsonl": LINES[0]})
        hub.commit("ann/secret", {"a.jsonl": LINES[0]})
        hub.gated.add("ann/secret")
        yield hub


def read(path: str) -> list[object]:
    return [record.fields for chunk in read_chunks(list_files(path)) for record in chunk.records()]


def test_a_split_has_the_records_of_its_files(hub: Hub) -> None:
    hub.num_broken = 2
    assert read("hf://ann/two/en:train") == RECORDS
    hub.num_broken = 1
    assert read("hf://ann/two/table") == RECORDS  # its only split
    assert read("hf://ann/two@main/en:held") == RECORDS[:1]
    first = hub.refs["ann/plain"]["main"]
    hub.commit("ann/plain", {"train.jsonl": LINES[7]})
    assert read("hf://ann/plain") == RECORDS[7:8]
    assert read(f"hf://ann/plain@{first}:train") == RECORDS
    hub.commit("ann/plain", {"default/train/0.jsonl": LINES[5]}, ref="refs/convert/parquet")
    assert read("hf://ann/plain@refs/convert/parquet:train") == RECORDS[5:6]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("hf://ann/two", ["available configs: ['en', 'table']", "hf://ann/two/CONFIG:SPLIT"]),
        ("hf://ann/two/de:train", ["'de' not found", "['en', 'table']"]),
        (
            "hf://ann/two/en",
            ["several splits and none named", "train (2 files), held (1 file)", "hf://ann/two/en:train"],
        ),
        ("hf://ann/two/en:dev", ["no split dev", "train (2 files), held (1 file)"]),
        ("hf://ann/plain@v9:train", ["no revision v9"]),
        ("hf://ann/script", ["scripts are no longer supported", "@refs/convert/parquet"]),
        ("hf://ann/secret", ["gated", "/datasets/ann/secret", "HF_TOKEN"]),
        ("hf://ann/missing:train", ["no data set ann/missing", "private", "HF_TOKEN"]),
        ("hf://ann/two/en/a.jsonl", ["the form is hf://OWNER/NAME", "hf://datasets/OWNER/NAME/"]),
        ("hf://two", ["the form is hf://OWNER/NAME"]),
    ],
)
def test_what_is_not_there_or_must_be_named_is_one_line(hub: Hub, path: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        list_files(path)
    message = str(error.value)
    assert "\n" not in message and not [word for word in words if word not in message], message


def test_a_saved_data_set_is_its_own_files_of_one_split(tmp_path: Path) -> None:
    rows = Dataset.from_list(RECORDS)
    folder = tmp_path / "saved"
    DatasetDict({"train": rows.select(range(30)), "test": rows.select(range(30, 40))}).save_to_disk(folder)
    assert read(f"{folder}:train") == read(f"{folder}/train") == RECORDS[:30]
    for path in (str(folder), f"{folder}:dev", str(tmp_path), f"file://{folder}"):
        with pytest.raises(ValueError, match=r"it has train, test"):
            list_files(path)
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    rows.select([3]).save_to_disk(tmp_path / "other")
    (tmp_path / "other/data-00000-of-00001.arrow").rename(tmp_path / "one/data-of-before.arrow")
    assert read(str(tmp_path / "one")) == read(f"file://{tmp_path}/one") == RECORDS
    with pytest.raises(ValueError, match=r"data-00000-of-00001\.arrow of the data set is not there"):
        list_files(str(tmp_path / "other"))
    state = tmp_path / "one/state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(ValueError, match="an index chooses the rows"):
        list_files(str(tmp_path / "one"))


def test_a_hub_that_cannot_be_reached_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match="hf://ann/two/en:train cannot be reached"):
        list_files("hf://ann/two/en:train")


def test_a_new_commit_makes_the_store_stale_and_an_old_one_is_not_read_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_ann")
    (tmp_path / "here").mkdir()
    (tmp_path / "here/train.jsonl").write_bytes(b"".join(LINES))
    here = make(write_recipe(tmp_path / "here", [source("all", tmp_path / "here/train.jsonl")]))
    recipe = write_recipe(tmp_path, [source("all", "hf://ann/plain:train")])
    store = make(recipe)
    assert hub.kinds() == {"GET revision": 2, "GET tree": 2, "GET resolve": 1}  # the client opens a file with two more
    assert hub.tokens == {"Bearer hf_of_ann"}
    names = {"ledger.parquet", "manifest.json"}  # these name the file
    assert {name for name, data in contents(here).items() if contents(store)[name] != data} == names

    hub.requests.clear()
    make(recipe)
    assert "is up to date" in capsys.readouterr().out
    assert hub.kinds() == {"GET revision": 1, "GET tree": 1}
    hub.commit("ann/plain", {"train.jsonl": b"".join(LINES), "README.md": b"# Read me\n"})
    make(recipe)
    assert "is stale (an input file changed)" in capsys.readouterr().out

    # the cache's copy of the same commit is the same data
    snapshot_download("ann/plain", repo_type="dataset")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    make(recipe)
    assert "is up to date" in capsys.readouterr().out
    assert contents(make(recipe, f"data.store={tmp_path / 'offline'}"))["ledger.parquet"]
    assert not hub.requests
    next((tmp_path / "cache").glob("*/snapshots/*/train.jsonl")).unlink()
    message = failure(recipe, f"data.store={tmp_path / 'other'}")
    assert "1 of its 1 files are not in the cache" in message and "hf download --repo-type dataset ann/plain" in message
    make(recipe)  # the store is whole all the same
