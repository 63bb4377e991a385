"""The report of a run: how it stands, what it learned, how fast it is, as sections of texts, tables and charts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import yaml
from rich.filesize import decimal

from ochat_train.report.charts import INK, Chart, Curve, Curves, Floats, Scale, colour_of, smooth
from ochat_train.report.leanings import leanings
from ochat_train.report.page import (
    Block,
    Document,
    Figures,
    Listing,
    Section,
    Table,
    Text,
    show_condition,
    show_duration,
    show_number,
)
from ochat_train.report.run import ALL, Losses, RunReport, by_condition, column, probe_of, weight_by_source
from ochat_train.report.run_status import (
    LEAST_LEARNED,
    count_of,
    key_figures,
    origin,
    probed_evaluations,
    show_loss,
    start_time,
    status,
    verdict,
)

_SMOOTH_PARTS = 100  # a smooth curve is the mean over one part of so many, to either side
_TRAINING_PARTS = 5  # of the run, each a column of the table of training losses
_MOST_ROWS = 40  # of a table
_BEST = "best epoch"
_AS_A_TABLE = "As a table"


def run_document(report: RunReport) -> Document:
    """The whole report."""
    sections = (
        Section("training", "Training", _training(report)),
        Section("held-out", "Held out", _held_out(report)),
        Section("checks", "Checks", _checks(report)),
        Section("probe", "Condition probe", _probe(report)),
        Section("leanings", "What conditions mean", leanings(report)),
        Section("replies", "Replies", _replies(report)),
        Section("sources", "Sources", _sources(report)),
        Section("speed", "Optimisation and speed", _speed(report)),
        Section("starts", "Starts", _starts(report)),
        Section("saved", "Checkpoints and models", _saved(report)),
        Section("recipe", "Recipe and versions", _recipe(report)),
    )
    head: list[Block] = [*_sentences(report), Table((), origin(report), left=(0, 1))]
    if report.steps:
        head.append(Figures(key_figures(report)))
    return Document(f"Run {report.name}", head, [section for section in sections if section.blocks])


def run_summary(report: RunReport) -> list[list[Block]]:
    """What a person wants at the end of a run, in groups: how it stands, where the model is, losses, replies."""
    has_model = any(folder.path == "model" for folder in report.saved)
    place = f"model: {report.path}/model" if has_model else f"run: {report.path}"
    ends = _losses_at_ends(report)
    losses: list[Block] = [ends] if ends.rows else []
    return list(filter(None, (_sentences(report), [Text(place)], losses, _replies(report))))


def _sentences(report: RunReport) -> list[Block]:
    return [Text(sentence, is_lead=True) for sentence in status(report)]


# ------------------------------------------------------------------------------------------------------- words


def _share(value: float) -> str:
    return f"{100 * value:.3g} %" if np.isfinite(value) else "-"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.3g} GB"


def _group(name: str | None) -> str:
    """A condition, or all of them, for a reader."""
    return "all" if name is ALL else show_condition(name)


def _groups(report: RunReport) -> list[str | None]:
    """All conditions together, if there are several, and each."""
    return [*([ALL] if len(report.conditions) > 1 else []), *report.conditions]


# The charts of speed: the names and fields of their curves, the text of a value, title and unit.
_SERIES: tuple[tuple[dict[str, str], Callable[[float], str], str, str], ...] = (
    ({"learning rate": "lr"}, show_number, "Learning rate", "at the end of a step"),
    ({"gradient norm": "grad_norm"}, show_number, "Gradient norm", "before clipping"),
    (
        {"tokens/s": "tokens_per_s", "supervised tokens/s": "supervised_tokens_per_s"},
        show_number,
        "Tokens a second",
        "of all processes",
    ),
    ({"router loss": "router_loss"}, show_number, "Router loss", "before its coefficient"),
    ({"largest expert": "largest_expert_share"}, _share, "Largest expert", "of the choices of a layer"),
    ({"MFU": "mfu"}, _share, "MFU", "of the peak"),
    ({"data wait": "data_wait_s"}, _share, "Data wait", "of a step"),
    ({"peak memory": "peak_memory_bytes"}, _gigabytes, "Peak memory", "of the fullest process"),
)


# ---------------------------------------------------------------------------------------------------- sections


def _training(report: RunReport) -> list[Block]:
    found = by_condition(report.steps, "loss")
    losses = {name: found[name] for name in _groups(report) if name in found and np.isfinite(found[name]).any()}
    if not losses:
        return []
    parts = np.array_split(np.arange(len(report.steps)), min(_TRAINING_PARTS, len(report.steps)))
    header = ("condition", *(f"to step {report.steps[part[-1]]['step']:,}" for part in parts))
    rows = [(_group(name), *(show_loss(_mean(values[part])) for part in parts)) for name, values in losses.items()]
    curves = [
        curve
        for name, values in losses.items()
        # Those of the conditions show where a spike is from.
        for curve in _over_steps(report, _group(name), values, _colour(report, name), has_thin=name is not ALL)
    ]
    note = f"Thin: single steps. Thick: the mean of the {2 * reach + 1:,} around." if (reach := _reach(report)) else ""
    if len(report.starts) > 1:
        note += " Dotted, upwards: a restart."
    return [
        Text("Weighted, nats a token. The table has the mean over the steps up to each that it names."),
        *_curves(report, curves, _loss_tick, "auto").chart("Training loss", "nats a token", note),
        Table(header, rows),
    ]


def _losses_at_ends(report: RunReport) -> Table:
    """The loss of each condition at the start and at the end: the held-out one, or that of the steps without one."""
    events, kind = (report.evaluations, "held-out loss") if report.evaluations else (report.steps, "training loss")
    ends = [*events[:1], *events[-1:]]
    losses = by_condition(ends, "loss")
    rows = [(show_condition(name), *map(show_loss, losses[name])) for name in report.conditions if name in losses]
    return Table((kind, *(f"step {event['step']}" for event in ends)), rows)


def _held_out(report: RunReport) -> list[Block]:
    evaluations, best, names = report.evaluations, report.best, _measured(report)
    if not evaluations:
        return []
    losses = by_condition(evaluations, "loss")
    columns = [
        ("step", [f"{event['step']:,}" for event in evaluations]),
        ("epoch", [f"{event['epoch']}" for event in evaluations]),
        *((f"loss, {_group(name)}" if len(names) > 1 else "loss", map(show_loss, losses[name])) for name in names),
        ("perplexity", map(show_number, column(evaluations, "perplexity"))),
        ("accuracy", map(_share, column(evaluations, "accuracy"))),
        ("loss, unweighted", map(show_loss, column(evaluations, "unweighted_loss"))),
        ("accuracy, unweighted", map(_share, column(evaluations, "unweighted_accuracy"))),
        ("", [_BEST if event is best else "end of the epoch" * bool(event.get("epoch_end")) for event in evaluations]),
    ]
    header, cells = zip(*columns, strict=True)
    return [
        Text("Weighted as in training; at the right of the table also with every supervised token counting 1."),
        *_held_out_chart(report, "loss", "nats a token", _loss_tick),
        *_held_out_chart(report, "perplexity", "exp(loss)", show_number),
        *_held_out_chart(report, "accuracy", "of supervised tokens", _share),
        *_few_rows(Table(header, list(zip(*cells, strict=True)), left=(len(header) - 1,), folded=_AS_A_TABLE)),
    ]


def _measured(report: RunReport) -> list[str | None]:
    """All conditions together, if there are several, and those that every evaluation has."""
    return [
        name
        for name in _groups(report)
        if name is ALL or all(name in (event.get("loss_by_condition") or ()) for event in report.evaluations)
    ]


def _held_out_chart(report: RunReport, field: str, unit: str, form: Callable[[float], str]) -> list[Chart]:
    x = column(report.evaluations, "step")
    weighted, unweighted = (by_condition(report.evaluations, name) for name in (field, f"unweighted_{field}"))
    nothing = np.full(len(x), np.nan)
    curves = []
    for name in _measured(report):
        values, others = (found.get(name, nothing) for found in (weighted, unweighted))
        curves.append(Curve(_group(name), x, values, _colour(report, name)))
        if np.isfinite(others).any() and not np.allclose(values, others, rtol=1e-3, equal_nan=True):
            curves.append(Curve(_group(name), x, others, _colour(report, name), "dashed"))
    has_dashes = any(curve.style == "dashed" for curve in curves)
    note = "Dashed: every supervised token counts 1, where that differs." if has_dashes else ""
    drawn = _curves(report, curves, form, "linear" if field == "accuracy" else "auto")
    best = report.best
    drawn = replace(drawn, best=None if best is None else best["step"])
    return drawn.chart(f"Held-out {field}", unit, note)


def _checks(report: RunReport) -> list[Block]:
    """The scores of generated answers: a chart of each check, and a table of the last evaluation that has them."""
    checked = report.checked
    if not checked:
        return []
    x = column(checked, "step")
    charts: list[Block] = []
    for name in dict.fromkeys(name for event in checked for name in event["checks"]):
        scores = [event["checks"].get(name, {}) for event in checked]
        conditions = dict.fromkeys(condition for found in scores for condition in found)
        curves = [
            Curve(_group(one), x, column([found.get(one, {}) for found in scores], "score"), colour_of(number))
            for number, one in enumerate(conditions)
        ]
        charts += _curves(report, curves, _share).chart(f"Check {name}", "mean score of the answers")
    rows = [
        (
            name,
            _group(condition),
            "-" if found["score"] is None else _share(found["score"]),
            " to ".join(map(_share, found["interval_95"] or ())),
            *(f"{found[field]:,}" for field in ("num", "num_truncated", "num_failed")),
        )
        for name, by_condition in checked[-1]["checks"].items()
        for condition, found in by_condition.items()
    ]
    header = ("check", "condition", "score", "95 % interval", "answers", "cut", "not scored")
    note = (
        f"Greedy answers after step {checked[-1]['step']:,}; the answers themselves are in {report.path}/checks. Cut: "
        "at max_new_tokens. Not scored: the check's function failed."
    )
    return [Text(note), Table(header, rows, left=(0, 1)), *charts]


def _probe(report: RunReport) -> list[Block]:
    if not (probed := probed_evaluations(report)):
        return []
    last = probe_of(probed[-1])
    rows = [
        (_group(name), *map(show_loss, last[name]), f"{last[name].gain:+.4f}", verdict(last[name]))
        for name in _groups(report)
        if name in last
    ]
    x = column(probed, "step")
    charts = []
    for name in _groups(report):
        found = [probe_of(event).get(name) for event in probed]
        curves = [
            Curve(field, x, column([losses._asdict() if losses else {} for losses in found], field), colour_of(colour))
            for colour, field in enumerate(Losses._fields)
        ]
        charts += _curves(report, curves, _loss_tick, "auto").chart(f"Probe, {_group(name)}", "nats a token")
    note = (
        "The mean weighted loss of held-out answers under their own, another and no condition. Learned: it is lower "
        f"by at least {LEAST_LEARNED} under their own than under another, or than under none if there is no other."
    )
    return [Text(note), Table(("condition", "own", "other", "none", "gain", ""), rows, left=(0, 5)), *charts]


def _replies(report: RunReport) -> list[Block]:
    if not report.replies:
        return []
    replies = [(show_condition(name), reply) for name, reply in report.replies.items()]
    return [Text(f"question: {report.question}"), Table((), replies, left=(0, 1))]


def _sources(report: RunReport) -> list[Block]:
    shares = weight_by_source(report.steps)
    if not shares:
        return []
    curves = [
        curve
        for number, (name, values) in enumerate(shares.items())
        for curve in _over_steps(report, name, values, colour_of(number))
    ]
    means = [(_mean(values), colour_of(number)) for number, values in enumerate(shares.values())]
    drawn = replace(_curves(report, curves, _share), levels=means)
    rows = [
        (name, *map(_share, (_mean(values), np.nanmin(values), np.nanmax(values)))) for name, values in shares.items()
    ]
    return [
        Text(
            "A source's share of the loss weight: how much of the gradient is of it, in all steps and in single ones."
        ),
        *drawn.chart("Share of the loss weight", "of a step", "Dashed: the mean of the whole run."),
        Table(("source", "mean of all steps", "least", "most"), rows),
    ]


def _speed(report: RunReport) -> list[Block]:
    steps, skipped = report.steps, [event["step"] for event in report.steps if event.get("skipped")]
    charts: list[Block] = []
    rows = []
    for fields, form, title, unit in _SERIES:
        is_norm = "gradient norm" in fields
        curves: list[Curve] = []
        for number, (name, field) in enumerate(fields.items()):
            values = column(steps, field) / (column(steps, "seconds") if field == "data_wait_s" else 1)
            if np.isfinite(values).any():
                rows.append((name, *map(form, (np.nanmedian(values), np.nanmin(values), np.nanmax(values)))))
                curves += _over_steps(report, name, values, colour_of(number), is_log=is_norm)
        drawn = _curves(report, curves, form, "log" if is_norm else "zero")
        charts += replace(drawn, skipped=skipped if is_norm else ()).chart(title, unit)
    note = [Text("Marks above the gradient norm: skipped steps.")] if skipped else []
    return [*note, *charts, Table(("", "median", "least", "most"), rows, folded=_AS_A_TABLE)] if rows else []


def _starts(report: RunReport) -> list[Block]:
    rows = [
        (
            f"{start['step']:,}",
            start_time(start),
            start.get("resumed") or "-",
            f"{start.get('num_processes') or '-'}",
            start.get("device") or "-",
        )
        for start in report.starts
    ]
    header = ("after step", "UTC", "resumed", "processes", "device")
    return _few_rows(Table(header, rows, left=(1, 2, 4))) if len(rows) > 1 else []


def _saved(report: RunReport) -> list[Block]:
    losses = {event["step"]: event.get("loss") for event in report.evaluations}
    rows = [
        (
            folder.path,
            folder.kind,
            decimal(folder.num_bytes),
            f"{folder.made:%Y-%m-%d %H:%M}",
            "-" if folder.seconds is None else show_duration(folder.seconds),
            show_loss(losses.get(folder.step)),
        )
        for folder in report.saved
    ]
    header = ("folder", "", "size", "made, UTC", "saving took", "held-out loss")
    removed = f"{count_of(report.num_removed, 'older one')} removed, as the recipe asks."
    notes = [Text(removed)] if report.num_removed else []
    return [*notes, *_few_rows(Table(header, rows, left=(0, 1)))] if rows else []


def _recipe(report: RunReport) -> list[Block]:
    if not report.about:
        return []
    versions = {**report.about.get("versions", {}), "commit": report.about.get("commit") or "-"}
    recipe = yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True)
    lines = "\n".join(f"{name} {version}" for name, version in versions.items())
    return [Listing("The resolved recipe", recipe), Listing("Versions", lines)]


# ------------------------------------------------------------------------------------------------------ shared


def _few_rows(table: Table) -> list[Block]:
    """The table; if it has many rows, some of them, evenly chosen, with the first, the last and the best."""
    count = len(table.rows)
    if count <= _MOST_ROWS:
        return [table]
    places = set(np.linspace(0, count - 1, _MOST_ROWS).round().astype(int).tolist())
    kept = [row for place, row in enumerate(table.rows) if place in places or row[-1] == _BEST]
    return [Text(f"{len(kept)} of {count:,} rows."), replace(table, rows=kept)]


def _mean(values: Floats) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else np.nan


def _loss_tick(value: float) -> str:
    return f"{value:.4g}"


def _colour(report: RunReport, name: str | None) -> str:
    """A condition's colour by its place; ink for all of them together."""
    return INK if name is ALL else colour_of(report.conditions.index(name))


def _reach(report: RunReport) -> int:
    """The places to either side over which a smooth curve is the mean."""
    return len(report.steps) // _SMOOTH_PARTS


def _over_steps(
    report: RunReport, name: str, values: Floats, colour: str, *, has_thin: bool = True, is_log: bool = False
) -> Iterator[Curve]:
    """A curve of the training steps: as it is, thin, and its mean over a window on top, the geometric one if is_log."""
    is_there = np.isfinite(values) & ((values > 0) | (not is_log))
    x, y = column(report.steps, "step")[is_there], values[is_there]
    if has_thin:
        yield Curve(name, x, y, colour, "thin")
    means = np.exp(smooth(np.log(y), _reach(report))) if is_log else smooth(y, _reach(report))
    yield Curve(name, x, means, colour)


def _curves(report: RunReport, curves: Sequence[Curve], form: Callable[[float], str], scale: Scale = "zero") -> Curves:
    """The curves on the axis of all charts, with its restarts."""
    steps = [event["step"] for event in (*report.steps, *report.evaluations, *report.checked)]
    first, last = min(steps, default=0), max(steps, default=0)
    restarts = [start["step"] for start in report.starts[1:] if first <= start["step"] <= last]
    return Curves(curves, form, scale, span=(first, max(last, first + 1)), restarts=restarts)
