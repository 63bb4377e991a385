"""What is in a token store: read_store(STORE) -> StoreReport, the numbers and the samples."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from ochat_train.conversations.described import read_template
from ochat_train.preprocess.ledger import LEDGER_SCHEMA, Ledger, SourceCounts
from ochat_train.report.page import Token
from ochat_train.tokens.loss_forms import spread_over_answers
from ochat_train.tokens.order import DataOrder
from ochat_train.tokens.plan import PlanShape, plan_epoch
from ochat_train.tokens.store import Manifest, Split, read_manifest

Counts = npt.NDArray[np.int64]

_PACKING_FACTORS = (1, 2, 4, 8)  # capacities tried, in data.max_tokens
PACKING_BINS = 8
_PACKING_EXAMPLES = 50_000  # more than these are sampled
_PACKING_QUADRATIC_LENGTH = 50_000  # of a 7B model; the balance of costs hardly moves the fill
_SAMPLE_QUANTILES = (0.05, 0.5, 0.95)  # of the lengths of a source
_SAMPLE_HEAD, _SAMPLE_TAIL = 400, 200  # tokens shown of a long sample
_CHARACTER_TOKENS = 4  # no character is longer than 4 bytes
_LEDGER_COLUMNS = [name for name in LEDGER_SCHEMA.names if name not in ("file", "offset", "detail")]


# ------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True, slots=True)
class GroupSums:
    """Of some examples. A conversation that was split into several counts once.

    weight_sum, answer_weight_sum: of the loss weights, in the loss forms token and answer.
    """

    conversations: int = 0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    weight_sum: float = 0.0
    answer_weight_sum: float = 0.0

    def __add__(self, other: Self) -> Self:
        return type(self)(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))


class PackingTrial(NamedTuple):
    """How packing at this capacity goes, tried on `num_tried` examples.

    fill: tokens / room, over the steps of an epoch without the last one; None if there is only that.
    """

    capacity: int
    fill: float | None
    steps: int
    num_tried: int


Turn = tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """An example of the train split: its first turns, then the number of tokens left out, then the last turns."""

    id: str
    source: str
    condition: str
    num_tokens: int
    head: tuple[Turn, ...]
    num_hidden: int
    tail: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class StoreReport:
    """The facts about a store.

    records: what became of each source's records, sources in the recipe's order. train, held_out: by source and
    condition. lengths: by source that is not held out whole, i64[max_tokens + 1], how many examples of the train split
    have so many tokens.
    """

    path: str
    made: datetime
    manifest: Manifest
    vocabulary_size: int
    records: dict[str, SourceCounts]
    train: dict[tuple[str, str], GroupSums]
    held_out: dict[tuple[str, str], GroupSums]
    lengths: dict[str, Counts]
    packing: tuple[PackingTrial, ...]
    samples: tuple[Sample, ...]

    @property
    def max_tokens(self) -> int:
        """The recipe's data.max_tokens."""
        return int(self.manifest.made_from["data"]["max_tokens"])

    @property
    def all_lengths(self) -> Counts:
        """The lengths of all sources together."""
        total: Counts = np.sum(list(self.lengths.values()), axis=0)
        return total

    @property
    def by_source(self) -> dict[str, GroupSums]:
        """The train split's totals of each source."""
        return sum_by(self.train, 0, self.records)

    @property
    def by_condition(self) -> dict[str, GroupSums]:
        """The train split's totals of each condition, in the order of the sources."""
        order = list(self.records)
        groups = sorted(self.train, key=lambda group: order.index(group[0]))
        return sum_by(self.train, 1, (condition for _, condition in groups))


def read_store(store: Path) -> StoreReport:
    """The facts about the store.

    Reads every weight once, memory-mapped. In memory are a count for each length and source, and the ids of the
    conversations that were split. Raises ValueError when there is no complete store.
    """
    manifest = read_manifest(store)
    if manifest is None:
        raise ValueError(f"no complete token store at {store}; make it with ochat preprocess RECIPE")
    data = manifest.made_from["data"]
    records, split_ids = _read_ledger(store / "ledger.parquet", manifest.sources)
    is_held_out = set(manifest.sources) - set(manifest.trained_sources)
    lengths = {name: np.zeros(data["max_tokens"] + 1, np.int64) for name in records if name not in is_held_out}
    for batch in _batches(store, "train"):
        _add_lengths(lengths, batch)
    tokenizer = Tokenizer.from_file(str(store / "tokenizer" / "tokenizer.json"))
    return StoreReport(
        path=str(store),
        made=datetime.fromtimestamp((store / "manifest.json").stat().st_mtime, UTC),
        manifest=manifest,
        vocabulary_size=tokenizer.get_vocab_size(),
        records=records,
        train=_sum_split(store, "train", split_ids),
        held_out=_sum_split(store, "eval", split_ids),
        lengths=lengths,
        packing=_try_packing(lengths, data["max_tokens"]),
        samples=tuple(_take_samples(store, lengths, tokenizer, read_template(manifest.template).end_token)),
    )


def sum_by(groups: Mapping[tuple[str, str], GroupSums], part: int, names: Iterable[str]) -> dict[str, GroupSums]:
    """The totals of each of the sources (part 0 of a group) or conditions (part 1)."""
    sums = dict.fromkeys(names, GroupSums())
    for group, totals in groups.items():
        sums[group[part]] += totals
    return sums


def quantile(counts: Counts, share: float) -> int:
    """The least length that is not below `share` of all; counts: i64[longest + 1], how many of each length."""
    ends = np.cumsum(counts)
    return int(np.searchsorted(ends, max(1, ceil(share * int(ends[-1])))))


def _read_ledger(file: Path, sources: Sequence[str]) -> tuple[dict[str, SourceCounts], set[str]]:
    """The counts by source, with the recipe's sources first, and the ids of conversations of several examples."""
    split_ids: set[str] = set()
    with Ledger(None) as ledger:
        for batch in pq.ParquetFile(file).iter_batches(columns=_LEDGER_COLUMNS):
            table = pa.Table.from_batches([batch])
            ledger.add(table)
            split_ids.update(table["id"].filter(pc.greater(table["num_examples"], 1)).to_pylist())
    return {name: SourceCounts() for name in sources} | ledger.counts, split_ids


def _batches(store: Path, split: Split) -> Iterator[pa.RecordBatch]:
    """The rows of a split; an empty one has no file."""
    for file in sorted((store / split).glob("*.arrow")):
        with pa.memory_map(str(file)) as rows:
            yield from pa.ipc.open_stream(rows)


def _sum_split(store: Path, split: Split, split_ids: set[str]) -> dict[tuple[str, str], GroupSums]:
    groups: dict[tuple[str, str], GroupSums] = {}
    for batch in _batches(store, split):
        lengths = pc.list_value_length(batch["input_ids"]).to_numpy()
        num_answers = pc.list_value_length(batch["answer_lengths"]).to_numpy()
        weights, answer_lengths = (batch[name].flatten().to_numpy() for name in ("loss_weights", "answer_lengths"))
        spread = spread_over_answers(weights, lengths, answer_lengths, num_answers)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths  # no example is empty
        columns = {
            "conversations": _begins_conversation(batch["id"], split_ids),
            "examples": np.ones(len(lengths), dtype=np.int64),
            "tokens": lengths,
            "supervised_tokens": np.add.reduceat(weights != 0, starts, dtype=np.int64),
            "weight_sum": np.add.reduceat(weights, starts, dtype=np.float64),
            "answer_weight_sum": np.add.reduceat(spread, starts, dtype=np.float64),
        }
        table = pa.table({"source": batch["source"], "condition": batch["condition"], **columns})
        sums = table.group_by(["source", "condition"]).aggregate([(name, "sum") for name in columns])
        for row in sums.to_pylist():
            group = row["source"], row["condition"]
            groups[group] = groups.get(group, GroupSums()) + GroupSums(*(row[f"{name}_sum"] for name in columns))
    return groups


def _begins_conversation(ids: pa.Array, split_ids: set[str]) -> Counts:
    """1 for each row but the second and later parts of a conversation, which preprocess names ID#2, ID#3, ..."""
    begins = np.ones(len(ids), dtype=np.int64)
    is_part = pc.match_substring_regex(ids, "#([2-9]|[1-9][0-9]+)$").to_numpy(zero_copy_only=False)
    parts = ids.filter(pa.array(is_part)).to_pylist()
    begins[is_part] = [part.rpartition("#")[0] not in split_ids for part in parts]
    return begins


def _add_lengths(lengths: dict[str, Counts], batch: pa.RecordBatch) -> None:
    of_batch = pc.list_value_length(batch["input_ids"])
    for source in pc.unique(batch["source"]).to_pylist():
        of_source = of_batch.filter(pc.equal(batch["source"], source)).to_numpy()
        lengths[source] += np.bincount(of_source, minlength=len(lengths[source]))


def _try_packing(lengths: Mapping[str, Counts], max_tokens: int) -> tuple[PackingTrial, ...]:
    """The plan of an epoch at several capacities, over at most _PACKING_EXAMPLES examples."""
    counts: Counts = np.sum(list(lengths.values()), axis=0)
    num_examples, num_tokens = int(counts.sum()), int(counts @ np.arange(len(counts)))
    num_tried = min(num_examples, _PACKING_EXAMPLES)
    if num_tried < num_examples:
        counts = np.random.default_rng(0).multivariate_hypergeometric(counts, num_tried)
    each = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    found = []
    for capacity in (factor * max_tokens for factor in _PACKING_FACTORS):
        shape = PlanShape(capacity, PACKING_BINS, 1, _PACKING_QUADRATIC_LENGTH)
        plan = list(plan_epoch(each, np.zeros(len(each)), shape, DataOrder(len(each), seed=0), epoch=0))
        *full_steps, _ = (step.num_tokens for step in plan)
        fill = sum(full_steps) / (shape.room * len(full_steps)) if full_steps else None
        num_steps = ceil(num_tokens / (shape.room * fill)) if fill and num_tried < num_examples else len(plan)
        found.append(PackingTrial(capacity, fill, num_steps, num_tried))
    return tuple(found)


# ----------------------------------------------------------------------------------------------- samples


def _take_samples(store: Path, lengths: dict[str, Counts], tokenizer: Tokenizer, end_token: str) -> Iterator[Sample]:
    """A short, a median and a long example of each source: the first ones of those lengths in the store."""
    missing: Counter[tuple[str, int]] = Counter()
    for source, counts in lengths.items():
        if counts.any():
            wanted = Counter(quantile(counts, share) for share in _SAMPLE_QUANTILES)
            missing.update({(source, length): min(n, int(counts[length])) for length, n in wanted.items()})
    found: dict[tuple[str, int], list[Sample]] = {key: [] for key in missing}
    for batch in _batches(store, "train"):
        of_batch = pc.list_value_length(batch["input_ids"])
        for source, length in list(missing):
            fits = pc.and_(pc.equal(batch["source"], source), pc.equal(of_batch, length))
            for row in batch.filter(fits).slice(0, missing[source, length]).to_pylist():
                found[source, length].append(_sample(row, tokenizer, end_token))
                missing[source, length] -= 1
        missing = +missing
        if not missing:
            break
    return chain.from_iterable(found.values())


def _sample(row: dict[str, Any], tokenizer: Tokenizer, end_token: str) -> Sample:
    ids, weights = row["input_ids"], row["loss_weights"]
    num_hidden = max(0, len(ids) - _SAMPLE_HEAD - _SAMPLE_TAIL)
    head_end = _SAMPLE_HEAD if num_hidden else len(ids)
    head, tail = (
        tuple(_turns(_split_tokens(ids[part], weights[part], tokenizer), end_token))
        for part in (slice(head_end), slice(head_end + num_hidden, None))
    )
    return Sample(row["id"], row["source"], row["condition"], len(ids), head, num_hidden, tail)


def _split_tokens(ids: Sequence[int], weights: Sequence[float], tokenizer: Tokenizer) -> Iterator[Token]:
    """The text of each token, as it is after the tokens before it."""
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    before: list[int] = []
    here: list[int] = []
    for position, (id, weight) in enumerate(zip(ids, weights, strict=True)):
        if id in special:
            before = []
            yield Token((id,), tokenizer.id_to_token(id) or "", weight, True)
            continue
        here.append(id)
        text = tokenizer.decode(before + here)[len(tokenizer.decode(before)) :]
        is_last = position + 1 == len(ids) or ids[position + 1] in special
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(here) < _CHARACTER_TOKENS and not is_last:
            continue  # the first bytes of a character
        # Some tokenizers leave out a first space when they decode; then it is shown as the vocabulary spells it.
        yield Token(tuple(here), text or tokenizer.id_to_token(id) or f"<{id}>", weight, False)
        before, here = here, []


def _turns(tokens: Iterator[Token], end_token: str) -> Iterator[Turn]:
    """The tokens up to each end token and the line break that some templates put after it."""
    turn: list[Token] = []
    has_ended = False
    for token in tokens:
        if has_ended and token.text.strip():
            yield tuple(turn)
            turn, has_ended = [], False
        turn.append(token)
        has_ended = has_ended or (token.is_special and token.text == end_token)
    if turn:
        yield tuple(turn)
