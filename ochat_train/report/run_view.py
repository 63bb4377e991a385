"""The report of a run, shown: how it stands, what it learned, how fast it is; as text, and with charts as a page."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ochat_train.report.charts import Axis, Chart, Curve, Floats, Scale, draw, smooth
from ochat_train.report.run import ALL, Evaluation, Probe, RunReport, Saved
from ochat_train.report.tables import (
    Table,
    align,
    note_lines,
    percent,
    printable,
    render_page,
    show_condition,
    show_duration,
    table_lines,
)

_LEAST_LEARNED = 0.01  # nats a token by which the own condition must be better, for it to count as learned
_SMOOTH_PARTS = 100  # a smooth curve is the mean over one part of so many, to either side
_TEXT_ROWS, _PAGE_ROWS = 16, 200  # of a table, at most
_BEST = "best epoch"
_NO_PROBE = Probe(np.nan, None, np.nan)
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 40  # characters
_BYTE_UNITS = ("bytes", "kB", "MB", "GB", "TB")


# ------------------------------------------------------------------------------------------------------- words


def _loss(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.4f}"


def _number(value: float | None) -> str:
    if value is None or not np.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _large(value: float) -> str:
    return f"{value / 1e9:,.2f} billion" if value >= 1e9 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{100 * value:.3g} %"


def _bytes(value: float) -> str:
    unit = 0
    while value >= 1000 and unit < len(_BYTE_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_BYTE_UNITS[unit]}"


def _group(name: str | None) -> str:
    """A condition, or all of them, for a reader."""
    return "all" if name is ALL else show_condition(name)


def _groups(report: RunReport) -> list[str | None]:
    """All conditions together, if there are several, and each."""
    return [*([ALL] if len(report.conditions) > 1 else []), *report.conditions]


def _state(report: RunReport) -> str:
    """How the run stands, in a sentence or two."""
    at = f"step {report.last_step:,}{_goal(report)}"
    resumable = [saved for saved in report.saved if saved.kind == "checkpoint"]
    again = f"goes on from {resumable[-1].path}" if resumable else "begins anew, because no checkpoint is there"
    left = report.steps.last("time_left_s")
    return {
        "running": f"In progress: {at} is done{f', about {show_duration(left)} left' if left else ''}.",
        "finished": f"Finished: all {report.last_step:,} steps are done.",
        "max_steps": f"Ended by train.max_steps at {at}. With a higher one the same command goes on.",
        "stopped": f"Stopped on request at {at}. The same command {again}.",
        "skipped": (
            f"Stopped itself at {at}: too many steps in a row had a loss or a gradient that is not finite "
            "(train.max_skipped)."
        ),
        "dead": f"Not running, and without an end: it crashed or was killed behind {at}. The same command {again}.",
        "unknown": f"Begun, at {at}. Whether it still runs is not known; its last line is of {_time(report)}.",
    }[report.state]


def _goal(report: RunReport) -> str:
    """Behind a step: of how many, if that is known and there are more."""
    whole, most = report.num_steps, report.max_steps
    if whole is None or whole == report.last_step:
        return ""
    if most is not None and report.last_step < most < whole:
        return f" of {most:,} (train.max_steps)"
    return f" of about {whole:,}"


def _time(report: RunReport) -> str:
    return f"{report.updated:%Y-%m-%d %H:%M} UTC"


def _best(report: RunReport) -> str:
    """The best epoch against the last one, and what to do where they differ."""
    best = report.best
    if best is None:
        if report.evaluations:
            return "Best epoch: none has ended yet."
        return "Best epoch: not known, because nothing is held out (data.eval_fraction)."
    last = report.epoch_ends[-1]
    found = f"Best epoch: {best.epoch}, held-out loss {_loss(best.weighted[ALL].loss)} at step {best.step:,}"
    if best is last:
        return f"{found}, the last one." if best.epoch else f"{found}, the only one so far."
    worse = last.weighted[ALL].loss - best.weighted[ALL].loss
    how = f"is worse by {worse:.4f}" if np.isfinite(worse) else "has none"
    return f"{found}. The last one, {last.epoch}, {how}. {_kept(report, best.step)}"


def _kept(report: RunReport, step: int) -> str:
    """What is left of the model after a step."""
    kept = {saved.kind: saved.path for saved in report.saved if saved.step == step}
    if "model" in kept:
        return f"The better model is {printable(report.path)}/{kept['model']}."
    if "checkpoint" in kept:
        return (
            f"Get the better model by python -m ochat_train.export {printable(report.path)}/{kept['checkpoint']} OUT."
        )
    return "The better model was not kept; checkpoint.models.every_epochs=1 keeps one of each epoch."


def _origin(report: RunReport) -> list[tuple[str, str]]:
    pairs = [("run", printable(report.path))]
    if report.starts and report.starts[0].started:
        pairs.append(("begun", f"{printable(report.starts[0].started).replace('T', ' ')[:16]} UTC"))
    pairs.append(("last line", _time(report)))
    hardware = report.starts[-1]._asdict() if report.starts else report.about
    if hardware.get("device"):
        pairs.append(("on", f"{hardware.get('num_processes')} x {printable(str(hardware['device']))}"))
        pairs.append(("attention", printable(str(hardware.get("attention")))))
    return pairs


def _headline(report: RunReport) -> list[tuple[str, str, str]]:
    """The figures that a person asks for first: name, value, remark."""
    steps, best = report.steps, report.best
    if not len(steps.step):
        return []
    progress, epochs = steps.last("progress") or 0.0, report.num_epochs
    skipped = max(int(steps.skipped.sum()), int(steps.last("skipped_steps") or 0))
    about = report.num_steps if report.num_steps != report.last_step else None
    others = [f"{show_duration(report.save_seconds)} of saving" if report.save_seconds else "without evaluations"]
    others += [_count(len(report.starts), "start")] if report.starts else []
    rows = [
        ("steps", f"{report.last_step:,}", f"of about {about:,}" if about else ""),
        ("progress", percent(progress, 1), "of the examples of all epochs"),
        (
            "epochs",
            f"{progress * epochs:.3g}" if epochs else f"{steps.epoch[-1] + 1}",
            f"of {epochs}" if epochs else "begun",
        ),
        (
            "time in steps",
            show_duration(steps.total("seconds")),
            "; ".join(others),
        ),
        ("tokens", _large(steps.total("tokens")), f"{_large(steps.total('supervised_tokens'))} supervised"),
        (
            "tokens/s",
            _number(steps.median("tokens_per_s")),
            f"{_number(steps.median('supervised_tokens_per_s'))} supervised",
        ),
        ("skipped steps", f"{skipped:,}", "gradient not finite" if skipped else ""),
    ]
    if best is not None:
        rows.append(("best held-out loss", _loss(best.weighted[ALL].loss), f"epoch {best.epoch}, step {best.step:,}"))
    if (mfu := steps.median("mfu")) is not None:
        rows.append(("MFU", percent(mfu, 1), "of the peak, median"))
    if np.isfinite(peaks := steps.columns["peak_memory_bytes"]).any():
        rows.append(("peak memory", _bytes(float(np.nanmax(peaks))), "of the fullest process"))
    return rows


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


# ------------------------------------------------------------------------------------------------------ tables


def _ends(report: RunReport) -> Table:
    """The loss of each condition at the start and at the end: the held-out one, or that of the steps without one."""
    steps = report.steps
    if ends := report.evaluations[:1] + report.evaluations[-1:]:
        kind, at = "held-out loss", [end.step for end in ends]
        losses = {name: [end.weighted[name].loss for end in ends] for name in _measured(report)}
    else:
        places = [0, -1] if len(steps.step) else []
        kind, at = "training loss", steps.step[places].tolist()
        losses = {name: values[places].tolist() for name, values in steps.loss_by_condition.items()}
    rows = [(show_condition(name), *map(_loss, losses[name])) for name in report.conditions if name in losses]
    return Table("ends", "Losses", "", (kind, *(f"step {number}" for number in at)), rows)


def _measured(report: RunReport) -> list[str]:
    """The conditions that were evaluated."""
    return [name for name in report.conditions if all(name in at.weighted for at in report.evaluations)]


def _training(report: RunReport) -> Table:
    """The training loss of each condition over parts of the run."""
    count = len(report.steps.step)
    parts = np.array_split(np.arange(count), min(5, count))
    header = ("condition", *(f"to step {report.steps.step[part[-1]]:,}" for part in parts), "")
    rows = [
        (_group(name), *(_loss(_mean(values[part])) for part in parts), _sparkline(values))
        for name, values in _training_losses(report)
    ]
    note = "Mean over the steps up to each, nats a token, weighted."
    return Table("training", "Training loss", note, header, rows, left=(0, len(parts) + 1))


def _training_losses(report: RunReport) -> Iterator[tuple[str | None, Floats]]:
    for name in _groups(report):
        values = report.steps.columns["loss"] if name is ALL else report.steps.loss_by_condition.get(name)
        if values is not None and np.isfinite(values).any():
            yield name, values


def _mean(values: Floats) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else np.nan


def _held_out(report: RunReport) -> Table:
    names = [name for name in _groups(report) if name is ALL or name in _measured(report)]
    best, ends = report.best, {end.step for end in report.epoch_ends}
    rows = []
    for at in report.evaluations:
        weighted, plain = at.weighted[ALL], at.unweighted[ALL]
        remark = _BEST if at is best else "end of the epoch" if at.step in ends else ""
        losses = (_loss(at.weighted[name].loss) for name in names)
        others = (_number(weighted.perplexity), _share(weighted.accuracy), _loss(plain.loss), _share(plain.accuracy))
        rows.append((f"{at.step:,}", f"{at.epoch}", *losses, *others, remark))
    note = "Weighted as in training; at the right also with every supervised token counting 1. Nats a token."
    header = (
        "step",
        "epoch",
        *(f"loss, {_group(name)}" if len(names) > 1 else "loss" for name in names),
        "perplexity",
        "accuracy",
        "loss, unweighted",
        "accuracy, unweighted",
        "",
    )
    return Table("held-out", "Held out", note, header, rows, left=(len(header) - 1,))


def _last_probe(report: RunReport) -> Evaluation | None:
    return next((at for at in reversed(report.evaluations) if at.probes), None)


def _gain(probe: Probe) -> float:
    """By how much the own condition is better than another; than none, where there is no other.

    Another one is the fair comparison: an answer under no condition at all was never trained, so that its loss may rise
    with training though no condition means anything.
    """
    return (probe.none if probe.other is None else probe.other) - probe.own


def _verdict(probe: Probe) -> str:
    gain = _gain(probe)
    if gain >= _LEAST_LEARNED:
        return "learned"
    return "misleading" if gain <= -_LEAST_LEARNED else "not learned"


def _probe_sentence(report: RunReport) -> str:
    at = _last_probe(report)
    if at is None:
        return ""
    probe = at.probes[ALL]
    against, gain = "without one" if probe.other is None else "under another", _gain(probe)
    meaning = {
        "learned": f"lower by {gain:.3f} than {against}: the condition was learned",
        "misleading": f"higher by {-gain:.3f} than {against}: the condition misleads the model",
        "not learned": f"no different than {against} (by {abs(gain):.3f}): the condition was not learned",
    }[_verdict(probe)]
    return f"At step {at.step:,} the loss of answers under their own condition is {meaning}."


def _probe(report: RunReport) -> Table:
    rows = []
    if (at := _last_probe(report)) is not None:
        for name in (name for name in _groups(report) if name in at.probes):
            probe = at.probes[name]
            rows.append((_group(name), *(_loss(loss) for loss in probe), f"{_gain(probe):+.4f}", _verdict(probe)))
    note = (
        "The mean weighted loss of held-out answers under their own, another and no condition. Learned: it is lower "
        f"by at least {_LEAST_LEARNED} under their own than under another, or than under none if there is no other."
    )
    header = ("condition", "own", "other", "none", "gain", "")
    return Table("probe", "Condition probe", note, header, rows, left=(0, 5))


def _sources(report: RunReport) -> Table:
    rows = [
        (
            printable(name),
            _share(_mean(shares)),
            *(_share(float(find(shares[np.isfinite(shares)]))) for find in (np.min, np.max)),
            _sparkline(shares),
        )
        for name, shares in report.steps.weight_by_source.items()
    ]
    note = (
        "A source's share of the loss weight: how much of the gradient is of it, in the whole run and in single steps."
    )
    header = ("source", "mean of all steps", "least", "most", "")
    return Table("sources", "Sources", note, header, rows, left=(0, 4))


def _speed(report: RunReport) -> Table:
    rows = []
    for name, values, form in _speeds(report):
        found = values[np.isfinite(values)]
        if len(found):
            numbers = (form(float(number)) for number in (np.median(found), found.min(), found.max()))
            rows.append((name, *numbers, _sparkline(values)))
    return Table("speed", "Optimisation and speed", "", ("", "median", "least", "most", ""), rows, left=(0, 4))


def _speeds(report: RunReport) -> list[tuple[str, Floats, Any]]:
    columns = report.steps.columns
    return [
        ("learning rate", columns["lr"], _number),
        ("gradient norm", columns["grad_norm"], _number),
        ("tokens/s", columns["tokens_per_s"], _number),
        ("supervised tokens/s", columns["supervised_tokens_per_s"], _number),
        ("MFU", columns["mfu"], _share),
        ("data wait", columns["data_wait_s"] / columns["seconds"], _share),
        ("peak memory", columns["peak_memory_bytes"], _bytes),
    ]


def _starts(report: RunReport) -> Table:
    rows = [
        (
            f"{start.step:,}",
            printable((start.started or "-").replace("T", " ").removesuffix("Z")),
            printable(start.resumed or "-"),
            f"{start.num_processes or '-'}",
            printable(start.device or "-"),
        )
        for start in report.starts
    ]
    header = ("behind step", "UTC", "resumed", "processes", "device")
    return Table("starts", "Starts", "", header, rows if len(rows) > 1 else [], left=(1, 2, 4))


def _saved(report: RunReport) -> Table:
    rows = [
        (
            saved.path,
            saved.kind,
            _bytes(saved.num_bytes),
            f"{saved.made:%Y-%m-%d %H:%M}",
            "-" if saved.seconds is None else show_duration(saved.seconds),
            _loss_at(report, saved),
        )
        for saved in report.saved
    ]
    note = f"{_count(report.num_removed, 'older one')} removed, as the recipe asks." if report.num_removed else ""
    header = ("folder", "", "size", "made, UTC", "saving took", "held-out loss")
    return Table("saved", "Checkpoints and models", note, header, rows, left=(0, 1))


def _loss_at(report: RunReport, saved: Saved) -> str:
    return next((_loss(at.weighted[ALL].loss) for at in report.evaluations if at.step == saved.step), "-")


def _sparkline(values: Floats) -> str:
    """The values in little columns: each the mean of a part of them."""
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    means = [part.mean() for part in np.array_split(values, min(_SPARK_WIDTH, len(values)))]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_SPARKS[round((mean - low) / span * (len(_SPARKS) - 1))] for mean in means)


# --------------------------------------------------------------------------------------------------------- text


def as_summary(report: RunReport) -> str:
    """What a person wants at the end of a run: how it stands, the best epoch, losses, replies."""
    has_model = any(saved.path == "model" for saved in report.saved)
    place = f"model: {printable(report.path)}/model" if has_model else f"run: {printable(report.path)}"
    lines = [*_sentences(report), "", place]
    if (ends := _ends(report)).rows:
        lines += ["", *align([ends.header, *ends.rows])]
    return "\n".join([*lines, *_reply_lines(report)])


def _sentences(report: RunReport) -> list[str]:
    """How the run stands, the best epoch and what the probe means, in lines for a terminal."""
    return [line for note in (_state(report), _best(report), _probe_sentence(report)) for line in note_lines(note)]


def _reply_lines(report: RunReport) -> list[str]:
    if not report.replies:
        return []
    replies = [(show_condition(name), printable(reply)) for name, reply in report.replies.items()]
    return ["", f"question: {printable(report.question)}", *(f"  {line}" for line in align(replies, left=(0, 1)))]


def as_text(report: RunReport) -> str:
    """The report for a terminal."""
    lines = [f"Run {printable(report.name)}", "", *_sentences(report), "", *align(_origin(report), left=(0, 1))]
    if headline := _headline(report):
        lines += ["", *align(headline, left=(0, 2))]
    for table in _tables(report):
        lines += table_lines(_few_rows(table, _TEXT_ROWS))
    return "\n".join([*lines, *_reply_lines(report)])


def _few_rows(table: Table, most: int) -> Table:
    """The table with some of its rows, if they are many: evenly chosen, the first, the last and the best."""
    count = len(table.rows)
    if count <= most:
        return table
    places = set(np.linspace(0, count - 1, most).round().astype(int).tolist())
    rows = [row for place, row in enumerate(table.rows) if place in places or row[-1] == _BEST]
    return replace(table, note=f"{table.note} {len(rows)} of {count:,} rows.".strip(), rows=rows)


def _tables(report: RunReport) -> list[Table]:
    """In the order in which a person wants them; those without rows are left out."""
    makers = (_training,) if len(report.steps.step) else ()
    tables = (make(report) for make in (*makers, _held_out, _probe, _sources, _speed, _starts, _saved))
    return [table for table in tables if table.rows]


# --------------------------------------------------------------------------------------------------------- page


def as_html(report: RunReport) -> str:
    """The report as one page that needs nothing else."""
    import yaml  # only a page shows the recipe

    tables = {table.key: _few_rows(table, _PAGE_ROWS) for table in _tables(report)}
    steps = [*report.steps.step.tolist(), *(at.step for at in report.evaluations)]
    first, last = min(steps, default=0), max(steps, default=0)
    axis = Axis(first, max(last, first + 1))
    restarts = [(start.step, "restart", "") for start in report.starts[1:] if first <= start.step <= last]

    def drawn(charts: Iterable[Chart]) -> list[dict[str, Any]]:
        marked = (replace(chart, marks=(*restarts, *chart.marks)) for chart in charts)
        return [drawing for chart in marked if (drawing := draw(chart, axis)) is not None]

    return render_page(
        "run.html.j2",
        {},
        title=f"Run {printable(report.name)}",
        lead=[sentence for sentence in (_state(report), _best(report)) if sentence],
        origin=_origin(report),
        headline=_headline(report),
        replies=[(show_condition(name), reply) for name, reply in report.replies.items()],
        question=report.question if report.replies else "",
        tables=tables,
        training=drawn([_training_chart(report, len(restarts))]),
        held_out=drawn(_held_out_charts(report)),
        probe=drawn(_probe_charts(report)),
        probe_sentence=_probe_sentence(report),
        sources=drawn([_source_chart(report)]),
        optimisation=drawn(_optimisation_charts(report)),
        speed=drawn(_speed_charts(report)),
        recipe=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True) if report.recipe else "",
        about=[
            *((name, str(version)) for name, version in report.about.get("versions", {}).items()),
            ("commit", str(report.about.get("commit") or "-")),
        ]
        if report.about
        else [],
    )


def _colour(report: RunReport, name: str | None) -> int | None:
    """A condition's place in the palette; ink for all of them together."""
    return None if name is ALL else report.conditions.index(name)


def _over_steps(
    report: RunReport, name: str, values: Floats, colour: int | None, *, thin: bool = True, is_log: bool = False
) -> Iterator[Curve]:
    """A curve of the training steps: as it is, thin, and its mean over a window on top, the geometric one if is_log."""
    is_there = np.isfinite(values)
    x, y = report.steps.step[is_there].astype(np.float64), values[is_there]
    if thin:
        yield Curve(name, x, y, colour, "thin", has_key=False)
    means = np.exp(smooth(np.log(y), _reach(report))) if is_log else smooth(y, _reach(report))
    yield Curve(name, x, means, colour)


def _reach(report: RunReport) -> int:
    """The places to either side over which a smooth curve is the mean."""
    return len(report.steps.step) // _SMOOTH_PARTS


def _training_chart(report: RunReport, num_restarts: int) -> Chart:
    curves = [
        curve
        for name, values in _training_losses(report)
        # Those of the conditions show where a spike is from.
        for curve in _over_steps(report, _group(name), values, _colour(report, name), thin=name is not ALL)
    ]
    note = f"Thin: single steps. Thick: the mean of the {2 * reach + 1:,} around." if (reach := _reach(report)) else ""
    note += " Dotted, upwards: a restart." if num_restarts else ""
    return Chart("training-loss", "Training loss", "nats a token", curves, _loss_tick, "auto", note)


def _loss_tick(value: float) -> str:
    return f"{value:.4g}"


def _held_out_charts(report: RunReport) -> Iterator[Chart]:
    x = np.array([at.step for at in report.evaluations], np.float64)
    marks = [] if report.best is None else [(report.best.step, "best", "best epoch")]
    names = [name for name in _groups(report) if name is ALL or name in _measured(report)]

    def chart(field: str, unit: str, form: Callable[[float], str], scale: Scale) -> Chart:
        curves = []
        for name in names:
            weighted = np.array([getattr(at.weighted[name], field) for at in report.evaluations], np.float64)
            plain = np.array([getattr(at.unweighted[name], field) for at in report.evaluations], np.float64)
            curves.append(Curve(_group(name), x, weighted, _colour(report, name)))
            if np.isfinite(plain).any() and not np.allclose(weighted, plain, rtol=1e-3, equal_nan=True):
                curves.append(Curve(_group(name), x, plain, _colour(report, name), "dashed", has_key=False))
        has_plain = any(curve.style == "dashed" for curve in curves)
        note = "Dashed: every supervised token counts 1, where that differs." if has_plain else ""
        return Chart(f"held-out-{field}", f"Held-out {field}", unit, curves, form, scale, note, marks=marks)

    yield chart("loss", "nats a token", _loss_tick, "auto")
    yield chart("perplexity", "exp(loss)", _number, "auto")
    yield chart("accuracy", "of supervised tokens", _share, "linear")


def _probe_charts(report: RunReport) -> Iterator[Chart]:
    probed = [at for at in report.evaluations if at.probes]
    x = np.array([at.step for at in probed], np.float64)
    for name in _groups(report):
        curves = []
        for colour, field in enumerate(Probe._fields):
            found = [getattr(at.probes.get(name, _NO_PROBE), field) for at in probed]
            y = np.array([np.nan if loss is None else loss for loss in found], np.float64)
            curves.append(Curve(field, x, y, colour))
        key = "probe-all" if name is ALL else f"probe-{report.conditions.index(name)}"
        yield Chart(key, f"Probe, {_group(name)}", "nats a token", curves, _loss_tick, "auto")


def _source_chart(report: RunReport) -> Chart:
    shares = report.steps.weight_by_source
    curves = [
        curve
        for colour, (name, values) in enumerate(shares.items())
        for curve in _over_steps(report, printable(name), values, colour)
    ]
    levels = [(_mean(values), colour) for colour, values in enumerate(shares.values())]
    note = "Dashed: the mean of the whole run."
    return Chart("source-shares", "Share of the loss weight", "of a step", curves, _share, note=note, levels=levels)


def _optimisation_charts(report: RunReport) -> Iterator[Chart]:
    columns = report.steps.columns
    lr = Curve("learning rate", report.steps.step.astype(np.float64), columns["lr"], 0)
    yield Chart("lr", "Learning rate", "at the end of a step", [lr], _number)
    skipped = report.steps.step[report.steps.skipped].tolist()
    note = "A mark at the top: a skipped step." if skipped else ""
    positive = np.where(columns["grad_norm"] > 0, columns["grad_norm"], np.nan)
    norm = [*_over_steps(report, "gradient norm", positive, 0, is_log=True)]
    yield Chart("grad-norm", "Gradient norm", "before clipping", norm, _number, "log", note, ticks=skipped)


def _speed_charts(report: RunReport) -> Iterator[Chart]:
    for key, title, unit, names, form in (
        ("tokens", "Tokens a second", "of all processes", ("tokens/s", "supervised tokens/s"), _number),
        ("mfu", "MFU", "of the peak", ("MFU",), _share),
        ("data-wait", "Data wait", "of a step", ("data wait",), _share),
        ("memory", "Peak memory", "of the fullest process", ("peak memory",), _bytes),
    ):
        curves = [
            curve
            for colour, (name, values, _) in enumerate(speed for speed in _speeds(report) if speed[0] in names)
            for curve in _over_steps(report, name, values, colour)
        ]
        yield Chart(key, title, unit, curves, form)
