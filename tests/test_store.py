"""What goes into a store comes out of it, and a store is there as a whole or not at all."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import orjson
import pyarrow as pa
import pytest

import ochat_train.tokens.store
import ochat_train.tokens.store_files
from ochat_train.tokens.encode import Example
from ochat_train.tokens.store import Manifest, Split, StoreWriter, TokenStore, check_store_path, read_manifest
from ochat_train.tokens.store_files import StoreDamaged, check_blocks
from tests.dumps import contents

CONDITIONS = ("GPT4", "", "größer")
SOURCES = ("source 0", "source 1", "source of nothing")


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    source: str
    condition: str
    example: Example


def random_rows(num_rows: int, seed: int = 0) -> list[Row]:
    """Examples of 1 to 60 tokens with weights of all kinds, the first condition met being the second of CONDITIONS."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(num_rows):
        length = int(random.integers(1, 61))
        ids = random.integers(0, 2**31, length).astype(np.int32)
        weights = random.choice(np.array([0, 0.1, 0.3, 1, 2.5], dtype=np.float32), length)
        condition = CONDITIONS[(number + 1) % 3]
        rows.append(Row(f"id {number} ü", SOURCES[number % 2], condition, Example(ids, weights)))
    return rows


def one_answer(example: Example) -> list[int]:
    """The answer lengths of an example whose weights are all of one answer; none without weights."""
    return [count] if (count := np.count_nonzero(example.loss_weights)) else []


def table_of(rows: Sequence[Row]) -> pa.Table:
    """The rows as a shard has them: with a column more than a store."""
    columns = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "source": pa.array([row.source for row in rows], pa.string()),
        "condition": pa.array([row.condition for row in rows], pa.string()),
        "input_ids": pa.array([row.example.input_ids for row in rows], pa.list_(pa.int32())),
        "loss_weights": pa.array([row.example.loss_weights for row in rows], pa.list_(pa.float32())),
        "answer_lengths": pa.array([one_answer(row.example) for row in rows], pa.list_(pa.int32())),
        "record": pa.array(range(len(rows)), pa.int32()),
    }
    return pa.table(columns)


def add_all(writer: StoreWriter, split: Split, rows: Sequence[Row], sizes: Sequence[int] = (700, 1, 0, 299)) -> None:
    """Add the rows in tables of these sizes, over and over."""
    start = number = 0
    while start < len(rows):
        size = sizes[number % len(sizes)]
        writer.add(split, table_of(rows[start : start + size]))
        start, number = start + size, number + 1


def manifest_of(writer: StoreWriter, fingerprint: str = "f" * 64) -> Manifest:
    return Manifest(
        fingerprint=fingerprint,
        made_from={"template": "openchat_v3.2"},
        template="openchat_v3.2",
        conditions=writer.conditions,
        sources=writer.sources,
        inference_condition="GPT4",
        added_tokens={"<|end_of_turn|>": 32000},
        splits=writer.split_totals(),
        counts={},
        overlong={},
    )


def staging_beside(path: Path) -> Path:
    """The empty folder in which a store for `path` is written, as preprocessing makes it."""
    staging = path.with_name(f"{path.name}.partial-test") / "store"
    staging.mkdir(parents=True)
    return staging


def write(path: Path, train: Sequence[Row], eval_: Sequence[Row] = (), fingerprint: str = "f" * 64) -> Path:
    """Write a store, and give back the work folder, which is left to whoever made it."""
    writer = StoreWriter(staging_beside(path), SOURCES, 2**31)
    add_all(writer, "train", train)
    add_all(writer, "eval", eval_)
    writer.finish(manifest_of(writer, fingerprint), path)
    return writer.staging.parent


def check_split(path: Path, split: Split, rows: Sequence[Row]) -> None:
    store = TokenStore(path, split)
    assert len(store) == len(rows)
    kinds = [a.dtype.name for a in (store.lengths, store.weight_sums, store.condition_ids, store.source_ids)]
    assert kinds == ["int32", "float64", "int32", "int32"]
    assert store.lengths.tolist() == [len(row.example.input_ids) for row in rows]
    # f64 sums of f32 weights: the same additions, so exactly the same numbers
    assert store.weight_sums.tolist() == [float(row.example.loss_weights.sum(dtype=np.float64)) for row in rows]
    assert [store.manifest.conditions[id_] for id_ in store.condition_ids] == [row.condition for row in rows]
    assert [store.manifest.sources[id_] for id_ in store.source_ids] == [row.source for row in rows]
    for id_, name in enumerate(SOURCES):
        assert store.members(id_).tolist() == [number for number, row in enumerate(rows) if row.source == name]
    for position, row in enumerate(rows):
        example = store[position]
        assert (example.input_ids.dtype.name, example.loss_weights.dtype.name) == ("int32", "float32")
        assert np.array_equal(example.input_ids, row.example.input_ids)
        assert np.array_equal(example.loss_weights, row.example.loss_weights)
        assert store.name(position) == row.id


# ---- Round trip ----


@pytest.mark.parametrize(("num_train", "num_eval"), [(1, 0), (7, 3), (1000, 1), (2345, 1001)])
def test_every_example_comes_back_as_it_was(num_train: int, num_eval: int, tmp_path: Path) -> None:
    train, eval_ = random_rows(num_train, 1), random_rows(num_eval, 2)
    path = tmp_path / "store"
    work = write(path, train, eval_)
    check_split(path, "train", train)
    check_split(path, "eval", eval_)
    assert os.listdir(work) == []


def test_the_manifest_comes_back_with_the_totals_of_each_split(tmp_path: Path) -> None:
    train, eval_ = random_rows(50, 1), random_rows(9, 2)
    write(tmp_path / "store", train, eval_)
    manifest = read_manifest(tmp_path / "store")
    assert manifest is not None
    assert TokenStore(tmp_path / "store").fingerprint == manifest.fingerprint == "f" * 64
    assert manifest.conditions == ["", "größer", "GPT4"]  # by first appearance
    assert manifest.added_tokens == {"<|end_of_turn|>": 32000}
    for split, rows in (("train", train), ("eval", eval_)):
        weights = np.concatenate([row.example.loss_weights for row in rows])
        assert manifest.splits[split] == {
            "num_examples": len(rows),
            "num_tokens": len(weights),
            "num_supervised_tokens": int((weights > 0).sum()),
            "weight_sum": pytest.approx(weights.sum(dtype=np.float64), rel=1e-12),  # another order of f64 additions
        }


def test_conditions_are_numbered_over_both_splits_and_weighed_in_training_alone(tmp_path: Path) -> None:
    def row(condition: str, *weights: float) -> Row:
        return Row("", SOURCES[0], condition, Example(np.zeros(len(weights), np.int32), np.array(weights, np.float32)))

    writer = StoreWriter(staging_beside(tmp_path / "store"), SOURCES, 2**31)
    writer.add("train", table_of([row("b", 0, 0.5, 0.5), row("a", 0, 2)]))
    writer.add("eval", table_of([row("only held out", 0, 1), row("b", 0, 9)]))
    writer.add("train", table_of([row("unweighted", 0, 0), row("b", 0, 2, 0)]))
    assert writer.conditions == ["b", "a", "only held out", "unweighted"]
    assert writer.trained_condition_weights() == {"b": 1.0, "a": 2.0}
    writer.finish(manifest_of(writer), tmp_path / "store")
    assert TokenStore(tmp_path / "store").condition_ids.tolist() == [0, 1, 3, 0]
    assert TokenStore(tmp_path / "store", "eval").condition_ids.tolist() == [2, 0]


def test_datasets_opens_it(tmp_path: Path) -> None:
    train, eval_ = random_rows(12, 1), random_rows(5, 2)
    write(tmp_path / "store", train, eval_)
    opened = datasets.load_from_disk(str(tmp_path / "store"))
    for split, rows in (("train", train), ("eval", eval_)):
        dataset = opened[split]
        assert dataset.column_names == ["id", "source", "condition", "input_ids", "loss_weights", "answer_lengths"]
        assert dataset["id"][:] == [row.id for row in rows]
        assert dataset["source"][:] == [row.source for row in rows]
        assert dataset["condition"][:] == [row.condition for row in rows]
        assert dataset["input_ids"][:] == [row.example.input_ids.tolist() for row in rows]
        assert dataset["loss_weights"][:] == [row.example.loss_weights.tolist() for row in rows]
        assert dataset.features["input_ids"].feature.dtype == "int32"
        assert dataset.features["loss_weights"].feature.dtype == "float32"


def test_an_empty_eval_split_is_a_store_of_length_0(tmp_path: Path) -> None:
    rows = random_rows(3)
    write(tmp_path / "store", rows)
    eval_ = TokenStore(tmp_path / "store", "eval")
    assert len(eval_) == 0
    assert (eval_.lengths.shape, eval_.weight_sums.shape, eval_.condition_ids.shape) == ((0,), (0,), (0,))
    assert len(datasets.load_from_disk(str(tmp_path / "store"))["train"]) == 3


def test_equal_rows_make_equal_files(tmp_path: Path) -> None:
    rows, eval_ = random_rows(1200), random_rows(20, 3)
    for name in ("a", "b"):
        write(tmp_path / name, rows, eval_)
    first = contents(tmp_path / "a")
    assert {"train/data-00000-of-00001.arrow", "eval/lengths.npy", "manifest.json"} < first.keys()
    assert first == contents(tmp_path / "b")


# ---- All or nothing ----


def test_nothing_is_at_its_place_until_the_store_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "store"
    writer = StoreWriter(staging_beside(path), SOURCES, 2**31)
    add_all(writer, "train", random_rows(1500))
    assert not path.exists()
    assert not (writer.staging / "manifest.json").exists()
    writer.finish(manifest_of(writer), path)
    assert len(TokenStore(path)) == 1500
    assert not writer.staging.exists()


def test_the_manifest_is_written_when_all_else_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StoreWriter(staging_beside(tmp_path / "store"), SOURCES, 2**31)
    add_all(writer, "train", random_rows(30))
    manifest = manifest_of(writer)
    write_bytes, names = Path.write_bytes, []

    def fail_at_manifest(self: Path, data: bytes) -> int:
        names.append(self.name)
        if self.name == "manifest.json":
            raise OSError("disk full")
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", fail_at_manifest)
    with pytest.raises(OSError, match="disk full"):
        writer.finish(manifest, tmp_path / "store")
    assert names[-1] == "manifest.json"
    assert not (tmp_path / "store").exists()
    monkeypatch.undo()
    written = set(contents(writer.staging))
    write(tmp_path / "whole", random_rows(30))
    assert written == set(contents(tmp_path / "whole")) - {"manifest.json"}


def test_all_of_it_is_on_the_disk_before_it_is_moved_to_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flushed = tmp_path / "store", []
    writer = StoreWriter(staging_beside(path), SOURCES, 2**31)
    add_all(writer, "train", random_rows(30))

    def flush(folder: Path) -> None:
        assert not path.exists()
        flushed.append(contents(folder))

    monkeypatch.setattr(ochat_train.tokens.store, "flush_tree", flush)
    writer.finish(manifest_of(writer), path)
    assert flushed == [contents(path)]


def test_an_older_store_survives_a_rewrite_that_fails(tmp_path: Path) -> None:
    path, rows = tmp_path / "store", random_rows(30)
    write(path, rows)
    before = contents(path)
    writer = StoreWriter(staging_beside(tmp_path / "other"), SOURCES, 2**31)
    add_all(writer, "train", random_rows(2000, 9))
    (writer.staging / "manifest.json").mkdir()  # so that it cannot be written
    with pytest.raises(OSError):
        writer.finish(manifest_of(writer), path)
    assert contents(path) == before
    check_split(path, "train", rows)


def test_a_rewrite_replaces_the_older_store_as_a_whole(tmp_path: Path) -> None:
    path, rows = tmp_path / "store", random_rows(5, 9)
    write(path, random_rows(30), random_rows(4), fingerprint="old")
    opened = TokenStore(path)  # a training run that still reads the old one
    last = opened[29]
    work = write(path, rows, fingerprint="new")
    check_split(path, "train", rows)
    check_split(path, "eval", [])
    assert TokenStore(path).fingerprint == "new"
    assert read_manifest(work / "old") is not None  # out of the way, for whoever made the work folder to remove
    assert sorted(os.listdir(tmp_path)) == ["store", work.name]
    assert np.array_equal(opened[29].input_ids, last.input_ids)


@pytest.mark.parametrize("content", ["thesis.txt", "sub/photo.jpg", "dataset_dict.json"])
def test_a_folder_that_is_no_store_is_refused(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "mine"
    (folder / content).parent.mkdir(parents=True)
    (folder / content).write_text("dear")
    with pytest.raises(ValueError, match=f"data.store {folder} exists and is not a token store"):
        check_store_path(folder)


def test_a_file_in_the_place_of_the_store_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("dear")
    with pytest.raises(ValueError, match="is not a token store"):
        check_store_path(file)


def test_a_store_no_place_or_an_empty_folder_may_be_written_to(tmp_path: Path) -> None:
    check_store_path(tmp_path / "none")
    (tmp_path / "store").mkdir()
    check_store_path(tmp_path / "store")
    write(tmp_path / "store", random_rows(2))
    assert len(TokenStore(tmp_path / "store")) == 2
    check_store_path(tmp_path / "store")


# ---- Reading ----


def test_a_store_without_its_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store"
    write(path, random_rows(3))
    (path / "manifest.json").unlink()
    assert read_manifest(path) is None
    with pytest.raises(ValueError, match=f"no complete token store at {path}; make it with"):
        TokenStore(path)
    with pytest.raises(ValueError, match="no complete token store"):
        TokenStore(tmp_path / "none")


def test_a_store_of_another_format_is_refused_for_reading_and_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "store"
    write(path, random_rows(3))
    manifest = path / "manifest.json"
    fields = orjson.loads(manifest.read_bytes()) | {"format_version": 1, "more": 1}
    del fields["digest"]  # which that version did not have
    manifest.write_bytes(orjson.dumps(fields))
    assert read_manifest(path) is None
    with pytest.raises(ValueError, match="no complete token store"):
        TokenStore(path)
    check_store_path(path)
    write(path, random_rows(4))
    assert len(TokenStore(path)) == 4


def test_arrays_are_mapped_not_copied(tmp_path: Path) -> None:
    write(tmp_path / "store", random_rows(300))
    store = TokenStore(tmp_path / "store")
    assert isinstance(store.lengths, np.memmap)
    for array in (store[7].input_ids, store[7].loss_weights, store.lengths):
        assert not array.flags.owndata
        assert not array.flags.writeable


# ---- Damage ----


def flip(file: Path, position: int) -> None:
    """Flip the lowest bit of one byte."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("block_bytes", [1 << 26, 97])
@pytest.mark.parametrize("name", ["lengths.npy", "weight_sums.npy", "by_source.npy", "data-00000-of-00001.arrow"])
def test_a_bit_that_flips_in_any_file_is_found_by_the_rank_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block_bytes: int
) -> None:
    monkeypatch.setattr(ochat_train.tokens.store_files, "_BLOCK_BYTES", block_bytes)
    path = tmp_path / "store"
    write(path, random_rows(40), random_rows(5))
    files = TokenStore(path).manifest.files
    for part in range(3):
        check_blocks(path, files, part=part, parts=3)
    file = path / "train" / name
    flip(file, file.stat().st_size * 3 // 4)
    TokenStore(path)  # of the right size
    found = []
    for part in range(3):
        try:
            check_blocks(path, files, part=part, parts=3)
        except StoreDamaged as damage:
            found.append(str(damage))
    assert len(found) == 1
    assert f"train/{name} has other bytes than were written" in found[0]


def test_a_file_that_is_cut_or_gone_is_named_before_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "store"
    write(path, random_rows(40))
    (arrow,) = (path / "train").glob("*.arrow")
    size = arrow.stat().st_size
    os.truncate(arrow, size // 2)
    with pytest.raises(StoreDamaged, match=rf"train/data-.* has {size // 2:,} bytes, not {size:,}"):
        TokenStore(path)
    arrow.unlink()
    with pytest.raises(StoreDamaged, match=r"train/data-.* is not there"):
        TokenStore(path)


def test_a_manifest_that_was_changed_is_damaged(tmp_path: Path) -> None:
    """By one bit anywhere: in a value, in the name of a field, or so that it is JSON no more."""
    path = tmp_path / "store"
    write(path, random_rows(3))
    manifest, whole = read_manifest(path), (path / "manifest.json").read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        (path / "manifest.json").write_bytes(changed)
        try:
            assert read_manifest(path) == manifest  # such as 1E-05 for 1e-05
        except StoreDamaged as damage:
            assert "manifest.json does not agree with its own digest" in str(damage)
            check_store_path(path)  # so that preprocess makes it anew


def test_an_id_of_no_token_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(staging_beside(tmp_path / "store"), SOURCES, 100)
    row = Row("a", SOURCES[0], "", Example(np.array([99, 100], np.int32), np.ones(2, np.float32)))
    with pytest.raises(ValueError, match="ids 99 to 100, and has 100 tokens"):
        writer.add("train", table_of([row]))
