"""Sources: which part of the dumps a record is of, and the condition and loss weight it has from there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import Repr
from typing import Literal

from ochat_train.conversations.fields import Reading
from ochat_train.conversations.own_weights import MAX_FLOAT32
from ochat_train.conversations.schema import Conversation, Message, ParsedRecord


@dataclass(frozen=True, slots=True)
class Source:
    """Records of one quality, told by their fields.

    `where` and `where_not` map a field's name to a value, or to a list that means any of its values.
    `condition` None leaves the condition to the record. `weight` is the loss weight of every assistant token.
    `html` says whether its texts are HTML, `encoding` is that of its files where it is not UTF-8, and `reading` how its
    records are written.
    """

    name: str
    condition: str | None
    weight: float
    where: Mapping[str, object]
    where_not: Mapping[str, object]
    html: Literal["auto", "always", "never"] = "auto"
    encoding: str | None = None
    reading: Reading = field(default_factory=Reading)


def match_source(
    fields: object,
    candidates: Sequence[Source],
    *,
    file: str,
    offset: int,
    id: str,
) -> Source | None:
    """The one source whose `where` fields all equal the record's, and of whose `where_not` none does.

    A field that the record lacks never equals anything, so it fails a `where` and passes a `where_not`. Equal
    is meant as JSON means it: true is not 1. A record that is not an object has no fields to tell sources
    apart by: it belongs to the only candidate there is, or to none (None).

    Raises ValueError if no source matches an object, or more than one: a source is never guessed, since that
    would give records a weight that nobody wrote down.

    Worked example: of gpt4 (where model: "Model: GPT-4") and gpt3 (where_not model: "Model: GPT-4"), the
    record {"model": "Model: GPT-4"} matches gpt4, and {} matches gpt3.
    """
    if not isinstance(fields, Mapping):
        return candidates[0] if len(candidates) == 1 else None
    matches = [source for source in candidates if _matches(fields, source)]
    if len(matches) == 1:
        return matches[0]

    if matches:
        found = f"matches {len(matches)} sources ({', '.join(source.name for source in matches)})"
        remedy = "narrow their where / where_not until only one of them takes it"
    else:
        found = "matches no source"
        remedy = "add a source that takes it, or widen the where / where_not of one"
    names = dict.fromkeys(name for source in candidates for name in (*source.where, *source.where_not))
    values = ", ".join(f"{name}={_show(fields[name]) if name in fields else '(missing)'}" for name in names)
    filters = "; ".join(_show_filter(source) for source in candidates)
    raise ValueError(
        f"{file}, byte {offset}: record {id!r} {found}; its fields: {values or '(no filter names any)'}; "
        f"the sources: {filters or '(none)'}; {remedy}"
    )


def _matches(fields: Mapping[str, object], source: Source) -> bool:
    return all(_field_equals(fields, name, wanted) for name, wanted in source.where.items()) and not any(
        _field_equals(fields, name, unwanted) for name, unwanted in source.where_not.items()
    )


def _field_equals(fields: Mapping[str, object], name: str, wanted: object) -> bool:
    if name not in fields:
        return False
    options = wanted if isinstance(wanted, list | tuple) else [wanted]
    return any(_equals(fields[name], option) for option in options)


def _equals(value: object, wanted: object) -> bool:
    if isinstance(value, float) and value != value:
        value = None  # NaN, which pandas writes for what is missing
    return isinstance(value, bool) == isinstance(wanted, bool) and value == wanted


_SHORT = Repr()  # bounded in length and depth, whatever a record holds
_SHORT.maxstring = _SHORT.maxother = 80


def _show(value: object) -> str:
    return _SHORT.repr(value)


def _show_filter(source: Source) -> str:
    rules = [f"where {name}={_show(value)}" for name, value in source.where.items()]
    rules += [f"where_not {name}={_show(value)}" for name, value in source.where_not.items()]
    return f"{source.name} ({', '.join(rules) or 'takes every record'})"


def assign_source(turns: ParsedRecord, source: Source) -> Conversation:
    """The conversation that `turns` becomes in `source`: condition settled, every message weight a number.

    The condition is the source's; where that is None the record's own, or else empty. An assistant turn
    weighs `source.weight` times the record's own weight, times its own weight if it has one; a turn of another role
    weighs their product too, and 0.0 without a weight of its own.

    Raises ValueError if the product is above the largest float32, which is how weights are stored. Worked
    example: at source weight 0.1, an assistant turn of its own weight 0.5 weighs 0.05, a plain one 0.1.
    """
    return Conversation(
        id=turns.id,
        source=source.name,
        condition=source.condition if source.condition is not None else turns.condition or "",
        system=turns.system,
        messages=tuple(_weigh(message, source, turns) for message in turns.messages),
    )


def _weigh(message: Message, source: Source, turns: ParsedRecord) -> Message:
    own = message.weight
    if own is None:
        own = 1.0 if message.role == "assistant" else 0.0
    weight = float(source.weight * turns.weight * own)
    if weight > MAX_FLOAT32:
        raise ValueError(
            f"record {turns.id!r}: a turn's weight {own} times the record's {turns.weight} and the weight "
            f"{source.weight} of source {source.name} is not finite in float32; lower one of them"
        )
    return Message(message.role, message.text, weight)
