"""The report of a token store: records, sources, lengths, packing and samples, as sections of tables and charts."""

from collections.abc import Iterable, Mapping
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING

import numpy as np

from ochat_train.conversations.described import name_template
from ochat_train.preprocess.ledger import NUM_EXAMPLES, Tally, show_id
from ochat_train.report.charts import INK, Chart, LegendEntry, colour_of, shares_chart
from ochat_train.report.page import (
    TOTAL,
    Block,
    Document,
    Figures,
    Section,
    Table,
    Text,
    Transcript,
    percent,
    ratio,
    show_condition,
)
from ochat_train.report.store import PACKING_BINS, GroupSums, Sample, StoreReport, quantile, sum_by

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COUNTS = ("conversations", "examples", "tokens", "supervised tokens")
_MEASURES = {
    "conversations": "conversations",
    "tokens": "tokens",
    "supervised tokens": "supervised_tokens",
    "loss": "weight_sum",
    "loss by answer": "answer_weight_sum",
}
_CONDITIONS_SHOWN = 3  # of one source


def store_document(report: StoreReport) -> Document:
    """The whole report."""
    trained = {name: sums for name, sums in report.by_source.items() if name in report.lengths}
    sources, conditions = _shares("source", trained), _shares("condition", report.by_condition)
    sections = (
        Section("sources", "Sources", _sources(report)),
        Section("source-shares", "What each source counts in the loss", sources),
        Section("conditions", "Conditions", _conditions(report)),
        Section("condition-shares", "What each condition counts in the loss", conditions),
        Section("lengths", "Lengths", _lengths(report)),
        Section("funnel", "From records to conversations", _funnel(report)),
        Section("changes", "Changes", _changes(report)),
        Section("overlong", "Longer than the context", _overlong(report)),
        Section("packing", "Fill of the packed batches", _packing(report)),
        Section("held-out", "Held out", _held_out(report)),
        Section("samples", "Samples", _samples(report)),
    )
    head: list[Block] = [Table((), _origin(report), left=(0, 1)), Figures(_figures(report))]
    title = f"Token store {report.path.rstrip('/').rpartition('/')[2]}"
    return Document(title, head, [section for section in sections if section.blocks])


def _origin(report: StoreReport) -> list[tuple[str, str]]:
    manifest = report.manifest
    return [
        ("store", report.path),
        ("fingerprint", manifest.fingerprint[:12]),
        ("made", f"{report.made:%Y-%m-%d %H:%M} UTC"),
        (
            "template",
            f"{name_template(manifest.template)}; inference under {show_condition(manifest.inference_condition)}",
        ),
        ("tokenizer", f"{report.vocabulary_size:,} tokens; {manifest.made_from['tokenizer'][:12]}"),
        ("added to it", ", ".join(f"{token} = {id}" for token, id in manifest.added_tokens.items()) or "nothing"),
    ]


def _figures(report: StoreReport) -> list[tuple[str, str, str]]:
    num_in = sum(counts.num_in for counts in report.records.values())
    num_kept = sum(counts.num_kept for counts in report.records.values())
    train, held_out = (sum(groups.values(), GroupSums()) for groups in (report.train, report.held_out))
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


def _sources(report: StoreReport) -> list[Block]:
    rows = []
    for (name, sums), counts in zip(report.by_source.items(), report.records.values(), strict=True):
        groups = report.train | report.held_out
        conditions = [show_condition(condition) for source, condition in groups if source == name]
        if (more := len(conditions) - _CONDITIONS_SHOWN) > 0:
            conditions[_CONDITIONS_SHOWN:] = [f"{more:,} more"]
        records = (f"{number:,}" for number in (counts.num_in, counts.num_kept, counts.num_dropped))
        rows.append((name, ", ".join(conditions) or "-", _weight(sums), *records, *_counts(sums)))
    note = "Records are what was read, the rest is what is trained on. Weight is the mean over the supervised tokens."
    if held_out := [name for name in report.records if name not in report.lengths]:
        note += f" Held out whole: {', '.join(held_out)}."
    header = ("source", "condition", "weight", "records", "kept", "dropped", *_COUNTS)
    return [Text(note), Table(header, rows, left=(0, 1))]


def _conditions(report: StoreReport) -> list[Block]:
    rows = [(show_condition(name), _weight(sums), *_counts(sums)) for name, sums in report.by_condition.items()]
    return [Table(("condition", "weight", *_COUNTS), rows)]


def _shares(kind: str, groups: Mapping[str, GroupSums]) -> list[Block]:
    """Of the conversations, the tokens, the supervised tokens and the loss: the share of each group."""
    shares = {}
    for measure, field in _MEASURES.items():
        values = [getattr(sums, field) for sums in groups.values()]
        shares[measure] = [value / (sum(values) or 1) for value in values]
    names = list(map(show_condition, groups))
    columns = zip(*shares.values(), strict=True)
    rows = [(name, *(percent(share, 1) for share in row)) for name, row in zip(names, columns, strict=True)]
    note = (
        f"A {kind}'s share of the loss is its weight sum over the weight sum of all: how much it moves the model. By "
        "answer is its share with train.loss: answer, where long answers do not count more than short ones."
    )
    table = Table((kind, *(f"of {measure}" for measure in shares)), rows)
    return [Text(note), shares_chart(names, shares), table]


def _lengths(report: StoreReport) -> list[Block]:
    edges = _length_edges(report)
    names = [f"{below + 1:,} to {last:,}" if below + 1 < last else f"{last:,}" for below, last in pairwise(edges)]
    by_source = {
        source: [int(counts[below + 1 : last + 1].sum()) for below, last in pairwise(edges)]
        for source, counts in report.lengths.items()
    }
    rows = [
        (name, *(f"{number:,}" for number in (*numbers, sum(numbers))))
        for name, *numbers in zip(names, *by_source.values(), strict=True)
        if any(numbers)
    ]
    lengths = report.all_lengths
    marks = {name: quantile(lengths, share) for name, share in (("median", 0.5), ("90 %", 0.9), ("longest", 1.0))}
    marks["data.max_tokens"] = report.max_tokens

    def draw(axes: "Axes") -> None:
        bottom = np.zeros(len(names), np.int64)
        for number, numbers in enumerate(by_source.values()):
            axes.bar(np.arange(len(names)) + 0.5, numbers, width=0.88, bottom=bottom, color=colour_of(number))
            bottom += numbers
        for length in marks.values():
            axes.axvline(np.interp(length, edges, np.arange(len(edges))), color=INK, linestyle="--", linewidth=1)
        powers = [place for place, edge in enumerate(edges) if edge & (edge - 1) == 0 and edge]
        axes.set_xticks(powers, [f"{edges[place]:,}" for place in powers])
        axes.set_xlabel("tokens of an example")
        axes.set_ylabel("examples")
        axes.locator_params(axis="y", nbins=5, integer=True)
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")

    legend = [LegendEntry(source, colour_of(number)) for number, source in enumerate(report.lengths)]
    note = "Dashed, from the left: the median, 90 %, the longest, data.max_tokens."
    return [
        Text("Tokens of an example: " + ", ".join(f"{name} {length:,}" for name, length in marks.items()) + "."),
        Chart("Examples", "by their tokens", draw, legend, note, width=720, height=200),
        Table(("tokens", *report.lengths, TOTAL), rows, folded="As a table"),
    ]


def _length_edges(report: StoreReport) -> list[int]:
    """The borders of the bins of lengths, four to an octave; a bin holds its upper border, not its lower one."""
    lengths = np.flatnonzero(report.all_lengths)
    edges = np.unique(np.rint([0, *2.0 ** (np.arange(32 * 4) / 4)]))
    first = int(np.searchsorted(edges, lengths[0])) - 1
    last = int(np.searchsorted(edges, report.max_tokens))
    return [int(edge) for edge in edges[first : last + 1]]


def _funnel(report: StoreReport) -> list[Block]:
    nums_in = [counts.num_in for counts in report.records.values()]
    nums_kept = [counts.num_kept for counts in report.records.values()]
    left = num_in = sum(nums_in)
    rows = [("records in", *(f"{number:,}" for number in (num_in, *nums_in)), "")]
    bars = [(0.0, 1.0)]
    dropped = _by_name(counts.dropped for counts in report.records.values())
    for name, numbers, ids in [*dropped, ("kept", nums_kept, "")]:
        cells = (_part(part, whole) for part, whole in zip((sum(numbers), *numbers), (num_in, *nums_in), strict=True))
        rows.append((name, *cells, ids))
        bars.append(((left - sum(numbers)) / num_in, left / num_in))
        left -= sum(numbers)
    header = ("", TOTAL, *report.records, "some ids")
    note = "Each record is kept, or dropped for one reason. Shares are of the records of a source."
    return [Text(note), Table(header, rows, left=(0, len(header) - 1), bars=bars)]


def _changes(report: StoreReport) -> list[Block]:
    rows = [
        (name, *(f"{number:,}" for number in (sum(numbers), *numbers)), ids)
        for name, numbers, ids in _by_name(counts.actions for counts in report.records.values())
    ]
    header = ("", TOTAL, *report.records, "some ids")
    note = "How many records were changed in which way. A record may be changed in several ways, and dropped later."
    return [Text(note), Table(header, rows, left=(0, len(header) - 1))] if rows else []


def _by_name(of_sources: Iterable[Mapping[str, Tally]]) -> list[tuple[str, list[int], str]]:
    """Each reason or action, that of most records first: how many records of each source, and some ids."""
    by_source = list(of_sources)
    found = []
    for name in dict.fromkeys(chain.from_iterable(by_source)):
        tallies = [of_source.get(name, Tally()) for of_source in by_source]
        ids = islice(chain.from_iterable(tally.ids for tally in tallies), NUM_EXAMPLES)
        found.append((name, [tally.num_records for tally in tallies], ", ".join(map(show_id, ids))))
    return sorted(found, key=lambda row: (-sum(row[1]), row[0]))


def _overlong(report: StoreReport) -> list[Block]:
    counts, chosen = report.manifest.overlong, report.manifest.made_from["data"]["overlong"]
    if not counts["conversations"]:
        return []
    rows = []
    for choice in ("split", "truncate", "drop"):
        kept = ((counts[f"{choice}_{name}"], counts[name]) for name in ("tokens", "supervised_tokens"))
        cells = (cell for part, whole in kept for cell in (f"{part:,}", percent(part, whole)))
        rows.append((f"{choice} (this store)" if choice == chosen else choice, *cells))
    note = (
        f"{counts['conversations']:,} conversations are longer than data.max_tokens {report.max_tokens:,}: "
        f"{counts['tokens']:,} tokens, {counts['supervised_tokens']:,} of them supervised. What each choice of "
        "data.overlong keeps of these:"
    )
    return [Text(note), Table(("data.overlong", "tokens", "share", "supervised tokens", "share"), rows)]


def _packing(report: StoreReport) -> list[Block]:
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
    return [Text(note), Table(("packing.tokens_per_gpu", "fill", "steps an epoch", "examples a step"), rows)]


def _held_out(report: StoreReport) -> list[Block]:
    held_out = sum_by(report.held_out, 0, report.records)
    rows = [
        (name, *_counts(sums), percent(sums.conversations, sums.conversations + train.conversations))
        for (name, sums), train in zip(held_out.items(), report.by_source.values(), strict=True)
    ]
    note = [] if report.held_out else [Text("Nothing is held out.")]
    return [*note, Table(("source", *_COUNTS, "share of conversations"), rows)]


def _samples(report: StoreReport) -> list[Block]:
    note = Text(
        "A short, a median and a long example of each source, as the model sees it. A block is a turn, a thin gap the "
        "border of two tokens, ↵ a line break. Underlined tokens have a loss weight: the higher, the darker. Framed "
        "ones are special tokens. Hold the pointer over a token for its id and weight.",
        terminal="Each line begins with the loss weight of its tokens. Special tokens stand in ⟨⟩.",
    )
    return [note, *(Transcript(_title(one), one.head, one.num_hidden, one.tail) for one in report.samples)]


def _title(sample: Sample) -> str:
    return f"{sample.source}, {show_condition(sample.condition)}: {sample.num_tokens:,} tokens, {show_id(sample.id)}"


def _counts(sums: GroupSums) -> tuple[str, ...]:
    """The cells of _COUNTS."""
    return tuple(f"{n:,}" for n in (sums.conversations, sums.examples, sums.tokens, sums.supervised_tokens))


def _weight(sums: GroupSums) -> str:
    return ratio(sums.weight_sum, sums.supervised_tokens, ".4g")


def _part(part: int, whole: int) -> str:
    return f"{part:,} ({percent(part, whole)})" if part else "0"
