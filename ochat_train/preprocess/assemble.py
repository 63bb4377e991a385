"""Shards and the decisions over them to a store and its ledger, shard by shard in the order of the input."""

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from ochat_train.conversations.dedupe import DROP_REASONS, KEEP, Decisions
from ochat_train.preprocess.ledger import Ledger, drop_rows
from ochat_train.preprocess.shard import MAX_NAMES, OTHER_NAMES, OVERLONG_COLUMNS, Shard
from ochat_train.preprocess.shard_files import WorkFolder
from ochat_train.tokens.store import StoreWriter


@dataclass(slots=True)
class Totals:
    """Over all shards. overlong: i64[len(OVERLONG_COLUMNS)]. dialects and unread: as of a Shard.

    outcomes: how many records of which (file, reason of the drop), the reason empty where they are kept. details: of
    the first of each that was dropped, its detail.
    """

    overlong: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(OVERLONG_COLUMNS), dtype=np.int64))
    dialects: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    unread: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    details: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def num_records(self) -> int:
        """The records that were read."""
        return self.dialects.total()


def assemble(
    work: WorkFolder, num_shards: int, decisions: Decisions, ledger: Ledger, writer: StoreWriter | None
) -> Totals:
    """Every record goes into the ledger, every example that stays to the writer if there is one."""
    names = _Names(work, num_shards)
    totals = Totals()
    for number in tqdm(range(num_shards), desc="assemble", unit="shard", delay=2):
        shard = work.load(number)
        keys = slice(names.first_keys[number], names.first_keys[number + 1])
        status, held_out = decisions.status[keys], decisions.held_out[keys]
        records = _drop_duplicates(shard, status, decisions.of[keys], names)
        ledger.add(records)
        if writer is not None:
            key_of_row = np.searchsorted(shard.key_records, shard.rows["record"].to_numpy())
            is_kept, is_held_out = (status == KEEP)[key_of_row], held_out[key_of_row]
            writer.add("train", shard.rows.filter(pa.array(is_kept & ~is_held_out)))
            writer.add("eval", shard.rows.filter(pa.array(is_kept & is_held_out)))
        # Those that were dropped for another reason than their length were never to be cut.
        is_counted = [reason in (None, "too_long") for reason in records["reason"].to_pylist()]
        totals.overlong += shard.overlong[np.array(is_counted, dtype=bool)].sum(axis=0)
        totals.dialects.update(shard.dialects)
        for key, count in shard.unread.items():
            totals.unread[key if key in totals.unread or len(totals.unread) < MAX_NAMES else OTHER_NAMES] += count
        grouped = records.group_by(["file", "reason"], use_threads=False)
        named = {file for file, _, _ in shard.dialects}
        for row in grouped.aggregate([([], "count_all"), ("detail", "first")]).to_pylist():
            of_file = row["file"] if row["file"] in named else "", row["reason"] or ""  # as dialects has saved pages
            totals.outcomes[of_file] += row["count_all"]
            totals.details.setdefault(of_file, row["detail_first"] or "")
    return totals


def _drop_duplicates(
    shard: Shard, status: npt.NDArray[np.uint8], of: npt.NDArray[np.int64], names: "_Names"
) -> pa.Table:
    reasons: list[str | None] = shard.records["reason"].to_pylist()
    details: list[str | None] = shard.records["detail"].to_pylist()
    for key in np.flatnonzero(status).tolist():
        record = shard.key_records[key]
        reasons[record] = DROP_REASONS[status[key]]
        details[record] = f"of {names.name(int(of[key]))}"
    return drop_rows(shard.records, reasons, details)


class _Names:
    """Ids of records by the positions of their keys. `first_keys` holds each shard's first, and behind it the end."""

    def __init__(self, work: WorkFolder, num_shards: int) -> None:
        self._work = work
        self.first_keys = list(accumulate((work.num_keys(number) for number in range(num_shards)), initial=0))
        self._read = lru_cache(maxsize=64)(self._read_shard)

    def name(self, key: int) -> str:
        number = bisect_right(self.first_keys, key) - 1
        ids, key_records = self._read(number)
        return str(ids[int(key_records[key - self.first_keys[number]])])

    def _read_shard(self, number: int) -> tuple[pa.ChunkedArray, npt.NDArray[np.int32]]:
        shard = self._work.load(number)
        return shard.records["id"], shard.key_records
