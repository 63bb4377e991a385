"""What a run tells while it trains: JSON lines always, a progress bar, wandb when asked. Only the main rank tells."""

import math
import secrets
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson
import torch
from torch import Tensor
from tqdm import tqdm

import ochat_train
from ochat_train.recipe import Recipe, to_json


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step over all ranks. sums: f64[3, K] nll, weight and tokens with a loss of each condition.

    loss is sum(w * nll) / sum(w); seconds is wall time; fill is tokens / room of the step's micro-batches; data_wait_s
    is the longest time that a rank waited for its batches.
    """

    step: int
    epoch: int
    examples_consumed: int
    progress: float
    sums: Tensor
    lr: float
    grad_norm: float
    num_tokens: int
    fill: float
    num_processes: int
    seconds: float
    data_wait_s: float

    def to_json(self, conditions: list[str]) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        num_supervised = int(self.sums[2].sum())
        return {
            "event": "step",
            "step": self.step,
            "epoch": self.epoch,
            "examples_consumed": self.examples_consumed,
            "progress": self.progress,
            **losses(self.sums, conditions),
            "lr": self.lr,
            "grad_norm": self.grad_norm,
            "skipped": not math.isfinite(self.grad_norm),  # DeepSpeed leaves such a step out
            "tokens": self.num_tokens,
            "supervised_tokens": num_supervised,
            "tokens_per_s": self.num_tokens / self.seconds,
            "supervised_tokens_per_s": num_supervised / self.seconds,
            "fill": self.fill,
            "num_processes": self.num_processes,
            "seconds": self.seconds,
            "data_wait_s": self.data_wait_s,
        }


def losses(sums: Tensor, conditions: list[str]) -> dict[str, Any]:
    """`loss` over all conditions and `loss_by_condition`; None where a condition has no weight in the sums."""
    nll, weight = sums[0].tolist(), sums[1].tolist()
    by_condition = {name: n / w if w else None for name, n, w in zip(conditions, nll, weight, strict=True)}
    return {"loss": sum(nll) / sum(weight) if sum(weight) else None, "loss_by_condition": by_condition}


class Metrics:
    """Where the main rank's reports go; on other ranks every call does nothing.

    `run_dir/metrics.jsonl` gets a line a report. A run that continues from step `start` keeps the lines up to there; if
    others must go (steps that a crash undid, an earlier run's), the old file stays beside it as metrics.jsonl.old.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        conditions: list[str],
        *,
        start: int,
        num_steps: int,
        total_examples: int,
        is_main: bool,
    ) -> None:
        self._is_main = is_main
        self._start, self._num_steps = start, num_steps
        self._conditions = conditions
        self._total_examples = total_examples
        self._recipe, self._run_dir = recipe, run_dir
        self._wandb: Any = None
        self._bar: Any = None

    def __enter__(self) -> Self:
        if self._is_main:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            _keep_lines_until(self._run_dir / "metrics.jsonl", self._start)
            self._file = open(self._run_dir / "metrics.jsonl", "ab")  # closed by __exit__
            self._start_wandb()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_main:
            return
        self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def step(self, report: StepReport) -> None:
        """Report one training step."""
        if not self._is_main:
            return
        line = report.to_json(self._conditions)
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
            f"step {report.step}/{self._num_steps}, epoch {report.epoch}, loss {line['loss'] or 0:.4f}, "
            f"lr {report.lr:.2e}, {line['tokens_per_s']:,.0f} tokens/s",
            refresh=False,
        )
        self._bar.update(report.examples_consumed - self._bar.n)

    def evaluation(self, step: int, epoch: int, sums: Tensor) -> None:
        """Report the held-out losses after `step`."""
        if not self._is_main:
            return
        line = {"event": "eval", "step": step, "epoch": epoch, **losses(sums, self._conditions)}
        self._write(line)
        shown = ", ".join(
            f"{name or '(none)'} {loss:.4f}" for name, loss in line["loss_by_condition"].items() if loss is not None
        )
        tqdm.write(f"step {step}: held-out loss {line['loss'] or 0:.4f} ({shown})")

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(orjson.dumps(line) + b"\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(_flat(line), step=line["step"])

    def _start_wandb(self) -> None:
        section = self._recipe.log.wandb
        if section is None:
            return
        import wandb  # slow to import, and most runs do not ask for it

        id_file = self._run_dir / "wandb_id"  # a resumed run goes on in the same wandb run
        if self._start == 0 or not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._wandb = wandb.init(
            project=section.project,
            entity=section.entity,
            mode=section.mode,
            name=self._recipe.name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(self._run_dir),
            config=to_json(self._recipe),
        )


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


def _flat(line: dict[str, Any]) -> dict[str, Any]:
    """wandb's names: the event in front, conditions behind a slash."""
    flat: dict[str, Any] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            flat |= {f"{line['event']}/{key}/{name}": inner for name, inner in value.items() if inner is not None}
        elif key != "event":
            flat[f"{line['event']}/{key}"] = value
    return flat


def describe_run(recipe: Recipe, world_size: int, attention: str) -> dict[str, Any]:
    """What is saved with every run: the resolved recipe, the code's commit, versions, hardware."""
    packages = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy")
    return {
        "recipe": to_json(recipe),
        "commit": _git_commit(),
        "versions": {name: metadata.version(name) for name in packages} | {"ochat_train": ochat_train.__version__},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "num_processes": world_size,
        "attention": attention,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


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
