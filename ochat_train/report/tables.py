"""What the reports share: tables of text cells, for a terminal and for a page, and numbers as a reader wants them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import Any

_NOTE_WIDTH = 100  # characters
_UNITS = (("days", 86_400), ("h", 3600), ("min", 60), ("s", 1))
_MOST_HOURS = 48  # longer times are in days


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text, the columns `left` aligned to the left. bars: where each row's bar begins and ends, of 1."""

    key: str
    title: str
    note: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: tuple[int, ...] = (0,)
    bars: Sequence[tuple[float, float]] = ()


def align(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Each row as a line, its cells padded to columns: those of `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if position in left else ">" for position in range(len(widths))]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def table_lines(table: Table) -> list[str]:
    """The table for a terminal, an empty line before it."""
    cells = (f"  {line}" for line in align([table.header, *table.rows], table.left))
    return ["", table.title.upper(), *note_lines(table.note), *cells]


def note_lines(note: str) -> list[str]:
    """A sentence or two in lines for a terminal; paths stay whole."""
    return wrap(note, _NOTE_WIDTH, break_long_words=False, break_on_hyphens=False)


def percent(part: float, whole: float, digits: int = 1) -> str:
    """`12.5 %`, or a dash where there is no whole. digits: behind the point."""
    return f"{100 * part / whole:.{digits}f} %" if whole else "-"


def ratio(part: float, whole: float, form: str) -> str:
    """The quotient in the format `form`, or a dash where it has no value."""
    return format(part / whole, form) if whole else "-"


def tick_distance(highest: float) -> int:
    """The number 1, 2, 5, 10, 20, ... by which an axis up to `highest` has at most four ticks above 0."""
    steps: Iterator[int] = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
    return next(step for step in steps if 5 * step > highest)


def show_duration(seconds: float) -> str:
    """The time in two units: `14 h 50 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    for (name, large), (part_name, small) in pairwise(_UNITS):
        count, per = round(seconds / small), large // small
        if count > _MOST_HOURS if part_name == "h" else count >= per:
            whole, part = divmod(count, per)
            return f"{whole:,} {name} {part} {part_name}" if part else f"{whole:,} {name}"
    raise AssertionError(seconds)


def printable(text: str) -> str:
    """The text on one line, and nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def show_condition(condition: str) -> str:
    """The condition for a reader."""
    return printable(condition) or "(no condition)"


def render_page(template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """The page that a template of this folder makes of the values; all of them are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only a page needs it

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template).render(**values)
