"""What a run did so far: read_run(RUN) -> RunReport, from what it writes while it trains; what its model replies."""

import fcntl
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from ochat_train.training.best_epoch import best_epoch

Floats = npt.NDArray[np.float64]
Reason = Literal["finished", "max_steps", "stopped", "skipped"]
State = Reason | Literal["running", "dead", "unknown"]

ALL = None  # beside the conditions: all of them together
# The numbers of a step that are read as they are.
COLUMNS = (
    "loss",
    "lr",
    "grad_norm",
    "progress",
    "tokens",
    "supervised_tokens",
    "tokens_per_s",
    "supervised_tokens_per_s",
    "seconds",
    "data_wait_s",
    "mfu",
    "peak_memory_bytes",
    "skipped_steps",
    "time_left_s",
)
_MOST_REPLY_TOKENS = 96
_STEP_FOLDER = "step-" + "[0-9]" * 8


# ------------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True, slots=True)
class Steps:
    """The training steps as columns of n; nan where a line does not say a value, or says null.

    step, epoch: i64[n], the steps ascending. skipped: bool[n]. columns: f64[n] for each of COLUMNS.
    loss_by_condition, weight_by_source: f64[n] for each name.
    """

    step: npt.NDArray[np.int64]
    epoch: npt.NDArray[np.int64]
    skipped: npt.NDArray[np.bool_]
    columns: dict[str, Floats]
    loss_by_condition: dict[str, Floats]
    weight_by_source: dict[str, Floats]

    def total(self, column: str) -> float:
        """The sum of a column, values that are not there left out."""
        return float(np.nansum(self.columns[column]))

    def last(self, column: str) -> float | None:
        """The value of the last step; None where it does not say it."""
        values = self.columns[column]
        return float(values[-1]) if len(values) and np.isfinite(values[-1]) else None

    def median(self, column: str) -> float | None:
        """Over the steps without the first tenth, in which a run warms up; None where no step says it."""
        values = self.columns[column][len(self.step) // 10 :]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None


class Score(NamedTuple):
    """Of held-out answers; loss in nats a token, accuracy 0 to 1; nan where not measured."""

    loss: float
    perplexity: float
    accuracy: float


class Probe(NamedTuple):
    """The loss of the same held-out answers under their own, another and no condition. other: None of one alone."""

    own: float
    other: float | None
    none: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The held-out split after a step, by condition, ALL for all. probes: empty when not made."""

    step: int
    epoch: int
    is_epoch_end: bool
    weighted: dict[str | None, Score]
    unweighted: dict[str | None, Score]
    probes: dict[str | None, Probe]


class Start(NamedTuple):
    """A start of the run behind `step` steps. resumed: the checkpoint's name; None for the first, or if not known."""

    step: int
    num_processes: int | None
    started: str | None
    resumed: str | None
    device: str | None
    attention: str | None


class End(NamedTuple):
    """How the last start ended."""

    step: int
    reason: Reason


class Saved(NamedTuple):
    """A checkpoint or a model that is there. path: below the run; step: None if its name does not say it."""

    kind: Literal["checkpoint", "model"]
    path: str
    step: int | None
    num_bytes: int
    made: datetime
    seconds: float | None


@dataclass(frozen=True, slots=True)
class RunReport:
    """The facts about a run.

    updated: when it last wrote a line. best_step: the last of the best epoch. is_held: whether a process holds the
    run's lock; None if it never had one. num_removed: checkpoints and models that were saved and are not there. about:
    what a checkpoint or a model says of the run (recipe, commit, versions, ...), empty before the first is saved.
    replies: by condition, of RUN/model.
    """

    path: str
    updated: datetime
    steps: Steps
    evaluations: tuple[Evaluation, ...]
    best_step: int | None
    starts: tuple[Start, ...]
    end: End | None
    is_held: bool | None
    saved: tuple[Saved, ...]
    num_removed: int
    save_seconds: float
    conditions: tuple[str, ...]
    about: dict[str, Any]
    replies: dict[str, str]

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's where no recipe is saved yet."""
        return str(self.recipe.get("name") or Path(self.path).resolve().name)

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe; empty before a checkpoint or a model is saved."""
        return dict(self.about.get("recipe", {}))

    @property
    def question(self) -> str:
        """What the replies reply to."""
        return str(self.recipe["log"]["question"])

    @property
    def last_step(self) -> int:
        """The steps done."""
        steps = [*self.steps.step[-1:].tolist(), *(evaluation.step for evaluation in self.evaluations[-1:])]
        return max(steps, default=self.starts[-1].step if self.starts else 0)

    @property
    def max_steps(self) -> int | None:
        """The recipe's train.max_steps, unless the run has gone beyond it, with another recipe."""
        max_steps = self.recipe.get("train", {}).get("max_steps")
        return None if max_steps is None or max_steps < self.last_step else int(max_steps)

    @property
    def num_epochs(self) -> int | None:
        """The recipe's train.epochs."""
        epochs: int | None = self.recipe.get("train", {}).get("epochs")
        return epochs

    @property
    def state(self) -> State:
        """Whether it runs, and why not."""
        reason = None if self.end is None else self.end.reason
        if self.is_held and reason not in ("finished", "max_steps"):  # of those two the model may still be exported
            return "running"
        if reason is not None:
            return reason
        if (self.steps.last("progress") or 0) >= 1:
            return "finished"
        if self.max_steps is not None and self.max_steps == self.last_step:
            return "max_steps"
        return "unknown" if self.is_held is None else "dead"

    @property
    def num_steps(self) -> int | None:
        """About how many steps all epochs have, from the share of the examples done; None before the first step."""
        progress = self.steps.last("progress")
        return round(self.last_step / progress) if progress else None

    @property
    def epoch_ends(self) -> tuple[Evaluation, ...]:
        """The evaluations at the end of an epoch."""
        return tuple(evaluation for evaluation in self.evaluations if evaluation.is_epoch_end)

    @property
    def best(self) -> Evaluation | None:
        """Of those the one with the lowest held-out loss."""
        return next((end for end in self.epoch_ends if end.step == self.best_step), None)


# ----------------------------------------------------------------------------------------------------- reading


def read_events(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without any that a crash cut off; none when there is no such file."""
    try:
        lines = metrics.read_bytes().splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        with suppress(orjson.JSONDecodeError):
            events.append(orjson.loads(line))
    return [event for event in events if isinstance(event, dict) and "event" in event]


def read_run(run: Path) -> RunReport:
    """The facts about a run at any moment. Raises ValueError when it has not measured anything yet."""
    metrics = run / "metrics.jsonl"
    events = _without_undone(read_events(metrics))
    if not events:
        raise ValueError(
            f"{run} has no metrics yet: {metrics.name} {'is empty' if metrics.is_file() else 'is not there'}; name a "
            "run's folder, checkpoint.dir of its recipe, once its first step is done"
        )
    kinds: dict[str, list[dict[str, Any]]] = {"step": [], "eval": [], "start": [], "save": [], "end": []}
    for event in events:
        kinds.setdefault(event["event"], []).append(event)
    saved = _find_saved(run, kinds["save"])
    about = _read_about(run, saved)
    found = [name for event in (*kinds["eval"], *kinds["step"]) for name in event.get("loss_by_condition") or ()]
    return RunReport(
        path=str(run),
        updated=_modified(metrics),
        steps=_read_steps(kinds["step"]),
        evaluations=tuple(_read_evaluation(event) for event in kinds["eval"]),
        best_step=best.step if (best := best_epoch(kinds["eval"])) else None,
        starts=tuple(Start(event["step"], *map(event.get, Start._fields[1:])) for event in kinds["start"]),
        end=_read_end(events),
        is_held=_is_held(run / "lock"),
        saved=saved,
        num_removed=len({event["path"] for event in kinds["save"]} - {one.path for one in saved}),
        save_seconds=sum(event.get("seconds") or 0.0 for event in kinds["save"]),
        conditions=tuple(dict.fromkeys([*about.pop("conditions", ()), *found])),
        about=about,
        replies={},
    )


def _without_undone(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events without those of steps that a later start undid: it went on from an earlier step."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "start":
            kept = [other for other in kept if other["step"] <= event["step"]]
        kept.append(event)
    return kept


def _read_steps(events: Sequence[dict[str, Any]]) -> Steps:
    conditions, sources = (
        list(dict.fromkeys(name for event in events for name in event.get(field) or ()))
        for field in ("loss_by_condition", "weight_by_source")
    )
    return Steps(
        step=np.array([event["step"] for event in events], np.int64),
        epoch=np.array([event["epoch"] for event in events], np.int64),
        skipped=np.array([event.get("skipped", False) for event in events], np.bool_),
        columns={name: _floats(event.get(name) for event in events) for name in COLUMNS},
        loss_by_condition={
            name: _floats((event.get("loss_by_condition") or {}).get(name) for event in events) for name in conditions
        },
        weight_by_source={
            # What a step does not name has no weight in it; a step that names nothing does not say.
            name: _floats(
                shares.get(name, 0.0) if (shares := event.get("weight_by_source")) else None for event in events
            )
            for name in sources
        },
    )


def _floats(values: Iterable[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _read_evaluation(event: Mapping[str, Any]) -> Evaluation:
    probes: dict[str | None, Any] = {}
    if event.get("probe"):
        probes = {ALL: event["probe"], **(event.get("probe_by_condition") or {})}
    return Evaluation(
        step=event["step"],
        epoch=event["epoch"],
        is_epoch_end=bool(event.get("epoch_end")),
        weighted=_read_scores(event, ""),
        unweighted=_read_scores(event, "unweighted_"),
        probes={name: Probe(probe["own"], probe["other"], probe["none"]) for name, probe in probes.items() if probe},
    )


def _read_scores(event: Mapping[str, Any], prefix: str) -> dict[str | None, Score]:
    """By condition; the fields of an evaluation whose names begin with the prefix."""

    def score(name: str | None) -> Score:
        fields = (f"{prefix}{field}" for field in Score._fields)
        found = (
            event.get(field) if name is ALL else (event.get(f"{field}_by_condition") or {}).get(name)
            for field in fields
        )
        return Score(*(np.nan if value is None else value for value in found))

    return {name: score(name) for name in (ALL, *(event.get("loss_by_condition") or ()))}


def _read_end(events: Sequence[Mapping[str, Any]]) -> End | None:
    """The end of the last start, if it has ended; a save may stand behind it."""
    last = next((event for event in reversed(events) if event["event"] in ("start", "step", "end")), None)
    if last is None or last["event"] != "end":
        return None
    return End(last["step"], last["reason"])


def _is_held(lock: Path) -> bool | None:
    """Whether a process holds the run's lock. Asking takes a shared lock for a moment."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _find_saved(run: Path, events: Iterable[Mapping[str, Any]]) -> tuple[Saved, ...]:
    """The checkpoints and models of a run, in the order of their steps, the exported model last."""
    seconds = {event["path"]: event.get("seconds") for event in events}
    found = []
    places: tuple[tuple[Literal["checkpoint", "model"], str], ...] = (
        ("checkpoint", _STEP_FOLDER),
        ("model", f"models/{_STEP_FOLDER}"),
        ("model", "model"),
    )
    for kind, pattern in places:
        for folder in sorted(filter(Path.is_dir, run.glob(pattern))):
            path = str(folder.relative_to(run))
            step = int(folder.name.removeprefix("step-")) if folder.name != "model" else None
            with suppress(FileNotFoundError):  # the run is removing it
                num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                found.append(Saved(kind, path, step, num_bytes, _modified(folder), seconds.get(path)))
    return tuple(found)


def _modified(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def _read_about(run: Path, saved: Sequence[Saved]) -> dict[str, Any]:
    """What the newest checkpoint or model says of its run, and the conditions in their order; empty without one."""
    for one in sorted(saved, key=lambda one: one.made, reverse=True):
        for file in (run / one.path / "checkpoint.json", run / one.path / "ochat_train.json"):
            with suppress(OSError, orjson.JSONDecodeError, KeyError):  # being removed, or damaged: take an older one
                fields = orjson.loads(file.read_bytes())
                return {**fields["run"], "conditions": fields["conditions"]}
    return {}


# ----------------------------------------------------------------------------------------------------- replies


def ask(model_dir: Path, question: str, conditions: Sequence[str]) -> dict[str, str]:
    """The model's greedy reply to one question under each condition."""
    import torch  # the facts of a run do without
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
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
