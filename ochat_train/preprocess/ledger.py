"""The ledger of a preprocess run: a row for every record, saying what happened to it and why."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

NUM_EXAMPLES = 3  # ids shown for each reason and action

# outcome is "kept" or "dropped"; reason and detail are null for a kept record. actions: what was done, in order.
# offset counts bytes, or rows of a table file. The numbers are of its examples: 0 for a dropped record.
LEDGER_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "file": pa.string(),
        "offset": pa.int64(),
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
class Entry:
    """What happened to one record; `reason` None means that it was kept."""

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

    @property
    def outcome(self) -> str:
        """Kept or dropped."""
        return "kept" if self.reason is None else "dropped"


def ledger_table(entries: Sequence[Entry]) -> pa.Table:
    """The entries as a table of LEDGER_SCHEMA."""
    columns: dict[str, list[Any]] = {name: [] for name in LEDGER_SCHEMA.names}
    for entry in entries:
        for name, column in columns.items():
            column.append(getattr(entry, name))
    return pa.table(columns, schema=LEDGER_SCHEMA)


def drop_rows(table: pa.Table, reasons: Sequence[str | None], details: Sequence[str | None]) -> pa.Table:
    """The table with each row dropped for which `reasons` holds a text; their counts become 0."""
    mask = pa.array([reason is not None for reason in reasons], type=pa.bool_())
    changed = {"outcome": pa.scalar("dropped"), "reason": pa.array(reasons, pa.string())}
    changed["detail"] = pa.array(details, pa.string())
    changed |= {name: pa.scalar(0, LEDGER_SCHEMA.field(name).type) for name in _NUMBERS}
    for name, values in changed.items():
        column = pc.if_else(mask, values, table[name])
        table = table.set_column(table.schema.get_field_index(name), LEDGER_SCHEMA.field(name), column)
    return table


@dataclass(slots=True)
class Tally:
    """How many records, and something of a few of them: `ids` holds the first NUM_EXAMPLES."""

    num_records: int = 0
    ids: list[str] = field(default_factory=list)

    def add(self, num_records: int, ids: Iterable[str]) -> None:
        """More records, the first of them by id."""
        self.num_records += num_records
        self.ids = [*self.ids, *ids][:NUM_EXAMPLES]


@dataclass(slots=True)
class SourceCounts:
    """What became of one source's records; `actions` counts each that was changed, dropped ones too."""

    num_in: int = 0
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
        # One that is kept without an example is lost: `check` shall notice it.
        is_kept = pc.and_(pc.equal(table["outcome"], "kept"), pc.greater(table["num_examples"], 0))
        self.num_kept += pc.sum(is_kept).as_py() or 0
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + (pc.sum(table[name]).as_py() or 0))
        dropped = table.filter(pc.equal(table["outcome"], "dropped"))
        _tally(self.dropped, dropped["reason"], dropped["id"])
        owners = table["id"].take(pc.list_parent_indices(table["actions"]))
        _tally(self.actions, pc.list_flatten(table["actions"]), owners)


def _tally(tallies: dict[str, Tally], names: pa.ChunkedArray, ids: pa.ChunkedArray) -> None:
    for name in pc.unique(names).to_pylist():
        of_name = ids.filter(pc.equal(names, name))
        tallies.setdefault(name, Tally()).add(len(of_name), of_name.slice(0, NUM_EXAMPLES).to_pylist())


class Ledger:
    """Counts every record by source, and writes the rows to a Parquet file unless `path` is None.

    `unread` is how often which (file, kind, name) was met and not read; it goes into the file's metadata. `sources` are
    those that are to be in the table even without a record. Use it as a context manager, or call `close`.
    """

    def __init__(self, path: str | None, sources: Sequence[str] = ()) -> None:
        self.counts = {source: SourceCounts() for source in sources}
        self.unread: Mapping[tuple[str, str, str], int] = {}
        self._file = pq.ParquetWriter(path, LEDGER_SCHEMA, compression="zstd") if path is not None else None

    def add(self, table: pa.Table) -> None:
        """Count and write the rows of a LEDGER_SCHEMA table, a shard's."""
        for source in pc.unique(table["source"]).to_pylist():
            self.counts.setdefault(source, SourceCounts()).add(table.filter(pc.equal(table["source"], source)))
        if self._file is not None:
            self._file.write_table(table)

    def check(self, num_records: int) -> None:
        """Raises RuntimeError, a bug of ours, if the records read are not kept + dropped, in all and by source."""
        total = self.total()
        for name, counts in [*self.counts.items(), ("total", total)]:
            num_in = num_records if counts is total else counts.num_in
            if num_in != counts.num_kept + counts.num_dropped:
                raise RuntimeError(
                    f"{name}: {num_in:,} records in, but {counts.num_kept:,} kept and {counts.num_dropped:,} dropped; "
                    "this is a bug in preprocessing, please report it"
                )

    def check_examples(self, splits: Iterable[Mapping[str, float]]) -> None:
        """Raises RuntimeError, a bug of ours, if the examples of a store's splits are not those of the records kept."""
        total, splits = self.total(), list(splits)
        for name in ("num_examples", "num_tokens", "num_supervised_tokens"):
            if (num_written := sum(split[name] for split in splits)) != getattr(total, name):
                raise RuntimeError(
                    f"{name}: {num_written:,} in the store, but {getattr(total, name):,} of the records kept; "
                    "this is a bug in preprocessing, please report it"
                )

    def total(self) -> SourceCounts:
        """The counts of all sources together; of reasons only the numbers."""
        total = SourceCounts()
        for counts in self.counts.values():
            total.num_in += counts.num_in
            total.num_kept += counts.num_kept
            for name in _NUMBERS:
                setattr(total, name, getattr(total, name) + getattr(counts, name))
            for reason, tally in counts.dropped.items():
                total.dropped.setdefault(reason, Tally()).add(tally.num_records, ())
        return total

    def table(self) -> str:
        """The counts as aligned text: a row a source and one of totals, below each its reasons and actions.

        Share supervised is supervised tokens / tokens, mean weight is weight sum / supervised tokens; "-"
        stands for a division by 0.
        """
        rows = [_HEADER, *(_row(name, counts) for name, counts in self.counts.items())]
        rows.append(_row("total", self.total()))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        details = [[], *map(_details, self.counts.values()), []]
        return "\n".join(
            line for row, below in zip(rows, details, strict=True) for line in (_align(row, widths), *below)
        )

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

    def close(self) -> None:
        """Write out what is left and close the file."""
        if self._file is not None:
            by_file: dict[str, dict[str, dict[str, int]]] = {}
            for (file, kind, name), count in sorted(self.unread.items()):
                by_file.setdefault(file, {}).setdefault(kind, {})[name] = count
            self._file.add_key_value_metadata({"unread": orjson.dumps(by_file)})
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_entries(path: str, id: str) -> list[dict[str, Any]]:
    """The rows of a ledger file for the records of this id; a file's records need not have different ids."""
    rows: list[dict[str, Any]] = pq.read_table(path, filters=[("id", "==", id)]).to_pylist()
    return rows


def read_unread(path: str) -> dict[str, dict[str, dict[str, int]]]:
    """{file: {kind: {name: how often}}} of what was met and not read, from a ledger file; "" stands for saved pages."""
    by_file: dict[str, dict[str, dict[str, int]]] = orjson.loads(pq.read_metadata(path).metadata[b"unread"])
    return by_file


_HEADER = (
    "source",
    "records in",
    "kept",
    "dropped",
    "examples",
    "tokens",
    "supervised tokens",
    "share supervised",
    "mean weight",
)


def _row(name: str, counts: SourceCounts) -> tuple[str, ...]:
    num_tokens, num_supervised = counts.num_tokens, counts.num_supervised_tokens
    return (
        name,
        f"{counts.num_in:,}",
        f"{counts.num_kept:,}",
        f"{counts.num_dropped:,}",
        f"{counts.num_examples:,}",
        f"{num_tokens:,}",
        f"{num_supervised:,}",
        f"{100 * num_supervised / num_tokens:.1f} %" if num_tokens else "-",
        f"{counts.weight_sum / num_supervised:.4f}" if num_supervised else "-",
    )


def _align(cells: Sequence[str], widths: Sequence[int]) -> str:
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join((cells[0].ljust(widths[0]), *numbers))


def _details(counts: SourceCounts) -> list[str]:
    lines = []
    for title, tallies in (("dropped", counts.dropped), ("changed", counts.actions)):
        if tallies:
            lines.append(f"  {title}: {', '.join(map(_show_tally, tallies, tallies.values()))}")
    return lines


def _show_tally(name: str, tally: Tally) -> str:
    return f"{name} {tally.num_records:,} ({', '.join(map(show_id, tally.ids))})"


def show_id(id: str) -> str:
    """The id, whole, as a word that bash and zsh read back, for `--explain`: an id is the dump's text, of any kind."""
    if id.isprintable():
        return shlex.quote(id)
    return f"$'{''.join(map(_escape, id))}'"


def _escape(c: str) -> str:
    if c in "\\'":
        return f"\\{c}"
    if c.isprintable():
        return c
    return c.encode("unicode_escape").decode() if c.isascii() else f"\\U{ord(c):08x}"
