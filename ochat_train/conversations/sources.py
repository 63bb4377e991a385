"""Sources: the parts of the dumps, and the condition and loss weight that their records get."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Literal, NamedTuple

from ochat_train.conversations.fields import Reading, get_value, show
from ochat_train.conversations.own_weights import MAX_FLOAT32
from ochat_train.conversations.schema import Conversation, ParsedRecord


class Range(NamedTuple):
    """Numbers from `min` on and below `max`; None is no bound. So {min: a, max: b} and {min: b} share no number."""

    min: float | None = None
    max: float | None = None

    def holds(self, value: object) -> bool:
        """Whether a number, or the text of one, is in the range. True, false and NaN are in none."""
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                return False
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or value != value:
            return False
        return (self.min is None or value >= self.min) and (self.max is None or value < self.max)

    def __repr__(self) -> str:
        bounds = (f"{name}: {bound:g}" for name, bound in self._asdict().items() if bound is not None)
        return f"{{{', '.join(bounds)}}}"


@dataclass(frozen=True, slots=True)
class Source:
    """Records of one quality, recognized by their fields.

    `where` and `where_not` map a field's name to a value, to a list that means any of its values, or to a Range.
    `condition` None leaves the condition to the record. `weight` is the loss weight of every assistant token.
    `html` says whether the texts are HTML, `encoding` is the encoding of the files if it is not UTF-8, and `reading`
    says how the records are written. `held_out`: no record of it is trained.
    """

    name: str
    condition: str | None
    weight: float
    where: Mapping[str, object]
    where_not: Mapping[str, object]
    html: Literal["auto", "always", "never"] = "auto"
    encoding: str | None = None
    reading: Reading = field(default_factory=Reading)
    held_out: bool = False


def match_source(
    fields: object,
    candidates: Sequence[Source],
    *,
    file: str,
    offset: int,
    id: str,
) -> Source | None:
    """The one source of which all `where` fields, and no `where_not` field, equal the record's.

    A field that the record lacks never equals anything, so it fails a `where` and passes a `where_not`. Equality is
    JSON's: true is not 1. A record that is not an object has no fields to compare: it belongs to the only candidate, or
    to none (None) if there are several.

    Raises ValueError if no source matches an object, or more than one: a source is never guessed, since that would give
    records a weight that nobody wrote down.

    Worked example: of gpt4 (where model: "Model: GPT-4") and gpt3 (where_not model: "Model: GPT-4"), the
    record {"model": "Model: GPT-4"} matches gpt4, and {} matches gpt3.
    """
    if not isinstance(fields, Mapping):
        return candidates[0] if len(candidates) == 1 else None
    matches = [source for source in candidates if takes(source, fields)]
    if len(matches) == 1:
        return matches[0]

    if matches:
        found = f"matches {len(matches)} sources ({', '.join(source.name for source in matches)})"
        remedy = "narrow their where / where_not until only one of them takes it"
    else:
        found = "matches no source"
        remedy = "add a source that takes it, or widen the where / where_not of one"
    names = dict.fromkeys(name for source in candidates for name in (*source.where, *source.where_not))
    values = ", ".join(f"{name}={show(fields[name]) if name in fields else '(missing)'}" for name in names)
    filters = "; ".join(_show_filter(source) for source in candidates)
    raise ValueError(
        f"{file}, byte {offset}: record {id!r} {found}; its fields: {values or '(no filter names any)'}; "
        f"the sources: {filters or '(none)'}; {remedy}"
    )


def takes(source: Source, fields: Mapping[str, object]) -> bool:
    """Whether the source's `where` and `where_not` take a record with these fields."""
    return all(_field_equals(fields, name, wanted) for name, wanted in source.where.items()) and not any(
        _field_equals(fields, name, unwanted) for name, unwanted in source.where_not.items()
    )


def _field_equals(fields: Mapping[str, object], name: str, wanted: object) -> bool:
    if name not in fields:
        return False
    value = get_value(fields, name)
    if isinstance(wanted, Range):
        return wanted.holds(value)
    options = wanted if isinstance(wanted, list | tuple) else [wanted]
    return any(isinstance(value, bool) == isinstance(option, bool) and value == option for option in options)


def _show_filter(source: Source) -> str:
    rules = [f"where {name}={show(value)}" for name, value in source.where.items()]
    rules += [f"where_not {name}={show(value)}" for name, value in source.where_not.items()]
    return f"{source.name} ({', '.join(rules) or 'takes every record'})"


def assign_source(parsed: ParsedRecord, source: Source) -> Conversation:
    """The conversation that a record becomes in `source`, with its condition and a number for every weight.

    The condition is the source's. Where that is None, it is the record's own, or empty. An assistant turn weighs
    `source.weight` times the record's own weight, times its own weight if it has one. A turn of another role weighs the
    same product if it has a weight of its own, and 0.0 otherwise.

    Raises ValueError if the product is above the largest float32, which is how weights are stored. Worked example: at
    source weight 0.1, an assistant turn of its own weight 0.5 weighs 0.05, a plain one 0.1.
    """
    messages = []
    for message in parsed.messages:
        own = message.weight
        if own is None:
            own = 1.0 if message.role == "assistant" else 0.0
        weight = float(source.weight * parsed.weight * own)
        if weight > MAX_FLOAT32:
            raise ValueError(
                f"record {parsed.id!r}: a turn's weight {own} times the record's {parsed.weight} and the weight "
                f"{source.weight} of source {source.name} is not finite in float32; lower one of them"
            )
        messages.append(replace(message, weight=weight))
    condition = source.condition if source.condition is not None else parsed.condition or ""
    return Conversation(
        parsed.id, source.name, condition, parsed.system, tuple(messages), parsed.tools, held_out=source.held_out
    )
