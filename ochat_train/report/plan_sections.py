"""The report of a plan, or of two side by side: figures, times, sources, pictures of steps, as sections."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ochat_train.report.charts import INK, LINE, Chart, LegendEntry, colour_of, shares_chart
from ochat_train.report.page import (
    Block,
    Document,
    Figures,
    Section,
    Table,
    Text,
    percent,
    ratio,
    show_duration,
    show_number,
)
from ochat_train.report.plan import PlanReport, StepPicture
from ochat_train.tokens.loss_forms import LOSS_FORMS
from ochat_train.training.speed import Rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ORDINALS = ("first", "second")
_NARROWEST = 0.002  # of a picture's width; narrower sequences of a source are drawn as one
_GAP = 0.002  # between two sequences
_ROW_HEIGHTS = ((4, 24), (8, 18), (math.inf, 14))  # up to so many rows, one is so many pixels high


def plan_document(reports: Sequence[PlanReport]) -> Document:
    """The whole report of one plan; or of two, whose figures stand side by side and whose sections follow in turn."""
    title = f"of {' and '.join(dict.fromkeys(report.recipe.name for report in reports))}"
    if len(reports) == 1:
        (report,) = reports
        figures = Figures([(figure.name, figure.value, figure.remark) for figure in _figures(report)])
        head: list[Block] = [Table((), _origin(report), left=(0, 1)), figures, Text(" ".join(_notes(report)))]
        return Document(f"Plan {title}", head, _sections(report))
    first, second = reports
    pairs = []
    for name, report in zip(_ORDINALS, reports, strict=True):
        pairs.append((name, f"{_recipe_of(report)} on {report.request.num_gpus:,} GPUs"))
        pairs.append(("its store", _store_of(report)))
        pairs.append(("its loss", report.recipe.train.loss))
    head = [Table((), pairs, left=(0, 1))]
    head += [
        Text(f"{name.capitalize()} plan: {' '.join(_notes(report))}")
        for name, report in zip(_ORDINALS, reports, strict=True)
    ]
    sections = [Section("figures", "Side by side", [_compare(first, second)])]
    for name, report in zip(_ORDINALS, reports, strict=True):
        sections += [
            replace(section, key=f"{name}-{section.key}", title=f"{name.capitalize()} plan: {section.title}")
            for section in _sections(report)
        ]
    return Document(f"Two plans {title}", head, sections)


def _sections(report: PlanReport) -> list[Section]:
    return [
        *_predictions(report),
        Section("sources", "Sources", _sources(report)),
        Section("steps", "Steps", _steps(report)),
    ]


class Figure(NamedTuple):
    """A number of a plan: its name, text and a remark; number: to compare two plans by, if it can be."""

    name: str
    value: str
    remark: str = ""
    number: float | None = None
    is_share: bool = False


# -------------------------------------------------------------------------------------------------------- head


def _origin(report: PlanReport) -> list[tuple[str, str]]:
    shape, packing = report.table.shape, report.recipe.packing
    on_each = f"each {packing.sequence_parallel} of them" if packing.sequence_parallel > 1 else "each"
    micro_batches = f"{shape.grad_accum:,} micro-batch{'es' * (shape.grad_accum > 1)}"
    return [
        ("recipe", _recipe_of(report)),
        ("store", _store_of(report)),
        ("loss", f"{report.recipe.train.loss}: {LOSS_FORMS[report.recipe.train.loss]}"),
        ("a step", f"{report.request.num_gpus:,} GPUs, {micro_batches} of {shape.capacity:,} tokens on {on_each}"),
        ("attention", f"costs as much as all else in a sequence of {shape.quadratic_length:,} tokens"),
    ]


def _recipe_of(report: PlanReport) -> str:
    return " ".join((report.request.recipe, *report.request.overrides))


def _store_of(report: PlanReport) -> str:
    return f"{report.recipe.data.store}, {report.fingerprint[:12]}"


def _shape_figures(report: PlanReport) -> list[Figure]:
    shape, packing, num_gpus = report.table.shape, report.recipe.packing, report.request.num_gpus
    return [
        Figure("GPUs", f"{num_gpus:,}", number=num_gpus),
        Figure("packing.grad_accum", f"{shape.grad_accum:,}", number=shape.grad_accum),
        Figure("packing.tokens_per_gpu", f"{packing.tokens_per_gpu:,}", number=packing.tokens_per_gpu),
        Figure("packing.sequence_parallel", f"{packing.sequence_parallel:,}", number=packing.sequence_parallel),
        Figure("attention = all else at", f"{shape.quadratic_length:,}"),
    ]


def _figures(report: PlanReport) -> list[Figure]:
    """The figures that a person asks for first."""
    table, seconds, worst = report.table, report.seconds, report.worst_step
    mean_tokens = table.num_tokens / table.num_steps
    of_full = "" if report.is_epoch_end.all() else ", of the full ones"
    gpu_hours = None if seconds is None else seconds * report.request.num_gpus / 3600
    return [
        Figure(
            "wall time",
            "-" if seconds is None else show_duration(seconds),
            "not known, see below" if report.rate is None else f"{report.rate.origin}: {_pace(report.rate)}",
            seconds,
        ),
        Figure("GPU hours", "-" if gpu_hours is None else show_number(gpu_hours), "", gpu_hours),
        Figure(
            "steps",
            f"{table.num_steps:,}",
            "" if seconds is None else f"{show_duration(seconds / table.num_steps)} each",
            table.num_steps,
        ),
        Figure("epochs", *_epochs(report)),
        Figure(
            "examples",
            f"{report.num_examples:,}",
            f"{show_number(report.num_examples / table.num_steps)} a step",
            report.num_examples,
        ),
        Figure(
            "tokens",
            f"{table.num_tokens:,}",
            f"{ratio(table.num_tokens, report.num_examples, ',.0f')} an example",
            table.num_tokens,
        ),
        Figure("tokens a step", f"{mean_tokens:,.0f}", f"of room for {table.shape.room:,}", mean_tokens),
        Figure(
            "weight sum",
            show_number(table.weight_sum),
            f"{ratio(table.weight_sum, table.num_tokens, '.3g')} a token",
            table.weight_sum,
        ),
        _share("fill", table.fill, "of the micro-batches"),
        _share("ranks busy", table.efficiency, "of the time; else they wait", 2),
        _share("balance of a step", float(report.balances.mean()), "mean share of time busy", 2),
        _share("worst balance", float(report.balances[worst]), f"step {worst + 1:,}{of_full}", 2),
    ]


def _share(name: str, share: float, remark: str, digits: int = 1) -> Figure:
    return Figure(name, percent(share, 1, digits), remark, share, is_share=True)


def _pace(rate: Rate) -> str:
    return f"{rate.tokens_per_s:,.0f} tokens/s a GPU"


def _epochs(report: PlanReport) -> tuple[str, str]:
    """How many the run trains, and of how many if it stops before."""
    num_epochs, num_planned = report.recipe.train.epochs, int(report.whole.rows["num_examples"].sum())
    if report.num_examples == num_planned:
        return f"{num_epochs:,}", f"{show_number(report.table.num_steps / num_epochs)} steps each"
    return f"{num_epochs * report.num_examples / num_planned:.3g}", f"of {num_epochs:,}"


def _notes(report: PlanReport) -> Iterator[str]:
    """What has to be said about the figures, in sentences."""
    rate = report.rate
    if rate is None:
        yield (
            "The wall time is not known: give tokens_per_s=X, the tokens a second of one GPU, or train some steps with "
            f"train.max_steps=20, whose rate is then found in {report.metrics}."
        )
    elif rate.basis is not None:
        yield f"The wall time is modelled, {_pace(rate)}, as in the line of this machine below; no run measured it."
    elif rate.origin == "modelled":
        yield (
            "The wall time is modelled: as many seconds as in the first plan for the same cost, which makes "
            f"{_pace(rate)}."
        )
    elif rate.origin == "given":
        yield f"The wall time is that of {_pace(rate)}, as given."
    else:
        yield (
            f"The wall time is that of {_pace(rate)}, measured: the median of {rate.num_steps:,} steps on "
            f"{' or '.join(map(str, rate.num_processes))} processes in {report.metrics}."
        )
    if rate is not None and rate.origin != "modelled":
        yield "Start, held-out losses and saving take time of their own."
    if report.table.num_steps < report.whole.num_steps:
        yield f"train.max_steps stops the run; all its epochs have {report.whole.num_steps:,} steps."
    for name, (old, new) in report.scaled.items():
        yield (
            f"Source {name} has weight {old:g} in the store, scaled here to {new:g}; preprocess might "
            "choose others among duplicates."
        )


# ---------------------------------------------------------------------------------------------------- sections


def _compare(first: PlanReport, second: PlanReport) -> Table:
    old, new = ([*_figures(report), *_shape_figures(report)] for report in (first, second))
    rows = [(one.name, one.value, other.value, _change(one, other)) for one, other in zip(old, new, strict=True)]
    return Table(("", *_ORDINALS, "change"), rows)


def _change(first: Figure, second: Figure) -> str:
    """From the first to the second, where they differ and a difference means something."""
    old, new = first.number, second.number
    if old is None or new is None or first.value == second.value:
        return ""
    if first.is_share:
        return f"{100 * (new - old):+.2f} points"
    if not 0.5 < new / old < 2:
        return f"\N{MULTIPLICATION SIGN} {new / old:.3g}"
    change = round(100 * (new / old - 1), 1)
    return f"{change:+.1f} %" if change else ""


def _predictions(report: PlanReport) -> list[Section]:
    """How long the run takes on machines, and on what that is modelled; nothing where nothing can be predicted."""
    bases = list(dict.fromkeys(found.basis for found in report.predictions))
    if not bases:
        return []
    rows = [
        (
            found.machine.name,
            show_duration(found.seconds),
            f"{found.tokens_per_s:,.0f}",
            percent(found.share, 1),
            percent(found.communication_s, found.seconds) if found.communication_s else "-",
            f"modelled on {1 + bases.index(found.basis)}",
        )
        for found in report.predictions
    ]
    note = (
        "As if the GPUs reached the share of their peak that they reached at the speed named, all that is computed "
        "again included. Share: of the peak, by what trains the model. Communication: of ZeRO, by its bytes over "
        "NVLink, as part of the time. Start, held-out losses and saving are left out, and whether the model fits."
    )
    header = ("machine", "wall time", "tokens/s a GPU", "share", "communication", "how")
    speeds = [
        (
            f"{number}",
            f"{basis.num_devices} x {basis.device}",
            basis.model,
            basis.checkpointing,
            f"{basis.tokens_per_s:,.0f}",
            percent(basis.share, 1),
            f"{basis.origin}: {basis.source}",
        )
        for number, basis in enumerate(bases, start=1)
    ]
    about = Text("Of the peak: with all that was computed again.")
    speed_header = ("", "GPUs", "model", "checkpointing", "tokens/s a GPU", "of the peak", "where from")
    return [
        Section("predictions", "How long on which machine", [Text(note), Table(header, rows, left=(0, 5))]),
        Section("speeds", "Speeds that these are modelled on", [about, Table(speed_header, speeds, (0, 1, 2, 3, 6))]),
    ]


def _sources(report: PlanReport) -> list[Block]:
    all_tokens = sum(totals.num_tokens for totals in report.sources.values())
    all_weights = sum(totals.weight_sum for totals in report.sources.values())
    rows = [
        (
            name,
            f"{totals.epochs:g}",
            f"{totals.num_examples:,}",
            f"{totals.num_tokens:,}",
            percent(totals.num_tokens, all_tokens),
            show_number(totals.weight_sum),
            percent(totals.weight_sum, all_weights),
        )
        for name, totals in report.sources.items()
    ]
    shares = {
        "tokens": [totals.num_tokens / all_tokens for totals in report.sources.values()],
        "loss": [totals.weight_sum / (all_weights or 1) for totals in report.sources.values()],
    }
    note = (
        "Passes over the source in an epoch, and what is drawn of it in the whole run. A source's share of the loss is "
        "its weight sum over that of all: how much it moves the model."
    )
    header = ("source", "epochs", "examples", "tokens", "of tokens", "weight sum", "of loss")
    return [
        Text(note),
        shares_chart([*report.sources], shares),
        Table(header, rows),
    ]


def _steps(report: PlanReport) -> list[Block]:
    note = (
        "A row is a rank, or the first of those that share micro-batches; time runs to the right. A rank runs its "
        "micro-batches one after the other, and starts each when all have finished the one before. The unit of time is "
        "what a token takes without its attention."
    )
    longest = max(int(picture.ends[-1]) for picture in report.pictures)
    charts = [_step_chart(picture, report, longest) for picture in report.pictures]
    return [Text(note), *charts, *(_step_table(picture, report, longest) for picture in report.pictures)]


def _caption(picture: StepPicture, report: PlanReport) -> tuple[str, str]:
    """Which step it is, and its numbers."""
    fill = percent(picture.num_tokens, report.table.shape.room)
    num_ranks, selection = report.table.shape.world_size, ""
    shared = report.recipe.packing.sequence_parallel
    of_what = f"groups of {shared} ranks" if shared > 1 else "ranks"
    if len(picture.rows) < num_ranks:
        selection = f"; {len(picture.rows)} of {num_ranks:,} {of_what}, from the lightest to the heaviest"
    return (
        f"Step {picture.number:,} of {report.table.num_steps:,}, {' and '.join(picture.names)}",
        f"{picture.num_tokens:,} tokens in {picture.num_examples:,} sequences, fill {fill}, balance "
        f"{percent(picture.balance, 1, 2)}{selection}",
    )


def _step_table(picture: StepPicture, report: PlanReport, longest: int) -> Table:
    """How long each rank of a step is busy; its bar: of the longest step shown."""
    rows, bars = [], []
    end = int(picture.ends[-1])
    for rank, parts in picture.rows.items():
        busy = sum(int(part.costs.sum()) for part in parts)
        rows.append((f"rank {rank}", f"{sum(len(part.costs) for part in parts):,}", percent(end - busy, end, 2)))
        bars.append((0.0, busy / longest))
    title, numbers = _caption(picture, report)
    return Table(("", "sequences", "waits"), rows, title=f"{title}: {numbers}", bars=bars, folded=title)


def _step_chart(picture: StepPicture, report: PlanReport, longest: int) -> Chart:
    unit = report.table.shape.quadratic_length
    row_height = next(height for most, height in _ROW_HEIGHTS if len(picture.rows) <= most)
    num_rows = len(picture.rows)

    def draw(axes: "Axes") -> None:
        waiting = [(row, 0, int(picture.ends[-1])) for row in range(num_rows)]
        busy = source_spans(picture, longest)
        for colour, spans in [(LINE, waiting), *((colour_of(source), spans) for source, spans in busy.items())]:
            rows, starts, stops = np.array(spans).T
            gaps = np.minimum(_GAP * longest, 0.3 * (stops - starts))
            x = np.column_stack([starts, stops - gaps, np.full(len(rows), np.nan)]) / unit
            axes.plot(x.ravel(), rows.repeat(3), color=colour, linewidth=row_height - 3, solid_capstyle="butt")
        axes.vlines(picture.ends / unit, -0.5, num_rows - 0.5, color=INK, linewidth=1)
        axes.set_xlim(0, longest / unit)
        axes.set_ylim(num_rows - 0.5, -0.5)
        axes.set_yticks(range(num_rows), [f"{rank}" for rank in picture.rows])
        axes.grid(False)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")

    title, numbers = _caption(picture, report)
    legend = [LegendEntry(name, colour_of(source)) for source, name in enumerate(report.sources)]
    note = "Grey: waiting. A line: all ranks have finished a micro-batch."
    return Chart(title, numbers, draw, legend, note, height=40 + row_height * num_rows)


def source_spans(picture: StepPicture, longest: int) -> dict[int, list[tuple[int, int, int]]]:
    """For each source, where its sequences stand in a picture: row, start and end, in the unit of costs.

    In a micro-batch the sequences of a source stand together, the heaviest first; those that would be too narrow to be
    seen in a picture as wide as `longest` are one span.
    """
    spans: dict[int, list[tuple[int, int, int]]] = {}
    for row, parts in enumerate(picture.rows.values()):
        for start, part in zip([0, *picture.ends.tolist()], parts, strict=False):
            for source in np.unique(part.source_ids).tolist():
                costs = np.sort(part.costs[part.source_ids == source])[::-1]
                is_wide = costs >= _NARROWEST * longest
                widths = [*costs[is_wide].tolist(), int(costs[~is_wide].sum())]
                ends = [start + width for width in accumulate(widths)]
                spans.setdefault(source, []).extend(
                    (row, end - width, end) for end, width in zip(ends, widths, strict=True) if width
                )
                start = ends[-1]
    return spans
