"""Shards and the decisions over them to a store and its ledger, shard by shard in the order of the input."""

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from ochat_train.conversations.dedupe import DROP_REASONS, KEEP, Decisions
from ochat_train.preprocess.ledger import Ledger, drop_rows
from ochat_train.preprocess.shard import OVERLONG_COLUMNS, Shard, count_unread
from ochat_train.preprocess.shard_files import WorkFolder
from ochat_train.tokens.store import SPLITS, Split, StoreWriter


@dataclass(slots=True)
class InputSummary:
    """What was read, over all shards.

    dialects, unread: as of a Shard. overlong: sums of OVERLONG_COLUMNS. outcomes: how many records of which (file,
    reason of the drop), with the reason "" where they are kept. details: the detail of the first of each. conditions:
    of each split, each (source, condition).
    """

    dialects: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    unread: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    overlong: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OVERLONG_COLUMNS, 0))
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    details: dict[tuple[str, str], str] = field(default_factory=dict)
    conditions: dict[Split, set[tuple[str, str]]] = field(default_factory=lambda: {split: set() for split in SPLITS})

    def add(self, shard: Shard, records: pa.Table) -> None:
        """Count a shard. `records`: its rows of the ledger, after the decisions over all shards."""
        self.dialects.update(shard.dialects)
        for key, count in shard.unread.items():
            count_unread(self.unread, key, count)
        # What was dropped for another reason than its length would not have been cut.
        is_counted = np.array([reason in (None, "too_long") for reason in records["reason"].to_pylist()], np.bool_)
        for name, total in zip(OVERLONG_COLUMNS, shard.overlong[is_counted].sum(axis=0).tolist(), strict=True):
            self.overlong[name] += total
        named = {file for file, _, _ in shard.dialects}
        grouped = records.group_by(["file", "reason"], use_threads=False)
        for row in grouped.aggregate([([], "count_all"), ("detail", "first")]).to_pylist():
            outcome = row["file"] if row["file"] in named else "", row["reason"] or ""  # "" for saved pages
            self.outcomes[outcome] += row["count_all"]
            self.details.setdefault(outcome, row["detail_first"] or "")


def assemble(
    work: WorkFolder, num_shards: int, decisions: Decisions, ledger: Ledger, writer: StoreWriter | None
) -> InputSummary:
    """Put every record into the ledger, and every example that stays into the store, if there is a writer of one."""
    num_kept = (len(work.load(number).kept) for number in range(num_shards))
    first_keys = list(accumulate(num_kept, initial=0))  # of each shard, and at the end the number of all

    @lru_cache(maxsize=64)
    def kept_ids(number: int) -> list[str]:
        shard = work.load(number)
        ids: list[str] = shard.records["id"].take(pa.array(shard.kept)).to_pylist()
        return ids

    summary = InputSummary()
    for number in tqdm(range(num_shards), desc="assemble", unit="shard", delay=2):
        shard = work.load(number)
        keys = slice(first_keys[number], first_keys[number + 1])
        kept, status, held_out = shard.kept, decisions.status[keys], decisions.held_out[keys]
        reasons = {}
        for position in np.flatnonzero(status != KEEP).tolist():
            original = int(decisions.of[keys][position])
            of_shard = bisect_right(first_keys, original) - 1
            detail = f"of {kept_ids(of_shard)[original - first_keys[of_shard]]}"
            reasons[int(kept[position])] = DROP_REASONS[status[position]], detail
        records = drop_rows(shard.records, reasons)
        ledger.add(records)
        summary.add(shard, records)
        conversation = shard.rows["conversation"].to_numpy()
        is_kept, is_held_out = (status == KEEP)[conversation], held_out[conversation]
        of_split: dict[Split, pa.Table] = {
            "train": shard.rows.filter(pa.array(is_kept & ~is_held_out)),
            "eval": shard.rows.filter(pa.array(is_kept & is_held_out)),
        }
        for split, rows in of_split.items():
            named = rows.group_by(["source", "condition"], use_threads=False).aggregate([]).to_pylist()
            summary.conditions[split].update((row["source"], row["condition"]) for row in named)
            if writer is not None:
                writer.add(split, rows)
    return summary
