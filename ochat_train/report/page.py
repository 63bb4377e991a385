"""A report as sections of texts, tables and charts, and its two forms: text for a terminal, and one HTML page."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise, zip_longest
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text as Words

from ochat_train.report.charts import CSS_COLOURS, Chart, as_svg

if TYPE_CHECKING:
    from markupsafe import Markup

TOTAL = "(all)"  # names a column or row of totals; in brackets, because a source may be called all
_TEXT_WIDTH = 100  # characters of a paragraph in a terminal
_TABLE_WIDTH = 1000  # at most; a terminal breaks longer lines itself
_BAR_WIDTH = 40
_UNITS = (("days", 86_400), ("h", 3600), ("min", 60), ("s", 1))
_MOST_HOURS = 48  # longer times are in days


# ------------------------------------------------------------------------------------------------------ blocks


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; is_lead: of what matters most. terminal: what a terminal says in its place, if not the same."""

    text: str
    is_lead: bool = False
    terminal: str | None = None
    kind: ClassVar[str] = "text"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells. The columns `left` are aligned to the left, the others to the right.

    header: empty for pairs of a name and a value. bars: where the bar after the first cell of each row begins and
    ends, of 1. folded: the words to click on, on the page, to see the table.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)
    title: str = ""
    bars: Sequence[tuple[float, float]] = ()
    folded: str = ""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True, slots=True)
class Figures:
    """The numbers that a person asks for first: name, value, remark."""

    rows: Sequence[tuple[str, str, str]]
    kind: ClassVar[str] = "figures"


@dataclass(frozen=True, slots=True)
class Listing:
    """A text of many lines that only the page shows, folded below its title."""

    title: str
    text: str
    kind: ClassVar[str] = "listing"


class Token(NamedTuple):
    """A token, or the few that only together spell a character, with its loss weight."""

    ids: tuple[int, ...]
    text: str
    weight: float
    is_special: bool


@dataclass(frozen=True, slots=True)
class Transcript:
    """Turns of tokens: the first ones, how many tokens are left out, the last ones."""

    title: str
    head: Sequence[Sequence[Token]]
    num_hidden: int
    tail: Sequence[Sequence[Token]]
    kind: ClassVar[str] = "transcript"


Block = Text | Table | Figures | Listing | Transcript | Chart


@dataclass(frozen=True, slots=True)
class Section:
    """Blocks below a title. key: of links to it."""

    key: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Document:
    """A whole report; head: what comes before its sections."""

    title: str
    head: Sequence[Block]
    sections: Sequence[Section]


# ------------------------------------------------------------------------------------------------------- words


def percent(part: float, whole: float, digits: int = 1) -> str:
    """`12.5 %`, or a dash where there is no whole. digits: after the point."""
    return f"{100 * part / whole:.{digits}f} %" if whole else "-"


def ratio(part: float, whole: float, form: str) -> str:
    """The quotient in the format `form`, or a dash where it has no value."""
    return format(part / whole, form) if whole else "-"


def show_number(value: float) -> str:
    """`1,234` or `0.0123`; a dash for nan."""
    if value != value:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


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


def show_condition(condition: str) -> str:
    """The condition for a reader."""
    return condition or "(no condition)"


def printable(text: str) -> str:
    """The text on one line, and nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# ---------------------------------------------------------------------------------------------------- terminal


def as_text(document: Document) -> str:
    """The report for a terminal."""
    parts: list[RenderableType] = [_heading(document.title)]
    for _, blocks in groupby(document.head, key=lambda block: block.kind):
        parts += ["", *chain.from_iterable(map(_render, blocks))]
    for section in document.sections:
        if shown := list(chain.from_iterable(_render(block, indent=2) for block in section.blocks)):
            parts += ["", _heading(section.title.upper()), *shown]
    return as_lines(parts)


def blocks_as_text(groups: Iterable[Iterable[Block]]) -> str:
    """Groups of blocks for a terminal, an empty line between two groups."""
    return "\n\n".join(as_lines(chain.from_iterable(map(_render, blocks))) for blocks in groups)


def as_lines(parts: Iterable[RenderableType]) -> str:
    """What rich makes of the parts, one below the other; headings are bold if standard output is a terminal."""
    console = Console(width=_TABLE_WIDTH, highlight=False)
    with console.capture() as capture:
        console.print(Group(*parts))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def align(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Each row as a line, its cells padded to columns: those of `left` to the left, the others to the right."""
    return as_lines([terminal_table(Table((), rows, left))]).splitlines()


def _heading(title: str) -> Words:
    return Words(printable(title), style="bold")


def _render(block: Block, indent: int = 0) -> Iterator[RenderableType]:
    match block:
        case Text():
            text = printable(block.text if block.terminal is None else block.terminal)
            yield from map(Words, wrap(text, _TEXT_WIDTH, break_long_words=False, break_on_hyphens=False))
        case Table():
            if block.title:
                yield from ("", Words(printable(block.title)))
            yield Padding.indent(terminal_table(block), indent)
        case Figures():
            yield terminal_table(Table((), block.rows, left=(0, 2)))
        case Transcript():
            yield from ("", Words(block.title))
            yield from chain.from_iterable(map(_render_turn, block.head))
            if block.num_hidden:
                yield f"  … {block.num_hidden:,} tokens left out"
                yield from chain.from_iterable(map(_render_turn, block.tail))


def terminal_table(table: Table) -> Grid:
    """The table for a terminal, its bars after the first column."""
    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(table.header))
    for number, name in enumerate(table.header or table.rows[0]):
        grid.add_column(Words(printable(name)), justify="left" if number in table.left else "right", no_wrap=True)
        if number == 0 and table.bars:
            grid.add_column(width=_BAR_WIDTH)
    for row, bar in zip_longest(table.rows, table.bars):
        first, *others = (Words(printable(cell)) for cell in row)
        grid.add_row(first, *([Bar(1, *bar)] if bar else []), *others)
    return grid


def _render_turn(turn: Sequence[Token]) -> Iterator[Words]:
    for weight, tokens in groupby(turn, key=lambda token: token.weight):
        text = "".join(f"⟨{token.text}⟩" if token.is_special else token.text for token in tokens)
        first, *others = map(printable, text.replace("\n", "↵\n").split("\n"))
        yield Words(f"  {weight:>8.4g}  {first}")
        yield from (Words(f"{'':12}{other}") for other in others if other)


# -------------------------------------------------------------------------------------------------------- page


def as_html(document: Document) -> str:
    """The report as one page that loads nothing; every text in it is escaped, and no control character is in it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only a page needs it

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {"visible": visible, "svg": as_svg, "variable": CSS_COLOURS.__getitem__}
    return environment.get_template("page.html.j2").render(document=document)


def visible(text: str) -> "Markup":
    """The text of a token as HTML in which one sees line breaks, tabs, control characters and runs of spaces."""
    from markupsafe import Markup, escape

    marks = {"\n": "↵", "\t": "⇥"}
    if text.isspace() and len(text) > 1:
        marks[" "] = "·"
    parts = []
    for c in text:
        if c.isprintable() and c not in marks:
            parts.append(escape(c))
        else:
            parts.append(Markup("<i>{}</i>").format(marks.get(c, repr(c)[1:-1])) + (c if c in "\n\t" else ""))
    return Markup("").join(parts)
