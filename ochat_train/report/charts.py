"""Curves over steps, as a page draws them: points thinned to what can be seen, axes with ticks, SVG paths."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Scale = Literal["zero", "linear", "auto", "log"]

_COLUMNS = 500  # a curve keeps its lowest and its highest point in each
_WIDTH, _HEIGHT = 4 * _COLUMNS, 1000  # of a chart, in the units of its paths
_MOST_DOTTED = 60  # points of a curve; more would touch
_MOST_TICKS = 5  # and one at the beginning
_LOG_RATIO = 20  # from here between highest and lowest, an axis that may be logarithmic is


@dataclass(frozen=True, slots=True)
class Curve:
    """y f64[n] over x f64[n], which ascends; nan where there is no value. colour: its place in the palette, None: ink.

    style: a line, a thin one under it, or a dashed one. has_key: whether the legend names it.
    """

    name: str
    x: Floats
    y: Floats
    colour: int | None
    style: Literal["line", "thin", "dashed"] = "line"
    has_key: bool = True


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves that share their axes. form: of a value. scale: of the y-axis; auto is log where values differ much.

    levels: (height, colour) of lines across. marks: (step, class, name) of lines upwards. ticks: steps marked above.
    """

    key: str
    title: str
    unit: str
    curves: Sequence[Curve]
    form: Callable[[float], str]
    scale: Scale = "zero"
    note: str = ""
    levels: Sequence[tuple[float, int | None]] = ()
    marks: Sequence[tuple[float, str, str]] = ()
    ticks: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high`, which is above it; both above 0 where it is logarithmic."""

    low: float
    high: float
    is_log: bool = False

    def place(self, values: Floats) -> Floats:
        """Where values lie: 0 at the low end, 1 at the high end."""
        low, high = (math.log(end) if self.is_log else end for end in (self.low, self.high))
        return ((np.log(values) if self.is_log else values) - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values, at most one more; of a logarithmic axis powers of ten, and some between if it has few."""
        if not self.is_log:
            step = _round_step((self.high - self.low) / _MOST_TICKS)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [number * step for number in range(first, last + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [digit * 10.0**power for power in powers for digit in digits]
            found = [value for value in found if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]
            if len(found) <= _MOST_TICKS:
                return found
        return found[:: math.ceil(len(found) / _MOST_TICKS)]


def _round_step(least: float) -> float:
    """The least of 1, 2, 2.5, 5, 10 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= least * (1 - 1e-9))


def smooth(values: Floats, reach: int) -> Floats:
    """f64[n], the means of the values up to `reach` places away: mean(values[max(0, i - reach) : i + reach + 1])."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    places = np.arange(len(values))
    begins, ends = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return np.asarray((sums[ends] - sums[begins]) / (ends - begins))


def thin(x: Floats, y: Floats, axis: Axis) -> npt.NDArray[np.intp]:
    """The positions of the points that can be seen: in each column of the chart the lowest and the highest, so that no
    spike is lost, and the first and the last of all. x ascends; y has no nan."""
    columns = np.floor(axis.place(x) * _COLUMNS).astype(np.int64)
    order = np.lexsort((y, columns))
    ends = np.flatnonzero(np.diff(columns[order], append=columns[-1] + 1) > 0)
    begins = np.concatenate(([0], ends[:-1] + 1))
    return np.unique(np.concatenate((order[begins], order[ends], [0, len(x) - 1])))


def y_axis(chart: Chart) -> Axis | None:
    """The axis that holds all values of a chart; None without values."""
    values = np.concatenate([curve.y for curve in chart.curves] or [np.empty(0)])
    values = values[np.isfinite(values) & ((values > 0) | (chart.scale != "log"))]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if low > 0 and (chart.scale == "log" or (chart.scale == "auto" and high > _LOG_RATIO * low)):
        return Axis(low / 1.05, high * 1.05, is_log=True)
    low = min(low, 0.0) if chart.scale == "zero" else low
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low if low == 0 else low - margin, high + margin)


def draw(chart: Chart, x_axis: Axis) -> dict[str, Any] | None:
    """What the page's macro draws; None without values. x in percent of the width, y from 0, the top, to 1."""
    axis = y_axis(chart)
    if axis is None:
        return None
    lines: list[tuple[int | None, str, str]] = []
    keys = []
    for curve in chart.curves:
        is_there = np.isfinite(curve.y) & ((curve.y > 0) | (not axis.is_log))
        x, y = curve.x[is_there], curve.y[is_there]
        if not len(x):
            continue
        lines.append((curve.colour, curve.style, _path(x, y, x_axis, axis)))
        if curve.has_key:
            keys.append((curve.name, curve.colour, curve.style, chart.form(float(y[-1]))))
            if len(x) <= _MOST_DOTTED:
                lines.append((curve.colour, "dots", _path(x, y, x_axis, axis, dots=True)))
    label = ", ".join(f"{name} {value}" for name, _, _, value in keys)
    return {
        "key": chart.key,
        "title": chart.title,
        "unit": f"{chart.unit}, logarithmic" if axis.is_log else chart.unit,
        "note": chart.note,
        "label": f"{chart.title} by step; at the end {label}",
        "view": f"0 0 {_WIDTH} {_HEIGHT}",
        "lines": lines,
        "keys": keys,
        "x_ticks": [(_percent(tick, x_axis), f"{tick:,.0f}") for tick in x_axis.ticks() if tick == int(tick)],
        "y_ticks": [(1 - float(axis.place(np.array(tick))), chart.form(tick)) for tick in axis.ticks()],
        "levels": [(1 - float(axis.place(np.array(height))), colour) for height, colour in chart.levels],
        "marks": [(_percent(step, x_axis), name, text) for step, name, text in chart.marks],
        "ticks": sorted({round(_percent(step, x_axis), 1) for step in chart.ticks}),
    }


def _percent(x: float, axis: Axis) -> float:
    return 100 * float(axis.place(np.array(x)))


def _path(x: Floats, y: Floats, x_axis: Axis, axis: Axis, *, dots: bool = False) -> str:
    """A line through the points that can be seen, or a dot on each."""
    kept = thin(x, y, x_axis)
    left = np.rint(_WIDTH * x_axis.place(x[kept])).astype(int).tolist()
    top = np.rint(_HEIGHT * (1 - axis.place(y[kept]))).astype(int).tolist()
    points = [f"{a} {b}" for a, b in zip(left, top, strict=True)]
    return "".join(f"M{point}h0" for point in points) if dots else f"M{'L'.join(points)}"
