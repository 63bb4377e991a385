"""The table of all steps: exact totals, a hash of the whole plan, one planner for a node."""

import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ochat_train.tokens.plan_ahead
from ochat_train.tokens.order import DataOrder, SourceShare
from ochat_train.tokens.plan import PlanShape
from ochat_train.tokens.plan_ahead import PlanTable, RunPlan, make_table, plan_ahead

NEVER, ALWAYS = 10**9, 0  # shared_above


def plan_of(lengths: npt.NDArray[np.int32], shape: PlanShape, *, num_epochs: int = 2, seed: int = 0) -> RunPlan:
    """A plan whose tokens all weigh a tenth, as f32 has it."""
    weights = lengths * float(np.float32(0.1))
    return RunPlan(lengths, weights, shape, DataOrder(len(lengths), seed, num_epochs=num_epochs), num_epochs)


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
    assert table.rows["num_examples"].sum() == num_epochs * len(lengths) == plan.total_examples
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
    order = DataOrder(4, 0, shares, num_epochs=2)
    plan = RunPlan(lengths, lengths * 1.0, PlanShape(64, 1, 1, 100), order, 2)
    table = make_table(plan)
    assert table.rows["num_examples"].sum() == plan.total_examples == 2 + 8
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
    digests = [plan.digest() for plan in plans]
    assert len(set(digests)) == len(plans)
    assert plan.digest() == some_plan().digest()
    monkeypatch.setattr(ochat_train.tokens.plan_ahead, "_CHANGES", 10**6)  # another version of the planner
    assert plan.digest() not in digests


def test_a_memory_mapped_store_has_the_digest_of_the_same_arrays_in_memory(tmp_path: Path) -> None:
    plan = some_plan()
    np.save(tmp_path / "lengths.npy", plan.lengths)
    np.save(tmp_path / "weights.npy", plan.weight_sums)
    mapped = replace(
        plan,
        lengths=np.load(tmp_path / "lengths.npy", mmap_mode="r"),
        weight_sums=np.load(tmp_path / "weights.npy", mmap_mode="r"),
    )
    assert mapped.digest() == plan.digest()
    assert make_table(mapped).digest == make_table(plan).digest


# ------------------------------------------------------------------------------------- one planner a node


def test_a_small_plan_is_made_by_every_process_and_leaves_no_file(tmp_path: Path) -> None:
    plan = some_plan()
    for is_planner in (True, False):
        table = plan_ahead(plan, 0, folder=tmp_path, is_planner=is_planner, shared_above=NEVER).result(60)
        assert table.digest == make_table(plan).digest
    assert not list(tmp_path.iterdir())


PROCESS = """
import sys
from pathlib import Path
from tests.test_plan_ahead import some_plan
import ochat_train.tokens.plan_ahead as module
if sys.argv[2] == "reader":
    module.make_table = None  # it must not plan
table = module.plan_ahead(some_plan(), 0, folder=Path(sys.argv[1]), is_planner=sys.argv[2] == "planner", shared_above=0)
print(table.result(60).digest)
"""


def test_of_a_large_plan_one_process_of_a_node_plans_and_the_others_read(tmp_path: Path) -> None:
    folder = tmp_path / "plan" / "node"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(folder), kind],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"PYTHONHASHSEED": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, kind in enumerate(("reader", "reader", "planner"))
    ]
    printed = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert printed == [make_table(some_plan()).digest] * 3
    assert [file.suffix for file in folder.iterdir()] == [".npy"]


def test_a_file_that_is_there_is_taken_and_not_planned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = some_plan()
    first = plan_ahead(plan, 0, folder=tmp_path, is_planner=True, shared_above=ALWAYS).result(60)
    monkeypatch.setattr(ochat_train.tokens.plan_ahead, "make_table", None)
    again = plan_ahead(plan, 0, folder=tmp_path, is_planner=True, shared_above=ALWAYS).result(60)
    assert again.digest == first.digest


@pytest.mark.parametrize("damage", ["empty", "cut", "not numpy", "of another array", "of fewer steps"])
def test_a_file_that_is_no_whole_table_is_made_anew(tmp_path: Path, damage: str) -> None:
    plan = some_plan()
    expected = plan_ahead(plan, 0, folder=tmp_path, is_planner=True, shared_above=ALWAYS).result(60)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if damage == "of another array":
        np.save(file, np.arange(10))
    elif damage == "of fewer steps":
        np.save(file, expected.rows[:-1])
    else:
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "not numpy": b"plan"}[damage])
    again = plan_ahead(plan, 0, folder=tmp_path, is_planner=True, shared_above=ALWAYS).result(60)
    assert again.digest == expected.digest
    assert file.read_bytes() == content


def test_another_plan_or_position_has_another_file(tmp_path: Path) -> None:
    for plan, consumed in ((some_plan(), 0), (some_plan(), 10), (some_plan(seed=1), 0), (some_plan(num_epochs=3), 0)):
        table = plan_ahead(plan, consumed, folder=tmp_path, is_planner=True, shared_above=ALWAYS).result(60)
        assert table.digest == make_table(plan, consumed).digest
    assert len(list(tmp_path.iterdir())) == 4


def test_a_reader_waits_for_the_planner(tmp_path: Path) -> None:
    plan = some_plan()
    reader = plan_ahead(plan, 0, folder=tmp_path, is_planner=False, shared_above=ALWAYS)
    time.sleep(0.3)
    assert not reader.done()
    plan_ahead(plan, 0, folder=tmp_path, is_planner=True, shared_above=ALWAYS).result(60)
    assert reader.result(60).digest == make_table(plan).digest


def test_what_goes_wrong_in_planning_reaches_whoever_asks_for_the_table(tmp_path: Path) -> None:
    plan = plan_of(np.array([5, 9], np.int32), PlanShape(8, 1, 1, 10))
    with pytest.raises(ValueError, match=r"9 tokens, above packing\.tokens_per_gpu 8"):
        plan_ahead(plan, 0, folder=tmp_path, is_planner=True).result(60)


def test_planning_does_not_hold_up_a_process_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()
    monkeypatch.setattr(ochat_train.tokens.plan_ahead, "make_table", lambda *_: may_end.wait(60))
    table = plan_ahead(some_plan(), 0, folder=tmp_path, is_planner=True)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "plan")
    assert thread.daemon
    assert not table.done()
    may_end.set()
    thread.join(60)
