"""What goes into a store comes out of it, and a store is there as a whole or not at all."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest

from ochat_train.tokens.encode import Example
from ochat_train.tokens.store import Manifest, Split, StoreWriter, TokenStore, read_manifest

CONDITIONS = ("GPT4", "", "größer")


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
        rows.append(Row(f"id {number} ü", f"source {number % 2}", condition, Example(ids, weights)))
    return rows


def manifest_of(writer: StoreWriter, fingerprint: str = "f" * 64) -> Manifest:
    return Manifest(
        fingerprint=fingerprint,
        made_from={"template": "openchat_v3.2"},
        template="openchat_v3.2",
        conditions=writer.conditions,
        inference_condition="GPT4",
        added_tokens={"<|end_of_turn|>": 32000},
        splits=writer.split_totals(),
        counts={},
    )


def write(path: Path, train: Sequence[Row], eval_: Sequence[Row] = (), fingerprint: str = "f" * 64) -> None:
    with StoreWriter(path) as writer:
        add_all(writer, "train", train)
        add_all(writer, "eval", eval_)
        writer.finish(manifest_of(writer, fingerprint))


def add_all(writer: StoreWriter, split: Split, rows: Sequence[Row]) -> None:
    for row in rows:
        writer.add(split, row.id, row.source, row.condition, row.example)


def check_split(path: Path, split: Split, rows: Sequence[Row]) -> None:
    store = TokenStore(path, split)
    assert len(store) == len(rows)
    kinds = [array.dtype.name for array in (store.lengths, store.weight_sums, store.condition_ids)]
    assert kinds == ["int32", "float64", "int32"]
    assert store.lengths.tolist() == [len(row.example.input_ids) for row in rows]
    # f64 sums of f32 weights: the same additions, so exactly the same numbers
    assert store.weight_sums.tolist() == [float(row.example.loss_weights.sum(dtype=np.float64)) for row in rows]
    assert [store.manifest.conditions[id_] for id_ in store.condition_ids] == [row.condition for row in rows]
    for position, row in enumerate(rows):
        example = store[position]
        assert (example.input_ids.dtype.name, example.loss_weights.dtype.name) == ("int32", "float32")
        assert np.array_equal(example.input_ids, row.example.input_ids)
        assert np.array_equal(example.loss_weights, row.example.loss_weights)
        assert store.name(position) == row.id


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# ---- Round trip ----


# Rows are written in batches of 1,000.
@pytest.mark.parametrize(("num_train", "num_eval"), [(1, 0), (7, 3), (1000, 1), (2345, 1001)])
def test_every_example_comes_back_as_it_was(num_train: int, num_eval: int, tmp_path: Path) -> None:
    train, eval_ = random_rows(num_train, 1), random_rows(num_eval, 2)
    path = tmp_path / "deep" / "store"
    write(path, train, eval_)
    check_split(path, "train", train)
    check_split(path, "eval", eval_)
    assert os.listdir(path.parent) == ["store"]


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


def test_datasets_opens_it(tmp_path: Path) -> None:
    train, eval_ = random_rows(12, 1), random_rows(5, 2)
    write(tmp_path / "store", train, eval_)
    opened = datasets.load_from_disk(str(tmp_path / "store"))
    for split, rows in (("train", train), ("eval", eval_)):
        dataset = opened[split]
        assert dataset.column_names == ["id", "source", "condition", "input_ids", "loss_weights"]
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
    first, second = (
        {name: data for name, data in contents(tmp_path / folder).items() if name.endswith((".arrow", ".npy"))}
        for folder in ("a", "b")
    )
    assert len(first) == 8
    assert first == second


# ---- All or nothing ----


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_leaving_by_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), StoreWriter(tmp_path / "store") as writer:
        add_all(writer, "train", random_rows(1500))
        assert writer.partial.is_dir()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store") as writer:
        add_all(writer, "train", random_rows(3))
    assert list(tmp_path.iterdir()) == []


def test_an_older_store_survives_a_rewrite_that_fails(tmp_path: Path) -> None:
    path, rows = tmp_path / "store", random_rows(30)
    write(path, rows)
    before = contents(path)
    with pytest.raises(RuntimeError), StoreWriter(path) as writer:
        add_all(writer, "train", random_rows(2000, 9))
        raise RuntimeError
    assert contents(path) == before
    assert os.listdir(tmp_path) == ["store"]
    check_split(path, "train", rows)


def test_a_rewrite_replaces_the_older_store_as_a_whole(tmp_path: Path) -> None:
    path, rows = tmp_path / "store", random_rows(5, 9)
    write(path, random_rows(30), random_rows(4), fingerprint="old")
    opened = TokenStore(path)  # a training run that still reads the old one
    last = opened[29]
    write(path, rows, fingerprint="new")
    check_split(path, "train", rows)
    check_split(path, "eval", [])
    assert TokenStore(path).fingerprint == "new"
    assert os.listdir(tmp_path) == ["store"]
    assert np.array_equal(opened[29].input_ids, last.input_ids)


def test_leftovers_of_dead_processes_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead, alive = dead_pid(), os.getppid()
    for name in (f"store.partial-{dead}", f"store.partial-{dead}-old", f"store.partial-{alive}"):
        (tmp_path / name / "train").mkdir(parents=True)
        (tmp_path / name / "train.stream").write_bytes(b"half")
    untouched = {f"store.partial-{alive}", "store.partial-notes", f"store2.partial-{dead}", f"other-{dead}"}
    for name in untouched:
        (tmp_path / name).mkdir(exist_ok=True)
    write(tmp_path / "store", random_rows(3))
    assert set(os.listdir(tmp_path)) == {"store", *untouched}
    assert contents(tmp_path / f"store.partial-{alive}") == {"train.stream": b"half"}


@pytest.mark.parametrize("content", ["thesis.txt", "sub/photo.jpg", "dataset_dict.json"])
def test_a_folder_that_is_no_store_is_refused_and_untouched(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "mine"
    (folder / content).parent.mkdir(parents=True)
    (folder / content).write_text("dear")
    with pytest.raises(ValueError, match=f"{folder} exists and is not a token store"):
        StoreWriter(folder)
    assert contents(folder) == {content: b"dear"}
    assert os.listdir(tmp_path) == ["mine"]


def test_a_file_in_the_place_of_the_store_is_refused_and_untouched(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("dear")
    with pytest.raises(ValueError, match="is not a token store"):
        StoreWriter(file)
    assert contents(tmp_path) == {"mine": b"dear"}


def test_an_empty_folder_in_the_place_of_the_store_is_used(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    write(tmp_path / "store", random_rows(2))
    assert len(TokenStore(tmp_path / "store")) == 2


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
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 0, "more": 1'))
    assert read_manifest(path) is None
    with pytest.raises(ValueError, match="no complete token store"):
        TokenStore(path)
    write(path, random_rows(4))
    assert len(TokenStore(path)) == 4


def test_arrays_are_mapped_not_copied(tmp_path: Path) -> None:
    write(tmp_path / "store", random_rows(300))
    store = TokenStore(tmp_path / "store")
    assert isinstance(store.lengths, np.memmap)
    for array in (store[7].input_ids, store[7].loss_weights, store.lengths):
        assert not array.flags.owndata
        assert not array.flags.writeable
