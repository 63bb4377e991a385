"""The token store: examples on disk, memory-mapped, shared by all processes of a node.

    STORE/manifest.json             written last, with checksums of itself and the files of the splits
    STORE/tokenizer/                the tokenizer with the template's special tokens
    STORE/ledger.parquet            what happened to each record
    STORE/train/, STORE/eval/       Arrow: id, source, condition, input_ids i32[L], loss_weights f32[L],
                                    answer_lengths i32[A], see loss_forms.py
    STORE/train/lengths.npy ...     i32[N] lengths, f64[N] weight_sums and answer_weight_sums, i32[N] condition_ids,
                                    i32[N] source_ids
    STORE/train/by_source.npy       i64[N] the positions of the first source, then those of the second, ...
    STORE/train/source_ends.npy     i64[number of sources] where each ends in by_source

`datasets.load_from_disk(STORE)` opens it too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from ochat_train.conversations.described import Description
from ochat_train.files import flush_tree
from ochat_train.tokens.encode import Example
from ochat_train.tokens.loss_forms import LossForm, spread_over_answers
from ochat_train.tokens.store_files import StoreDamaged, StoreFile, check_sizes, describe_files

FORMAT_VERSION = 4
Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "condition": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "loss_weights": pa.list_(pa.float32()),
        "answer_lengths": pa.list_(pa.int32()),
    }
)
_WEIGHT_SUMS: Mapping[LossForm, str] = {"token": "weight_sums", "answer": "answer_weight_sums"}
_INDEX = {
    "lengths": np.int32,
    **dict.fromkeys(_WEIGHT_SUMS.values(), np.float64),
    "condition_ids": np.int32,
    "source_ids": np.int32,
}
_ARROW_FILE = "data-00000-of-00001.arrow"
# What `Dataset.save_to_disk` writes. It is written here, because that function would copy all rows once more, and
# `datasets` takes a second to import.
_VALUES = {"id": "string", "source": "string", "condition": "string"}
_LISTS = {"input_ids": "int32", "loss_weights": "float32", "answer_lengths": "int32"}
_DATASET_INFO = {
    **dict.fromkeys(("description", "citation", "homepage", "license"), ""),
    "features": {name: {"dtype": dtype, "_type": "Value"} for name, dtype in _VALUES.items()}
    | {name: {"feature": {"dtype": dtype, "_type": "Value"}, "_type": "List"} for name, dtype in _LISTS.items()},
}
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
    the code's version and the input files' digests, and over no path in it. conditions[i] is the name of condition id
    i, sources[i] that of source id i, in the recipe's order, those that are held out whole last. added_tokens: ids of
    special tokens that the base tokenizer lacked. splits: num_examples, num_tokens, num_supervised_tokens and
    weight_sum of each. counts: the ledger's. overlong: shard.py's OVERLONG_COLUMNS. files: those of the splits, as they
    were written; StoreWriter fills it in.
    """

    fingerprint: str
    made_from: dict[str, Any]
    template: Description
    conditions: list[str]
    sources: list[str]
    inference_condition: str
    added_tokens: dict[str, int]
    splits: dict[str, dict[str, float]]
    counts: dict[str, Any]
    overlong: dict[str, int]
    files: dict[str, StoreFile] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def trained_sources(self) -> list[str]:
        """The sources that are not held out whole."""
        held_out = {source["name"] for source in self.made_from["data"].get("eval_sources", ())}
        return [name for name in self.sources if name not in held_out]

    @property
    def places(self) -> dict[str, Any]:
        """Where the store's dumps and tokenizer were, in the form of a recipe as JSON."""
        tokenizer = self.made_from.get("places", {}).get("tokenizer")
        return {"tokenizer": tokenizer, "data": self.made_from["data"]}


def read_manifest(path: str | Path) -> Manifest | None:
    """The manifest of the store at `path`; None when there is no complete store of this format version.

    Raises StoreDamaged when it differs from what was written.
    """
    content = _read_manifest_file(Path(path))
    if content is None:
        return None
    try:
        fields = orjson.loads(content)
    except orjson.JSONDecodeError:
        fields = {}
    digest = fields.pop("digest", None)
    is_older = digest is None and fields.get("format_version", FORMAT_VERSION) != FORMAT_VERSION  # and has no digest
    if digest != _digest(fields) and not is_older:
        raise StoreDamaged(
            f"token store {path} is damaged: manifest.json does not agree with its own digest; run "
            "ochat preprocess with its recipe, which makes it anew"
        )
    if fields["format_version"] != FORMAT_VERSION:
        return None
    files = {name: StoreFile(**described) for name, described in fields.pop("files").items()}
    return Manifest(**fields, files=files)


def _digest(fields: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS))


def _read_manifest_file(path: Path) -> bytes | None:
    """The content of manifest.json, of any version, also damaged; None when it is missing or no token store's."""
    try:
        content = (path / "manifest.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    names = (b'"format_version"', b'"fingerprint"', b'"made_from"')  # of which damage may have hit one
    return content if sum(name in content for name in names) >= 2 else None


class StoreChanged(Exception):
    """The files of an open store are no longer those that were opened."""


class Examples(Protocol):
    """What is planned and batched: the examples of a split, or some of them. The fields are those of TokenStore."""

    lengths: npt.NDArray[np.int32]
    weight_sums: npt.NDArray[np.float64]
    condition_ids: npt.NDArray[np.int32]

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> Example: ...


class TokenStore:
    """One split of a store, opened for reading, with the loss weights of a loss form.

    lengths: i32[N], tokens of each example. weight_sums: f64[N], sum of its loss weights. condition_ids: i32[N],
    positions in `manifest.conditions`. source_ids: i32[N], positions in `manifest.sources`. `store[i]` is the i-th
    Example. Everything is read from memory-mapped files. Raises ValueError when `path` holds no complete store, and
    StoreDamaged when a file has another size than was written; `store_files.check_blocks` reads what they hold.
    """

    def __init__(self, path: str | Path, split: Split = "train", loss: LossForm = "token") -> None:
        manifest = read_manifest(path)
        if manifest is None:
            raise ValueError(f"no complete token store at {path}; make it with ochat preprocess RECIPE")
        check_sizes(Path(path), manifest.files)
        self.manifest, self.loss = manifest, loss
        folder = Path(path) / split
        self.lengths: npt.NDArray[np.int32] = _read_index(folder, "lengths")
        self.weight_sums: npt.NDArray[np.float64] = _read_index(folder, _WEIGHT_SUMS[loss])
        self.condition_ids: npt.NDArray[np.int32] = _read_index(folder, "condition_ids")
        self.source_ids: npt.NDArray[np.int32] = _read_index(folder, "source_ids")
        self._by_source: npt.NDArray[np.int64] = _read_index(folder, "by_source")
        self._source_ends: list[int] = _read_index(folder, "source_ends").tolist()
        if len(self.lengths):  # an empty split has no Arrow file
            from datasets import DatasetDict, load_from_disk  # slow to import, and writing does without

            dataset = load_from_disk(str(path))
            assert isinstance(dataset, DatasetDict)
            table = dataset[split].data
            self._ids, self._weights = table.column("input_ids"), table.column("loss_weights")
            self._answer_lengths, self._names = table.column("answer_lengths"), table.column("id")
        files = [Path(path) / "manifest.json", *folder.glob("*.npy"), *folder.glob("*.arrow")]
        self._files = {file: _identity(file) for file in sorted(files)}

    def check_unchanged(self) -> None:
        """Raise StoreChanged, by name, when a file was written to, replaced or removed since the store was opened.

        Mapped files show what others write into them, and one that is cut off ends the process that reads it.
        """
        for file, identity in self._files.items():
            if _identity(file) != identity:
                raise StoreChanged(
                    f"token store file {file} was {'changed' if file.exists() else 'removed'} during training, so what "
                    "it holds is no longer what this run trains on; restore it and run the same command again, which "
                    "goes on from the newest checkpoint, or train on the new store in another checkpoint.dir"
                )

    @property
    def fingerprint(self) -> str:
        """The manifest's: equal for equal contents."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, position: int) -> Example:
        ids, weights = self._ids[position].values.to_numpy(), self._weights[position].values.to_numpy()
        if self.loss == "answer":
            answer_lengths = self._answer_lengths[position].values.to_numpy()
            weights = spread_over_answers(weights, [len(weights)], answer_lengths, [len(answer_lengths)])
        return Example(ids, weights)

    def members(self, source_id: int) -> npt.NDArray[np.int64]:
        """i64[n]: the positions of one source's examples, ascending."""
        begin, end = [0, *self._source_ends][source_id : source_id + 2]
        return self._by_source[begin:end]

    def name(self, position: int) -> str:
        """The id of the conversation from which the example was made."""
        return str(self._names[position].as_py())


def _identity(file: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written to or replaced: (inode, size, time of change); None when it is not there."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read_index(folder: Path, name: str) -> npt.NDArray[Any]:
    file = folder / f"{name}.npy"
    # An empty split has nothing to map.
    array: npt.NDArray[Any] = np.load(file, mmap_mode="r" if file.stat().st_size > 128 else None)
    return array


def check_store_path(path: Path) -> None:
    """Raise ValueError when `path` holds something that is not a store, so that nobody loses a file."""
    if path.resolve().is_mount():  # it could not be moved to its place
        raise ValueError(f"data.store {path} is where a disk is mounted; name a folder below it")
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and _read_manifest_file(path) is None:
        raise ValueError(f"data.store {path} exists and is not a token store; name another folder")


class StoreWriter:
    """Writes a store into `staging`, an empty folder on the same disk as its final path; `finish` moves it there.

    sources: the names of all sources; a source's position is its id. num_ids: of the tokenizer; ids are below it.
    """

    def __init__(self, staging: Path, sources: Sequence[str], num_ids: int) -> None:
        self.staging, self._num_ids = staging, num_ids
        self.sources = list(sources)
        self._condition_ids: dict[str, int] = {}
        self._condition_totals = np.zeros((0, 2))  # of the train split by condition: weight sum, supervised tokens
        self._splits: dict[Split, _SplitWriter] = {split: _SplitWriter(staging / split) for split in SPLITS}

    @property
    def conditions(self) -> list[str]:
        """The conditions of all examples added so far; a condition's position is its id."""
        return list(self._condition_ids)

    def add(self, split: Split, rows: pa.Table) -> None:
        """Append examples to a split: a table with the columns of a store. Raises ValueError for an id of no token."""
        if not rows.num_rows:
            return
        bounds = pc.min_max(pc.list_flatten(rows["input_ids"])).as_py()
        if bounds["min"] < 0 or bounds["max"] >= self._num_ids:
            raise ValueError(
                f"the tokenizer made the ids {bounds['min']:,} to {bounds['max']:,}, and has {self._num_ids:,} tokens; "
                "its files do not belong together: fetch them again"
            )
        for condition in pc.unique(rows["condition"]).to_pylist():
            self._condition_ids.setdefault(condition, len(self._condition_ids))
        condition_ids = pc.index_in(rows["condition"], value_set=pa.array(self.conditions)).to_numpy().astype(np.int32)
        source_ids = pc.index_in(rows["source"], value_set=pa.array(self.sources)).to_numpy().astype(np.int32)
        totals = self._splits[split].add(rows.select(_SCHEMA.names), condition_ids, source_ids)
        if split == "train":
            grown = np.zeros((len(self._condition_ids), 2))
            grown[: len(self._condition_totals)] = self._condition_totals
            np.add.at(grown, condition_ids, totals)
            self._condition_totals = grown

    def trained_condition_weights(self) -> dict[str, float]:
        """The mean weight of a supervised token under each condition of the train split."""
        return {
            condition: float(weight / num_tokens)
            for condition, (weight, num_tokens) in zip(self.conditions, self._condition_totals, strict=False)
            if num_tokens
        }

    def split_totals(self) -> dict[str, dict[str, float]]:
        """Of each split: num_examples, num_tokens, num_supervised_tokens, weight_sum."""
        return {split: dict(writer.totals) for split, writer in self._splits.items()}

    def finish(self, manifest: Manifest, path: Path) -> None:
        """Move the store to `path`, and an older store from there to `staging`/../old. The manifest is written last."""
        # datasets cannot read an empty split back, so only its index is written.
        splits = [split for split, writer in self._splits.items() if writer.totals["num_examples"]]
        (self.staging / "dataset_dict.json").write_bytes(orjson.dumps({"splits": splits}))
        for writer in self._splits.values():
            writer.finish(len(self.sources))
        fields = asdict(replace(manifest, files=describe_files(self.staging)))
        fields["digest"] = _digest(fields)
        (self.staging / "manifest.json").write_bytes(orjson.dumps(fields, option=orjson.OPT_INDENT_2))
        flush_tree(self.staging)
        if path.exists():
            path.rename(self.staging.with_name("old"))
        self.staging.rename(path)


class _SplitWriter:
    """One split on its way to disk. Until it is finished, nothing of it stays in memory."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.totals = {"num_examples": 0, "num_tokens": 0, "num_supervised_tokens": 0, "weight_sum": 0.0}
        self._arrow = pa.ipc.new_stream(str(folder / _ARROW_FILE), _SCHEMA)
        self._columns = [_Column(folder / f"{name}.npy", np.dtype(dtype)) for name, dtype in _INDEX.items()]

    def add(
        self, rows: pa.Table, condition_ids: npt.NDArray[np.int32], source_ids: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float64]:
        """Append the rows; f64[rows, 2], the weight sum and the number of supervised tokens of each."""
        self._arrow.write_table(rows)
        lengths, num_answers = (pc.list_value_length(rows[name]).to_numpy() for name in ("input_ids", "answer_lengths"))
        weights, answer_lengths = (
            pc.list_flatten(rows[name]).to_numpy() for name in ("loss_weights", "answer_lengths")
        )
        spread = spread_over_answers(weights, lengths, answer_lengths, num_answers)
        ends = np.cumsum(lengths, dtype=np.int64)
        starts = ends - lengths  # no example is empty, which reduceat could not tell from one token
        weight_sums, spread_sums = (np.add.reduceat(each, starts, dtype=np.float64) for each in (weights, spread))
        num_supervised = np.add.reduceat(weights != 0, starts, dtype=np.int64)
        index = (lengths, weight_sums, spread_sums, condition_ids, source_ids)
        for column, values in zip(self._columns, index, strict=True):
            column.append(values)
        self.totals["num_examples"] += len(lengths)
        self.totals["num_tokens"] += int(ends[-1])
        self.totals["num_supervised_tokens"] += int(num_supervised.sum())
        self.totals["weight_sum"] += float(weight_sums.sum())
        return np.stack([weight_sums, num_supervised.astype(np.float64)], axis=1)

    def finish(self, num_sources: int) -> None:
        """Close the files, and write the others that `datasets.load_from_disk` and TokenStore read."""
        self._arrow.close()
        for column in self._columns:
            column.close()
        source_ids = _read_index(self.folder, "source_ids")
        np.save(self.folder / "source_ends.npy", np.cumsum(np.bincount(source_ids, minlength=num_sources)))
        np.save(self.folder / "by_source.npy", np.argsort(source_ids, kind="stable"))  # 12 bytes of memory an example
        if not self.totals["num_examples"]:
            (self.folder / _ARROW_FILE).unlink()
            return
        (self.folder / "dataset_info.json").write_text(json.dumps(_DATASET_INFO))
        (self.folder / "state.json").write_bytes(orjson.dumps(_DATASET_STATE))


class _Column:
    """A one-dimensional .npy file that grows. Its header is written again when its length is known."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._file = path.open("wb")
        self._dtype, self._length = dtype, 0
        self._write_header()

    def append(self, values: npt.NDArray[Any]) -> None:
        self._file.write(values.astype(self._dtype, copy=False).tobytes())
        self._length += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()  # numpy pads headers, so that one of any length takes the same room
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
