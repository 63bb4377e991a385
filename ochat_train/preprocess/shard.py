"""One chunk of records to a shard: its examples, what happened to each record, and the keys to find duplicates by.

This is what a worker process runs. A shard depends on its chunk and the settings alone, so any number of workers on any
machines make the same ones.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ochat_train.conversations.base_template import BaseTemplate
from ochat_train.conversations.chats import Chat
from ochat_train.conversations.clean import LeadingAnswers, clean_turns
from ochat_train.conversations.fields import Reading, own_id
from ochat_train.conversations.filters import Filtered, FilterRules, filter_conversations
from ochat_train.conversations.records import Chunk
from ochat_train.conversations.schema import Conversation, Drop, ParsedRecord, Record
from ochat_train.conversations.sharegpt import chats_of, parse_record
from ochat_train.conversations.sources import Source, assign_source, match_source, takes
from ochat_train.conversations.spell_out import Spelling
from ochat_train.conversations.template import ChatTemplate
from ochat_train.conversations.text_keys import TextKeys, text_keys
from ochat_train.preprocess.ledger import LedgerRow, ledger_table
from ochat_train.tokens.encode import Encoded
from ochat_train.tokens.overlong import Fitted, Overlong, fit_all
from ochat_train.tokens.rendered import encode_all
from ochat_train.tokens.strings import Refused
from ochat_train.tokens.tokenizer import TextEncoder

# Of a shard's examples. `conversation` is the position of the example's conversation among those that the shard keeps.
ROW_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "condition": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "loss_weights": pa.list_(pa.float32()),
        "answer_lengths": pa.list_(pa.int32()),
        "conversation": pa.int32(),
    }
)
# Of conversations above max_tokens: their number, their tokens, and what each choice of data.overlong keeps of these.
OVERLONG_COLUMNS = (
    "conversations",
    *(f"{kind}{tokens}" for kind in ("", "split_", "truncate_", "drop_") for tokens in ("tokens", "supervised_tokens")),
)
UNREADABLE = "(unreadable)"  # the source of a record that could be of several and says nothing
_BATCH_CONVERSATIONS = 256  # tokenized at once: the tokenizer's own results take a hundred times the ids' memory
_MAX_NAMES = 10_000  # of what is not read: a record may have fields that no other has; the others are counted together
_OTHER_NAMES = ("", "record field", "...")


@dataclass(frozen=True, slots=True)
class ShardSettings:
    """Everything but the chunk that decides a shard.

    minhash: whether near-duplicates will be looked for; said: whether leaks of held-out sources will be.
    """

    template: ChatTemplate | BaseTemplate
    encoder: TextEncoder
    filters: FilterRules
    max_tokens: int
    overlong: Overlong
    overlong_context: int
    minhash: bool
    said: bool = False
    leading_answers: LeadingAnswers = "context"
    spelling: Spelling = field(default_factory=Spelling)


@dataclass(frozen=True, slots=True)
class Task:
    """A chunk, and the sources that name its files."""

    chunk: Chunk
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """What became of a chunk's R conversations, of which N were kept and became E >= N examples.

    rows: E rows of ROW_SCHEMA. records: R rows of LEDGER_SCHEMA. keys: of the N conversations, in their order.
    overlong: i64[R, len(OVERLONG_COLUMNS)], 0 where a conversation was not above max_tokens. dialects: how many records
    of which (file, form, dialect). unread: how often which (file, kind, name) as in Unread was met and not read,
    and under "hint" which line of a recipe would have read records that were dropped. The file is "" for
    saved pages.
    """

    rows: pa.Table
    records: pa.Table
    keys: TextKeys
    overlong: npt.NDArray[np.int64]
    dialects: Counter[tuple[str, str, str]]
    unread: Counter[tuple[str, str, str]]

    @property
    def kept(self) -> npt.NDArray[np.int64]:
        """i64[N]: the positions among the R conversations of those that are kept."""
        return np.flatnonzero(self.records["reason"].is_null())


@dataclass(slots=True)
class Trace:
    """What each stage made of one conversation; None for a stage that it did not reach.

    number: which of the record's conversations it is, from 1. source: None for a record that is no object
    where several sources name its file. conversation: as its source weighs
    it, and after filtering, as it is encoded. reason: why it was dropped, None while it is kept; detail: the same for
    a person.
    """

    record: Record
    number: int
    source: Source | None
    parsed: ParsedRecord | Drop
    cleaned: ParsedRecord | Drop
    conversation: Conversation | None = None
    filtered: Filtered | None = None
    encoded: tuple[Encoded, ...] | None = None
    fitted: Fitted | None = None
    reason: str | None = None
    detail: str | None = None

    def drop(self, reason: str, detail: str) -> None:
        """No later stage gets the conversation."""
        self.reason, self.detail, self.conversation = reason, detail, None


def make_shard(settings: ShardSettings, task: Task) -> Shard:
    """The shard of one chunk. Raises ValueError for a chunk that cannot be read, or a record of no or two sources."""
    traces = follow(task.chunk.records(), task.sources, settings)
    kept = [(conversation, trace.fitted) for trace in traces if (conversation := trace.conversation) and trace.fitted]
    dialects: Counter[tuple[str, str, str]] = Counter()
    unread: Counter[tuple[str, str, str]] = Counter()
    for place in task.chunk.beside():
        count_unread(unread, (place[0], "wrapper field", place[1]))
    for trace in traces:
        file, parsed = "" if trace.record.is_page else trace.record.file, trace.parsed
        if trace.number == 1:
            dialects[file, task.chunk.form, parsed.dialect if isinstance(parsed, ParsedRecord) else "not read"] += 1
        for kind, name in parsed.unread:
            if trace.number == 1 or kind != "record field":
                count_unread(unread, (file, kind, name))
        if isinstance(parsed, Drop) and parsed.hint:
            count_unread(unread, (file, "hint", parsed.hint))
    return Shard(
        rows=_rows(kept),
        records=ledger_table([_ledger_row(trace) for trace in traces]),
        keys=text_keys([conversation for conversation, _ in kept], minhash=settings.minhash, said=settings.said),
        overlong=np.array([_overlong_counts(trace, settings.max_tokens) for trace in traces], np.int64),
        dialects=dialects,
        unread=unread,
    )


# ---- The stages ----


def follow(records: Iterable[Record], sources: Sequence[Source], settings: ShardSettings) -> list[Trace]:
    """Each conversation of the records through all stages. Raises ValueError for one of no source or of two."""
    traces = [trace for record in records for trace in _read(record, sources, settings)]
    _filter(traces, settings)
    reached = [(trace, conversation) for trace in traces if (conversation := trace.conversation)]
    for start in range(0, len(reached), _BATCH_CONVERSATIONS):
        batch = reached[start : start + _BATCH_CONVERSATIONS]
        outcomes = encode_all([conversation for _, conversation in batch], settings.template, settings.encoder)
        for (trace, _), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Refused):
                trace.drop(*outcome)
                continue
            trace.encoded = outcome
            trace.fitted = fit_all(
                outcome,
                max_tokens=settings.max_tokens,
                overlong=settings.overlong,
                context_tokens=settings.overlong_context,
            )
            if trace.fitted.reason is not None:
                trace.drop(trace.fitted.reason, trace.fitted.detail)
    return traces


def id_of(record: Record) -> str:
    """The record's own id, or else its place."""
    own = own_id(record.fields) if isinstance(record.fields, dict) else None
    return own or f"{record.file}:{record.offset}"


def _read(record: Record, sources: Sequence[Source], settings: ShardSettings) -> list[Trace]:
    """The record's conversations: the source of each, its turns as they are and cleaned, what it is in the source."""
    id = id_of(record)
    traces = []
    found = _split(record, sources, id)
    for number, (chat, source) in enumerate(found, start=1):
        reading = source.reading if source is not None else Reading()
        parsed = parse_record(record, default_id=id, reading=reading, chat=chat)
        trace = Trace(record, number, source, parsed, cleaned=parsed)
        traces.append(trace)
        if isinstance(parsed, ParsedRecord):
            assert source is not None  # only a record that is no object, which is a Drop, belongs to none
            trace.cleaned = clean_turns(
                parsed, html=source.html, spelling=settings.spelling, leading_answers=settings.leading_answers
            )
            if isinstance(trace.cleaned, ParsedRecord):
                try:
                    conversation = assign_source(trace.cleaned, source)
                    place = f"{record.file}:{record.offset}" if len(found) > 1 else ""
                    trace.conversation = replace(conversation, record=place) if place else conversation
                except ValueError as error:  # a weight that is too large
                    trace.drop("bad_weight", str(error))
        if isinstance(trace.cleaned, Drop):
            trace.drop(trace.cleaned.reason, trace.cleaned.detail)
    return traces


def _split(record: Record, sources: Sequence[Source], id: str) -> list[tuple[Chat, Source | None]]:
    """The conversations of a record, each with its source, under the names of fields that its sources have."""
    file, offset = record.file, record.offset
    found = [(chats_of(record, sources[0].reading), list(sources))]
    if any(_names_in(source) != _names_in(sources[0]) for source in sources[1:]):
        alike = [[other for other in sources if _names_in(other) == _names_in(source)] for source in sources]
        groups = [group for place, group in enumerate(alike) if group not in alike[:place]]
        readings = [(chats_of(record, group[0].reading), group) for group in groups]
        taken = [
            (chats, group)
            for chats, group in readings
            if isinstance(record.fields, dict) and any(takes(source, chat.fields) for chat in chats for source in group)
        ]
        if len(taken) > 1:
            names = ", ".join(source.name for _, group in taken for source in group)
            raise ValueError(
                f"{file}, byte {offset}: record {id!r} is taken by sources that read it in different ways ({names}); "
                "narrow their where / where_not until only one of them takes it"
            )
        found = taken or [([Chat(record.fields)], list(sources))]
    ((chats, candidates),) = found
    return [
        (chat, match_source(chat.fields, candidates, file=file, offset=offset, id=f"{id}{chat.suffix}"))
        for chat in chats
    ]


def _names_in(source: Source) -> tuple[object, ...]:
    """What of a source decides which conversations a record has."""
    return source.reading.fields, source.reading.roles, source.reading.tree


def _filter(traces: Sequence[Trace], settings: ShardSettings) -> None:
    """Filter the conversations and mask answers, all at once, because the patterns are compiled for each call."""
    reached = [(trace, conversation) for trace in traces if (conversation := trace.conversation)]
    results = filter_conversations([conversation for _, conversation in reached], settings.filters)
    for (trace, _), filtered in zip(reached, results, strict=True):
        trace.filtered = filtered
        messages = filtered.conversation.messages
        num_kept = max((place for place, message in enumerate(messages, start=1) if message.has_weight), default=0)
        # What stands after the last turn with a weight would be context of nothing.
        trace.conversation = replace(filtered.conversation, messages=messages[:num_kept])
        if filtered.reason is not None:
            trace.drop(filtered.reason, filtered.detail)
        elif not num_kept:
            repairs = trace.cleaned.repairs if isinstance(trace.cleaned, ParsedRecord) else ()
            of_calls = "; a call has none without data.tool_calls: train" if "calls_untrained" in repairs else ""
            trace.drop("no_weight", f"every turn has weight 0{of_calls}")


# ---- From what the stages made of records to tables ----


def count_unread(unread: Counter[tuple[str, str, str]], key: tuple[str, str, str], num: int = 1) -> None:
    """Add to the count of what was not read; once there are _MAX_NAMES names, that of others to the count of all."""
    unread[key if key in unread or len(unread) < _MAX_NAMES else _OTHER_NAMES] += num


def _ledger_row(trace: Trace) -> LedgerRow:
    actions = trace.cleaned.repairs
    for stage in (trace.filtered, trace.fitted):
        actions += stage.actions if stage is not None else ()
    examples = trace.fitted.examples if trace.fitted is not None else ()
    return LedgerRow(
        id=trace.cleaned.id,
        file=trace.record.file,
        offset=trace.record.offset,
        source=trace.source.name if trace.source is not None else UNREADABLE,
        actions=actions,
        reason=trace.reason,
        detail=trace.detail,
        num_examples=len(examples),
        num_tokens=sum(len(example.input_ids) for example in examples),
        num_supervised_tokens=sum(int(np.count_nonzero(example.loss_weights)) for example in examples),
        weight_sum=sum(example.weight_sum for example in examples),
        conversation=trace.number,
    )


def _overlong_counts(trace: Trace, max_tokens: int) -> tuple[int, ...]:
    """A row of OVERLONG_COLUMNS."""
    fitted = trace.fitted
    if fitted is None or fitted.whole.tokens <= max_tokens:
        return (0,) * len(OVERLONG_COLUMNS)
    return 1, *fitted.whole, *chain.from_iterable(fitted.kept[choice] for choice in ("split", "truncate", "drop"))


def _rows(kept: Sequence[tuple[Conversation, Fitted]]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in ROW_SCHEMA.names}
    for position, (conversation, fitted) in enumerate(kept):
        for number, (example, lengths) in enumerate(zip(fitted.examples, fitted.answer_lengths, strict=True), start=1):
            columns["id"].append(f"{conversation.id}#{number}" if len(fitted.examples) > 1 else conversation.id)
            columns["source"].append(conversation.source)
            columns["condition"].append(conversation.condition)
            columns["input_ids"].append(example.input_ids)
            columns["loss_weights"].append(example.loss_weights)
            columns["answer_lengths"].append(lengths)
            columns["conversation"].append(position)
    lists = {
        "input_ids": _list_column(columns["input_ids"], np.int32),
        "loss_weights": _list_column(columns["loss_weights"], np.float32),
        "answer_lengths": _list_column(columns["answer_lengths"], np.int32),
    }
    return pa.table({**columns, **lists}, schema=ROW_SCHEMA)


def _list_column(arrays: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> pa.ListArray:
    """The arrays as a column of lists, hundreds of times faster than pyarrow's own conversion."""
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate([np.empty(0, dtype), *arrays]))
