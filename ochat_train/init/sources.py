"""What the fields of records say about their quality -> the sources of a recipe."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Fields that usually say how good a record is, and values that usually mean that it is.
_FIELDS = ("preference", "quality", "model", "model_name", "generator", "source", "score", "rating", "label")
_GOOD = re.compile(
    r"gpt-?4(?!o-mini)|claude|chosen|good|best|high|strong|expert|human|^true$|^\"?yes\"?$", re.IGNORECASE
)
MOST_VALUES = 20  # of a field that divides records
_MOST_SOURCES = 8
_WORDS = {"yes", "no", "on", "off", "true", "false", "null", "inf", "nan"}


class Division(NamedTuple):
    """Sources by the values of a field, as lines of YAML, and in words how they were found."""

    lines: tuple[str, ...]
    found: str


def find_field(choices: Mapping[str, Counter[str]]) -> str | None:
    """The field that most likely says how good a record is; None if none has a name for that."""
    return next((name for wanted in _FIELDS for name in choices if name.lower() == wanted), None)


def find_good(values: Counter[str]) -> list[str]:
    """The values, as JSON, that mean good ones; of numbers those of the best quarter; empty where nothing is known."""
    if all(_is_number(value) for value in values):
        best, *others = sorted(values, key=float, reverse=True)
        upper = [best]
        for value in others:
            if sum(values[other] for other in (*upper, value)) > values.total() / 4:
                break
            upper.append(value)
        return upper
    good = [value for value in values if _GOOD.search(value)]
    return good if len(good) < len(values) else []


def divide(paths: Sequence[str], extra: str, field: str | None, values: Counter[str], good: Sequence[str]) -> Division:
    """The sources of the records at `paths`: the good ones and the rest, or one for each value where none is known.

    extra: more keys of each source, as YAML. values, good: values of `field` as JSON, with how often each occurs. A
    record without the field is of the last source.
    """
    path = yaml_text(paths[0]) if len(paths) == 1 else f"[{', '.join(map(yaml_text, paths))}]"

    def line(name: str, where: str, condition: str, weight: float) -> str:
        parts = (f"name: {yaml_text(name)}", f"path: {path}", where, extra, f"condition: {yaml_text(condition)}")
        return f"- {{{', '.join(part for part in parts if part)}, weight: {weight}}}"

    if field is None:
        found = "No field was found that says how good a record is; with one, each quality gets a condition (--by)."
        return Division((line("everything", "", "Good", 1.0),), found)
    key = yaml_text(field)
    counted = ", ".join(f"{value} {count:,}" for value, count in values.most_common(_MOST_SOURCES))
    found = f"By the field {field}: {counted}."
    if good:
        where = f"{{{key}: [{', '.join(good)}]}}"
        lines = [line("good", f"where: {where}", "Good", 1.0), line("rest", f"where_not: {where}", "Other", 0.1)]
        return Division(tuple(lines), found)
    *named, last = [value for value, _ in values.most_common(_MOST_SOURCES)]
    lines = [line(_name(value), f"where: {{{key}: {value}}}", _name(value).title(), 1.0) for value in named]
    where_not = f"where_not: {{{key}: [{', '.join(named)}]}}"
    is_last = len(values) == len(named) + 1
    lines.append(
        line(_name(last) if is_last else "others", where_not, _name(last).title() if is_last else "Others", 1.0)
    )
    return Division(tuple(lines), f"{found} Which are better is not known: lower the weight of the worse ones, to 0.1.")


def yaml_text(text: str) -> str:
    """The text as YAML that no reader takes for anything else."""
    is_plain = re.fullmatch(r"[A-Za-z][\w./*-]*", text) and text.lower() not in _WORDS
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def _name(value: str) -> str:
    """A value in JSON as the name of a source."""
    return "-".join(re.findall(r"\w+", value)).lower() or "empty"


def _is_number(value: str) -> bool:
    return isinstance(json.loads(value), int | float) and value not in ("true", "false")
