"""What dumps hold, to write a recipe by: `ochat preprocess --fields PATH ...`."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from tqdm import tqdm

from ochat_train.conversations.chats import Chat
from ochat_train.conversations.dataset_list import expand
from ochat_train.conversations.fields import Reading
from ochat_train.conversations.records import list_files, read_chunks
from ochat_train.conversations.roles import find_role
from ochat_train.conversations.schema import Drop, ParsedRecord, Record
from ochat_train.conversations.sharegpt import chats_of, parse_record
from ochat_train.preprocess.job import stamp_of

_MAX_VALUES = 1000  # different ones that are counted of a field
_MAX_NAMES = 200  # of fields and roles that are counted
_NUM_SHOWN = 6
_OF_ANSWER = " (of an answer)"
_MAX_CHARS = 60


def survey(paths: Sequence[str], *, encoding: str | None = None) -> Iterator[str]:
    """The lines for each path: forms, dialects, what is not read, fields with their commonest values, roles, lengths.

    Memory does not grow with the number of records. Raises ValueError for a path that matches no file, and at the end
    when files could not be read.
    """
    num_unread = 0
    for path, reading in chain.from_iterable(expand(path, Reading()) for path in paths):
        left_out: Counter[str] = Counter()
        files = list_files(path, left_out)
        others = f"; left out, hidden or of other suffixes: {_show_counts(left_out)}" if left_out else ""
        yield f"{path}: {len(files):,} file{'s' * (len(files) != 1)}{others}"
        held = Contents(reading)
        for error in _read(files, held, encoding):
            num_unread += 1
            yield f"  error: {error}"
        yield from held.lines()
    if num_unread:
        raise ValueError(f"{num_unread:,} files could not be read, see above")


def contents_of(paths: Sequence[str]) -> "Contents":
    """What all of the paths hold together. Raises ValueError for the first file that cannot be read."""
    held = Contents(Reading())
    for path, reading in chain.from_iterable(expand(path, Reading()) for path in paths):
        held.reading = reading
        for error in _read(list_files(path, Counter()), held, None):
            raise error
    return held


def _read(files: Sequence[str], held: "Contents", encoding: str | None) -> Iterator[ValueError]:
    """Add the files' records; yields the reason for each file that cannot be read."""
    with tqdm(
        total=sum(max(0, stamp_of(file)[0]) for file in files), unit="B", unit_scale=True, desc="reading", delay=2
    ) as bar:
        num_before = 0.0
        for file in files:
            try:
                for chunk in read_chunks([file], encoding=encoding, columns=None):
                    for record in chunk.records():
                        held.add(record, chunk.form)
                    bar.update(num_before + chunk.bytes_read - bar.n)
                num_before = bar.n
            except ValueError as error:
                yield error


class Contents:
    """What the records so far hold, counted."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self._dialects: Counter[str] = Counter()
        self._drops: Counter[str] = Counter()
        self._hints: Counter[str] = Counter()
        self._fields: Counter[str] = Counter()
        self._values: dict[str, Counter[str]] = {}
        self._turn_fields: Counter[str] = Counter()
        self._roles: Counter[str] = Counter()
        self._num_turns: Counter[int] = Counter()
        self._num_chars: Counter[int] = Counter()

    def add(self, record: Record, form: str) -> None:
        chats = chats_of(record, self.reading)
        parsed = [parse_record(record, default_id="", reading=self.reading, chat=chat) for chat in chats]
        dialect = parsed[0].dialect if isinstance(parsed[0], ParsedRecord) else "not read"
        several = f", {len(chats)} conversations in each" if len(chats) > 1 else ""
        self._dialects[f"{form}, {dialect}{several}"] += 1
        for one in parsed:
            if isinstance(one, Drop):
                self._drops[one.reason] += 1
                if one.hint:
                    _count(self._hints, one.hint)
            else:
                self._num_chars.update(_round(len(message.text)) for message in one.messages)
        if not isinstance(record.fields, dict):
            return
        for name, value in record.fields.items():
            has_turns = name in chats[0].read and not chats[0].form and not isinstance(value, bool)  # no label
            if value is not None and _count(self._fields, name) and not has_turns:
                _count(self._values.setdefault(name, Counter()), _show(value), _MAX_VALUES)
        for chat in chats:
            if chat.turns:
                self._num_turns[len(chat.turns)] += 1
            for name in sorted(chat.own):
                shown = f"{name}{_OF_ANSWER}"
                if chat.fields[name] is not None and _count(self._fields, shown):
                    _count(self._values.setdefault(shown, Counter()), _show(chat.fields[name]), _MAX_VALUES)
            self._add_turns(chat)

    def _add_turns(self, chat: Chat) -> None:
        for turn in chat.turns:
            if not isinstance(turn, dict):
                continue
            for name, value in turn.items():
                if value is not None:
                    _count(self._turn_fields, name)
            role = turn.get("role") if turn.get("from") is None else turn["from"]
            if isinstance(role, str):
                _count(self._roles, role)

    @property
    def num_records(self) -> int:
        return self._dialects.total()

    @property
    def num_chars(self) -> int:
        """The characters of all texts, to two digits each."""
        return sum(number * count for number, count in self._num_chars.items())

    @property
    def hint(self) -> str:
        """The keys of a source that would read most of the records that are not read; empty if there are none."""
        return next((hint for hint, _ in self._hints.most_common() if not hint.startswith("data.")), "")

    def choices(self, most: int) -> dict[str, Counter[str]]:
        """The values, as JSON, of each field that a `where` can name: 2 to `most` different ones, some repeated."""
        return {
            name.removesuffix(_OF_ANSWER): values
            for name, values in self._values.items()
            if 2 <= len(values) <= min(most, values.total() - 1)
            and not any(value[0] in "[{" or value.endswith("…") for value in values)
        }

    def lines(self) -> Iterator[str]:
        for dialect, count in self._dialects.most_common():
            yield f"  {dialect}: {count:,} record{'s' * (count != 1)}"
        if self._drops:
            yield f"  not read, because of: {_show_counts(self._drops)}"
        for hint, count in self._hints.most_common(3):
            place = "the recipe" if hint.startswith("data.") else "their source"
            yield f"  to read {count:,} of them, write into {place}: {hint}"
        if self._fields:
            yield "  fields of records, with their commonest values:"
        width = max(map(len, self._fields), default=0)
        for name, count in self._fields.most_common():
            yield f"    {name:<{width}}  {count:>10,}  {self._describe(name)}"
        if self._num_turns:
            yield f"  fields of turns: {_show_counts(self._turn_fields)}"
            yield f"  turns a conversation: {_spread(self._num_turns)}"
        roles = [f"{name} {count:,} ({find_role(name) or 'not known'})" for name, count in self._roles.most_common(20)]
        if roles:
            yield f"  roles: {', '.join(roles)}"
        if self._num_chars:
            yield f"  characters a text: {_spread(self._num_chars)}"

    def _describe(self, name: str) -> str:
        values = self._values.get(name)
        if values is None:
            return "the turns"
        if len(values) > 20 and len(values) in (values.total(), _MAX_VALUES):
            return f"many different ones, such as {', '.join(list(values)[:3])}"
        more = f", and {len(values) - _NUM_SHOWN:,} others" if len(values) > _NUM_SHOWN else ""
        return ", ".join(f"{value} {count:,}" for value, count in values.most_common(_NUM_SHOWN)) + more


def _count(counts: Counter[str], key: str, max_keys: int = _MAX_NAMES) -> bool:
    """Count the key, unless it is new and `max_keys` are counted already; whether it was counted."""
    if key not in counts and len(counts) >= max_keys:
        return False
    counts[key] += 1
    return True


def _show(value: Any) -> str:
    """A value as a recipe would write it, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        text = "(nested deeply)"
    return text if len(text) <= _MAX_CHARS else f"{text[: _MAX_CHARS - 1]}…"


def _show_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common(20))


def _round(number: int) -> int:
    """The number to two digits, so that few different ones are counted."""
    digits = max(len(str(number)) - 2, 0)
    return int(number // 10**digits * 10**digits)


def _spread(counts: Counter[int]) -> str:
    """The least, the median and the largest of counted numbers."""
    numbers = np.array(sorted(counts))
    ends = np.cumsum([counts[number] for number in numbers.tolist()])
    median = int(numbers[np.searchsorted(ends, ends[-1] / 2)])
    return f"{int(numbers[0]):,} to {int(numbers[-1]):,}, median {median:,}"
