"""The table of all steps: exact totals, a hash of the whole plan, made in the background."""

import math
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ochat_train.tokens.plan
from ochat_train.tokens.order import DataOrder, SourceShare
from ochat_train.tokens.plan import PlanShape, PlanTable, RunPlan, make_table, start_table
from tests.waiting import HANG_S


def plan_of(lengths: npt.NDArray[np.int32], shape: PlanShape, *, num_epochs: int = 2, seed: int = 0) -> RunPlan:
    """A plan whose tokens all weigh a tenth, as f32 has it."""
    weights = lengths * float(np.float32(0.1))
    return RunPlan(lengths, weights, shape, DataOrder(len(lengths), seed), num_epochs)


def some_plan(num: int = 300, *, num_epochs: int = 2, seed: int = 0) -> RunPlan:
    lengths = np.random.default_rng(1).integers(1, 200, num).astype(np.int32)
    return plan_of(lengths, PlanShape(400, 3, 2, 500), num_epochs=num_epochs, seed=seed)


# ------------------------------------------------------------------------------------------------ totals


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_the_totals_are_exact_before_the_first_step(
    lengths: list[int], num_epochs: int, world_size: int, grad_accum: int
) -> None:
    plan = plan_of(np.array(lengths, np.int32), PlanShape(64, world_size, grad_accum, 30), num_epochs=num_epochs)
    table, steps = make_table(plan), list(plan.steps())
    assert table.num_steps == len(steps)
    assert table.num_tokens == num_epochs * sum(lengths)
    assert table.rows["num_examples"].sum() == num_epochs * len(lengths) == plan.num_examples
    # Each step's sum is rounded once, to 2^-53 of itself; so their sum is off by no more than that of the whole.
    assert table.weight_sum == pytest.approx(num_epochs * math.fsum(plan.weight_sums), rel=2**-52)
    assert table.fill == table.num_tokens / (64 * world_size * grad_accum * len(steps))
    for row, step in zip(table.rows, steps, strict=True):
        assert tuple(row)[:3] == (step.num_examples, step.num_tokens, step.weight_sum)


def test_the_efficiency_is_what_is_left_of_the_time_when_ranks_wait_at_each_micro_batch() -> None:
    # q = 1 makes costs of 3 * 4 = 12 and 1 * 2 = 2. Two ranks, two micro-batches each, one example a bin: the two long
    # ones run together, then the two short ones, and nobody waits. With three long ones somebody does.
    shape = PlanShape(3, 2, 2, 1)
    assert make_table(plan_of(np.array([3, 1, 3, 1], np.int32), shape, num_epochs=1)).efficiency == 1.0
    uneven = make_table(plan_of(np.array([3, 3, 3, 1], np.int32), shape, num_epochs=1))
    assert uneven.efficiency == (12 + 12 + 12 + 2) / (2 * (12 + 12))


def test_a_position_gives_the_rest_of_the_table() -> None:
    plan = some_plan()
    whole = make_table(plan)
    assert whole.num_steps > 10
    for number in (1, 5, whole.num_steps - 1, whole.num_steps):
        consumed = int(whole.rows["num_examples"][:number].sum())
        assert np.array_equal(make_table(plan, consumed).rows, whole.rows[number:])


def test_sources_in_other_shares_are_in_the_totals() -> None:
    lengths = np.array([10, 20, 30, 40], np.int32)
    shares = [SourceShare("a", np.array([0, 2]), 0.5), SourceShare("b", np.array([1, 3]), 2.0)]
    order = DataOrder(4, 0, shares)
    plan = RunPlan(lengths, lengths * 1.0, PlanShape(64, 1, 1, 100), order, 2)
    table = make_table(plan)
    assert table.rows["num_examples"].sum() == plan.num_examples == 2 + 8
    assert table.num_tokens == table.weight_sum == (10 + 30) + 4 * (20 + 40)


def test_a_run_without_examples_has_no_steps() -> None:
    table = make_table(plan_of(np.array([], np.int32), PlanShape(8, 1, 1, 10)))
    assert (table.num_steps, table.num_tokens, table.weight_sum, table.fill, table.efficiency) == (0, 0, 0.0, 0.0, 1.0)


# ---------------------------------------------------------------------------------------------- the hash


def test_equal_tables_are_equal_plans() -> None:
    """A swap of two examples of equal length and weight changes no total, but the checksum and so the digest."""
    plan = some_plan()
    table = make_table(plan)
    step = next(plan.steps())
    table.check(0, step)
    swapped = replace(step, bins=(step.bins[1], step.bins[0], *step.bins[2:]))
    with pytest.raises(RuntimeError, match="step 1 of the plan is not the one agreed on"):
        table.check(0, swapped)
    rows = table.rows.copy()
    rows["checksum"][0] = swapped.checksum
    assert PlanTable(rows, plan.shape).digest != table.digest


def test_the_digest_changes_with_everything_that_the_steps_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = some_plan()
    lengths, weights = plan.lengths.copy(), plan.weight_sums.copy()
    lengths[-1] += 1
    weights[-1] += 1e-9
    plans = [
        plan,
        replace(plan, lengths=lengths),
        replace(plan, weight_sums=weights),
        replace(plan, num_epochs=3),
        replace(plan, order=DataOrder(300, 1)),
        replace(plan, order=DataOrder(300, 0, [SourceShare("all", np.arange(300), 0.5)])),
        *(
            replace(plan, shape=replace(plan.shape, **{name: getattr(plan.shape, name) + 1}))
            for name in ("capacity", "world_size", "grad_accum", "quadratic_length")
        ),
    ]
    digests = [plan.digest for plan in plans]
    assert len(set(digests)) == len(plans)
    assert plan.digest == some_plan().digest
    monkeypatch.setattr(ochat_train.tokens.plan, "_VERSION", 10**6)  # of the planner
    assert some_plan().digest not in digests


def test_a_memory_mapped_store_has_the_digest_of_the_same_arrays_in_memory(tmp_path: Path) -> None:
    plan = some_plan()
    np.save(tmp_path / "lengths.npy", plan.lengths)
    np.save(tmp_path / "weights.npy", plan.weight_sums)
    mapped = replace(
        plan,
        lengths=np.load(tmp_path / "lengths.npy", mmap_mode="r"),
        weight_sums=np.load(tmp_path / "weights.npy", mmap_mode="r"),
    )
    assert mapped.digest == plan.digest
    assert make_table(mapped).digest == make_table(plan).digest


def test_sums_over_a_long_run_are_above_64_bits_and_right() -> None:
    """A model whose costs do not grow with the square has a quadratic length of 10^9, and costs are times that."""
    shape = PlanShape(32_768, 8, 1, 10**9)
    row = next(iter(make_table(plan_of(np.full(8, 32_768, np.int32), shape, num_epochs=1)).rows))
    table = PlanTable(np.repeat(np.array([row]), 50_000), shape)
    assert table.cost == 50_000 * 8 * 32_768 * (10**9 + 32_768) > 2**63
    assert table.efficiency == 1.0


def test_a_table_is_made_in_the_memory_of_its_rows() -> None:
    plan = plan_of(np.full(20_000, 8, np.int32), PlanShape(8, 1, 1, 100), num_epochs=1)
    make_table(replace(plan, num_epochs=0))  # what is imported and compiled at the first time
    tracemalloc.start()
    table = make_table(plan)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert table.num_steps == 20_000
    # 44 bytes a row, half as many again while the array grows, and the window of 65,536 examples. As tuples, 260.
    assert peak < 2.5 * table.rows.nbytes + 4e6 < 200 * table.num_steps + 4e6


# -------------------------------------------------------------------------------------- in the background


def test_the_table_made_in_the_background_is_the_same_in_every_process() -> None:
    for hash_seed in ("0", "12345"):  # salts of hash(), as every process draws one
        printed = subprocess.run(
            [sys.executable, "-c", PROCESS],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert printed.strip() == make_table(some_plan(), 10).digest


PROCESS = """
from ochat_train.tokens.plan import start_table
from tests.test_plan_table import some_plan
print(start_table(some_plan(), 10).result().digest)
"""


def test_what_goes_wrong_in_planning_reaches_whoever_asks_for_the_table() -> None:
    plan = plan_of(np.array([5, 9], np.int32), PlanShape(8, 1, 1, 10))
    with pytest.raises(ValueError, match="9 tokens, above the 8 of a micro-batch"):
        start_table(plan).result()


FAILS = """
import threading
import ochat_train.tokens.plan as module
from tests.test_plan_table import some_plan
module.make_table = lambda *_: threading.Event().wait()  # for ever
module.start_table(some_plan())
raise SystemExit(7)
"""


def test_planning_does_not_hold_up_a_process_that_ends() -> None:
    done = subprocess.run([sys.executable, "-c", FAILS], cwd=Path(__file__).parents[1], timeout=HANG_S)
    assert done.returncode == 7
