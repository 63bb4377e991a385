"""The ledger of a preprocess run: what happened to every record, and why."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

NUM_EXAMPLES = 3  # ids shown for each reason and rule


@dataclass(slots=True)
class Tally:
    """How many records, and something of a few of them: `ids` holds the first NUM_EXAMPLES."""

    num_records: int = 0
    ids: list[str] = field(default_factory=list)

    def add(self, id: str) -> None:
        """One record more."""
        self.num_records += 1
        if len(self.ids) < NUM_EXAMPLES:
            self.ids.append(id)


@dataclass(slots=True)
class SourceCounts:
    """What became of one source's records; `repaired` counts each that a rule changed, dropped ones too."""

    num_in: int = 0
    num_kept: int = 0
    dropped: dict[str, Tally] = field(default_factory=dict)
    repaired: dict[str, Tally] = field(default_factory=dict)
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    weight_sum: float = 0.0

    @property
    def num_dropped(self) -> int:
        """Records dropped, for whatever reason."""
        return sum(tally.num_records for tally in self.dropped.values())


class Ledger:
    """A JSONL file with a line for every record repaired or dropped, and counts of all records by source.

    For each record call `received` when it is read, and later exactly one of `kept` and `dropped`: only so
    can `check` notice one that got lost between. A line is `{id, file, offset, source, outcome, reason,
    detail, repairs}`, its outcome "kept" (then reason and detail are null) or "dropped". Use it as a context
    manager, or call `close`.
    """

    def __init__(self, path: str) -> None:
        self.counts: dict[str, SourceCounts] = {}
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)

    def received(self, source: str) -> None:
        """Count one record of `source` that was read from a file."""
        self._of(source).num_in += 1

    def kept(
        self,
        *,
        id: str,
        file: str,
        offset: int,
        source: str,
        repairs: Sequence[str],
        num_tokens: int,
        num_supervised_tokens: int,
        weight_sum: float,
    ) -> None:
        """Count a record that became an example; a line is written only if it was repaired.

        `weight_sum` is the sum of the loss weights of its tokens, `num_supervised_tokens` how many are above
        0.
        """
        counts = self._of(source)
        counts.num_kept += 1
        counts.num_tokens += num_tokens
        counts.num_supervised_tokens += num_supervised_tokens
        counts.weight_sum += weight_sum
        if repairs:
            self._count_repairs(counts, id, repairs)
            self._write(id, file, offset, source, "kept", None, None, repairs)

    def dropped(
        self,
        *,
        id: str,
        file: str,
        offset: int,
        source: str,
        reason: str,
        detail: str,
        repairs: Sequence[str],
    ) -> None:
        """Count a record that became no example, and write its line."""
        counts = self._of(source)
        counts.dropped.setdefault(reason, Tally()).add(id)
        self._count_repairs(counts, id, repairs)
        self._write(id, file, offset, source, "dropped", reason, detail, repairs)

    def check(self) -> None:
        """Raises RuntimeError, which means a bug of ours, if the records received are not kept + dropped."""
        for name, counts in self.counts.items():
            if counts.num_in != counts.num_kept + counts.num_dropped:
                raise RuntimeError(
                    f"source {name}: {counts.num_in:,} records in, but {counts.num_kept:,} kept and "
                    f"{counts.num_dropped:,} dropped; this is a bug in preprocessing, please report it"
                )

    def table(self) -> str:
        """The counts as aligned text: a row a source and one of totals, below each its reasons and repairs.

        Share supervised is supervised tokens / tokens, mean weight is weight sum / supervised tokens; "-"
        stands for a division by 0.
        """
        rows = [_HEADER, *(_row(name, counts) for name, counts in self.counts.items())]
        rows.append(_row("total", self._total()))
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
                "repaired": {rule: tally.num_records for rule, tally in counts.repaired.items()},
                "tokens": counts.num_tokens,
                "supervised_tokens": counts.num_supervised_tokens,
                "weight_sum": counts.weight_sum,
            }
            for name, counts in self.counts.items()
        }

    def close(self) -> None:
        """Write out what is left and close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _of(self, source: str) -> SourceCounts:
        return self.counts.setdefault(source, SourceCounts())

    def _total(self) -> SourceCounts:
        total = SourceCounts()
        for counts in self.counts.values():
            total.num_in += counts.num_in
            total.num_kept += counts.num_kept
            total.num_tokens += counts.num_tokens
            total.num_supervised_tokens += counts.num_supervised_tokens
            total.weight_sum += counts.weight_sum
            for reason, tally in counts.dropped.items():
                total.dropped.setdefault(reason, Tally()).num_records += tally.num_records
        return total

    @staticmethod
    def _count_repairs(counts: SourceCounts, id: str, repairs: Iterable[str]) -> None:
        for rule in repairs:
            counts.repaired.setdefault(rule, Tally()).add(id)

    def _write(
        self,
        id: str,
        file: str,
        offset: int,
        source: str,
        outcome: str,
        reason: str | None,
        detail: str | None,
        repairs: Sequence[str],
    ) -> None:
        line = {
            "id": id,
            "file": file,
            "offset": offset,
            "source": source,
            "outcome": outcome,
            "reason": reason,
            "detail": detail,
            "repairs": list(repairs),
        }
        # A file name that is not UTF-8 holds lone surrogates; "backslashreplace" writes them as JSON's own
        # escapes.
        self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


_HEADER = (
    "source",
    "conversations in",
    "kept",
    "dropped",
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
    for title, tallies in (("dropped", counts.dropped), ("repaired", counts.repaired)):
        if tallies:
            lines.append(f"  {title}: {', '.join(map(_tally, tallies, tallies.values()))}")
    return lines


def _tally(name: str, tally: Tally) -> str:
    return f"{name} {tally.num_records:,} ({', '.join(map(_show_id, tally.ids))})"


def _show_id(id: str) -> str:
    # an id is the dump's text: it may be long, and a line end in it would break the table
    text = id if id.isprintable() else repr(id)
    return text if len(text) <= 40 else text[:39] + "…"
