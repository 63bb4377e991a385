"""The report of a plan, or of two side by side, shown: figures, sources, pictures of steps; as text, as a page."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ochat_train.report.plan import MicroBatch, PlanReport, SourceTotals, StepPicture
from ochat_train.report.tables import (
    Table,
    align,
    note_lines,
    percent,
    printable,
    ratio,
    render_page,
    show_duration,
    table_lines,
    tick_distance,
)
from ochat_train.training.speed import Rate, Speed

_ORDINALS = ("first", "second")
_NOTHING = SourceTotals(0, 0, 0, 0)  # of a source that only the other plan has

_BAR_WIDTH = 60  # characters
_EIGHTHS = ("", *"▏▎▍▌▋▊▉")  # of a character, from the left
_LEAST_BETWEEN_LINES = 3  # characters; closer lines would hide the bars

_WIDTH = 10_000  # of a picture on the page, in its own units, some ten to a pixel
_GAP = 10  # between two sequences
_NARROW = 10  # narrower sequences are drawn together
_ROWS = ((4, 24), (8, 18), (math.inf, 14))  # up to so many, one is so many pixels high
_MARGIN = 3  # of these between two rows


class Figure(NamedTuple):
    """A number of a plan: its name, text and a remark; number: to compare two plans by, if it can be."""

    name: str
    value: str
    remark: str = ""
    number: float | None = None
    is_share: bool = False


# ------------------------------------------------------------------------------------------------------- words


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _title(reports: Sequence[PlanReport]) -> str:
    names = dict.fromkeys(printable(report.recipe.name) for report in reports)
    return f"{'Plan' if len(reports) == 1 else 'Two plans'} of {' and '.join(names)}"


def _origin(reports: Sequence[PlanReport]) -> list[tuple[str, str]]:
    if len(reports) > 1:
        pairs = []
        for name, report in zip(_ORDINALS, reports, strict=True):
            pairs.append((name, f"{_recipe_of(report)} on {report.request.num_gpus:,} GPUs"))
            pairs.append(("its store", _store_of(report)))
        return pairs
    (report,) = reports
    shape = report.table.shape
    return [
        ("recipe", _recipe_of(report)),
        ("store", _store_of(report)),
        (
            "a step",
            f"{shape.world_size:,} GPUs, {_count_micro_batches(report)} of {shape.capacity:,} tokens on each",
        ),
        ("attention", f"costs as much as all else in a sequence of {shape.quadratic_length:,} tokens"),
    ]


def _count_micro_batches(report: PlanReport) -> str:
    number = report.table.shape.grad_accum
    return f"{number:,} micro-batch{'es' * (number > 1)}"


def _recipe_of(report: PlanReport) -> str:
    return printable(" ".join((report.request.recipe, *report.request.overrides)))


def _store_of(report: PlanReport) -> str:
    return f"{printable(report.recipe.data.store)}, {report.fingerprint[:12]}"


def _shape_figures(report: PlanReport) -> list[Figure]:
    shape = report.table.shape
    return [
        Figure("GPUs", f"{shape.world_size:,}", number=shape.world_size),
        Figure("packing.grad_accum", f"{shape.grad_accum:,}", number=shape.grad_accum),
        Figure("packing.tokens_per_gpu", f"{shape.capacity:,}", number=shape.capacity),
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
        Figure("GPU hours", "-" if gpu_hours is None else _number(gpu_hours), "", gpu_hours),
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
            f"{_number(report.num_examples / table.num_steps)} a step",
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
            _number(table.weight_sum),
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
        return f"{num_epochs:,}", f"{_number(report.table.num_steps / num_epochs)} steps each"
    return f"{num_epochs * report.num_examples / num_planned:.3g}", f"of {num_epochs:,}"


def _notes(report: PlanReport) -> Iterator[str]:
    """What has to be said about the figures, in sentences."""
    rate = report.rate
    if rate is None:
        yield (
            "The wall time is not known: give tokens_per_s=X, the tokens a second of one GPU, or train some steps with "
            f"train.max_steps=20, whose rate is then found in {printable(str(report.metrics))}."
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
            f"{' or '.join(map(str, rate.num_processes))} processes in {printable(str(report.metrics))}."
        )
    if rate is not None and rate.origin != "modelled":
        yield "Start, held-out losses and saving take time of their own."
    if report.table.num_steps < report.whole.num_steps:
        yield f"train.max_steps stops the run; all its epochs have {report.whole.num_steps:,} steps."
    for name, (old, new) in report.scaled.items():
        yield (
            f"Source {printable(name)} has weight {old:g} in the store, scaled here to {new:g}; preprocess might "
            "choose others among duplicates."
        )


def _note(words: Sequence[str], report: PlanReport) -> str:
    return " ".join([*(f"{word.capitalize()} plan:" for word in words), *_notes(report)])


def _compare(reports: Sequence[PlanReport]) -> Table:
    rows = [
        (first.name, first.value, second.value, _change(first, second))
        for first, second in zip(*([*_figures(report), *_shape_figures(report)] for report in reports), strict=True)
    ]
    return Table("figures", "Side by side", "", ("", *_ORDINALS, "change"), rows)


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


def _source_names(reports: Sequence[PlanReport]) -> list[str]:
    """Of all plans; a source's place is its colour."""
    return list(dict.fromkeys(name for report in reports for name in report.sources))


def _of_each_plan(reports: Sequence[PlanReport]) -> list[tuple[tuple[str, ...], PlanReport]]:
    """Each plan with the words that tell it from the other: none if it is alone."""
    return [((name,) * (len(reports) > 1), report) for name, report in zip(_ORDINALS, reports, strict=False)]


def _sources(reports: Sequence[PlanReport]) -> Table:
    rows = []
    for name in _source_names(reports):
        for words, report in _of_each_plan(reports):
            if (totals := report.sources.get(name)) is not None:
                rows.append((printable(name), *words, *_source_cells(totals, report)))
    note = (
        "Passes over the source in an epoch, and what is drawn of it in the whole run. A source's share of the loss is "
        "its weight sum over that of all: how much it moves the model."
    )
    words = ("plan",) * (len(reports) > 1)
    header = ("source", *words, "epochs", "examples", "tokens", "of tokens", "weight sum", "of loss")
    return Table("sources", "Sources", note, header, rows, left=tuple(range(1 + len(words))))


def _source_cells(totals: SourceTotals, report: PlanReport) -> tuple[str, ...]:
    all_tokens, all_weights = (sum(column) for column in list(zip(*report.sources.values(), strict=True))[2:])
    return (
        f"{totals.epochs:g}",
        f"{totals.num_examples:,}",
        f"{totals.num_tokens:,}",
        percent(totals.num_tokens, all_tokens),
        _number(totals.weight_sum),
        percent(totals.weight_sum, all_weights),
    )


def _bases(reports: Sequence[PlanReport]) -> list[Speed]:
    """The speeds on which predictions are modelled, each once."""
    return list(dict.fromkeys(found.basis for report in reports for found in report.predictions))


def _predictions(reports: Sequence[PlanReport]) -> list[Table]:
    """How long the runs take on machines, and on what that is modelled; nothing where nothing can be predicted."""
    bases = _bases(reports)
    if not bases:
        return []
    rows = []
    for words, report in _of_each_plan(reports):
        for found in report.predictions:
            numbers = (
                show_duration(found.seconds),
                f"{found.tokens_per_s:,.0f}",
                percent(found.share, 1),
                percent(found.communication_s, found.seconds) if found.communication_s else "-",
                f"modelled on {1 + bases.index(found.basis)}",
            )
            rows.append((found.machine.name, *words, *numbers))
    note = (
        "As if the GPUs reached the share of their peak that they reached at the speed named, all that is computed "
        "again included. Share: of the peak, by what trains the model. Communication: of ZeRO, by its bytes over "
        "NVLink, as part of the time. Start, held-out losses and saving are left out, and whether the model fits."
    )
    words = ("plan",) * (len(reports) > 1)
    header = ("machine", *words, "wall time", "tokens/s a GPU", "share", "communication", "how")
    left = (*range(1 + len(words)), len(header) - 1)
    known = [
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
    columns = ("", "GPUs", "model", "checkpointing", "tokens/s a GPU", "of the peak", "where from")
    about = "Of the peak: with all that was computed again."
    return [
        Table("predictions", "How long on which machine", note, header, rows, left=left),
        Table("speeds", "Speeds that these are modelled on", about, columns, known, left=(0, 1, 2, 3, 6)),
    ]


def _shares(reports: Sequence[PlanReport]) -> dict[str, list[float]]:
    """Of the tokens and of the loss, in each plan: the share of each source."""
    shares = {}
    for measure, field in (("tokens", "num_tokens"), ("loss", "weight_sum")):
        for words, report in _of_each_plan(reports):
            found = [getattr(report.sources.get(name, _NOTHING), field) for name in _source_names(reports)]
            shares[", ".join((measure, *words))] = [value / (sum(found) or 1) for value in found]
    return shares


def _steps_note(marks: str) -> str:
    return (
        "A row is a rank, time runs to the right. A rank runs its micro-batches one after the other, and begins each "
        f"when all have ended the one before: {marks}. The unit of time is what a token takes without its attention."
    )


def _caption(picture: StepPicture, report: PlanReport) -> tuple[str, str]:
    """Which step it is, and its numbers."""
    fill = percent(picture.num_tokens, report.table.shape.room)
    return (
        f"Step {picture.number:,} of {report.table.num_steps:,}, {' and '.join(picture.names)}",
        f"{picture.num_tokens:,} tokens in {picture.num_examples:,} sequences, fill {fill}, balance "
        f"{percent(picture.balance, 1, 2)}",
    )


def _selection(picture: StepPicture, report: PlanReport) -> str:
    """Which ranks the picture shows, if not all."""
    if len(picture.rows) == report.table.shape.world_size:
        return ""
    return f"{len(picture.rows)} of {report.table.shape.world_size:,} ranks, from the cheapest to the dearest"


def _waits(picture: StepPicture, row: Iterable[MicroBatch]) -> str:
    """The share of the step in which a rank waits."""
    busy = sum(int(micro_batch.costs.sum()) for micro_batch in row)
    return percent(int(picture.ends[-1]) - busy, int(picture.ends[-1]), 2)


# --------------------------------------------------------------------------------------------------------- text


def as_text(reports: Sequence[PlanReport]) -> str:
    """The report for a terminal."""
    lines = [_title(reports), "", *align(_origin(reports), left=(0, 1))]
    if len(reports) == 1:
        figures = ((figure.name, figure.value, figure.remark) for figure in _figures(reports[0]))
        lines += ["", *align(list(figures), left=(0, 2))]
    else:
        lines += table_lines(_compare(reports))
    for words, report in _of_each_plan(reports):
        lines += ["", *note_lines(_note(words, report))]
    lines += [line for table in _predictions(reports) for line in table_lines(table)]
    lines += [*table_lines(_sources(reports)), "", "STEPS"]
    lines += note_lines(_steps_note("dots are waiting, a line is where all have ended"))
    for words, report in _of_each_plan(reports):
        for picture in report.pictures:
            title, numbers = _caption(picture, report)
            lines += ["", ": ".join((*words, title)), numbers]
            lines += [selection] if (selection := _selection(picture, report)) else []
            lines += [f"  {line}" for line in _picture_lines(picture, _scale(report))]
    return "\n".join(lines)


def _scale(report: PlanReport) -> int:
    """The time that is as wide as a picture: that of the longest step shown."""
    return max(int(picture.ends[-1]) for picture in report.pictures)


def _picture_lines(picture: StepPicture, scale: int) -> list[str]:
    cells = [
        (f"rank {rank}", _bar(picture, row, scale / _BAR_WIDTH), f"waits {_waits(picture, row)}")
        for rank, row in picture.rows.items()
    ]
    return align(cells, left=(1,))


def _bar(picture: StepPicture, row: Sequence[MicroBatch], per_cell: float) -> str:
    """A rank's time: blocks while it computes, dots while it waits."""
    times = np.diff(picture.ends, prepend=0).tolist()
    widths = np.diff((picture.ends / per_cell).round().astype(int), prepend=0).tolist()
    line = "│" if _LEAST_BETWEEN_LINES * len(row) <= _BAR_WIDTH else ""
    bars = []
    for part, time, width in zip(row, times, widths, strict=True):
        if width:  # the micro-batches of a last step may be empty
            eighths = round(8 * width * int(part.costs.sum()) / time)
            bars.append(f"{'█' * (eighths // 8)}{_EIGHTHS[eighths % 8]}".ljust(width, "·") + line)
    return "".join(bars)


# --------------------------------------------------------------------------------------------------------- page


def as_html(reports: Sequence[PlanReport]) -> str:
    """The report as one page that needs nothing else."""
    alone = len(reports) == 1
    return render_page(
        "plan.html.j2",
        {},
        title=_title(reports),
        origin=_origin(reports),
        headline=[(figure.name, figure.value, figure.remark) for figure in _figures(reports[0])] if alone else [],
        compared=None if alone else _compare(reports),
        notes=[_note(words, report) for words, report in _of_each_plan(reports)],
        predictions=_predictions(reports),
        sources=_sources(reports),
        names=[printable(name) for name in _source_names(reports)],
        shares=_shares(reports),
        steps_note=_steps_note("there stands a line; what is hatched is waiting, a segment is a sequence"),
        plans=[
            (words, [_drawing(picture, report, _source_names(reports)) for picture in report.pictures])
            for words, report in _of_each_plan(reports)
        ],
        width=_WIDTH,
    )


def _drawing(picture: StepPicture, report: PlanReport, names: Sequence[str]) -> dict[str, Any]:
    """What the page draws of a step, in _WIDTH units to the right and pixels downwards."""
    per_unit = _scale(report) / _WIDTH
    colours = [names.index(name) for name in report.sources]
    title, numbers = _caption(picture, report)
    width = _scale(report) / report.table.shape.quadratic_length
    distance = next(height for most, height in _ROWS if len(picture.rows) <= most)
    return {
        "title": title,
        "numbers": numbers,
        "selection": _selection(picture, report),
        "row_distance": distance,
        "row_height": distance - _MARGIN,
        "rows": [
            (
                rank,
                f"rank {rank}: {_sequences(row)}, waits {_waits(picture, row)} of the step",
                _paths(row, picture.ends, per_unit, distance - _MARGIN, colours),
            )
            for rank, row in picture.rows.items()
        ],
        "ends": [round(end / per_unit) for end in picture.ends.tolist()],
        "ticks": [(100 * at / width, f"{at:,}") for at in range(0, int(width) + 1, tick_distance(width))],
    }


def _sequences(row: Iterable[MicroBatch]) -> str:
    return f"{sum(len(micro_batch.costs) for micro_batch in row):,} sequences"


def _paths(
    row: Sequence[MicroBatch], ends: npt.NDArray[np.int64], per_unit: float, height: int, colours: Sequence[int]
) -> dict[int | None, str]:
    """The outlines of a row: a path for the sequences of each colour, and one, None, for waiting.

    The narrow sequences of a source in a micro-batch are one piece.
    """
    paths: dict[int | None, list[str]] = {}
    for begin, end, part in zip([0, *ends.tolist()], ends.tolist(), row, strict=False):
        is_wide = part.costs >= _NARROW * per_unit
        narrow = np.bincount(part.source_ids[~is_wide], part.costs[~is_wide], len(colours)).tolist()
        pieces: list[tuple[int | None, float]] = [
            (colours[source], cost)
            for source, cost in chain(
                zip(part.source_ids[is_wide].tolist(), part.costs[is_wide].tolist(), strict=True), enumerate(narrow)
            )
        ]
        pieces.append((None, end - begin - int(part.costs.sum())))
        starts = accumulate((cost for _, cost in pieces), initial=begin)
        for start, (colour, cost) in zip(starts, pieces, strict=False):
            left, length = round(start / per_unit), round(max(cost / per_unit - _GAP, 0.7 * cost / per_unit))
            if length:
                paths.setdefault(colour, []).append(f"M{left} 0h{length}v{height}h-{length}z")
    return {colour: "".join(pieces) for colour, pieces in paths.items()}
