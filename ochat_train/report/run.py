"""The facts of a run at any moment: read_run(RUN) -> RunReport, from what it writes while it trains."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from ochat_train.files import STEP_FOLDERS, read_json_lines, try_lock
from ochat_train.tokens.loss_forms import LossForm
from ochat_train.training.best_epoch import best_epoch

Floats = npt.NDArray[np.float64]
Event = dict[str, Any]  # a line of metrics.jsonl; docs/runs.md has its fields
State = Literal["running", "finished", "max_steps", "early_stop", "stopped", "skipped", "dead", "unknown"]

ALL = None  # beside the conditions: all of them together
_MOST_REPLY_TOKENS = 96


# ------------------------------------------------------------------------------------------------------- facts


class Losses(NamedTuple):
    """The loss of the same held-out answers under their own, another and no condition. other: None of one alone."""

    own: float
    other: float | None
    none: float

    @property
    def gain(self) -> float:
        """By how much their own condition is better than another; than none, where there is no other.

        Another one is the fair comparison: an answer under no condition at all was never trained, so that its loss may
        rise with training though no condition means anything.
        """
        return (self.none if self.other is None else self.other) - self.own


class SavedFolder(NamedTuple):
    """A checkpoint or a model that is there. path: below the run; step: None if its name does not say it."""

    kind: Literal["checkpoint", "model"]
    path: str
    step: int | None
    num_bytes: int
    made: datetime
    seconds: float | None


@dataclass(frozen=True, slots=True)
class RunReport:
    """The facts of a run.

    updated: when it last wrote a line. steps, evaluations, starts: its lines of these kinds, steps ascending, without
    those that a restart undid; no evaluations if nothing is held out. checked: evaluations with checks. end: how the
    last start ended. is_held: whether a process holds the run's lock; None if it never had one. num_removed:
    checkpoints and models that were saved and are not there. about: what a checkpoint or a model says of the run
    (recipe, commit, versions, ...), empty before the first is saved. replies: of RUN/model to the recipe's
    log.question, by condition. leanings: of `write_leanings`, for the newest probe; empty without one.
    """

    path: str
    updated: datetime
    steps: Sequence[Event]
    evaluations: Sequence[Event]
    checked: Sequence[Event]
    starts: Sequence[Event]
    end: Event | None
    is_held: bool | None
    saved: tuple[SavedFolder, ...]
    num_removed: int
    save_seconds: float
    conditions: tuple[str, ...]
    about: dict[str, Any]
    replies: dict[str, str]
    leanings: dict[str, Any]

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's where no recipe is saved yet."""
        return str(self.recipe.get("name") or Path(self.path).resolve().name)

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe; empty before a checkpoint or a model is saved."""
        return dict(self.about.get("recipe", {}))

    @property
    def loss_form(self) -> LossForm | None:
        """What the loss weights of its losses are the weights of; None where no start says it."""
        return self.starts[-1].get("loss_form") if self.starts else None

    @property
    def question(self) -> str:
        """What the replies reply to."""
        return str(self.recipe["log"]["question"])

    @property
    def last_step(self) -> int:
        """The steps done."""
        return max(
            (event["step"] for event in (*self.steps[-1:], *self.evaluations[-1:], *self.starts[-1:])), default=0
        )

    @property
    def progress(self) -> float:
        """The share of the examples of all epochs that is done."""
        return float(self.steps[-1].get("progress") or 0.0) if self.steps else 0.0

    @property
    def num_steps(self) -> int | None:
        """About how many steps all epochs have, from the share of the examples done; None before the first step."""
        return round(self.last_step / self.progress) if self.progress else None

    @property
    def max_steps(self) -> int | None:
        """The recipe's train.max_steps, unless the run has gone beyond it, with another recipe."""
        max_steps: int | None = self.recipe.get("train", {}).get("max_steps")
        return None if max_steps is None or max_steps < self.last_step else max_steps

    @property
    def state(self) -> State:
        """Whether it runs, and why not."""
        reason: State | None = None if self.end is None else self.end["reason"]
        if self.is_held and reason not in (
            "finished",
            "max_steps",
            "early_stop",
        ):  # of those the model may still be exported
            return "running"
        if reason is not None:
            return reason
        if self.progress >= 1:
            return "finished"
        if self.max_steps is not None and self.max_steps == self.last_step:
            return "max_steps"
        return "unknown" if self.is_held is None else "dead"

    @property
    def epoch_ends(self) -> list[Event]:
        """The evaluations at the end of an epoch."""
        return [event for event in self.evaluations if event.get("epoch_end")]

    @property
    def best(self) -> Event | None:
        """Of those the one with the lowest held-out loss."""
        best = best_epoch(self.evaluations)
        return next((event for event in self.epoch_ends if best is not None and event["step"] == best.step), None)


def column(events: Iterable[Event], field: str) -> Floats:
    """f64[n], a field of each event; nan where an event does not have it, or it is null."""
    return _floats(event.get(field) for event in events)


def by_condition(events: Sequence[Event], field: str) -> dict[str | None, Floats]:
    """f64[n] for all conditions together, ALL, and for each that an event names."""
    rows = [{ALL: event.get(field), **(event.get(f"{field}_by_condition") or {})} for event in events]
    return {name: _floats(row.get(name) for row in rows) for name in dict.fromkeys(chain.from_iterable(rows))}


def weight_by_source(steps: Sequence[Event]) -> dict[str, Floats]:
    """f64[n], each source's share of the loss weight. One that a step does not name has no weight in it; a step that
    names nothing is nan."""
    rows = [event.get("weight_by_source") for event in steps]
    names = dict.fromkeys(name for row in rows for name in row or ())
    return {name: _floats(row.get(name, 0.0) if row else None for row in rows) for name in names}


def probe_of(evaluation: Event) -> dict[str | None, Losses]:
    """The condition probe of an evaluation, of all conditions together and of each; empty when not made."""
    if not evaluation.get("probe"):
        return {}
    probes = {ALL: evaluation["probe"], **(evaluation.get("probe_by_condition") or {})}
    return {name: Losses(probe["own"], probe["other"], probe["none"]) for name, probe in probes.items() if probe}


def _floats(values: Iterable[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], np.float64)


# ----------------------------------------------------------------------------------------------------- reading


def read_run(run: Path) -> RunReport:
    """The facts of a run at any moment. Raises ValueError when it has not measured anything yet."""
    metrics = run / "metrics.jsonl"
    events = _without_undone([line for line in read_json_lines(metrics) if "event" in line])
    if not events:
        raise ValueError(
            f"{run} has no metrics yet: {metrics.name} {'is empty' if metrics.is_file() else 'is not there'}; name a "
            "run's folder, checkpoint.dir of its recipe, once its first step is done"
        )
    steps, evaluations, starts, saves = (
        [event for event in events if event["event"] == kind] for kind in ("step", "eval", "start", "save")
    )
    saved = _find_saved(run, saves)
    about = _read_about(run, saved)
    found = chain.from_iterable(event.get("loss_by_condition") or () for event in (*evaluations, *steps))
    ended = next((event for event in reversed(events) if event["event"] in ("start", "step", "end")), None)
    return RunReport(
        path=str(run),
        updated=_modified(metrics),
        steps=steps,
        evaluations=evaluations if any(event.get("loss") is not None for event in evaluations) else [],
        checked=[event for event in evaluations if event.get("checks")],
        starts=starts,
        end=ended if ended is not None and ended["event"] == "end" else None,
        is_held=_is_held(run / "lock"),
        saved=saved,
        num_removed=len({event["path"] for event in saves} - {folder.path for folder in saved}),
        save_seconds=sum(event.get("seconds") or 0.0 for event in saves),
        conditions=tuple(dict.fromkeys([*about.pop("conditions", ()), *found])),
        about=about,
        replies={},
        leanings=_read_leanings(run, evaluations),
    )


def _read_leanings(run: Path, evaluations: Iterable[Event]) -> dict[str, Any]:
    """What leanings.json holds, if it is of the newest probe; else empty."""
    steps = [event["step"] for event in evaluations if event.get("probe")]
    with suppress(OSError, orjson.JSONDecodeError, KeyError):
        found: dict[str, Any] = orjson.loads((run / "leanings.json").read_bytes())
        return found if found["step"] in steps[-1:] else {}
    return {}


def _without_undone(events: Iterable[Event]) -> list[Event]:
    """The events without those of steps that a later start undid: it went on from an earlier step."""
    kept: list[Event] = []
    for event in events:
        if event["event"] == "start":
            kept = [other for other in kept if other["step"] <= event["step"]]
        kept.append(event)
    return kept


def _is_held(lock: Path) -> bool | None:
    """Whether a process holds the run's lock. Asking takes a shared lock for a moment."""
    try:
        with lock.open("rb") as file:
            return not try_lock(file, shared=True)
    except OSError:
        return None


def _find_saved(run: Path, saves: Iterable[Event]) -> tuple[SavedFolder, ...]:
    """The checkpoints and models of a run, in the order of their steps, the exported model last."""
    seconds = {event["path"]: event.get("seconds") for event in saves}
    found = []
    for pattern in (STEP_FOLDERS, f"models/{STEP_FOLDERS}", f"best/{STEP_FOLDERS}", "model"):
        for folder in sorted(filter(Path.is_dir, run.glob(pattern))):
            path = str(folder.relative_to(run))
            with suppress(FileNotFoundError):  # the run is removing it
                found.append(
                    SavedFolder(
                        kind="checkpoint" if pattern == STEP_FOLDERS else "model",
                        path=path,
                        step=None if pattern == "model" else int(folder.name.removeprefix("step-")),
                        num_bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
                        made=_modified(folder),
                        seconds=seconds.get(path),
                    )
                )
    return tuple(found)


def _modified(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def _read_about(run: Path, saved: Sequence[SavedFolder]) -> dict[str, Any]:
    """What the newest checkpoint or model says of its run, and the conditions in their order; empty without one."""
    for folder in sorted(saved, key=lambda folder: folder.made, reverse=True):
        for file in (run / folder.path / "checkpoint.json", run / folder.path / "ochat_train.json"):
            with suppress(OSError, orjson.JSONDecodeError, KeyError):  # being removed, or damaged: take an older one
                fields = orjson.loads(file.read_bytes())
                return {**fields["run"], "conditions": fields["conditions"]}
    return {}


# ----------------------------------------------------------------------------------------------------- replies


def generate_replies(model_dir: Path, question: str, conditions: Sequence[str]) -> dict[str, str]:
    """The model's greedy reply to one question under each condition."""
    import torch  # the facts of a run do without
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    from ochat_train.model.text_part import auto_class

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model: Any = auto_class(AutoConfig.from_pretrained(model_dir)).from_pretrained(model_dir, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    replies = {}
    for condition in conditions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            condition=condition,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        output = model.generate(**prompt, do_sample=False, max_new_tokens=_MOST_REPLY_TOKENS)
        reply = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        replies[condition] = " ".join(reply.split())
    return replies
