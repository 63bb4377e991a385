"""The report of a run says how it stands at any moment, what it learned and how fast it is, on a page and as text."""

import fcntl
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from matplotlib.figure import Figure

import ochat_train.report.__main__ as report
import ochat_train.report.page as page_module
from ochat_train.report.charts import INK, Chart, Curve, Curves, as_svg, colour_of, smooth
from ochat_train.report.page import blocks_as_text
from ochat_train.report.run import RunReport, column, read_run, weight_by_source
from ochat_train.report.run_sections import run_document, run_summary
from tests.test_report_plan import Nesting
from tests.test_report_store import Page
from tests.waiting import HANG_S

Event = dict[str, Any]
CONDITIONS = ("GPT4", "GPT3", "")
SOURCES = ("careful", "hasty", "old")
HOSTILE = "<script>alert('x')</script>&\"$\x1b[1m"
BEGIN = datetime(2026, 3, 1, 8, 30, tzinfo=UTC)


# ---- A run as it writes itself ----


def losses(at: float, conditions: Sequence[str], prefix: str, shift: float = 0.0) -> Event:
    """The six fields of an evaluation at this share of the run; those of later conditions are worse."""
    loss = {name: 0.9 + 2.5 * math.exp(-6 * at) + 0.3 * at + 0.4 * n + shift for n, name in enumerate(conditions)}
    mean = sum(loss.values()) / len(loss)
    return {
        f"{prefix}loss": mean,
        f"{prefix}loss_by_condition": loss,
        f"{prefix}perplexity": math.exp(mean),
        f"{prefix}perplexity_by_condition": {name: math.exp(value) for name, value in loss.items()},
        f"{prefix}accuracy": 1 / (1 + mean),
        f"{prefix}accuracy_by_condition": {name: 1 / (1 + value) for name, value in loss.items()},
    }


def probe_of(loss: float, at: float, has_other: bool) -> Event:
    return {"own": loss, "other": loss + 0.2 * at if has_other else None, "none": loss + 0.3 * at}


def evaluation(step: int, epoch: int, at: float, conditions: Sequence[str]) -> Event:
    weighted = losses(at, conditions, "")
    by_condition = {
        name: probe_of(loss, at, len(conditions) > 1) for name, loss in weighted["loss_by_condition"].items()
    }
    return {
        "event": "eval",
        "step": step,
        "epoch": epoch,
        **weighted,
        **losses(at, conditions, "unweighted_", shift=0.15),
        "probe": probe_of(weighted["loss"], at, len(conditions) > 1),
        "probe_by_condition": by_condition,
    }


def training_step(
    step: int, num_steps: int, steps_per_epoch: int, conditions: Sequence[str], sources: Sequence[str], skipped: int
) -> Event:
    random = np.random.default_rng(step)
    at = step / num_steps
    by_condition = {
        name: float(0.9 + 2.5 * math.exp(-6 * at) + 0.4 * n + random.normal(0, 0.12))
        if random.random() < 0.95
        else None
        for n, name in enumerate(conditions)
    }
    shares = random.dirichlet([40 / 4**n for n in range(len(sources))]).tolist()
    seconds = float(2.0 + random.gamma(2, 0.05) + (5 if step % 97 == 0 else 0))
    return {
        "event": "step",
        "step": step,
        "epoch": (step - 1) // steps_per_epoch,
        "loss": float(np.mean([loss for loss in by_condition.values() if loss is not None] or [1.0])),
        "loss_by_condition": by_condition,
        "examples_consumed": 10 * step,
        "progress": at,
        "lr": 1e-4 * min(1.0, at / 0.05) * (0.55 + 0.45 * math.cos(math.pi * at)),
        "grad_norm": None if skipped else float(random.lognormal(0, 0.35) * (40 if step % 131 == 0 else 1)),
        "skipped": bool(skipped),
        "tokens": 32_000,
        "supervised_tokens": 14_000,
        "tokens_per_s": 32_000 / seconds,
        "supervised_tokens_per_s": 14_000 / seconds,
        "fill": 0.99,
        "num_processes": 8,
        "seconds": seconds,
        "data_wait_s": float(random.gamma(2, 0.004)),
        "weight_by_source": dict(zip(sources, shares, strict=True)),
        "mfu": 0.9 / seconds,
        "peak_memory_bytes": 61_000_000_000 + 20_000_000 * min(step, 50),
        "time_left_s": (num_steps - step) * 2.1,
    }


def run_events(
    num_steps: int = 240,
    num_epochs: int = 4,
    *,
    conditions: Sequence[str] = CONDITIONS,
    sources: Sequence[str] = SOURCES,
    restarts: Sequence[int] = (100, 150),
    skips: Sequence[int] = (31, 32, 180),
    end: Event | None = None,
) -> Iterator[Event]:
    """The lines of a whole run: an evaluation every half epoch, and a checkpoint at the end of each."""
    per_epoch = num_steps // num_epochs
    start: Event = {
        "event": "start",
        "epoch": 0,
        "num_processes": 8,
        "device": "NVIDIA H100",
        "attention": "flash_attn",
    }
    yield start | {"step": 0, "started": f"{BEGIN:%Y-%m-%dT%H:%M:%SZ}", "resumed": None}
    yield evaluation(0, 0, 0.0, conditions)
    num_skipped = 0
    for step in range(1, num_steps + 1):
        if step - 1 in restarts:
            started = f"{BEGIN + timedelta(hours=step):%Y-%m-%dT%H:%M:%SZ}"
            yield start | {"step": step - 1, "started": started, "resumed": f"step-{step - 1:08d}"}
        num_skipped += step in skips
        line = training_step(step, num_steps, per_epoch, conditions, sources, step in skips)
        yield line | {"skipped_steps": num_skipped}
        if step % max(1, per_epoch // 2) == 0:
            at_end = {"epoch_end": step % per_epoch == 0}
            yield evaluation(step, line["epoch"], step / num_steps, conditions) | at_end
        if step % per_epoch == 0:
            path = f"step-{step:08d}"
            yield {"event": "save", "step": step, "kind": "checkpoint", "path": path, "seconds": 12.5, "bytes": 5000}
    yield {"event": "end", "step": num_steps, "epoch": num_epochs - 1, "reason": "finished"} | (end or {})


def write(run: Path, events: Sequence[Event] | Iterator[Event], tail: bytes = b"") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(event) + b"\n" for event in events) + tail)
    return run


def about(**changes: Any) -> Event:
    recipe = {"name": "chat", "train": {"epochs": 4, "max_steps": None}, "log": {"question": "Who are you?"}}
    recipe |= changes.pop("recipe", {})
    described = {"recipe": recipe, "commit": "c0ffee", "versions": {"torch": "2.13"}, "device": "cpu"}
    return described | {"num_processes": 2, "attention": "sdpa", "started": "2026-03-01T08:30:00Z"} | changes


def save(run: Path, path: str, num_bytes: int = 1000, conditions: Sequence[str] = CONDITIONS, **changes: Any) -> None:
    """A checkpoint, or a model, as far as the report looks at it."""
    folder = run / path
    (folder / "deepspeed").mkdir(parents=True)
    (folder / "deepspeed" / "weights").write_bytes(bytes(num_bytes))
    file = "checkpoint.json" if path.startswith("step-") else "ochat_train.json"
    (folder / file).write_bytes(orjson.dumps({"run": about(**changes), "conditions": conditions}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of several starts with what it saved."""
    run = write(tmp_path / "run", run_events())
    for path in ("step-00000180", "step-00000240", "models/step-00000120", "models/step-00000240"):
        save(run, path)
    return run


def as_text(report: RunReport) -> str:
    return page_module.as_text(run_document(report))


def as_html(report: RunReport) -> str:
    return page_module.as_html(run_document(report))


def as_summary(report: RunReport) -> str:
    return blocks_as_text(run_summary(report))


def titles(page: str) -> list[str]:
    return re.findall(r"<figcaption><b>(.*?)</b>", page)


def joined(text: str) -> str:
    return " ".join(text.split())


def cells_of(text: str, first: str) -> list[list[str]]:
    """The cells of each line that begins with a word."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines() if line.strip().startswith(f"{first}  ")]


def events_until(step: int, **changes: Any) -> list[Event]:
    """The lines of a run that was cut off after a step."""
    return [event for event in run_events(**changes) if event["step"] <= step and event["event"] != "end"]


# ---- How it stands ----


@pytest.mark.parametrize(
    ("reason", "step", "sentence"),
    [
        ("finished", 240, "Finished: all 240 steps are done."),
        (
            "max_steps",
            90,
            "Ended by train.max_steps at step 90 of about 240. With a higher one the same command goes on.",
        ),
        ("stopped", 90, "Stopped on request at step 90 of about 240. The same command goes on from step-00000060."),
        ("skipped", 90, "Stopped itself at step 90 of about 240: too many steps in a row had a loss or a gradient"),
    ],
)
def test_a_run_that_has_ended_says_why(tmp_path: Path, reason: str, step: int, sentence: str) -> None:
    end = {"event": "end", "step": step, "epoch": 1, "reason": reason, "best_epoch": None, "best_step": None}
    run = write(tmp_path / "run", [*events_until(step), end])
    save(run, "step-00000060")
    (run / "lock").write_text("{}")
    found = read_run(run)
    assert found.state == reason
    assert (
        sentence in joined(as_text(found))
        and sentence in Page(as_html(found)).text
        and sentence in joined(as_summary(found))
    )


def test_a_run_whose_lock_is_held_is_in_progress_and_else_has_crashed(tmp_path: Path) -> None:
    run = write(tmp_path / "run", events_until(90))
    unknown = joined(as_text(read_run(run)))
    assert "Started, at step 90 of about 240. Whether it still runs is not known; its last line is of 20" in unknown
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sentence = "In progress: step 90 of about 240 is done, about 5 min 15 s left."  # 150 steps of 2.1 s
        assert sentence in joined(as_text(read_run(run)))
        with pytest.raises(BlockingIOError), (run / "lock").open() as other:  # asking did not take the lock away
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    crashed = "Not running: it crashed or was killed after step 90 of about 240. The same command"
    assert f"{crashed} starts from the beginning: there is no checkpoint." in joined(as_text(read_run(run)))
    save(run, "step-00000060")
    (run / "step-00000080.partial").mkdir()
    assert f"{crashed} goes on from step-00000060." in joined(as_text(read_run(run)))
    save(run, "models/step-00000060", recipe={"train": {"epochs": 4, "max_steps": 200}})
    assert "killed after step 90 of 200 (train.max_steps). The same" in joined(as_text(read_run(run)))
    with (run / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nor did it keep it


def test_a_run_that_goes_on_after_its_end_has_not_ended(tmp_path: Path) -> None:
    events = list(run_events(restarts=(100,)))
    place = next(n for n, event in enumerate(events) if event["event"] == "start" and event["step"] == 100)
    stop = {"event": "end", "step": 100, "epoch": 1, "reason": "stopped", "best_epoch": 0, "best_step": 60}
    run = write(tmp_path / "run", [*events[:place], stop])
    assert read_run(run).state == "stopped"
    for more in (1, 5):
        write(run, [*events[:place], stop, *events[place : place + more]])
        assert (read_run(run).end, read_run(run).state) == (None, "unknown")


def test_runs_of_versions_that_wrote_no_end_are_told_by_their_progress(tmp_path: Path) -> None:
    run = write(tmp_path / "run", events_until(240))
    assert read_run(run).state == "finished"
    write(run, events_until(90))
    save(run, "step-00000060", recipe={"train": {"epochs": 4, "max_steps": 90}})
    assert read_run(run).state == "max_steps"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_run_can_be_looked_at_from_its_first_line_on(tmp_path: Path, number: int) -> None:
    """A start, an evaluation before the first step, a step."""
    run = write(tmp_path / "run", list(run_events())[:number], tail=b'{"event":"step","step":7,"lo')
    found = read_run(run)
    step = 1 if number == 3 else 0
    assert found.last_step == step
    assert f"Started, at step {step}" in as_text(found) and f"Started, at step {step}" in as_summary(found)
    assert "Best epoch: n" in as_text(found)
    Nesting(as_html(found))


@pytest.mark.parametrize("content", [None, b"", b'{"event":"st', b"[]\n17\n"])
def test_a_run_that_has_measured_nothing_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    what = "is not there" if content is None else "is empty"
    with pytest.raises(SystemExit, match=rf"^error: .* has no metrics yet: metrics\.jsonl {what}; name a run's folder"):
        report.main(["run", str(tmp_path)])
    assert not (tmp_path / "report.html").exists()


def test_lines_that_were_cut_off_are_left_out(tmp_path: Path) -> None:
    lines = [orjson.dumps(event) for event in run_events()]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines[:50], lines[50][:40], *lines[51:90], lines[90][:-1]]))
    kept = [orjson.loads(line) for n, line in enumerate(lines[:90]) if n != 50]
    assert read_run(tmp_path).steps == [event for event in kept if event["event"] == "step"]


def test_old_lines_without_the_new_fields_are_shown_as_far_as_they_go(tmp_path: Path) -> None:
    new = {
        "weight_by_source",
        "skipped_steps",
        "mfu",
        "peak_memory_bytes",
        "time_left_s",
        "probe",
        "probe_by_condition",
    }
    old = [
        {
            key: value
            for key, value in event.items()
            if key not in new and not key.startswith(("unweighted", "perplexity", "accuracy"))
        }
        for event in run_events()
        if event["event"] in ("step", "eval")
    ]
    found = read_run(write(tmp_path / "run", old))
    page, text = Page(as_html(found)), as_text(found)
    assert titles(page.page) == [
        *("Training loss", "Held-out loss", "Learning rate", "Gradient norm", "Tokens a second", "Data wait")
    ]
    assert cells_of(text, "skipped steps") == [["skipped steps", "3", "gradient not finite"]]
    assert "Best epoch: 3, held-out loss " in text
    assert not re.search(r"\bnan\b", text + page.text)
    assert "PROBE" not in text and "SOURCES" not in text and "STARTS" not in text


def test_a_run_without_a_held_out_split_shows_its_training_losses(tmp_path: Path) -> None:
    events = [event for event in run_events() if event["event"] != "eval"]
    found = read_run(write(tmp_path / "run", events))
    assert "Best epoch: not known, because nothing is held out (data.eval_fraction, data.eval_sources)." in as_text(
        found
    )
    steps = [event for event in events if event["event"] == "step"]
    first, last = (event["loss_by_condition"]["GPT3"] for event in (steps[0], steps[-1]))
    assert cells_of(as_summary(found), "training loss") == [["training loss", "step 1", "step 240"]]
    assert cells_of(as_summary(found), "GPT3") == [["GPT3", f"{first:.4f}", f"{last:.4f}"]]
    Nesting(as_html(found))


# ---- The figures ----


def test_the_figures_are_those_of_a_naive_recount(run: Path) -> None:
    steps = [event for event in run_events() if event["event"] == "step"]
    text = as_text(read_run(run))
    rates = sorted(event["tokens_per_s"] for event in steps[24:])
    seconds = sum(event["seconds"] for event in steps)
    assert cells_of(text, "steps") == [["steps", "240"]]
    assert cells_of(text, "progress")[0][1] == "100.0 %"
    assert cells_of(text, "epochs")[0][1:] == ["4", "of 4"]
    assert cells_of(text, "time in steps")[0][1] == f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    assert cells_of(text, "time in steps")[0][2] == "50 s of saving; 3 starts"
    assert cells_of(text, "tokens")[0][1:] == [f"{240 * 32_000:,}", f"{240 * 14_000:,} supervised"]
    assert cells_of(text, "tokens/s")[0][1] == f"{(rates[107] + rates[108]) / 2:,.0f}"
    assert cells_of(text, "skipped steps")[0][1] == "3"
    assert cells_of(text, "peak memory")[0][1:] == ["62.0 GB", "of the fullest process"]
    for name in SOURCES:
        shares = [event["weight_by_source"][name] for event in steps]
        expected = [f"{100 * share:.3g} %" for share in (sum(shares) / 240, min(shares), max(shares))]
        assert cells_of(text, name)[0][1:4] == expected


def test_steps_that_a_restart_undid_do_not_count(tmp_path: Path) -> None:
    """The run was killed after step 120, and started again from the checkpoint at 100."""
    events = list(run_events(restarts=(100,)))
    place = next(n for n, event in enumerate(events) if event["event"] == "start" and event["step"] == 100)
    undone = [event | {"loss": 99.0} for event in events[place + 1 : place + 21]]
    found = read_run(write(tmp_path / "run", [*events[:place], *undone, *events[place:]]))
    assert column(found.steps, "step").tolist() == list(range(1, 241))
    assert column(found.steps, "loss").max() < 10
    assert column(found.evaluations, "step").tolist() == list(range(0, 241, 30))


def test_a_source_that_a_step_does_not_name_has_no_weight_in_it(tmp_path: Path) -> None:
    events = list(run_events(4, 1, restarts=(), skips=()))
    steps = [event for event in events if event["event"] == "step"]
    for step, shares in zip(steps, ({"a": 1.0}, {"a": 0.5, "b": 0.5}, {}, {"b": 1.0}), strict=True):
        step["weight_by_source"] = shares
    found = weight_by_source(read_run(write(tmp_path / "run", events)).steps)
    np.testing.assert_equal(found, {"a": [1.0, 0.5, np.nan, 0.0], "b": [0.0, 0.5, np.nan, 1.0]})


# ---- The best epoch ----


def set_losses(events: list[Event], by_step: dict[int, float]) -> list[Event]:
    """The lines with other held-out losses after some steps."""
    return [
        event | {"loss": by_step[event["step"]]} if event["event"] == "eval" and event["step"] in by_step else event
        for event in events
    ]


def test_the_best_epoch_is_the_one_with_the_lowest_loss_at_its_end(tmp_path: Path) -> None:
    # Step 90 is the middle of an epoch, and the loss before the first step is none of an epoch.
    by_step = {0: 0.1, 60: 1.4, 90: 0.2, 120: 1.1, 180: 1.2, 240: 1.3}
    run = write(tmp_path / "run", set_losses(list(run_events()), by_step))
    found = read_run(run)
    assert [end["step"] for end in found.epoch_ends] == [60, 120, 180, 240]
    assert found.best is not None and (found.best["step"], found.best["epoch"]) == (120, 1)
    sentence = "Best epoch: 2, held-out loss 1.1000 at step 120. The last one, 4, is worse by 0.2000."
    lost = "The better model was not kept; checkpoint.models.every_epochs=1 keeps one of each epoch."
    assert f"{sentence} {lost}" in joined(as_text(found))
    save(run, "step-00000120")
    got = f"Get the better model by ochat export {run}/step-00000120 OUT."
    assert f"{sentence} {got}" in joined(as_summary(read_run(run)))
    save(run, "models/step-00000120")
    found = read_run(run)
    for shown in (joined(as_text(found)), joined(as_summary(found)), Page(as_html(found)).text):
        assert f"{sentence} The better model is {run}/models/step-00000120." in shown
    assert [row[-1] for row in cells_of(as_text(found), "120")] == ["best epoch"]


def test_an_epoch_whose_loss_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    events = [
        event | {"loss": None} if event["event"] == "eval" and event["step"] == 240 else event for event in run_events()
    ]
    text = joined(as_text(read_run(write(tmp_path / "run", events))))
    assert "Best epoch: 3, held-out loss 1.5528 at step 180. The last one, 4, has none." in text


def test_when_the_last_epoch_is_the_best_nothing_is_advised(tmp_path: Path) -> None:
    by_step = {60: 1.4, 120: 1.1, 180: 1.2, 240: 1.0}
    text = joined(as_text(read_run(write(tmp_path / "run", set_losses(list(run_events()), by_step)))))
    assert "Best epoch: 4, held-out loss 1.0000 at step 240, the last one." in text and "better model" not in text


# ---- The condition probe ----


@pytest.mark.parametrize(
    ("probe", "sentence", "verdict"),
    [
        ((1.0, 1.25, 9.0), "is lower by 0.250 than under another: the condition was learned.", "learned"),
        (
            (1.0, 1.009, 9.0),
            "is no different than under another (by 0.009): the condition was not learned.",
            "not learned",
        ),
        ((1.0, 0.9, 9.0), "is higher by 0.100 than under another: the condition misleads the model.", "misleading"),
        ((1.0, None, 1.5), "is lower by 0.500 than without one: the condition was learned.", "learned"),
    ],
)
def test_the_probe_is_put_into_words(
    tmp_path: Path, probe: tuple[float, float | None, float], sentence: str, verdict: str
) -> None:
    values = dict(zip(("own", "other", "none"), probe, strict=True))
    events = [
        event | {"probe": values, "probe_by_condition": {"GPT4": values, "GPT3": None}}
        if event["event"] == "eval" and event["step"] == 120
        else event | ({"probe": None, "probe_by_condition": None} if event["event"] == "eval" else {})
        for event in run_events()
    ]
    found = read_run(write(tmp_path / "run", events))
    whole = f"At step 120 the loss of answers under their own condition {sentence}"
    page = Page(as_html(found))
    assert whole in joined(as_text(found)) and whole in page.text
    (table,) = (table for table in page.tables if table[0][:4] == ["condition", "own", "other", "none"])
    shown = ["-" if loss is None else f"{loss:.4f}" for loss in probe]
    assert [row[:4] for row in table[1:]] == [["(all)", *shown], ["GPT4", *shown]]
    assert [row[5] for row in table[1:]] == [verdict] * 2
    assert [title for title in titles(page.page) if title.startswith("Probe")] == ["Probe, (all)", "Probe, GPT4"]


# ---- Charts ----


def test_a_smooth_curve_is_the_mean_around_each_place() -> None:
    values = np.random.default_rng(0).normal(5, 1, 57)
    for reach in (0, 1, 4, 100):
        naive = [values[max(0, i - reach) : i + reach + 1].mean() for i in range(57)]
        np.testing.assert_allclose(smooth(values, reach), naive, rtol=1e-12)  # sums of f64 in another order


def axes_of(chart: Chart) -> Any:
    """What a chart draws."""
    axes = Figure().subplots()
    chart.draw(axes)
    return axes


def chart_of(report: RunReport, title: str) -> Chart:
    blocks = [block for section in run_document(report).sections for block in section.blocks]
    (found,) = (block for block in blocks if isinstance(block, Chart) and block.title == title)
    return found


def lines_of(report: RunReport, title: str) -> list[tuple[str, float, str]]:
    """Colour, width and style of each line of a chart."""
    lines = axes_of(chart_of(report, title)).get_lines()
    return [(line.get_color(), line.get_linewidth(), line.get_linestyle()) for line in lines]


def curves(y: Sequence[float], scale: Any = "zero", **changes: Any) -> Curves:
    return Curves([Curve("a", np.arange(len(y), dtype=float), np.array(y), colour_of(3))], str, scale, **changes)


def test_values_that_differ_much_are_drawn_on_a_logarithmic_axis() -> None:
    for y, scale, unit in (
        ([1.0, 19.0], "auto", "u"),
        ([1.0, 21.0], "auto", "u, logarithmic"),
        ([0.0, 21.0], "auto", "u"),
        ([1.0, 1.0], "log", "u, logarithmic"),
    ):
        (chart,) = curves(y, scale).chart("T", "u")
        assert chart.unit == unit
        assert axes_of(chart).get_yscale() == ("log" if "log" in unit else "linear")


@pytest.mark.parametrize(
    ("y", "scale", "ticks"),
    [
        ([0, 1200], "zero", [0, 500, 1000]),
        ([0.14, 3.9], "log", [0.3, 1, 3]),
        ([0.1, 11], "log", [0.1, 0.3, 1, 3, 10]),
        ([1e-2, 200], "log", [0.01, 0.1, 1, 10, 100]),
    ],
)
def test_ticks_are_few_and_round(y: list[float], scale: Any, ticks: list[float]) -> None:
    (chart,) = curves(y, scale).chart("T", "u")
    axes = axes_of(chart)
    low, high = axes.get_ylim()
    assert [tick for tick in axes.get_yticks() if low <= tick <= high] == pytest.approx(ticks)


def test_a_curve_leaves_out_values_that_are_not_there_and_the_legend_names_the_last() -> None:
    (chart,) = curves([0.0, 10.0, np.nan, 5.0, np.nan], span=(0, 4)).chart("T", "u")
    assert [(entry.name, entry.colour, entry.value) for entry in chart.legend] == [("a", colour_of(3), "5.0")]
    assert chart.label == "T, u: a 5.0"
    (line,) = axes_of(chart).get_lines()
    np.testing.assert_equal(line.get_ydata(), [0.0, 10.0, np.nan, 5.0, np.nan])
    assert curves([np.nan, np.nan]).chart("T", "u") == []


def test_a_point_lies_where_its_values_are() -> None:
    """Colours are the page's variables, coordinates are in tenths of a pixel."""
    curve = Curve("a", np.array([0.0, 50.0, 100.0]), np.array([0.0, 10.0, 5.0]), colour_of(1))
    (chart,) = Curves([curve], str, span=(0, 100)).chart("T", "u")
    (path,) = re.findall(r'<path d="M([^"]*)" style="fill: none; stroke: var\(--c1\)', as_svg(chart))
    assert re.fullmatch(r"( \d+(\.\d)?){6} ?", path), path
    left, bottom, middle, top, right, half = map(float, path.split())
    assert left < 60 and right > 460 and middle == pytest.approx((left + right) / 2, abs=0.1)
    assert half == pytest.approx((bottom + top) / 2, abs=0.1) and top < bottom


def test_a_router_loss_is_drawn_from_its_least_value(run: Path) -> None:
    """With 8 experts a token it never is below 8."""
    found = read_run(run)
    steps = [event | {"router_loss": 8.1 + 0.01 * (number % 3)} for number, event in enumerate(found.steps)]
    low, high = axes_of(chart_of(replace(found, steps=steps), "Router loss")).get_ylim()
    assert 8 < low < 8.1 < high < 8.2


def test_restarts_skipped_steps_and_the_best_epoch_are_marked_where_they_were(run: Path) -> None:
    found = read_run(run)
    for title in ("Training loss", "Held-out accuracy", "Gradient norm", "Peak memory"):
        lines = axes_of(chart_of(found, title)).get_lines()
        assert [line.get_xdata()[0] for line in lines if line.get_linestyle() == ":"] == [100, 150]
    (marks,) = axes_of(chart_of(found, "Gradient norm")).collections
    assert [segment[0][0] for segment in marks.get_segments()] == [31, 32, 180]
    axes = axes_of(chart_of(found, "Held-out loss"))
    assert found.best is not None
    assert [(text.get_text(), text.get_position()[0]) for text in axes.texts] == [("best epoch", found.best["step"])]
    assert found.best["step"] in [line.get_xdata()[0] for line in axes.get_lines()]


def test_every_condition_and_source_has_its_curve(run: Path) -> None:
    found = read_run(run)
    thin, thick = 0.8, lines_of(found, "Training loss")[0][1]
    names = [(colour_of(number), width, "-") for number in range(3) for width in (thin, thick)]
    dotted = [line for line in lines_of(found, "Training loss") if line[2] == ":"]
    assert lines_of(found, "Training loss") == [(INK, thick, "-"), *names, *dotted]
    both = [(colour, thick, style) for colour in (INK, *map(colour_of, range(3))) for style in ("-", "--")]
    assert lines_of(found, "Held-out loss")[: len(both)] == both
    levels = [(colour_of(number), 1, "--") for number in range(3)]
    assert lines_of(found, "Share of the loss weight") == [*names, *dotted, *levels]


def test_the_conditions_together_have_a_curve_if_there_are_several(tmp_path: Path) -> None:
    for number, colours in ((1, [colour_of(0)]), (2, [INK, colour_of(0), colour_of(1)])):
        found = read_run(write(tmp_path / "run", run_events(conditions=CONDITIONS[:number])))
        assert [entry.colour for entry in chart_of(found, "Held-out loss").legend] == colours


def test_an_unweighted_curve_is_drawn_only_where_it_differs(tmp_path: Path) -> None:
    events = [
        event | {f"unweighted_{name}": event[name] for name in ("loss", "loss_by_condition")}
        if event["event"] == "eval"
        else event
        for event in run_events()
    ]
    found = read_run(write(tmp_path / "run", events))
    for title, has_dashes in (("Held-out loss", False), ("Held-out accuracy", True)):
        assert ("--" in [style for _, _, style in lines_of(found, title)]) is has_dashes


def figure_of(page: str, title: str) -> str:
    (found,) = (figure for figure in re.findall(r"<figure.*?</figure>", page, re.DOTALL) if f"<b>{title}</b>" in figure)
    return str(found)


def test_a_long_run_gives_a_small_page_on_which_a_single_spike_is_seen(tmp_path: Path) -> None:
    """100,000 steps, 2,000 evaluations, 30 restarts."""
    step = training_step(7, 100_000, 100, CONDITIONS, SOURCES, 0)
    random = np.random.default_rng(0)
    noise = random.lognormal(0, 0.3, 100_000).tolist()
    events: list[Event] = []
    for number in range(1, 100_001):
        factor = noise[number - 1]
        shares = {"careful": 0.6 / (1 + factor), "hasty": 0.4 / (1 + factor), "old": factor / (1 + factor)}
        values = {
            "step": number,
            "epoch": (number - 1) // 100,
            "progress": number / 100_000,
            "loss_by_condition": {name: 2 * factor for name in CONDITIONS},
            "loss": 2 * factor,
            "grad_norm": 1e6 if number == 54_321 else factor,
            "skipped": number % 500 == 0,
            "tokens_per_s": 15_000 * factor,
            "weight_by_source": shares,
            "data_wait_s": 0.01 * factor,
            "mfu": 0.4 * factor,
        }
        events.append(step | values)
        if number % 3000 == 0 and len(events) < 93_000:
            events.append({"event": "start", "step": number, "epoch": 0, "resumed": "x"})
        if number % 50 == 0:
            events.append(evaluation(number, (number - 1) // 100, number / 100_000, CONDITIONS))
    found = read_run(write(tmp_path / "run", events))
    page = as_html(found)
    assert len(page.encode()) < 1_500_000
    paths = re.findall(r'<path d="M([^"]*)" style="fill: none; stroke: var\(--c0\)', figure_of(page, "Gradient norm"))
    single, mean = ([float(number) for number in path.split()] for path in paths)
    left, top = min(zip(single[::2], single[1::2], strict=True), key=lambda point: point[1])
    share = (left - single[0]) / (single[-2] - single[0])
    assert share == pytest.approx((54_321 - 1) / (100_000 - 1), abs=1e-3) and top < min(mean[1::2]) - 20
    assert len(as_text(found).splitlines()) < 150


# ---- The page ----


@pytest.fixture
def hostile(tmp_path: Path) -> RunReport:
    """A run whose names are all hostile."""
    run = tmp_path / "run"
    events = [
        event | {"device": HOSTILE, "attention": HOSTILE, "resumed": HOSTILE} if event["event"] == "start" else event
        for event in run_events(conditions=(HOSTILE, "b"), sources=(HOSTILE, "d"))
    ]
    write(run, events)
    recipe = {"name": HOSTILE, "train": {"epochs": 4, "max_steps": None}, "log": {"question": HOSTILE}}
    save(run, "model", conditions=(HOSTILE, "b"), recipe=recipe, commit=HOSTILE, versions={HOSTILE: HOSTILE})
    return replace(read_run(run), replies={HOSTILE: HOSTILE, "b": "plain"})


def test_names_are_text_on_the_page_and_in_the_terminal(hostile: RunReport) -> None:
    page = Page(as_html(hostile))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "base", "use", "image"}
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {name for name in names if name in ("src", "href", "xlink:href", "srcset") or name.startswith("on")}
    visible = HOSTILE.replace("\x1b", "\\x1b")
    assert page.text.count(visible) >= 10
    for shown in (as_text(hostile), as_summary(hostile)):
        assert visible in shown and "\x1b" not in shown


def test_the_page_is_well_formed_and_loads_nothing(run: Path, hostile: RunReport) -> None:
    for found in (read_run(run), hostile):
        page = as_html(found)
        Nesting(page)
        assert "url(" not in page and "@import" not in page and "http" not in page
        for tag, attributes in Page(page).tags:
            if tag == "svg":
                is_hidden = attributes.get("aria-hidden") == "true"
                assert is_hidden or (attributes["role"] == "img" and attributes["aria-label"])


def test_the_page_has_the_tables_of_the_text(run: Path) -> None:
    found = read_run(run)
    text = as_text(found)
    tables = Page(as_html(found)).tables
    assert len(tables) == 8
    for table in tables:
        for row in table[1:]:
            cells = [cell for cell in row if cell]
            assert cells in cells_of(text, cells[0]), cells


def test_what_is_saved_is_listed_with_its_size_and_what_was_removed_is_counted(run: Path) -> None:
    save(run, "model", 2_500_000)
    size = sum(file.stat().st_size for file in (run / "model").rglob("*") if file.is_file())
    text = as_text(read_run(run))
    assert "2 older ones removed, as the recipe asks." in text  # of the four that the lines name
    assert cells_of(text, "model")[0][:3] == ["model", "model", f"{size / 1e6:.1f} MB"]
    places = re.findall(r"^  ((?:models/)?step-\d{8}) +(\w+) ", text, re.MULTILINE)
    assert places == [
        ("step-00000180", "checkpoint"),
        ("step-00000240", "checkpoint"),
        ("models/step-00000120", "model"),
        ("models/step-00000240", "model"),
    ]


def test_a_damaged_checkpoint_does_not_hide_the_rest(run: Path) -> None:
    for path in run.glob("*/*.json"):
        path.write_bytes(b"{")
    found = read_run(run)
    assert found.recipe["name"] == "chat"  # of a model
    for path in run.rglob("ochat_train.json"):
        path.unlink()
    found = read_run(run)
    assert (found.about, found.name, found.recipe) == ({}, "run", {})
    assert found.conditions == CONDITIONS
    assert "resolved recipe" not in as_html(found)


# ---- The command ----


def test_the_command_prints_what_matters_and_writes_a_page_whose_path_is_last(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.main(["run", str(run)])
    found = read_run(run)
    assert capsys.readouterr().out == f"{as_summary(found)}\n\n{run / 'report.html'}\n"
    assert (run / "report.html").read_text(encoding="utf-8") == as_html(found)
    report.main(["run", str(run), "--out", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.endswith(f"\n\n{tmp_path / 'page.html'}\n")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == as_html(found)


def test_the_command_writes_nothing_when_only_text_is_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(run.rglob("*"))
    report.main(["run", str(run), "--text"])
    assert capsys.readouterr().out == as_text(read_run(run)) + "\n"
    assert sorted(run.rglob("*")) == before


def test_the_model_replies_where_there_is_one(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate_replies(model: Path, question: str, conditions: Sequence[str]) -> dict[str, str]:
        return {name: f"{model.name} on {question!r} as {name!r}" for name in conditions}

    monkeypatch.setattr(report, "generate_replies", generate_replies)
    report.main(["run", str(run)])
    assert "question" not in capsys.readouterr().out
    save(run, "model")
    report.main(["run", str(run)])
    printed = capsys.readouterr().out
    replies = {name or "(no condition)": f"model on 'Who are you?' as {name!r}" for name in CONDITIONS}
    assert "question: Who are you?" in printed and f"model: {run}/model" in printed
    page = Page((run / "report.html").read_text(encoding="utf-8")).text
    for name, reply in replies.items():
        assert [name, reply] in cells_of(printed, name)
        assert reply in page


def test_a_model_that_does_not_reply_is_named_and_the_report_is_made(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate_replies(*_: Any) -> dict[str, str]:
        raise NotImplementedError("no cache")

    monkeypatch.setattr(report, "generate_replies", generate_replies)
    save(run, "model")
    report.main(["run", str(run)])
    printed = capsys.readouterr()
    assert "log.question is not answered" in printed.err and "no cache" in printed.err
    assert f"model: {run}/model" in printed.out and (run / "report.html").exists()


def test_a_report_without_a_model_loads_no_torch(run: Path) -> None:
    script = (
        "import sys\nimport ochat_train.report.__main__ as report\nreport.main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, "run", str(run)], check=True, capture_output=True, timeout=HANG_S)
