"""Charts of a page: drawn by matplotlib as SVG, whose colours and fonts are those of the page's style."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = npt.NDArray[np.float64]
Scale = Literal["zero", "linear", "auto", "log"]

# What stands for a colour while matplotlib draws, and its name in the page's style, which has a dark form of each.
COLOURS = ("#2f6fbb", "#b85a00", "#2e7d4f", "#7a4fb5", "#b3394f", "#007a87", "#7d5a3c", "#61690a")
INK, SOFT, LINE, DROP, CARD = "#1d1f23", "#5d636e", "#dedbd4", "#c77c2a", "#fefefe"
CSS_COLOURS = {
    **{colour: f"var(--c{number})" for number, colour in enumerate(COLOURS)},
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    DROP: "var(--drop)",
    CARD: "var(--card)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # texts stay texts, in the page's font
    "path.simplify_threshold": 0.5,
    "font.size": 11,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.xmargin": 0,
    "grid.color": LINE,
    "xtick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.color": SOFT,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.7,
    "lines.markersize": 3,
}
_SUPERFLUOUS = re.compile(
    r"""
    <!--.*?-->                          # comments
    | <defs>\s*<clipPath.*?</defs>      # nothing is outside of the axes
    | \sclip-path="[^"]*"
    | \sid="[^"]*"                      # the same in every chart
    | \stransform="rotate\(-0\s[^"]*"
    | font-(size|family):[^;"]*;?\s?    # the page's
    | (?<=\d\.\d)\d+(?=\s[-\d\n]|")   # of coordinates what is less than a tenth of a pixel
    """,
    re.VERBOSE | re.DOTALL,
)
_NARROW = 480  # two such charts stand side by side
_LABELLED_SHARE = 0.14  # smaller parts of a bar have no room for a number
_LOG_RATIO = 20  # from here between highest and lowest, an axis that may be logarithmic is


def colour_of(number: int) -> str:
    """The colour of a condition, a source or another name that is one of several, by its place among them."""
    return COLOURS[number % len(COLOURS)]


class LegendEntry(NamedTuple):
    """A name beside its colour, and a value, such as the last of a curve."""

    name: str
    colour: str
    value: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """What the page shows as a figure; a terminal shows none.

    draw: puts it onto empty axes. Texts that come from data belong into title, legend and note, which the page escapes:
    matplotlib would read a `$` in them as a formula. width, height: in CSS pixels; charts that are not wider than the
    default stand side by side.
    """

    title: str
    unit: str
    draw: Callable[["Axes"], None]
    legend: Sequence[LegendEntry] = ()
    note: str = ""
    width: int = _NARROW
    height: int = 205
    kind: ClassVar[str] = "chart"

    @property
    def is_wide(self) -> bool:
        """Whether it takes the whole width of a page."""
        return self.width > _NARROW

    @property
    def label(self) -> str:
        """The chart in words, for those who do not see it."""
        legend = ", ".join(f"{entry.name} {entry.value}".strip() for entry in self.legend)
        return f"{self.title}, {self.unit}: {legend}" if legend else f"{self.title}, {self.unit}"


def as_svg(chart: Chart) -> str:
    """The content of an <svg> element with the view box `0 0 width height`."""
    from matplotlib import rc_context  # takes a second
    from matplotlib.figure import Figure

    file = StringIO()
    with rc_context(_STYLE):
        figure = Figure((chart.width / 72, chart.height / 72), layout="constrained")
        axes = figure.subplots()
        for background in (figure.patch, axes.patch):
            background.set_visible(False)
        chart.draw(axes)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    # Without the head, whose style would be that of the whole page.
    svg = file.getvalue().partition("</defs>")[2].rpartition("</svg>")[0]
    svg = " ".join(_SUPERFLUOUS.sub("", svg).replace("\nL ", " ").split()).replace("> <", "><")
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg


# ------------------------------------------------------------------------------------------------------ curves


class Curve(NamedTuple):
    """y f64[n] over x f64[n], nan where there is no value. style: a line, a thin one under others, a dashed one.

    The legend names lines alone.
    """

    name: str
    x: Floats
    y: Floats
    colour: str
    style: Literal["line", "thin", "dashed"] = "line"


@dataclass(frozen=True, slots=True)
class Curves:
    """Curves over steps that share their axes.

    form: the text of a value. scale: of the y-axis; from zero, or logarithmic, or so (auto) where values differ much.
    span: the first and the last step of the axis. restarts, best: steps with a line upwards. skipped: steps with a mark
    at the top. levels: (height, colour) of dashed lines across.
    """

    curves: Sequence[Curve]
    form: Callable[[float], str]
    scale: Scale = "zero"
    span: tuple[int, int] = (0, 1)
    restarts: Sequence[int] = ()
    best: int | None = None
    skipped: Sequence[int] = ()
    levels: Sequence[tuple[float, str]] = ()

    @property
    def is_logarithmic(self) -> bool:
        """Whether the y-axis is."""
        values = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in self.curves])
        low, high = values.min(), values.max()
        return self.scale == "log" or (self.scale == "auto" and low > 0 and bool(high > _LOG_RATIO * low))

    def chart(self, title: str, unit: str, note: str = "") -> list[Chart]:
        """The chart in a list, which is empty where no curve has a value."""
        named = [curve for curve in self.curves if curve.style == "line" and np.isfinite(curve.y).any()]
        if not named:
            return []
        legend = [
            LegendEntry(curve.name, curve.colour, self.form(float(curve.y[np.isfinite(curve.y)][-1])))
            for curve in named
        ]
        unit = f"{unit}, logarithmic" if self.is_logarithmic else unit

        def draw(axes: "Axes") -> None:
            self.draw(axes)
            axes.set_ylabel(unit)

        return [Chart(title, unit, draw, legend, note)]

    def draw(self, axes: "Axes") -> None:
        """Draw them onto empty axes."""
        for curve in self.curves:
            _draw_curve(axes, curve)
        for step in self.restarts:
            axes.axvline(step, color=SOFT, linestyle=":", linewidth=1)
        for height, colour in self.levels:
            axes.axhline(height, color=colour, linestyle="--", linewidth=1)
        above = axes.get_xaxis_transform()  # x in steps, y from 0, the bottom, to 1, the top
        if self.best is not None:
            axes.axvline(self.best, color=INK, linewidth=1)
            axes.text(self.best, 1.02, "best epoch", transform=above, color=INK, ha="center")
        axes.vlines(self.skipped, 1, 1.05, transform=above, color=DROP, clip_on=False)
        axes.set_xlim(*self.span)
        axes.set_xlabel("step")
        self._scale_axes(axes)

    def _scale_axes(self, axes: "Axes") -> None:
        from matplotlib.ticker import LogLocator

        if self.is_logarithmic:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            digits = (1, 2, 5) if high < 30 * low else (1, 3) if high < 1000 * low else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=digits, numticks=6))
            axes.minorticks_off()
        else:
            axes.locator_params(axis="y", nbins=5)
            if self.scale == "zero" and axes.get_ylim()[1] > 0:
                axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, position: self.form(value))


def _draw_curve(axes: "Axes", curve: Curve) -> None:
    is_thin = curve.style == "thin"
    axes.plot(
        curve.x,
        curve.y,
        color=curve.colour,
        linestyle="--" if curve.style == "dashed" else "-",
        linewidth=0.8 if is_thin else None,
        alpha=0.4 if is_thin else None,
        marker="o" if len(curve.x) == 1 else "",
    )


def smooth(values: Floats, reach: int) -> Floats:
    """f64[n], the means of the values up to `reach` places away: mean(values[max(0, i - reach) : i + reach + 1])."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    places = np.arange(len(values))
    begins, ends = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return np.asarray((sums[ends] - sums[begins]) / (ends - begins))


# ------------------------------------------------------------------------------------------------------ shares


def shares_chart(names: Sequence[str], shares: Mapping[str, Sequence[float]]) -> Chart:
    """A bar for each measure, which the names divide among them; shares: of each name, together 1 or 0."""

    def draw(axes: "Axes") -> None:
        for row, parts in enumerate(shares.values()):
            starts = np.cumsum([0.0, *parts])
            for number, (start, part) in enumerate(zip(starts, parts, strict=False)):
                axes.barh(row, part, left=start, color=colour_of(number), edgecolor=CARD)
                if part >= _LABELLED_SHARE:
                    axes.text(start + part / 2, row, f"{100 * part:.1f} %", color=CARD, ha="center", va="center")
        axes.set_yticks(range(len(shares)), list(shares))
        axes.set_xlim(0, 1)
        axes.invert_yaxis()
        axes.grid(False)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)

    legend = [LegendEntry(name, colour_of(number)) for number, name in enumerate(names)]
    return Chart("Shares", "of all", draw, legend, height=20 + 30 * len(shares))
