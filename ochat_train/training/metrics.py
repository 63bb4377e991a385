"""What a run reports while it trains: JSON lines always, a progress bar, other sinks on request; skipped steps.

Only the main rank reports.
"""

import math
import resource
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import numpy as np
import numpy.typing as npt
import orjson
import torch
from torch import Tensor
from tqdm import tqdm

from ochat_train.files import publish_file
from ochat_train.model.loss import ConditionSums, LossSums
from ochat_train.model.router import RouterSums
from ochat_train.recipe import Recipe
from ochat_train.tokens.plan import StepPlan
from ochat_train.tokens.store import TokenStore
from ochat_train.training.best_epoch import BestEpoch, Criterion, best_epoch, num_without_gain
from ochat_train.training.engine import Failed, World, gather_objects
from ochat_train.training.held_out import ConditionProbe
from ochat_train.training.lines import LineFile
from ochat_train.training.saving import SaveResult
from ochat_train.training.sinks import Sink, flat_numbers, open_sinks
from ochat_train.training.speed import Utilisation

Reason = Literal["finished", "max_steps", "early_stop", "stopped", "skipped"]
_RECENT_STEPS = 50  # the remaining time is estimated from their speed
_BAR = "step {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"  # fits 80 columns


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step over all ranks.

    sums: f64, of K conditions. source_weights: f64[S], the sum of loss weights of each source. cost: of the plan's
    sequences, see PlanShape. fill: tokens / room of the step's micro-batches. seconds: wall time. data_wait_s: how long
    a rank waited for its batches; like peak_memory_bytes the largest of all ranks. router: f64, of a mixture.
    """

    step: int
    epoch: int
    examples_consumed: int
    progress: float
    sums: ConditionSums
    source_weights: npt.NDArray[np.float64]
    lr: float
    grad_norm: float
    num_tokens: int
    cost: int
    fill: float
    num_processes: int
    seconds: float
    data_wait_s: float
    peak_memory_bytes: int
    router: RouterSums | None = None

    @property
    def is_skipped(self) -> bool:
        """Whether the update was skipped, because the gradient was not finite."""
        return not math.isfinite(self.grad_norm)

    def to_json(self, conditions: Sequence[str], sources: Sequence[str]) -> dict[str, Any]:
        """The fields of its line in metrics.jsonl that depend on this step only."""
        num_supervised = int(self.sums.unweighted.weight.sum())
        shares = self.source_weights / (self.source_weights.sum() or 1.0)
        return {
            "event": "step",
            "step": self.step,
            "epoch": self.epoch,
            "examples_consumed": self.examples_consumed,
            "progress": self.progress,
            **_fields("loss", self.sums.weighted.with_total().loss, conditions),
            "weight_by_source": dict(zip(sources, shares.tolist(), strict=True)),
            "router_loss": self.router and _finite(float(self.router.loss) / self.num_tokens),
            "largest_expert_share": self.router and _finite(self.router.largest_share),
            "lr": self.lr,
            "grad_norm": _finite(self.grad_norm),
            "skipped": self.is_skipped,
            "tokens": self.num_tokens,
            "supervised_tokens": num_supervised,
            "tokens_per_s": self.num_tokens / self.seconds,
            "supervised_tokens_per_s": num_supervised / self.seconds,
            "fill": self.fill,
            "num_processes": self.num_processes,
            "seconds": self.seconds,
            "data_wait_s": self.data_wait_s,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def peak_memory_bytes(device: torch.device) -> int:
    """The peak memory of this process so far: of tensors on its GPU, or on a CPU of all that was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def evaluation_to_json(
    step: int,
    epoch: int,
    sums: ConditionSums,
    probe: ConditionProbe | None,
    conditions: Sequence[str],
    *,
    is_epoch_end: bool,
) -> dict[str, Any]:
    """The line of an evaluation of the held-out split in metrics.jsonl. sums: f64, of all K conditions."""
    line: dict[str, Any] = {"event": "eval", "step": step, "epoch": epoch, "epoch_end": is_epoch_end}
    for prefix, part in (("", sums.weighted), ("unweighted_", sums.unweighted)):
        totals = part.with_total()
        line |= _fields(f"{prefix}loss", totals.loss, conditions)
        line |= _fields(f"{prefix}perplexity", totals.loss.exp(), conditions)
        line |= _fields(f"{prefix}accuracy", totals.accuracy, conditions)
    return line | _probe_fields(probe, conditions)


def _probe_fields(probe: ConditionProbe | None, conditions: Sequence[str]) -> dict[str, Any]:
    if probe is None:
        return {"probe": None, "probe_by_condition": None, "probe_left_out": None}
    losses: dict[str, list[float | None]] = {}  # over all conditions first, then of each
    for name, sums in (("own", probe.own), ("other", probe.other), ("none", probe.none)):
        if sums is None:
            losses[name] = [None] * (1 + len(conditions))
        else:
            losses[name] = [_finite(loss) for loss in sums.weighted.with_total().loss.tolist()]
    total, *each = (dict(zip(losses, values, strict=True)) for values in zip(*losses.values(), strict=True))
    by_condition = dict(zip(conditions, each, strict=True))
    return {"probe": total, "probe_by_condition": by_condition, "probe_left_out": probe.num_left_out}


def _fields(name: str, values: Tensor, conditions: Sequence[str]) -> dict[str, Any]:
    """Of f64[1 + K]: the value over all conditions, and of each condition by its name; None where it is not finite."""
    total, *each = (_finite(value) for value in values.tolist())
    return {name: total, f"{name}_by_condition": dict(zip(conditions, each, strict=True))}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _shown_score(condition: str, found: dict[str, Any]) -> str:
    cut = f", {found['num_truncated']:,} cut" if found["num_truncated"] else ""
    score = "-" if found["score"] is None else f"{100 * found['score']:.1f} %"
    return f"{condition or '(none)'} {score} of {found['num']:,}{cut}"


@dataclass(frozen=True, slots=True)
class RunOutline:
    """What the reports of a run refer to.

    start: the step after which the run starts or continues; num_steps: the number of its last step; num_tokens: of the
    steps in between. utilisation: None where it is unknown. is_branch: whether the steps
    after `start` differ from those that the run may have made before, because it goes on with another recipe or plan.
    """

    recipe: Recipe
    dir: Path
    conditions: Sequence[str]
    sources: Sequence[str]
    start: int
    num_steps: int
    num_tokens: int
    utilisation: Utilisation | None
    is_branch: bool = False


class Metrics:
    """Writes the main rank's reports; on other ranks every call does nothing.

    RUN/metrics.jsonl gets one line for each report, see `LineFile`. No failure of reporting ends the run. num_skipped:
    the steps of the run without an update so far, known to the main rank.
    """

    def __init__(self, outline: RunOutline, *, is_main: bool) -> None:
        self._outline, self._is_main = outline, is_main
        self._num_tokens_left = outline.num_tokens
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT_STEPS)  # tokens and seconds
        self.num_skipped = 0
        self._is_disk_reported = False
        self._evaluations: list[dict[str, Any]] = []
        self._sinks: list[Sink] = []
        self._bar: Any = None

    def __enter__(self) -> Self:
        if self._is_main:
            run = self._outline
            run.dir.mkdir(parents=True, exist_ok=True)
            self._lines = LineFile(run.dir / "metrics.jsonl", run.start)
            self._read_earlier()
            is_branch = run.is_branch and self._lines.num_undone > 0
            self._sinks = open_sinks(run.recipe, run.dir, run.start, self._lines.earlier, is_branch=is_branch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_main:
            return
        if (unwritten := self._lines.write()) is not None:
            tqdm.write(
                f"WARNING: the last {len(self._lines.waiting)} lines of metrics.jsonl were not written ({unwritten})"
            )
        if self._bar is not None:
            self._bar.close()
        self._for_sinks(lambda sink: sink.close(is_failed=error is not None))

    def start(self, step: int, epoch: int, *, resumed: str | None, about: dict[str, Any]) -> None:
        """Report that training starts after `step`, or continues from the checkpoint `resumed`.

        about: the result of `describe_run`.
        """
        if self._is_main:
            names = ("num_processes", "started", "device", "attention", "checkpointing")
            described = {name: about[name] for name in names} | {"loss_form": self._outline.recipe.train.loss}
            self._write({"event": "start", "step": step, "epoch": epoch, **described, "resumed": resumed})

    def step(self, report: StepReport) -> None:
        """Report one training step."""
        if not self._is_main:
            return
        self.num_skipped += report.is_skipped
        self._num_tokens_left -= report.num_tokens
        if report.step > self._outline.start + 1:  # the first step of a process warms up
            self._recent.append((report.num_tokens, report.seconds))
        line = report.to_json(self._outline.conditions, self._outline.sources) | {
            "skipped_steps": self.num_skipped,
            "mfu": self._mfu(report),
            "time_left_s": self._time_left_s(),
        }
        self._write(line)
        if self._bar is None:
            self._bar = tqdm(
                total=self._outline.num_steps,
                initial=report.step,
                bar_format=_BAR,
                mininterval=1.0,
                dynamic_ncols=True,
            )
        self._bar.set_postfix_str(
            f"epoch {report.epoch + 1}, loss {_shown(line['loss'])}, {line['tokens_per_s']:,.0f} tokens/s",
            refresh=False,
        )
        self._bar.update(report.step - self._bar.n)

    def evaluation(
        self,
        step: int,
        epoch: int,
        sums: ConditionSums,
        probe: ConditionProbe | None = None,
        checks: dict[str, Any] | None = None,
        *,
        is_epoch_end: bool,
    ) -> None:
        """Report the loss sums of the held-out split after `step`, and the result of `Checker.run`."""
        if not self._is_main:
            return
        line = evaluation_to_json(step, epoch, sums, probe, self._outline.conditions, is_epoch_end=is_epoch_end)
        line["checks"] = checks
        self._write(line)
        self._evaluations.append(line)
        for name, by_condition in (checks or {}).items():
            tqdm.write(f"step {step}: check {name}: {', '.join(starmap(_shown_score, by_condition.items()))}")
        if not float(sums.unweighted.weight.sum()):  # nothing is held out
            return
        losses = line["loss_by_condition"].items()
        shown = ", ".join(f"{name or '(none)'} {loss:.4f}" for name, loss in losses if loss is not None)
        accuracy = "-" if line["accuracy"] is None else f"{100 * line['accuracy']:.1f} %"
        tqdm.write(f"step {step}: held-out loss {_shown(line['loss'])} ({shown}), accuracy {accuracy}")
        if line["probe"] is not None:
            own, other, none = (_shown(line["probe"][name]) for name in ("own", "other", "none"))
            left_out = f"; {line['probe_left_out']:,} examples left out" if line["probe_left_out"] else ""
            tqdm.write(
                f"step {step}: the same answers under their own condition {own}, another {other}, none {none}{left_out}"
            )

    def has_evaluation(self, step: int) -> bool:
        """Whether the held-out split was evaluated after `step`, now or before a resume; False on other ranks."""
        return any(evaluation["step"] == step for evaluation in self._evaluations)

    def best(self, criterion: Criterion) -> BestEpoch | None:
        """The best epoch of the run so far; None on other ranks."""
        return best_epoch(self._evaluations, criterion)

    def num_without_gain(self, criterion: Criterion) -> int:
        """How many epochs have ended since the best one; 0 on other ranks."""
        return num_without_gain(self._evaluations, criterion)

    def saved(self, saved: SaveResult) -> None:
        """Report a save that succeeded."""
        if self._is_main:
            line = {"event": "save", "step": saved.step, "kind": saved.kind}
            place = str(saved.path.relative_to(self._outline.dir))
            self._write(line | {"path": place, "seconds": saved.seconds, "bytes": saved.num_bytes})

    def end(self, step: int, epoch: int, reason: Reason) -> None:
        """Report that training ends after `step`, and which epoch's model is the best."""
        if not self._is_main:
            return
        best = best_epoch(self._evaluations)
        found: dict[str, Any] = {"best_epoch": None, "best_step": None, "best_loss": None}
        if best is not None:
            found = {"best_epoch": best.epoch, "best_step": best.step, "best_loss": best.value}
            tqdm.write(f"best epoch: {best.epoch + 1}, with held-out loss {best.value:.4f} at step {best.step}")
        self._write({"event": "end", "step": step, "epoch": epoch, "reason": reason, **found})

    def _mfu(self, report: StepReport) -> float | None:
        if self._outline.utilisation is None:
            return None
        return self._outline.utilisation.of_step(
            report.num_tokens, report.cost, seconds=report.seconds, num_devices=report.num_processes
        )

    def _time_left_s(self) -> float | None:
        """Seconds that the remaining tokens take at the recent speed; None before a speed is known."""
        if not self._recent:
            return None
        tokens, seconds = map(sum, zip(*self._recent, strict=True))
        return self._num_tokens_left * seconds / tokens

    def _read_earlier(self) -> None:
        """Read what later reports need from the lines of the run so far."""
        for event in self._lines.earlier:
            self.num_skipped += event["event"] == "step" and event.get("skipped", False)
            if event["event"] == "eval":
                self._evaluations.append(event)

    def _write(self, line: dict[str, Any]) -> None:
        error = self._lines.add(line)
        if error is not None and not self._is_disk_reported:
            tqdm.write(
                f"WARNING: metrics.jsonl cannot be written ({error}); training continues, and the lines wait in memory"
            )
        self._is_disk_reported = error is not None
        if line["event"] in ("step", "eval"):
            numbers = flat_numbers(line)
            self._for_sinks(lambda sink: sink.log(line["step"], numbers))

    def _for_sinks(self, action: Callable[[Sink], None]) -> None:
        """Call `action` with every sink; one that fails is dropped, and the run continues."""
        for sink in tuple(self._sinks):
            try:
                action(sink)
            except Exception as error:  # of any kind: wandb's own process may have died, a disk may be full
                tqdm.write(f"WARNING: {sink.name} takes no more numbers ({error!r}); the run continues without it")
                self._sinks.remove(sink)


class SkippedSteps:
    """The last steps in a row without an update, as this rank saw them. The run ends when they are too many."""

    def __init__(self, limit: int, run_dir: Path, store: TokenStore, world: World) -> None:
        self._limit, self._file, self._store, self._world = limit, run_dir / "skipped-steps.json", store, world
        self._steps: list[dict[str, Any]] = []

    def add(self, step: int, plan: StepPlan, parts: Sequence[LossSums], *, is_skipped: bool) -> None:
        """Record a step, on all ranks together. parts: the sums of each of this rank's micro-batches.

        Raises Failed when it is the last of `limit` skipped steps in a row.
        """
        if not is_skipped:
            self._steps.clear()
            return
        micro_batches = [
            {
                "rank": self._world.rank,
                "number": number,
                "is_loss_finite": bool(sums.by_condition.weighted.nll.isfinite().all()),
                "examples": [self._store.name(example) for example in examples.tolist()],
            }
            for number, (examples, sums) in enumerate(zip(plan.bins[self._world.own_bins], parts, strict=True), start=1)
        ]
        self._steps.append({"step": step, "micro_batches": micro_batches})
        if len(self._steps) >= self._limit:
            self.fail(f"{self._limit} steps in a row, train.max_skipped, up to step {step}")

    def fail(self, which: str) -> NoReturn:
        """Raise Failed, on all ranks together, after writing the ids of the skipped steps' examples."""
        of_ranks = gather_objects(self._steps)
        named = f"Their examples are named in {self._file}, first those whose own loss was not finite: look at them"
        try:
            if self._world.is_main:
                with publish_file(self._file) as file:
                    steps = [_joined(same) for same in zip(*of_ranks, strict=True)]
                    file.write(orjson.dumps(steps, option=orjson.OPT_INDENT_2))
        except OSError as error:
            named = f"{self._file}, for their examples, could not be written ({error}): look at the data"
        raise Failed(
            f"the gradients of {which} were not finite, and nothing was learned from them. {named}; if all are like "
            "that, look at the model or set a lower optim.lr. The same command goes on from the newest checkpoint, and "
            "with checkpoint.resume from an older one, if that is spoiled."
        )


def _joined(same: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One step as all ranks saw it, the likeliest causes first."""
    micro_batches = [batch for part in same for batch in part["micro_batches"]]
    return {
        "step": same[0]["step"],
        "micro_batches": sorted(micro_batches, key=lambda batch: bool(batch["is_loss_finite"])),
    }
