"""The table of all steps of a run: its exact totals and its hash, made in the background before step 1.

A large plan is made by one process of a node, which leaves it as a file for the others and for a resume.
"""

import os
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

from ochat_train.tokens.plan import PlanShape, RunPlan, StepPlan

SHARED_ABOVE = 2_000_000  # microseconds of planning; what takes less is planned by every process for itself
_EXAMPLE_US, _STEP_US = 1, 40  # about what planning takes
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
_Rows = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class PlanTable:
    """A row for each step: num_examples, num_tokens, weight_sum, cost, waits, checksum.

    cost is what the step's sequences cost together, waits what its ranks wait for (see PlanShape), checksum that of its
    bins: so equal tables are equal plans, bit for bit.
    """

    rows: _Rows
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
    def cost(self) -> int:
        """What all sequences cost, times the shape's quadratic length."""
        return sum(self.rows["cost"].tolist())  # of a long run it is no number of 64 bits

    @property
    def waits(self) -> int:
        """What ranks wait for in all steps: the modelled time, in the unit of costs."""
        return sum(self.rows["waits"].tolist())

    @property
    def fill(self) -> float:
        """Tokens / room of the micro-batches, over all steps."""
        return self.num_tokens / (self.shape.room * max(self.num_steps, 1))

    @property
    def efficiency(self) -> float:
        """The share of the modelled time in which ranks do not wait, over all steps."""
        return self.shape.efficiency(self.cost, self.waits)

    @property
    def digest(self) -> str:
        """SHA-256 of the table."""
        return _digest_of(self.rows)

    def check(self, number: int, step: StepPlan) -> None:
        """Raises RuntimeError when the step `number`, from 0, is not the planned one."""
        if step.checksum != self.rows["checksum"][number]:
            raise RuntimeError(
                f"step {number + 1} of the plan is not the one agreed on: were the store's files, or those in the "
                "folder plan of checkpoint.dir, changed meanwhile?"
            )


def make_table(plan: RunPlan, consumed: int = 0) -> PlanTable:
    """The table of the steps behind the first `consumed` examples."""

    def rows() -> Iterator[tuple[float, ...]]:
        with tqdm(total=plan.num_examples - consumed, unit=" examples", desc="plan", delay=5) as bar:
            for step in plan.steps(consumed):
                costs, waits = int(step.costs.sum()), plan.shape.waits(step.costs)
                yield step.num_examples, step.num_tokens, step.weight_sum, costs, waits, step.checksum
                bar.update(step.num_examples)

    return PlanTable(np.fromiter(rows(), _ROW), plan.shape)


class PlanAhead:
    """The table of the steps behind the first `consumed` examples, made by a thread while the model loads.

    A small plan is made by every process. A large one is made by the process that `is_planner`, into a file in
    `folder`, and read by the others of its node: first all call `make` together, then those that got None call `read`.
    A file's name tells what is in it, so one that is there is taken; other plans' files are removed.
    """

    def __init__(self, plan: RunPlan, consumed: int, *, folder: Path, is_planner: bool) -> None:
        self._plan, self._consumed = plan, consumed
        self._folder = folder if _planning_us(plan, consumed) > SHARED_ABOVE else None
        self._made: Future[PlanTable] | None = None
        if is_planner or self._folder is None:
            self._made = Future()
            Thread(target=self._run, name="plan", daemon=True).start()  # so that nobody who fails need wait for it

    def make(self) -> PlanTable | None:
        """The table, if this process makes it. Raises ValueError when its file cannot be written."""
        return None if self._made is None else self._made.result()

    def read(self) -> PlanTable:
        """The table that another process made. Raises ValueError when there is none."""
        if (table := self._find()) is None:
            raise ValueError(
                f"no plan in {self._folder}, where another process of this node wrote it: checkpoint.dir must be the "
                "same folder for all processes of a node"
            )
        return table

    def _run(self) -> None:
        assert self._made is not None
        try:
            table = self._find()
            if table is None:
                table = make_table(self._plan, self._consumed)
                self._write(table)
            self._made.set_result(table)
        except OSError as error:
            told = f"the plan cannot be written to {self._folder}: {error.strerror}"
            self._made.set_exception(ValueError(f"{told}; make room, or name another checkpoint.dir"))
        except BaseException as error:
            self._made.set_exception(error)

    def _find(self) -> PlanTable | None:
        """The table in a file: of the whole run, if a step of it ends at the position, or from the position on."""
        if self._folder is None:
            return None
        for begin in (0, self._consumed):
            for file in sorted(self._folder.glob(f"{self._stem(begin)}-*.npy")):
                if (rows := _read_rows(file)) is not None:
                    ends = begin + np.cumsum(rows["num_examples"])
                    num_done = int(np.searchsorted(ends, self._consumed, side="right"))
                    if self._consumed == (ends[num_done - 1] if num_done else begin):
                        return PlanTable(rows[num_done:], self._plan.shape)
        return None

    def _write(self, table: PlanTable) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.glob("plan-*"):
            old.unlink()
        file = self._folder / f"{self._stem(self._consumed)}-{table.digest[:16]}.npy"
        partial = file.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as stream:
            np.save(stream, table.rows)
        partial.rename(file)

    def _stem(self, begin: int) -> str:
        return f"plan-{self._plan.digest[:16]}-{begin}"


def _planning_us(plan: RunPlan, consumed: int) -> float:
    """About how many microseconds it takes to plan what is left."""
    num_left = plan.num_examples - consumed
    num_steps = num_left * float(np.mean(plan.lengths)) / plan.shape.room if num_left else 0
    return _EXAMPLE_US * num_left + _STEP_US * num_steps


def _read_rows(file: Path) -> _Rows | None:
    """The rows in a file; None when they are not those that its name tells."""
    try:
        rows: _Rows = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    is_whole = rows.dtype == _ROW and file.stem.endswith(_digest_of(rows)[:16])
    return rows if is_whole else None


def _digest_of(rows: _Rows) -> str:
    return sha256(np.ascontiguousarray(rows).data).hexdigest()
