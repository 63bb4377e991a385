"""The token store: examples on disk, memory-mapped, shared by all processes of a node.

    STORE/manifest.json             written last; a folder without it is no store
    STORE/tokenizer/                the tokenizer with the template's special tokens
    STORE/ledger.jsonl              what happened to each record that was not simply kept
    STORE/train/, STORE/eval/       Arrow: id, source, condition, input_ids i32[L], loss_weights f32[L]
    STORE/train/lengths.npy ...     i32[N] lengths, f64[N] weight_sums, i32[N] condition_ids

`datasets.load_from_disk(STORE)` opens it too.
"""

import glob
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
from datasets import DatasetDict, DatasetInfo, Features, load_from_disk

from ochat_train.files import flush_tree
from ochat_train.tokens.encode import Example

FORMAT_VERSION = 1
Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "condition": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "loss_weights": pa.list_(pa.float32()),
    }
)
_ROWS_PER_BATCH = 1000
_ARROW_FILE = "data-00000-of-00001.arrow"
# What `Dataset.save_to_disk` writes. We write it ourselves, because that function would copy all the rows once more.
_DATASET_STATE: dict[str, Any] = {
    "_data_files": [{"filename": _ARROW_FILE}],
    "_fingerprint": "ochat_train",
    "_format_columns": None,
    "_format_kwargs": {},
    "_format_type": None,
    "_output_all_columns": False,
    "_split": None,
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a store is made of.

    fingerprint: hash over `made_from`, which holds the tokenizer's digest, the template, the recipe's data section,
    the code's version and the input files' digests. conditions[i] is the name of condition id i. added_tokens: ids of
    special tokens that the base tokenizer lacked. splits: num_examples, num_tokens, num_supervised_tokens and
    weight_sum of each. counts: the ledger's.
    """

    fingerprint: str
    made_from: dict[str, Any]
    template: str
    conditions: list[str]
    inference_condition: str
    added_tokens: dict[str, int]
    splits: dict[str, dict[str, float]]
    counts: dict[str, Any]
    format_version: int = FORMAT_VERSION


def read_manifest(path: str | Path) -> Manifest | None:
    """The manifest of the store at `path`; None when there is no complete store of this version."""
    file = Path(path) / "manifest.json"
    if not file.is_file():
        return None
    fields = orjson.loads(file.read_bytes())
    return Manifest(**fields) if fields.get("format_version") == FORMAT_VERSION else None


class TokenStore:
    """One split of a store, opened for reading.

    lengths: i32[N], tokens of each example. weight_sums: f64[N], sum of its loss weights. condition_ids: i32[N],
    positions in `manifest.conditions`. `store[i]` is the i-th Example, read from the memory-mapped file.
    Raises ValueError when `path` holds no complete store.
    """

    def __init__(self, path: str | Path, split: Split = "train") -> None:
        manifest = read_manifest(path)
        if manifest is None:
            raise ValueError(f"no complete token store at {path}; make it with python -m ochat_train.preprocess RECIPE")
        self.manifest = manifest
        folder = Path(path) / split
        self.lengths: npt.NDArray[np.int32] = _read_index(folder, "lengths")
        self.weight_sums: npt.NDArray[np.float64] = _read_index(folder, "weight_sums")
        self.condition_ids: npt.NDArray[np.int32] = _read_index(folder, "condition_ids")
        if len(self.lengths):  # an empty split has no Arrow file
            dataset = load_from_disk(str(path))
            assert isinstance(dataset, DatasetDict)
            table = dataset[split].data
            self._ids, self._weights = table.column("input_ids"), table.column("loss_weights")
            self._names = table.column("id")

    @property
    def fingerprint(self) -> str:
        """The manifest's: equal for equal contents."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, position: int) -> Example:
        return Example(self._ids[position].values.to_numpy(), self._weights[position].values.to_numpy())

    def name(self, position: int) -> str:
        """The id of the conversation that the example was made from."""
        return str(self._names[position].as_py())


def _read_index(folder: Path, name: str) -> npt.NDArray[Any]:
    file = folder / f"{name}.npy"
    # An empty split has nothing to map.
    array: npt.NDArray[Any] = np.load(file, mmap_mode="r" if file.stat().st_size > 128 else None)
    return array


class StoreWriter:
    """Writes a store beside its place and moves it there when it is complete.

    Use as a context manager: leaving it without `finish` (an error, Ctrl-C) removes what was written. A crash leaves
    only a folder NAME.partial-PID, which the next writer removes. Raises ValueError when `path` holds something that
    is not a store, so that nothing of anybody's is overwritten.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not (self.path / "manifest.json").is_file():
            if not self.path.is_dir() or any(self.path.iterdir()):
                raise ValueError(f"data.store {self.path} exists and is not a token store; name another folder")
            self.path.rmdir()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self.partial = self.path.with_name(f"{self.path.name}.partial-{os.getpid()}")
        self._condition_ids: dict[str, int] = {}
        self._condition_totals: dict[str, list[float]] = {}  # weight sum and supervised tokens in the train split
        try:
            self.partial.mkdir()
            self._splits: dict[Split, _SplitWriter] = {split: _SplitWriter(self.partial, split) for split in SPLITS}
        except BaseException:  # Ctrl-C too: nobody calls __exit__ yet
            shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._splits.values():
            writer.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    @property
    def conditions(self) -> list[str]:
        """The conditions met so far; a condition's position is its id."""
        return list(self._condition_ids)

    def add(self, split: Split, id_: str, source: str, condition: str, example: Example) -> None:
        """Append one example to a split."""
        condition_id = self._condition_ids.setdefault(condition, len(self._condition_ids))
        num_supervised = int(np.count_nonzero(example.loss_weights))
        self._splits[split].add(id_, source, condition, condition_id, num_supervised, example)
        if split == "train":
            totals = self._condition_totals.setdefault(condition, [0.0, 0])
            totals[0] += example.weight_sum
            totals[1] += num_supervised

    def trained_condition_weights(self) -> dict[str, float]:
        """The mean weight of a supervised token under each condition of the train split."""
        return {condition: weight / num_tokens for condition, (weight, num_tokens) in self._condition_totals.items()}

    def split_totals(self) -> dict[str, dict[str, float]]:
        """Of each split: num_examples, num_tokens, num_supervised_tokens, weight_sum."""
        return {split: writer.totals() for split, writer in self._splits.items()}

    def finish(self, manifest: Manifest) -> None:
        """Move the store to its place, an older one out of it. The manifest is written last."""
        # datasets cannot read an empty split back, so of that only the index is written.
        splits = [split for split, writer in self._splits.items() if writer.num_examples]
        (self.partial / "dataset_dict.json").write_bytes(orjson.dumps({"splits": splits}))
        for writer in self._splits.values():
            writer.finish()
        (self.partial / "manifest.json").write_bytes(orjson.dumps(asdict(manifest), option=orjson.OPT_INDENT_2))
        flush_tree(self.partial)
        if self.path.exists():
            old = self.path.with_name(f"{self.path.name}.partial-{os.getpid()}-old")
            self.path.rename(old)
            self.partial.rename(self.path)
            shutil.rmtree(old)
        else:
            self.partial.rename(self.path)

    def _remove_leftovers(self) -> None:
        for folder in self.path.parent.glob(f"{glob.escape(self.path.name)}.partial-*"):
            pid = folder.name.removeprefix(f"{self.path.name}.partial-").partition("-")[0]
            if pid.isdecimal() and not _is_running(int(pid)):
                shutil.rmtree(folder)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


class _SplitWriter:
    """One split on its way to disk: rows go to an Arrow stream a batch at a time, the index stays in memory."""

    def __init__(self, root: Path, split: Split) -> None:
        self.folder = root / split
        self.folder.mkdir()
        self._writer = pa.ipc.new_stream(str(self.folder / _ARROW_FILE), _SCHEMA)
        self._rows: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
        self._lengths: list[int] = []
        self._weight_sums: list[float] = []
        self._condition_ids: list[int] = []
        self._num_supervised = 0

    def add(
        self, id_: str, source: str, condition: str, condition_id: int, num_supervised: int, example: Example
    ) -> None:
        row = (id_, source, condition, example.input_ids, example.loss_weights)
        for column, value in zip(self._rows.values(), row, strict=True):
            column.append(value)
        self._lengths.append(len(example.input_ids))
        self._weight_sums.append(example.weight_sum)
        self._condition_ids.append(condition_id)
        self._num_supervised += num_supervised
        if len(self._lengths) % _ROWS_PER_BATCH == 0:
            self._flush()

    @property
    def num_examples(self) -> int:
        return len(self._lengths)

    def totals(self) -> dict[str, float]:
        return {
            "num_examples": self.num_examples,
            "num_tokens": sum(self._lengths),
            "num_supervised_tokens": self._num_supervised,
            "weight_sum": sum(self._weight_sums),
        }

    def finish(self) -> None:
        """Close the Arrow file and write what `datasets.load_from_disk` and TokenStore want to see beside it."""
        self._flush()
        self.close()
        np.save(self.folder / "lengths.npy", np.array(self._lengths, dtype=np.int32))
        np.save(self.folder / "weight_sums.npy", np.array(self._weight_sums, dtype=np.float64))
        np.save(self.folder / "condition_ids.npy", np.array(self._condition_ids, dtype=np.int32))
        if not self.num_examples:
            (self.folder / _ARROW_FILE).unlink()
            return
        DatasetInfo(features=Features.from_arrow_schema(_SCHEMA)).write_to_directory(str(self.folder))
        (self.folder / "state.json").write_bytes(orjson.dumps(_DATASET_STATE))

    def close(self) -> None:
        with suppress(pa.ArrowInvalid):  # closing twice is fine
            self._writer.close()

    def _flush(self) -> None:
        if self._rows["id"]:
            arrays: Sequence[pa.Array] = [
                pa.array(column, type=field.type) for field, column in zip(_SCHEMA, self._rows.values(), strict=True)
            ]
            self._writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
            for column in self._rows.values():
                column.clear()
