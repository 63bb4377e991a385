"""The results of `table` as a document: the table itself, bars by category, what is missing, how it was measured."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ochat_train.evaluate.table_inputs import ALPACA, MT
from ochat_train.report.charts import CARD, INK, Chart, LegendEntry, colour_of
from ochat_train.report.page import Block, Document, Section, Table, Text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR_HEIGHT = 15  # pixels


def table_document(results: dict[str, Any]) -> Document:
    """The document of the results that `table` writes as JSON."""
    models, benchmarks = results["models"], results["benchmarks"]
    head: list[Block] = [
        Text(f"Judged by {results['judge']['model']} on {results['date'][:10]}.", is_lead=True),
        _summary(models, benchmarks),
        Text("In brackets: intervals of 95 %."),
    ]
    sections = []
    if mt := benchmarks.get(MT):
        sections.append(_scores(models))
        if mt["baseline"] is not None:
            sections.append(_comparisons(models, mt["baseline"]))
    if missing := _missing(models, benchmarks):
        sections.append(Section("missing", "What is missing", [Text(sentence) for sentence in missing]))
    sections.append(Section("measured", "How it was measured", [Text(words) for words in _method(benchmarks)]))
    return Document("Models side by side", head, sections)


def _summary(models: Sequence[dict[str, Any]], benchmarks: dict[str, Any]) -> Table:
    columns = {"Model": [row["name"] for row in models]}
    columns["Condition"] = ["-" if row["condition"] is None else row["condition"] for row in models]
    columns["Context"] = [f"{row['context']:,}" if row["context"] else "-" for row in models]
    if alpaca := benchmarks.get(ALPACA):
        columns[f"AlpacaEval (win rate %) v.s. {alpaca['baseline']}"] = [_rate(row[ALPACA]) for row in models]
    if mt := benchmarks.get(MT):
        if mt["baseline"] is not None:
            name = f"MT-bench (win rate adjusted %) v.s. {mt['baseline']}"
            columns[name] = [_rate(row[MT]) for row in models]
        columns["MT-bench (score)"] = [_score(row[MT]) for row in models]
    columns["$ERROR$"] = [f"{sum(len(row[name]['error']) for name in benchmarks):,}" for row in models]
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"} or "(" in name}
    left = [number for number, name in enumerate(columns) if name in ("Model", "Condition")]
    return Table(list(columns), list(zip(*columns.values(), strict=True)), left)


def _rate(found: dict[str, Any]) -> str:
    if found["win_rate"] is None:
        return "-"
    low, high = found["win_rate_95"]
    return f"{100 * found['win_rate']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _score(found: dict[str, Any]) -> str:
    if found["score"] is None:
        return "-"
    low, high = found["score_95"]
    return f"{found['score']:.2f} ({low:.2f} to {high:.2f})"


def _scores(models: Sequence[dict[str, Any]]) -> Section:
    categories = list(models[0][MT]["categories"])
    values = [[row[MT]["categories"][category]["score"] for category in categories] for row in models]
    turns = [[f"turn {number}", *column] for number, column in enumerate(_turns(models), start=1)]
    rows = [[name, *map(_plain, column)] for name, *column in zip(categories, *values, strict=True)]
    blocks: list[Block] = [
        _bars("MT-bench", "score from 1 to 10", categories, models, values, top=10, form="{:.1f}"),
        Table(["Category", *(row["name"] for row in models)], [*rows, *turns]),
    ]
    return Section("scores", "MT-bench by category", blocks)


def _turns(models: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [list(map(_plain, column)) for column in zip(*(row[MT]["turns"] for row in models), strict=True)]


def _plain(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"


def _comparisons(models: Sequence[dict[str, Any]], baseline: str) -> Section:
    categories = list(models[0][MT]["categories"])
    values = [
        [
            None if (rate := row[MT]["categories"][category]["win_rate"]) is None else 100 * rate
            for category in categories
        ]
        for row in models
    ]
    names = {"first": "wins", "second": "losses", "tie": "ties", "split": "split", "unclear": "unclear"}
    rows = [[row["name"], *(f"{row[MT]['outcomes'].get(outcome, 0):,}" for outcome in names)] for row in models]
    blocks: list[Block] = [
        _bars(f"Against {baseline}", "win rate adjusted, %", categories, models, values, top=100, form="{:.0f}"),
        Table(["Model", *names.values()], rows),
    ]
    return Section("comparisons", f"MT-bench against {baseline}", blocks)


def _bars(
    title: str,
    unit: str,
    categories: Sequence[str],
    models: Sequence[dict[str, Any]],
    values: Sequence[Sequence[float | None]],
    *,
    top: float,
    form: str,
) -> Chart:
    """For each category a bar of each model, with its value at the end."""
    width = 1 / (len(models) + 0.6)

    def draw(axes: "Axes") -> None:
        for number, heights in enumerate(values):
            for place, value in enumerate(heights):
                row = place + (number - (len(models) - 1) / 2) * width
                if value is None:
                    axes.text(0, row, " -", color=INK, va="center")
                    continue
                axes.barh(row, value, height=width, color=colour_of(number), edgecolor=CARD)
                axes.text(value, row, " " + form.format(value), color=INK, va="center")
        axes.set_yticks(range(len(categories)), [category.replace("$", r"\$") for category in categories])
        axes.set_xlim(0, 1.12 * top)
        axes.set_ylim(len(categories) - 0.5, -0.5)
        axes.set_xticks([top * step / 5 for step in range(6)])
        axes.set_xlabel(unit)
        axes.grid(False)
        axes.grid(True, axis="x")

    legend = [LegendEntry(row["name"], colour_of(number)) for number, row in enumerate(models)]
    height = 55 + round(len(categories) * _BAR_HEIGHT / width)
    return Chart(title, unit, draw, legend, height=height)


def _missing(models: Sequence[dict[str, Any]], benchmarks: dict[str, Any]) -> list[str]:
    sentences = []
    for row in models:
        for name in benchmarks:
            found = row[name]
            for names, what in (
                (found["error"], "longer than the model takes, judged as $ERROR$"),
                (found["unanswered"], "not answered, and in no figure"),
            ):
                if names:
                    sentences.append(f"{row['name']}, {name}: {len(names):,} {what}: {_listed(names)}.")
        if num := row.get(MT, {}).get("num_unrated"):
            sentences.append(f"{row['name']}, {MT}: turns without a rating, in no score: {num:,}.")
        if ALPACA in benchmarks and (num := row[ALPACA]["num_answered"] - row[ALPACA]["num_judged"]):
            sentences.append(f"{row['name']}, {ALPACA}: answers without a verdict, not in the rate: {num:,}.")
    return sentences


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(" ".join(name.split())[:60] for name in names[:10])
    return f"{shown} and {len(names) - 10:,} more" if len(names) > 10 else shown


def _method(benchmarks: dict[str, Any]) -> list[str]:
    sentences = []
    if mt := benchmarks.get(MT):
        sentences.append(
            f"MT-bench: {mt['num_questions']:,} questions. The judge grades each turn from 1 to 10 at temperature 0; "
            "the score is the mean of all grades, with an interval by bootstrap over the questions."
        )
        if mt["num_without_reference"]:
            sentences.append(
                f"{mt['num_without_reference']:,} questions of math, coding and reasoning were graded without a "
                "reference answer."
            )
        if mt["baseline"] is not None:
            sentences.append(
                "The win rate is (wins + ties / 2) / all. The judge reads both answers in both orders; opposite "
                "verdicts are a tie, unclear ones are left out; the interval is Wilson's."
            )
    if alpaca := benchmarks.get(ALPACA):
        sentences.append(
            f"AlpacaEval: {alpaca['num_questions']:,} instructions, judged by the prompt and counted by the code of "
            f"the alpaca_eval package (annotator {alpaca['annotator']}); the interval is 1.96 of its standard errors."
        )
    return sentences
