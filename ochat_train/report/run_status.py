"""How a run stands: in sentences, and in the figures that a person asks for first."""

import numpy as np
from rich.filesize import decimal

from ochat_train.report.page import percent, show_duration, show_number
from ochat_train.report.run import ALL, Event, Losses, RunReport, column, probe_of
from ochat_train.tokens.loss_forms import LOSS_FORMS

LEAST_LEARNED = 0.01  # nats a token by which the own condition must be better, for it to count as learned


def status(report: RunReport) -> list[str]:
    """How the run stands, its best epoch, and what the condition probe means if it was made."""
    return [sentence for sentence in (_state(report), _best(report), _probe_sentence(report)) if sentence]


def _state(report: RunReport) -> str:
    """How the run stands, in a sentence or two."""
    at = f"step {report.last_step:,}{_goal(report)}"
    resumable = [folder for folder in report.saved if folder.kind == "checkpoint"]
    again = f"goes on from {resumable[-1].path}" if resumable else "starts from the beginning: there is no checkpoint"
    left = report.steps[-1].get("time_left_s") if report.steps else None
    return {
        "running": f"In progress: {at} is done{f', about {show_duration(left)} left' if left else ''}.",
        "finished": f"Finished: all {report.last_step:,} steps are done.",
        "max_steps": f"Ended by train.max_steps at {at}. With a higher one the same command goes on.",
        "early_stop": f"Finished: stopped early at {at}, as train.early_stop asks.",
        "stopped": f"Stopped on request at {at}. The same command {again}.",
        "skipped": (
            f"Stopped itself at {at}: too many steps in a row had a loss or a gradient that is not finite "
            "(train.max_skipped)."
        ),
        "dead": f"Not running: it crashed or was killed after {at}. The same command {again}.",
        "unknown": f"Started, at {at}. Whether it still runs is not known; its last line is of {_minute(report)}.",
    }[report.state]


def _goal(report: RunReport) -> str:
    """Of how many steps, if that is known and there are more."""
    whole, most = report.num_steps, report.max_steps
    if whole is None or whole == report.last_step:
        return ""
    if most is not None and report.last_step < most < whole:
        return f" of {most:,} (train.max_steps)"
    return f" of about {whole:,}"


def _best(report: RunReport) -> str:
    """The best epoch against the last one, and what to do where they differ."""
    best = report.best
    if best is None:
        if report.evaluations:
            return "Best epoch: none has ended yet."
        return "Best epoch: not known, because nothing is held out (data.eval_fraction, data.eval_sources)."
    last = report.epoch_ends[-1]
    found = f"Best epoch: {best['epoch'] + 1}, held-out loss {show_loss(best['loss'])} at step {best['step']:,}"
    if best is last:
        return f"{found}, the last one." if best["epoch"] else f"{found}, the only one so far."
    how = "has none" if last["loss"] is None else f"is worse by {last['loss'] - best['loss']:.4f}"
    return f"{found}. The last one, {last['epoch'] + 1}, {how}. {_kept(report, best['step'])}"


def _kept(report: RunReport, step: int) -> str:
    """What is left of the model after a step."""
    kept = {folder.kind: folder.path for folder in report.saved if folder.step == step}
    if "model" in kept:
        return f"The better model is {report.path}/{kept['model']}."
    if "checkpoint" in kept:
        return f"Get the better model by ochat export {report.path}/{kept['checkpoint']} OUT."
    return "The better model was not kept; checkpoint.models.every_epochs=1 keeps one of each epoch."


def _probe_sentence(report: RunReport) -> str:
    if not (probed := probed_evaluations(report)):
        return ""
    losses = probe_of(probed[-1])[ALL]
    against, gain = "without one" if losses.other is None else "under another", losses.gain
    meaning = {
        "learned": f"lower by {gain:.3f} than {against}: the condition was learned",
        "misleading": f"higher by {-gain:.3f} than {against}: the condition misleads the model",
        "not learned": f"no different than {against} (by {abs(gain):.3f}): the condition was not learned",
    }[verdict(losses)]
    return f"At step {probed[-1]['step']:,} the loss of answers under their own condition is {meaning}."


def probed_evaluations(report: RunReport) -> list[Event]:
    return [event for event in report.evaluations if event.get("probe")]


def verdict(losses: Losses) -> str:
    if losses.gain >= LEAST_LEARNED:
        return "learned"
    return "misleading" if losses.gain <= -LEAST_LEARNED else "not learned"


def origin(report: RunReport) -> list[tuple[str, str]]:
    pairs = [("run", report.path)]
    if report.starts and report.starts[0].get("started"):
        pairs.append(("started", f"{start_time(report.starts[0])[:16]} UTC"))
    pairs.append(("last line", _minute(report)))
    if report.loss_form is not None:
        pairs.append(("loss", f"{report.loss_form}: {LOSS_FORMS[report.loss_form]}"))
    hardware = report.starts[-1] if report.starts else report.about
    if hardware.get("device"):
        pairs.append(("on", f"{hardware.get('num_processes')} x {hardware['device']}"))
        pairs.append(("attention", str(hardware.get("attention"))))
    return pairs


def key_figures(report: RunReport) -> list[tuple[str, str, str]]:
    steps, best = report.steps, report.best
    epochs = report.recipe.get("train", {}).get("epochs")
    skipped = max(sum(bool(event.get("skipped")) for event in steps), steps[-1].get("skipped_steps") or 0)
    others = [f"{show_duration(report.save_seconds)} of saving" if report.save_seconds else "without evaluations"]
    others += [count_of(len(report.starts), "start")] if report.starts else []
    tokens, supervised, seconds = (
        float(np.nansum(column(steps, name))) for name in ("tokens", "supervised_tokens", "seconds")
    )
    rows = [
        ("steps", f"{report.last_step:,}", _goal(report).strip()),
        ("progress", percent(report.progress, 1), "of the examples of all epochs"),
        (
            "epochs",
            f"{report.progress * epochs:.3g}" if epochs else f"{steps[-1]['epoch'] + 1}",
            f"of {epochs}" if epochs else "started",
        ),
        ("time in steps", show_duration(seconds), "; ".join(others)),
        ("tokens", _large(tokens), f"{_large(supervised)} supervised"),
        (
            "tokens/s",
            show_number(_median(report, "tokens_per_s")),
            f"{show_number(_median(report, 'supervised_tokens_per_s'))} supervised",
        ),
        ("skipped steps", f"{skipped:,}", "gradient not finite" if skipped else ""),
    ]
    if best is not None:
        when = f"epoch {best['epoch'] + 1}, step {best['step']:,}"
        rows.append(("best held-out loss", show_loss(best["loss"]), when))
    if np.isfinite(mfu := _median(report, "mfu")):
        rows.append(("MFU", percent(mfu, 1), "of the peak, median"))
    if np.isfinite(peaks := column(steps, "peak_memory_bytes")).any():
        rows.append(("peak memory", decimal(int(np.nanmax(peaks))), "of the fullest process"))
    return rows


def _median(report: RunReport, name: str) -> float:
    """Over the steps without the first tenth, in which a run warms up; nan where no step says it."""
    values = column(report.steps, name)[len(report.steps) // 10 :]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else np.nan


def start_time(start: Event) -> str:
    return str(start.get("started") or "-").replace("T", " ").removesuffix("Z")


def show_loss(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.4f}"


def _large(value: float) -> str:
    return f"{value / 1e9:,.2f} billion" if value >= 1e9 else f"{value:,.0f}"


def count_of(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _minute(report: RunReport) -> str:
    return f"{report.updated:%Y-%m-%d %H:%M} UTC"
