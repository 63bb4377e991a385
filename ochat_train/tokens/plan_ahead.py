"""The table of all steps of a run: its exact totals and its hash, made in the background before step 1.

A large plan is made by one process of a node, which leaves it as a file for the others and for a resume.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from hashlib import sha256
from math import fsum
from pathlib import Path
from threading import Thread

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ochat_train.tokens.order import DataOrder
from ochat_train.tokens.plan import Lengths, PlanShape, StepPlan, WeightSums, plan_run

SHARED_ABOVE = 2_000_000  # examples; fewer are planned in a second or two, by every process for itself
_POLL_S = 0.1
_CHANGES = 1  # count up when the same inputs give other steps than before
_ROW = np.dtype(
    [
        ("num_examples", "<i8"),
        ("num_tokens", "<i8"),
        ("weight_sum", "<f8"),
        ("cost", "<i8"),
        ("waits", "<i8"),
        ("checksum", "<u4"),
    ]
)


@dataclass(frozen=True, slots=True)
class RunPlan:
    """All that the steps of a run are a function of. lengths i32[N], weight_sums f64[N]; num_epochs of the run."""

    lengths: Lengths
    weight_sums: WeightSums
    shape: PlanShape
    order: DataOrder
    num_epochs: int

    @property
    def total_examples(self) -> int:
        """Examples of all epochs."""
        return self.order.total(self.num_epochs)

    def steps(self, consumed: int = 0) -> Iterator[StepPlan]:
        """The steps behind the first `consumed` examples of the run."""
        return plan_run(
            self.lengths,
            self.weight_sums,
            self.shape,
            self.order,
            num_epochs=self.num_epochs,
            consumed=consumed,
        )

    def digest(self) -> str:
        """SHA-256 of everything that the steps are a function of."""
        digest = sha256(repr((_CHANGES, self.shape, self.order.digest, self.num_epochs)).encode())
        digest.update(np.ascontiguousarray(self.lengths, dtype="<i4").data)
        digest.update(np.ascontiguousarray(self.weight_sums, dtype="<f8").data)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class PlanTable:
    """A row for each step: num_examples, num_tokens, weight_sum, cost, waits, checksum.

    cost is what the step's sequences cost together, waits what its ranks wait for (see PlanShape), checksum that of its
    bins: so equal tables are equal plans, bit for bit.
    """

    rows: npt.NDArray[np.void]
    shape: PlanShape

    @property
    def num_steps(self) -> int:
        """Steps."""
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps."""
        return int(self.rows["num_tokens"].sum())

    @property
    def weight_sum(self) -> float:
        """The sum of all loss weights of all steps."""
        return fsum(self.rows["weight_sum"].tolist())

    @property
    def fill(self) -> float:
        """Tokens / room of the micro-batches, over all steps."""
        return self.num_tokens / (self.shape.num_tokens * max(self.num_steps, 1))

    @property
    def efficiency(self) -> float:
        """The share of the modelled time in which ranks do not wait: cost / (ranks * waits), over all steps."""
        waits = int(self.rows["waits"].sum())
        return int(self.rows["cost"].sum()) / (self.shape.world_size * waits) if waits else 1.0

    @property
    def digest(self) -> str:
        """SHA-256 of the table."""
        return sha256(self.rows.tobytes()).hexdigest()

    def check(self, number: int, step: StepPlan) -> None:
        """Raises RuntimeError when the step `number`, from 0, is not the planned one."""
        if step.checksum != self.rows["checksum"][number]:
            raise RuntimeError(
                f"step {number + 1} of the plan is not the one agreed on: were the store's files changed meanwhile?"
            )


def make_table(plan: RunPlan, consumed: int = 0) -> PlanTable:
    """The table of the steps behind the first `consumed` examples."""
    rows = []
    with tqdm(total=plan.total_examples - consumed, unit=" examples", desc="plan", delay=5) as bar:
        for step in plan.steps(consumed):
            costs, waits = int(step.costs.sum()), plan.shape.waits(step.costs)
            rows.append((step.num_examples, step.num_tokens, step.weight_sum, costs, waits, step.checksum))
            bar.update(step.num_examples)
    return PlanTable(np.array(rows, dtype=_ROW), plan.shape)


def plan_ahead(
    plan: RunPlan, consumed: int, *, folder: Path, is_planner: bool, shared_above: int = SHARED_ABOVE
) -> Future[PlanTable]:
    """The table of the steps behind the first `consumed` examples, made by a thread of its own.

    With more than `shared_above` examples to plan, only the process that `is_planner` makes it, into a file in
    `folder`, and the others of its node read that. The file's name tells what it holds, so one that is there is taken.
    """
    table: Future[PlanTable] = Future()
    num_left = plan.total_examples - consumed

    def run() -> None:
        try:
            if num_left <= shared_above:
                table.set_result(make_table(plan, consumed))
                return
            file = folder / f"plan-{plan.digest()[:16]}-{consumed}.npy"
            found = _read_table(file, plan, num_left)
            if found is None and is_planner:
                found = make_table(plan, consumed)
                _write_table(file, found)
            while found is None:
                time.sleep(_POLL_S)
                found = _read_table(file, plan, num_left)
            table.set_result(found)
        except BaseException as error:
            table.set_exception(error)

    Thread(target=run, name="plan", daemon=True).start()  # so that a process that fails need not wait for it
    return table


def _read_table(file: Path, plan: RunPlan, num_examples: int) -> PlanTable | None:
    """The table in a file; None when there is none, or not all of it."""
    try:
        rows = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    is_whole = rows.dtype == _ROW and int(rows["num_examples"].sum()) == num_examples
    return PlanTable(rows, plan.shape) if is_whole else None


def _write_table(file: Path, table: PlanTable) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as stream:
        np.save(stream, table.rows)
    partial.rename(file)
