"""The report of a token store, shown: one set of tables, as text for a terminal and as an HTML page."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, chain, groupby, islice, pairwise
from typing import Any

import numpy as np

from ochat_train.preprocess.ledger import NUM_EXAMPLES, Tally, show_id
from ochat_train.report.store import PACKING_BINS, StoreReport, Totals, Turn, quantile, sum_by
from ochat_train.report.tables import (
    Table,
    align,
    percent,
    printable,
    ratio,
    render_page,
    show_condition,
    table_lines,
    tick_distance,
)

_TOTALS = ("conversations", "examples", "tokens", "supervised tokens")
_MEASURES = {
    "conversations": "conversations",
    "tokens": "tokens",
    "supervised tokens": "supervised_tokens",
    "loss": "weight_sum",
}
_CONDITIONS_SHOWN = 3  # of one source


def _origin(report: StoreReport) -> list[tuple[str, str]]:
    manifest = report.manifest
    return [
        ("store", report.path),
        ("fingerprint", manifest.fingerprint[:12]),
        ("made", f"{report.made:%Y-%m-%d %H:%M} UTC"),
        ("template", f"{manifest.template}; inference under {show_condition(manifest.inference_condition)}"),
        ("tokenizer", f"{report.vocabulary_size:,} tokens; {manifest.made_from['tokenizer'][:12]}"),
        ("added to it", ", ".join(f"{token} = {id}" for token, id in manifest.added_tokens.items()) or "nothing"),
    ]


def _headline(report: StoreReport) -> list[tuple[str, str, str]]:
    """The figures that a person asks for first: name, value, remark."""
    num_in = sum(counts.num_in for counts in report.records.values())
    num_kept = sum(counts.num_kept for counts in report.records.values())
    train, held_out = (sum(groups.values(), Totals()) for groups in (report.train, report.held_out))
    return [
        ("records kept", f"{num_kept:,}", f"{percent(num_kept, num_in)} of {num_in:,}"),
        ("examples to train on", f"{train.examples:,}", f"of {train.conversations:,} conversations"),
        ("tokens to train on", f"{train.tokens:,}", f"{ratio(train.tokens, train.examples, '.0f')} an example"),
        (
            "supervised tokens",
            f"{train.supervised_tokens:,}",
            f"{percent(train.supervised_tokens, train.tokens)} of them",
        ),
        ("mean weight", _weight(train), "of a supervised token"),
        ("examples held out", f"{held_out.examples:,}", f"of {held_out.conversations:,} conversations"),
    ]


def _tables(report: StoreReport) -> list[Table]:
    """In the order in which a person wants them; those without rows are left out."""
    split = (_sources, _source_shares, _conditions, _condition_shares, _lengths)
    makers = (*split, _funnel, _changes, _overlong, _packing, _held_out)
    return [table for make in makers if (table := make(report)).rows]


def _sources(report: StoreReport) -> Table:
    rows = []
    for (name, totals), counts in zip(report.by_source.items(), report.records.values(), strict=True):
        conditions = [show_condition(condition) for source, condition in report.train if source == name]
        if (more := len(conditions) - _CONDITIONS_SHOWN) > 0:
            conditions[_CONDITIONS_SHOWN:] = [f"{more:,} more"]
        records = (f"{number:,}" for number in (counts.num_in, counts.num_kept, counts.num_dropped))
        rows.append((name, ", ".join(conditions) or "-", _weight(totals), *records, *_numbers(totals)))
    note = "Records are what was read, the rest is what is trained on. Weight is the mean over the supervised tokens."
    header = ("source", "condition", "weight", "records", "kept", "dropped", *_TOTALS)
    return Table("sources", "Sources", note, header, rows, left=(0, 1))


def _conditions(report: StoreReport) -> Table:
    rows = [(show_condition(name), _weight(totals), *_numbers(totals)) for name, totals in report.by_condition.items()]
    return Table("conditions", "Conditions", "", ("condition", "weight", *_TOTALS), rows)


def _source_shares(report: StoreReport) -> Table:
    note = "A source's share of the loss is its weight sum over the weight sum of all: how much it moves the model."
    return _share_table("source", note, report.by_source)


def _condition_shares(report: StoreReport) -> Table:
    return _share_table("condition", "", report.by_condition)


def _share_table(kind: str, note: str, groups: dict[str, Totals]) -> Table:
    shares = _shares(groups)
    rows = [
        (show_condition(name), *(f"{100 * share:.1f} %" for share in row))
        for name, row in zip(groups, zip(*shares.values(), strict=True), strict=True)
    ]
    title = f"What each {kind} counts in the loss"
    return Table(f"{kind}-shares", title, note, (kind, *(f"of {measure}" for measure in shares)), rows)


def _shares(groups: dict[str, Totals]) -> dict[str, list[float]]:
    """Of the conversations, the tokens, the supervised tokens and the loss: the share of each group."""
    shares = {}
    for measure, field in _MEASURES.items():
        values = [getattr(totals, field) for totals in groups.values()]
        total = sum(values) or 1
        shares[measure] = [value / total for value in values]
    return shares


def _length_edges(report: StoreReport) -> list[int]:
    """The borders of the bins of lengths, four to an octave; a bin holds its upper border, not its lower one."""
    lengths = np.flatnonzero(report.all_lengths)
    edges = np.unique(np.rint([0, *2.0 ** (np.arange(32 * 4) / 4)]))
    first = int(np.searchsorted(edges, lengths[0])) - 1
    last = int(np.searchsorted(edges, report.max_tokens))
    return [int(edge) for edge in edges[first : last + 1]]


def _bin_lengths(report: StoreReport) -> list[tuple[str, list[int]]]:
    """For each bin of lengths: its name, and the number of examples of each source."""
    return [
        (
            f"{below + 1:,} to {last:,}" if below + 1 < last else f"{last:,}",
            [int(counts[below + 1 : last + 1].sum()) for counts in report.lengths.values()],
        )
        for below, last in pairwise(_length_edges(report))
    ]


def _length_marks(report: StoreReport) -> list[tuple[str, int]]:
    lengths = report.all_lengths
    marks = {"median": 0.5, "90 %": 0.9, "longest": 1.0}
    return [
        *((name, quantile(lengths, share)) for name, share in marks.items()),
        ("data.max_tokens", report.max_tokens),
    ]


def _lengths(report: StoreReport) -> Table:
    rows = [
        (name, *(f"{n:,}" for n in (*numbers, sum(numbers)))) for name, numbers in _bin_lengths(report) if any(numbers)
    ]
    note = "Tokens of an example: " + ", ".join(f"{name} {length:,}" for name, length in _length_marks(report)) + "."
    return Table("lengths", "Lengths", note, ("tokens", *report.lengths, "all"), rows)


def _funnel(report: StoreReport) -> Table:
    nums_in = [counts.num_in for counts in report.records.values()]
    nums_kept = [counts.num_kept for counts in report.records.values()]
    left = num_in = sum(nums_in)
    rows = [("records in", *(f"{number:,}" for number in (num_in, *nums_in)), "")]
    bars = [(0.0, 1.0)]
    for name, numbers, ids in [
        *_by_name(counts.dropped for counts in report.records.values()),
        ("kept", nums_kept, ""),
    ]:
        cells = (_part(part, whole) for part, whole in zip((sum(numbers), *numbers), (num_in, *nums_in), strict=True))
        rows.append((name, *cells, ids))
        bars.append(((left - sum(numbers)) / num_in, left / num_in))
        left -= sum(numbers)
    note = "Each record is kept, or dropped for one reason. Shares are of the records of a source."
    header = ("", "all", *report.records, "some ids")
    return Table("funnel", "From records to conversations", note, header, rows, (0, len(header) - 1), bars)


def _changes(report: StoreReport) -> Table:
    rows = [
        (name, *(f"{number:,}" for number in (sum(numbers), *numbers)), ids)
        for name, numbers, ids in _by_name(counts.actions for counts in report.records.values())
    ]
    note = "How many records were changed in which way. A record may be changed in several ways, and dropped later."
    header = ("", "all", *report.records, "some ids")
    return Table("changes", "Changes", note, header, rows, (0, len(header) - 1))


def _by_name(of_sources: Iterable[Mapping[str, Tally]]) -> list[tuple[str, list[int], str]]:
    """Each reason or action, that of most records first: how many records of each source, and some ids."""
    by_source = list(of_sources)
    found = []
    for name in dict.fromkeys(chain.from_iterable(by_source)):
        tallies = [of_source.get(name, Tally()) for of_source in by_source]
        ids = chain.from_iterable(tally.ids for tally in tallies)
        shown = ", ".join(show_id(id) for id in islice(ids, NUM_EXAMPLES))
        found.append((name, [tally.num_records for tally in tallies], shown))
    return sorted(found, key=lambda row: (-sum(row[1]), row[0]))


def _overlong(report: StoreReport) -> Table:
    counts, chosen = report.manifest.overlong, report.manifest.made_from["data"]["overlong"]
    rows = []
    for choice in ("split", "truncate", "drop") if counts["conversations"] else ():
        kept = ((counts[f"{choice}_{name}"], counts[name]) for name in ("tokens", "supervised_tokens"))
        cells = (cell for part, whole in kept for cell in (f"{part:,}", percent(part, whole)))
        rows.append((f"{choice} (this store)" if choice == chosen else choice, *cells))
    note = (
        f"{counts['conversations']:,} conversations are longer than data.max_tokens {report.max_tokens:,}: "
        f"{counts['tokens']:,} tokens, {counts['supervised_tokens']:,} of them supervised. What each choice of "
        "data.overlong keeps of these:"
    )
    header = ("data.overlong", "tokens", "share", "supervised tokens", "share")
    return Table("overlong", "Longer than the context", note, header, rows)


def _packing(report: StoreReport) -> Table:
    num_examples = int(report.all_lengths.sum())
    rows = [
        (f"{capacity:,}", percent(fill, 1) if fill else "-", f"{steps:,}", f"{num_examples / steps:,.0f}")
        for capacity, fill, steps, _ in report.packing
    ]
    note = (
        f"The share of the micro-batches that tokens fill, with {PACKING_BINS} of them a step (GPUs times "
        "packing.grad_accum). The last step of the epoch, which is smaller, is left out."
    )
    if (num_tried := report.packing[0].num_tried) < num_examples:
        note += f" Tried on {num_tried:,} examples drawn at random."
    header = ("packing.tokens_per_gpu", "fill", "steps an epoch", "examples a step")
    return Table("packing", "Fill of the packed batches", note, header, rows)


def _held_out(report: StoreReport) -> Table:
    held_out = sum_by(report.held_out, 0, report.records)
    rows = [
        (name, *_numbers(totals), percent(totals.conversations, totals.conversations + train.conversations))
        for (name, totals), train in zip(held_out.items(), report.by_source.values(), strict=True)
    ]
    note = "" if report.held_out else "Nothing is held out."
    return Table("held-out", "Held out", note, ("source", *_TOTALS, "share of conversations"), rows)


def _numbers(totals: Totals) -> tuple[str, ...]:
    """The cells of _TOTALS."""
    numbers = (totals.conversations, totals.examples, totals.tokens, totals.supervised_tokens)
    return tuple(f"{number:,}" for number in numbers)


def _weight(totals: Totals) -> str:
    return ratio(totals.weight_sum, totals.supervised_tokens, ".4g")


def _part(part: int, whole: int) -> str:
    return f"{part:,} ({percent(part, whole)})" if part else "0"


# ------------------------------------------------------------------------------------------------- showing


def as_text(report: StoreReport) -> str:
    """The report for a terminal."""
    lines = [*align(_origin(report), left=(0, 1)), "", *align(_headline(report), left=(0, 2))]
    for table in _tables(report):
        lines += table_lines(table)
    lines += ["", "SAMPLES", "Each line begins with the loss weight of its tokens. Special tokens stand in ⟨⟩."]
    for sample in report.samples:
        lines += [
            "",
            f"{sample.source}, {show_condition(sample.condition)}: {sample.num_tokens:,} tokens, {show_id(sample.id)}",
        ]
        lines += chain.from_iterable(map(_turn_lines, sample.head))
        if sample.num_hidden:
            lines += [f"  … {sample.num_hidden:,} tokens left out", *chain.from_iterable(map(_turn_lines, sample.tail))]
    return "\n".join(lines)


def _turn_lines(turn: Turn) -> Iterator[str]:
    for weight, run in groupby(turn, key=lambda piece: piece.weight):
        text = "".join(f"⟨{piece.text}⟩" if piece.is_special else piece.text for piece in run)
        first, *others = map(printable, text.replace("\n", "↵\n").split("\n"))
        yield f"  {weight:>8.4g}  {first}"
        yield from (f"{'':12}{other}" for other in others if other)


def as_html(report: StoreReport) -> str:
    """The report as one page that needs nothing else."""
    turns = chain.from_iterable((*sample.head, *sample.tail) for sample in report.samples)
    weights = sorted({piece.weight for turn in turns for piece in turn if piece.weight})
    return render_page(
        "store.html.j2",
        {"condition": show_condition, "id": show_id, "visible": _visible},
        report=report,
        origin=_origin(report),
        headline=_headline(report),
        tables=_tables(report),
        shares={"source-shares": _shares(report.by_source), "condition-shares": _shares(report.by_condition)},
        plot=_plot(report),
        weights=weights if len(weights) <= 6 else [weights[0], weights[-1]],
    )


def _visible(text: str) -> Any:
    """The text as HTML in which one sees line breaks, tabs, control characters and runs of spaces."""
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


def _plot(report: StoreReport) -> dict[str, Any]:
    """The histogram of lengths: x in percent of its width, y and heights in percent of its height, from the top."""
    edges, bins = _length_edges(report), _bin_lengths(report)
    width, highest = 100 / len(bins), max(sum(numbers) for _, numbers in bins)
    bars = []
    for bin, (name, numbers) in enumerate(bins):
        for colour, (source, top) in enumerate(zip(report.lengths, accumulate(numbers), strict=True)):
            if number := numbers[colour]:
                title = f"{source}: {number:,} examples of {name} tokens"
                bars.append((width * bin, 100 - 100 * top / highest, 100 * number / highest, colour, title))
    step = tick_distance(highest)

    def place(length: int) -> float:
        return width * float(np.interp(length, edges, np.arange(len(edges))))

    return {
        "width": width,
        "bars": bars,
        "x_ticks": [(place(length), f"{length:,}") for length in (2**power for power in range(32)) if length in edges],
        "y_ticks": [(100 - 100 * number / highest, f"{number:,}") for number in range(step, highest + 1, step)],
        "marks": [(place(length), f"{name} {length:,}") for name, length in _length_marks(report)],
    }
