"""The ledger of a preprocess run: what happened to every record and why, a row for each of its conversations."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

NUM_EXAMPLES = 3  # ids shown for each reason and action

# conversation counts those of one record from 1; what has none, such as a line that is no JSON, is one.
# outcome is "kept" or "dropped"; reason and detail are null for a kept record. actions: what was done, in order.
# offset counts bytes, or rows of a table file. The numbers are of its examples: 0 for a dropped record.
LEDGER_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "file": pa.string(),
        "offset": pa.int64(),
        "conversation": pa.int32(),
        "source": pa.string(),
        "outcome": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
        "actions": pa.list_(pa.string()),
        "num_examples": pa.int32(),
        "num_tokens": pa.int64(),
        "num_supervised_tokens": pa.int64(),
        "weight_sum": pa.float64(),
    }
)
_NUMBERS = ("num_examples", "num_tokens", "num_supervised_tokens", "weight_sum")


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """What happened to one conversation; `reason` None means that it was kept."""

    id: str
    file: str
    offset: int
    source: str
    actions: tuple[str, ...]
    reason: str | None = None
    detail: str | None = None
    num_examples: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    weight_sum: float = 0.0
    conversation: int = 1

    @property
    def outcome(self) -> str:
        """Kept or dropped."""
        return "kept" if self.reason is None else "dropped"


def ledger_table(rows: Sequence[LedgerRow]) -> pa.Table:
    """The rows as a table of LEDGER_SCHEMA."""
    columns = {name: [getattr(row, name) for row in rows] for name in LEDGER_SCHEMA.names}
    return pa.table(columns, schema=LEDGER_SCHEMA)


def drop_rows(table: pa.Table, reasons: Mapping[int, tuple[str, str]]) -> pa.Table:
    """The LEDGER_SCHEMA table with some rows dropped: by ascending position, the reason and its detail."""
    if not reasons:
        return table
    mask = np.zeros(table.num_rows, np.bool_)
    mask[list(reasons)] = True
    changed: dict[str, list[Any]] = {name: [0] * len(reasons) for name in _NUMBERS}
    changed["outcome"] = ["dropped"] * len(reasons)
    changed["reason"] = [reason for reason, _ in reasons.values()]
    changed["detail"] = [detail for _, detail in reasons.values()]
    for name, values in changed.items():
        field = LEDGER_SCHEMA.field(name)
        column = pc.replace_with_mask(table[name], mask, pa.array(values, field.type))
        table = table.set_column(LEDGER_SCHEMA.get_field_index(name), field, column)
    return table


@dataclass(slots=True)
class Tally:
    """How many records, and the ids of the first NUM_EXAMPLES of them."""

    num_records: int = 0
    ids: list[str] = field(default_factory=list)


@dataclass(slots=True)
class SourceCounts:
    """What became of one source's conversations; `actions` counts each that was changed, dropped ones too.

    num_records: of how many records it has the first conversation.
    """

    num_in: int = 0
    num_records: int = 0
    num_kept: int = 0
    dropped: dict[str, Tally] = field(default_factory=dict)
    actions: dict[str, Tally] = field(default_factory=dict)
    num_examples: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    weight_sum: float = 0.0

    @property
    def num_dropped(self) -> int:
        """Records dropped, for whatever reason."""
        return sum(tally.num_records for tally in self.dropped.values())

    def add(self, table: pa.Table) -> None:
        """Count the rows of a ledger table that are all of this source."""
        self.num_in += table.num_rows
        if "conversation" in table.column_names:  # not in ledgers of older stores
            self.num_records += pc.sum(pc.equal(table["conversation"], 1)).as_py() or 0
        # A kept row without an example counts as neither kept nor dropped, so that `check` reports it.
        is_kept = pc.and_(pc.equal(table["outcome"], "kept"), pc.greater(table["num_examples"], 0))
        self.num_kept += pc.sum(is_kept).as_py() or 0
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + (pc.sum(table[name]).as_py() or 0))
        dropped = table.filter(pc.equal(table["outcome"], "dropped"))
        changed_ids = table["id"].take(pc.list_parent_indices(table["actions"]))
        for tallies, names, ids in (
            (self.dropped, dropped["reason"], dropped["id"]),
            (self.actions, pc.list_flatten(table["actions"]), changed_ids),
        ):
            for name in pc.unique(names).to_pylist():
                of_name = ids.filter(pc.equal(names, name))
                tally = tallies.setdefault(name, Tally())
                tally.num_records += len(of_name)
                tally.ids += of_name.slice(0, NUM_EXAMPLES - len(tally.ids)).to_pylist()


class Ledger:
    """Counts every record by source, and writes the rows to a Parquet file unless `path` is None.

    A context manager that completes the file at its end. `unread` is how often which (file, kind, name) was met and not
    read; it goes into the file's metadata. `sources` are those that are in the table even without a record.
    """

    def __init__(self, path: str | None, sources: Sequence[str] = ()) -> None:
        self.counts = {source: SourceCounts() for source in sources}
        self.total = SourceCounts()
        self.unread: Mapping[tuple[str, str, str], int] = {}
        self._file = pq.ParquetWriter(path, LEDGER_SCHEMA, compression="zstd") if path is not None else None

    def add(self, table: pa.Table) -> None:
        """Count and write the rows of a LEDGER_SCHEMA table, a shard's."""
        self.total.add(table)
        for source in pc.unique(table["source"]).to_pylist():
            self.counts.setdefault(source, SourceCounts()).add(table.filter(pc.equal(table["source"], source)))
        if self._file is not None:
            self._file.write_table(table)

    def check(self, num_records: int) -> None:
        """Raise RuntimeError, a bug of ours, unless every conversation is kept or dropped, by source too, and those
        that are the first of a record are as many as the `num_records` that were read.
        """
        for name, counts in [*self.counts.items(), ("total", self.total)]:
            if counts.num_in != counts.num_kept + counts.num_dropped:
                outcomes = f"{counts.num_kept:,} kept and {counts.num_dropped:,} dropped"
                raise _bug(f"{name}: {counts.num_in:,} records in, but {outcomes}")
        if self.total.num_records != num_records:
            raise _bug(f"total: {num_records:,} records in, but {self.total.num_records:,} in the ledger")

    def check_examples(self, splits: Collection[Mapping[str, float]]) -> None:
        """Raise RuntimeError, a bug of ours, unless the examples of a store's splits are those of the kept records."""
        for name in ("num_examples", "num_tokens", "num_supervised_tokens"):
            num_written, num_kept = sum(split[name] for split in splits), getattr(self.total, name)
            if num_written != num_kept:
                raise _bug(f"{name}: {num_written:,} in the store, but {num_kept:,} of the records kept")

    def table(self) -> str:
        """The counts as aligned text: a row a source and one of totals, below each its reasons and actions.

        Share supervised is supervised tokens / tokens, mean weight is weight sum / supervised tokens; a division by 0
        is shown as "-".
        """
        total = _cells("total", self.total)
        rows = [tuple(total), *(tuple(_cells(*item).values()) for item in self.counts.items()), tuple(total.values())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for (name, *numbers), counts in zip(rows, (None, *self.counts.values(), None), strict=True):
            aligned = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
            lines.append("  ".join((name.ljust(widths[0]), *aligned)))
            lines += _details(counts) if counts is not None else []
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The counts as plain JSON values, `{source: {...}, ...}`, for the store's manifest."""
        return {
            name: {
                "in": counts.num_in,
                "kept": counts.num_kept,
                "dropped": {reason: tally.num_records for reason, tally in counts.dropped.items()},
                "actions": {action: tally.num_records for action, tally in counts.actions.items()},
                "examples": counts.num_examples,
                "tokens": counts.num_tokens,
                "supervised_tokens": counts.num_supervised_tokens,
                "weight_sum": counts.weight_sum,
            }
            for name, counts in self.counts.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._file is not None:
            by_file: dict[str, dict[str, dict[str, int]]] = {}
            for (file, kind, name), count in sorted(self.unread.items()):
                by_file.setdefault(file, {}).setdefault(kind, {})[name] = count
            self._file.add_key_value_metadata({"unread": orjson.dumps(by_file)})
            self._file.close()


def read_rows(path: str, id: str) -> list[dict[str, Any]]:
    """The rows of a ledger file for the conversations, or all those of records, of this id; it need not be unique."""
    rows: list[dict[str, Any]] = pq.read_table(path, filters=[("id", "==", id)]).to_pylist()
    if not rows:
        table = pq.read_table(path, columns=["id"])
        is_of_record = pc.starts_with(table["id"], f"{id}/")
        if pc.any(is_of_record).as_py():
            rows = pq.read_table(path).filter(is_of_record).to_pylist()
    return rows


def _bug(found: str) -> RuntimeError:
    return RuntimeError(f"{found}; this is a bug in preprocessing, please report it")


def _cells(name: str, counts: SourceCounts) -> dict[str, str]:
    """A row of the table, by the titles of its columns."""
    num_tokens, num_supervised = counts.num_tokens, counts.num_supervised_tokens
    return {
        "source": name,
        "records in": f"{counts.num_in:,}",
        "kept": f"{counts.num_kept:,}",
        "dropped": f"{counts.num_dropped:,}",
        "examples": f"{counts.num_examples:,}",
        "tokens": f"{num_tokens:,}",
        "supervised tokens": f"{num_supervised:,}",
        "share supervised": f"{100 * num_supervised / num_tokens:.1f} %" if num_tokens else "-",
        "mean weight": f"{counts.weight_sum / num_supervised:.4f}" if num_supervised else "-",
    }


def _details(counts: SourceCounts) -> list[str]:
    """A line for the reasons and one for the actions, each with how many records and the ids of the first."""
    lines = []
    for title, tallies in (("dropped", counts.dropped), ("changed", counts.actions)):
        shown = (
            f"{name} {tally.num_records:,} ({', '.join(map(show_id, tally.ids))})" for name, tally in tallies.items()
        )
        lines += [f"  {title}: {', '.join(shown)}"] if tallies else []
    return lines


def show_id(id: str) -> str:
    """The id, whole, as a word that bash and zsh read back, for `--explain`: an id is the dump's text, of any kind."""
    if id.isprintable():
        return shlex.quote(id)

    def escape(character: str) -> str:
        if character in "\\'":
            return f"\\{character}"
        if character.isprintable():
            return character
        return character.encode("unicode_escape").decode() if character.isascii() else f"\\U{ord(character):08x}"

    return f"$'{''.join(map(escape, id))}'"
