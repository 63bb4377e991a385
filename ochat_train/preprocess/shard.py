"""One chunk of records to a shard: its examples, what happened to each record, and the keys to find duplicates by.

This is what a worker process runs. A shard depends on its chunk and the settings alone, so any number of workers on any
machines make the same ones.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ochat_train.conversations.clean import LeadingAnswers, clean_turns
from ochat_train.conversations.dedupe import TextKeys, text_keys
from ochat_train.conversations.fields import Reading, own_id
from ochat_train.conversations.filters import FilterRules, filter_conversations
from ochat_train.conversations.records import Chunk, Record
from ochat_train.conversations.schema import Conversation, Drop, ParsedRecord
from ochat_train.conversations.sharegpt import parse_record
from ochat_train.conversations.sources import Source, assign_source, match_source
from ochat_train.conversations.spell_out import Spelling
from ochat_train.conversations.template import ChatTemplate
from ochat_train.preprocess.ledger import Entry, ledger_table
from ochat_train.tokens.encode import Example, encode
from ochat_train.tokens.overlong import Fitted, Overlong, fit
from ochat_train.tokens.tokenizer import TextEncoder

# Of a shard's examples. `record` is the position in the shard of the record that the example was made from.
ROW_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "condition": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "loss_weights": pa.list_(pa.float32()),
        "record": pa.int32(),
    }
)
# Of conversations above max_tokens: their number, their tokens, and what each choice of data.overlong keeps of these.
OVERLONG_COLUMNS = (
    "conversations",
    *(f"{kind}{tokens}" for kind in ("", "split_", "truncate_", "drop_") for tokens in ("tokens", "supervised_tokens")),
)
UNREADABLE = "(unreadable)"  # the source of a record that could be of several and says nothing
_BATCH_CONVERSATIONS = 256  # tokenized at once
MAX_NAMES = 10_000  # of what is not read: a record may have fields that no other has; the others are counted together
OTHER_NAMES = ("", "record field", "...")


@dataclass(frozen=True, slots=True)
class ShardSettings:
    """Everything but the chunk that decides a shard. `minhash`: whether near-duplicates will be looked for."""

    template: ChatTemplate
    encoder: TextEncoder
    filters: FilterRules
    max_tokens: int
    overlong: Overlong
    overlong_context: int
    minhash: bool
    leading_answers: LeadingAnswers = "context"
    spelling: Spelling = field(default_factory=Spelling)


@dataclass(frozen=True, slots=True)
class Task:
    """A chunk, and the sources that name its files."""

    chunk: Chunk
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """What became of a chunk of R records, of which N became E examples or more.

    rows: E rows of ROW_SCHEMA. records: R rows of LEDGER_SCHEMA. keys: of the N records. key_records: i32[N], their
    positions among the R. overlong: i64[R, len(OVERLONG_COLUMNS)], 0 where a conversation was not above max_tokens.
    dialects: how many records of which (file, form, dialect); they are counted as they are read, before anything is
    done to them, so their sum must be R. unread: how often which (file, "record field" | "turn field" | "role", name)
    was met and not read, and under "hint" which line of a recipe would have read records that were dropped.
    """

    rows: pa.Table
    records: pa.Table
    keys: TextKeys
    key_records: npt.NDArray[np.int32]
    overlong: npt.NDArray[np.int64]
    dialects: Counter[tuple[str, str, str]]
    unread: Counter[tuple[str, str, str]]


def make_shard(settings: ShardSettings, task: Task) -> Shard:
    """The shard of one chunk. Raises ValueError for a chunk that cannot be read, or a record of no or two sources."""
    maker = _ShardMaker(settings, task)
    received = [
        (position, conversation)
        for position, record in enumerate(task.chunk.records())
        if (conversation := maker.receive(record)) is not None
    ]
    # All at once, because the patterns are compiled for each call; the rest in batches, since tokens need much memory.
    judged = maker.judge(received)
    for start in range(0, len(judged), _BATCH_CONVERSATIONS):
        maker.encode(judged[start : start + _BATCH_CONVERSATIONS])
    return maker.finish()


# ---- The stages, each a function from one thing to the next, so that one record can be followed through them ----


def find_source(record: Record, sources: Sequence[Source]) -> Source | None:
    """The record's source; None for one that is no object where several sources could have it."""
    id = _default_id(record)
    if isinstance(record.fields, dict):
        id = own_id(record.fields) or id
    return match_source(record.fields, sources, file=record.file, offset=record.offset, id=id)


def parse(record: Record, source: Source | None) -> ParsedRecord | Drop:
    """The record's turns as they are, or why there are none; without an id of its own it has its place for one."""
    reading = source.reading if source is not None else Reading()
    return parse_record(record, default_id=_default_id(record), reading=reading)


def _default_id(record: Record) -> str:
    return f"{record.file}:{record.offset}"


def clean(turns: ParsedRecord, source: Source, settings: ShardSettings) -> ParsedRecord | Drop:
    """The turns as markdown, without a page's noise, spelled out, in an order that can be trained on."""
    return clean_turns(turns, html=source.html, spelling=settings.spelling, leading_answers=settings.leading_answers)


def without_tail(conversation: Conversation) -> Conversation:
    """The conversation up to its last turn with a weight; without turns where there is none."""
    num_kept = len(conversation.messages)
    while num_kept and not conversation.messages[num_kept - 1].weight:
        num_kept -= 1
    if num_kept == len(conversation.messages):
        return conversation
    return replace(conversation, messages=conversation.messages[:num_kept])


def has_weight(conversation: Conversation) -> bool:
    """Whether any turn is trained on."""
    return any(message.weight for message in conversation.messages)


Numbered = tuple[int, Conversation]  # with the position of its record


class _ShardMaker:
    """Collects what a shard holds: first all records are received, then they are judged, then encoded."""

    def __init__(self, settings: ShardSettings, task: Task) -> None:
        self._settings, self._task = settings, task
        self._entries: list[Entry] = []
        self._overlong: list[tuple[int, ...]] = []
        self._keys: list[TextKeys] = []
        self._key_records: list[int] = []
        self._rows: list[pa.RecordBatch] = []
        self._dialects: Counter[tuple[str, str, str]] = Counter()
        self._unread: Counter[tuple[str, str, str]] = Counter()

    def receive(self, record: Record) -> Conversation | None:
        """The record's conversation; None when it has none, and its entry says why."""
        chunk = self._task.chunk
        source = find_source(record, self._task.sources)
        parsed = parse(record, source)
        file = "" if record.is_page else record.file
        self._dialects[file, chunk.form, parsed.dialect if isinstance(parsed, ParsedRecord) else "not read"] += 1
        for kind, unread in (*parsed.unread, *((("hint", parsed.hint),) if isinstance(parsed, Drop) else ())):
            key = file, kind, unread
            if unread:
                self._unread[key if key in self._unread or len(self._unread) < MAX_NAMES else OTHER_NAMES] += 1
        name = source.name if source is not None else UNREADABLE
        if isinstance(parsed, ParsedRecord):
            assert source is not None  # only a record that is no object, which is a Drop, belongs to none
            parsed = clean(parsed, source, self._settings)
        self._entries.append(Entry(parsed.id, record.file, record.offset, name, parsed.repairs))
        self._overlong.append((0,) * len(OVERLONG_COLUMNS))
        if isinstance(parsed, Drop):
            self._drop(len(self._entries) - 1, parsed.reason, parsed.detail)
            return None
        assert source is not None
        try:
            return assign_source(parsed, source)
        except ValueError as error:  # a weight that is too large
            self._drop(len(self._entries) - 1, "bad_weight", str(error))
            return None

    def judge(self, received: Sequence[Numbered]) -> list[Numbered]:
        """The conversations that pass the filters, some of their answers masked."""
        judgements = filter_conversations([conversation for _, conversation in received], self._settings.filters)
        passed = []
        for (position, _), judgement in zip(received, judgements, strict=True):
            self._act(position, judgement.actions)
            if judgement.reason is not None:
                self._drop(position, judgement.reason, judgement.detail)
            elif not has_weight(judgement.conversation):
                self._drop(position, "no_weight", "every turn has weight 0")
            else:
                passed.append((position, without_tail(judgement.conversation)))
        return passed

    def encode(self, judged: Sequence[Numbered]) -> None:
        """Make the examples and the keys of some conversations."""
        settings = self._settings
        encoded = encode([conversation for _, conversation in judged], settings.template, settings.encoder)
        examples, kept = [], []
        for (position, conversation), whole in zip(judged, encoded, strict=True):
            fitted = fit(
                whole,
                max_tokens=settings.max_tokens,
                overlong=settings.overlong,
                context_tokens=settings.overlong_context,
            )
            self._act(position, fitted.actions)
            if fitted.whole.tokens > settings.max_tokens:
                kept_by_choice = [fitted.kept[choice] for choice in ("split", "truncate", "drop")]
                self._overlong[position] = (1, *fitted.whole, *chain.from_iterable(kept_by_choice))
            if fitted.reason is not None:
                self._drop(position, fitted.reason, fitted.detail)
            else:
                self._keep(position, fitted)
                kept.append((position, conversation))
                examples.append(fitted.examples)
        if kept:
            self._key_records += [position for position, _ in kept]
            self._keys.append(text_keys([conversation for _, conversation in kept], minhash=settings.minhash))
            self._rows.append(_rows(kept, examples))

    def finish(self) -> Shard:
        """The shard."""
        rows = self._rows or [pa.RecordBatch.from_pylist([], schema=ROW_SCHEMA)]
        return Shard(
            rows=pa.Table.from_batches(rows, schema=ROW_SCHEMA),
            records=ledger_table(self._entries),
            keys=TextKeys.concatenate(self._keys or [text_keys([], minhash=self._settings.minhash)]),
            key_records=np.array(self._key_records, dtype=np.int32),
            overlong=np.array(self._overlong, dtype=np.int64).reshape(-1, len(OVERLONG_COLUMNS)),
            dialects=self._dialects,
            unread=self._unread,
        )

    def _act(self, position: int, actions: tuple[str, ...]) -> None:
        if actions:
            entry = self._entries[position]
            self._entries[position] = replace(entry, actions=(*entry.actions, *actions))

    def _drop(self, position: int, reason: str, detail: str) -> None:
        self._entries[position] = replace(self._entries[position], reason=reason, detail=detail)

    def _keep(self, position: int, fitted: Fitted) -> None:
        self._entries[position] = replace(
            self._entries[position],
            num_examples=len(fitted.examples),
            num_tokens=sum(len(example.input_ids) for example in fitted.examples),
            num_supervised_tokens=sum(int(np.count_nonzero(example.loss_weights)) for example in fitted.examples),
            weight_sum=sum(example.weight_sum for example in fitted.examples),
        )


def _rows(kept: Sequence[Numbered], examples_of: Sequence[Sequence[Example]]) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {name: [] for name in ROW_SCHEMA.names}
    for (position, conversation), examples in zip(kept, examples_of, strict=True):
        for number, example in enumerate(examples, start=1):
            part = f"#{number}" if len(examples) > 1 else ""
            columns["id"].append(conversation.id + part)
            columns["source"].append(conversation.source)
            columns["condition"].append(conversation.condition)
            columns["input_ids"].append(example.input_ids)
            columns["loss_weights"].append(example.loss_weights)
            columns["record"].append(position)
    return pa.record_batch([_column(columns[field.name], field.type) for field in ROW_SCHEMA], schema=ROW_SCHEMA)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, type=kind)
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values), type=kind.value_type))
