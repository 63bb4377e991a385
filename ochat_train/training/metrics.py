"""What a run tells while it trains: JSON lines always, a progress bar, other sinks when asked.

Only the main rank tells.
"""

import math
import resource
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import orjson
import torch
from torch import Tensor
from tqdm import tqdm

import ochat_train
from ochat_train.recipe import Recipe, to_json
from ochat_train.training.best_epoch import best_epoch
from ochat_train.training.flops import Utilisation
from ochat_train.training.held_out import Probe
from ochat_train.training.run_folder import utc_now
from ochat_train.training.sinks import Sink, flat_numbers, open_sinks

Reason = Literal["finished", "max_steps", "stopped", "skipped"]
_RECENT_STEPS = 50  # whose speed tells the time that is left


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step over all ranks.

    sums: f64[2, 3, K], see LossSums.by_condition. source_weights: f64[S], the loss weight of each source. cost: that of
    the plan's sequences, see PlanShape. fill: tokens / room of the step's micro-batches. seconds: wall time.
    data_wait_s and peak_memory_bytes: the most of any rank; the one is the time it waited for its batches.
    """

    step: int
    epoch: int
    examples_consumed: int
    progress: float
    sums: Tensor
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

    @property
    def is_skipped(self) -> bool:
        """Whether DeepSpeed left the update out, as it does when the gradient is not finite."""
        return not math.isfinite(self.grad_norm)

    def to_json(self, conditions: Sequence[str], sources: Sequence[str]) -> dict[str, Any]:
        """The fields of its line in metrics.jsonl that the step itself decides."""
        nll, weight, _ = _with_total(self.sums[0])
        num_supervised = int(self.sums[1, 1].sum())
        shares = self.source_weights / (self.source_weights.sum() or 1.0)
        return {
            "event": "step",
            "step": self.step,
            "epoch": self.epoch,
            "examples_consumed": self.examples_consumed,
            "progress": self.progress,
            **_fields("loss", nll / weight, conditions),
            "weight_by_source": dict(zip(sources, shares.tolist(), strict=True)),
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
    """The most memory that this process has had so far: the tensors on its GPU, or on a CPU all that was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def evaluation_to_json(
    step: int, epoch: int, sums: Tensor, probe: Probe | None, conditions: Sequence[str], *, is_epoch_end: bool
) -> dict[str, Any]:
    """The line of an evaluation in metrics.jsonl. sums: f64[2, 3, K], see LossSums.by_condition."""
    line: dict[str, Any] = {"event": "eval", "step": step, "epoch": epoch, "epoch_end": is_epoch_end}
    for prefix, part in (("", sums[0]), ("unweighted_", sums[1])):
        nll, weight, correct = _with_total(part)
        loss = nll / weight
        line |= _fields(f"{prefix}loss", loss, conditions)
        line |= _fields(f"{prefix}perplexity", loss.exp(), conditions)
        line |= _fields(f"{prefix}accuracy", correct / weight, conditions)
    return line | _probe_fields(probe, conditions)


def _probe_fields(probe: Probe | None, conditions: Sequence[str]) -> dict[str, Any]:
    if probe is None:
        return {"probe": None, "probe_by_condition": None, "probe_left_out": None}
    losses: dict[str, list[float | None]] = {}  # the first over all conditions, then of each
    for name, sums in (("own", probe.own), ("other", probe.other), ("none", probe.none)):
        if sums is None:
            losses[name] = [None] * (1 + len(conditions))
        else:
            nll, weight, _ = _with_total(sums[0])
            losses[name] = [_finite(loss) for loss in (nll / weight).tolist()]
    total, *each = (dict(zip(losses, values, strict=True)) for values in zip(*losses.values(), strict=True))
    by_condition = dict(zip(conditions, each, strict=True))
    return {"probe": total, "probe_by_condition": by_condition, "probe_left_out": probe.num_left_out}


def _with_total(sums: Tensor) -> Tensor:
    """f64[3, 1 + K] of f64[3, K]: the sums over all conditions, then each one's."""
    return torch.cat([sums.sum(dim=1, keepdim=True), sums], dim=1)


def _fields(name: str, values: Tensor, conditions: Sequence[str]) -> dict[str, Any]:
    """A value over all conditions and, by their names, each one's, of f64[1 + K]; None for what is not finite."""
    total, *each = (_finite(value) for value in values.tolist())
    return {name: total, f"{name}_by_condition": dict(zip(conditions, each, strict=True))}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


class Metrics:
    """Where the main rank's reports go; on other ranks every call does nothing.

    `run_dir/metrics.jsonl` gets a line a report. A run that continues from step `start` keeps the lines up to there; if
    others must go (steps that a crash undid, an earlier run's), the old file stays beside it as metrics.jsonl.old.
    num_steps: the number of the run's last step. num_tokens: of the steps up to it that are left. utilisation: None if
    it cannot be told.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        conditions: Sequence[str],
        sources: Sequence[str],
        *,
        start: int,
        num_steps: int,
        num_tokens: int,
        total_examples: int,
        utilisation: Utilisation | None,
        is_main: bool,
    ) -> None:
        self._is_main = is_main
        self._start, self._num_steps = start, num_steps
        self._conditions, self._sources = conditions, sources
        self._total_examples = total_examples
        self._utilisation = utilisation
        self._recipe, self._run_dir = recipe, run_dir
        self._num_tokens_left = num_tokens
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT_STEPS)  # tokens and seconds
        self._num_skipped = 0
        self._is_disk_told = False
        self._evaluations: list[dict[str, Any]] = []
        self._sinks: list[Sink] = []
        self._bar: Any = None

    def __enter__(self) -> Self:
        if self._is_main:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            file = self._run_dir / "metrics.jsonl"
            _keep_lines_until(file, self._start)
            if file.exists():
                self._recall(file)
            self._file = open(file, "ab")  # closed by __exit__
            self._sinks = open_sinks(self._recipe, self._run_dir, self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_main:
            return
        with suppress(OSError):  # told of when it was written
            self._file.close()
        if self._bar is not None:
            self._bar.close()
        self._tell_sinks(lambda sink: sink.close(is_failed=error is not None))

    def start(self, step: int, epoch: int, *, resumed: str | None, about: dict[str, Any]) -> None:
        """Report that training begins behind `step`, or goes on from the checkpoint `resumed`.

        about: what `describe_run` gives.
        """
        if self._is_main:
            names = ("num_processes", "started", "device", "attention", "checkpointing")
            told = {name: about[name] for name in names}
            self._write({"event": "start", "step": step, "epoch": epoch, **told, "resumed": resumed})

    def step(self, report: StepReport) -> None:
        """Report one training step."""
        if not self._is_main:
            return
        self._num_skipped += report.is_skipped
        self._num_tokens_left -= report.num_tokens
        if report.step > self._start + 1:  # the first step of a process warms up
            self._recent.append((report.num_tokens, report.seconds))
        line = report.to_json(self._conditions, self._sources) | {
            "skipped_steps": self._num_skipped,
            "mfu": self._mfu(report),
            "time_left_s": self._time_left_s(),
        }
        self._write(line)
        if self._bar is None:
            self._bar = tqdm(
                total=self._total_examples,
                initial=report.examples_consumed,
                unit=" examples",
                desc="train",
                mininterval=1.0,
            )
        self._bar.set_postfix_str(
            f"step {report.step}/{self._num_steps}, epoch {report.epoch}, loss {_shown(line['loss'])}, "
            f"lr {report.lr:.2e}, {line['tokens_per_s']:,.0f} tokens/s",
            refresh=False,
        )
        self._bar.update(report.examples_consumed - self._bar.n)

    def evaluation(
        self, step: int, epoch: int, sums: Tensor, probe: Probe | None = None, *, is_epoch_end: bool
    ) -> None:
        """Report the held-out split after `step`: sums f64[2, 3, K], see LossSums.by_condition."""
        if not self._is_main:
            return
        line = evaluation_to_json(step, epoch, sums, probe, self._conditions, is_epoch_end=is_epoch_end)
        self._write(line)
        self._evaluations.append(line)
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
        """Whether the held-out split was evaluated after `step`, now or before a resume. Only the main rank knows."""
        return any(evaluation["step"] == step for evaluation in self._evaluations)

    def saved(
        self, step: int, kind: Literal["checkpoint", "model"], path: Path, *, seconds: float, num_bytes: int
    ) -> None:
        """Report what was saved after `step`, and how long that took. path: in the run's folder."""
        if self._is_main:
            place = str(path.relative_to(self._run_dir))
            self._write(
                {"event": "save", "step": step, "kind": kind, "path": place, "seconds": seconds, "bytes": num_bytes}
            )

    def end(self, step: int, epoch: int, reason: Reason) -> None:
        """Report that training ends after `step`, and which epoch's model was the best."""
        if not self._is_main:
            return
        best = best_epoch(self._evaluations)
        told: dict[str, Any] = {"best_epoch": None, "best_step": None, "best_loss": None}
        if best is not None:
            told = {"best_epoch": best.epoch, "best_step": best.step, "best_loss": best.loss}
            tqdm.write(
                f"best epoch: {best.epoch}, counted from 0, with held-out loss {best.loss:.4f} at step {best.step}"
            )
        self._write({"event": "end", "step": step, "epoch": epoch, "reason": reason, **told})

    def _mfu(self, report: StepReport) -> float | None:
        if self._utilisation is None:
            return None
        return self._utilisation.of_step(
            report.num_tokens, report.cost, seconds=report.seconds, num_devices=report.num_processes
        )

    def _time_left_s(self) -> float | None:
        """What the tokens that are left take at the recent speed; None where none is known yet."""
        if not self._recent:
            return None
        tokens, seconds = map(sum, zip(*self._recent, strict=True))
        return self._num_tokens_left * seconds / tokens

    def _recall(self, file: Path) -> None:
        """What the end of the run must know of the parts before this one."""
        for event in map(orjson.loads, file.read_bytes().splitlines()):
            self._num_skipped += event["event"] == "step" and event.get("skipped", False)
            if event["event"] == "eval":
                self._evaluations.append(event)

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(orjson.dumps(line) + b"\n")
            self._file.flush()
        except OSError as error:  # what is not on the disk stays in the buffer for the next line
            if not self._is_disk_told:
                tqdm.write(f"WARNING: {self._file.name} cannot be written ({error.strerror}); training goes on")
            self._is_disk_told = True
        if line["event"] in ("step", "eval"):
            numbers = flat_numbers(line)
            self._tell_sinks(lambda sink: sink.log(line["step"], numbers))

    def _tell_sinks(self, action: Callable[[Sink], None]) -> None:
        """Do it with every sink; one that fails takes no more, and stops no run."""
        for sink in tuple(self._sinks):
            try:
                action(sink)
            except Exception as error:  # of whatever kind: wandb's own process may have died, a disk may be full
                tqdm.write(f"WARNING: {sink.name} takes no more numbers ({error!r}); the run goes on without it")
                self._sinks.remove(sink)


def _keep_lines_until(file: Path, step: int) -> None:
    """Leave in a metrics file only whole lines of steps up to `step`; of none, if nothing is continued."""
    if not file.exists():
        return
    old = file.read_bytes()
    kept = b"".join(line + b"\n" for line in old.splitlines() if step and _step_of(line) <= step)
    if kept != old:
        file.rename(file.with_name("metrics.jsonl.old"))
        file.write_bytes(kept)


def _step_of(line: bytes) -> float:
    try:
        return float(orjson.loads(line)["step"])
    except orjson.JSONDecodeError:  # a line that a crash cut off
        return float("inf")


def describe_run(recipe: Recipe, world_size: int, attention: str, checkpointing: str) -> dict[str, Any]:
    """What is saved with every run: the resolved recipe, the code's commit, versions, hardware."""
    packages = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy")
    return {
        "recipe": to_json(recipe),
        "commit": _git_commit(),
        "versions": {name: metadata.version(name) for name in packages} | {"ochat_train": ochat_train.__version__},
        "device": device_name(),
        "num_processes": world_size,
        "attention": attention,
        "checkpointing": checkpointing,
        "started": utc_now(),
    }


def device_name() -> str:
    """What this process trains on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _git_commit() -> str | None:
    """The commit of the code, with + when files differ from it; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        options: dict[str, Any] = {"cwd": here, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
        is_dirty = subprocess.run(["git", "diff", "HEAD", "--name-only"], **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+" if is_dirty else str(commit)
