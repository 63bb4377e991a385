"""The plan: every example once, no bin too full, costs as equal as can be, one number as its position."""

import math
import os
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

import ochat_train.tokens.plan
from ochat_train.recipe import Recipe, load_recipe
from ochat_train.tokens.order import DataOrder, SourceShare
from ochat_train.tokens.packing import pack_step
from ochat_train.tokens.plan import PlanShape, RunPlan, StepPlan, plan_epoch, quadratic_length
from ochat_train.tokens.store import Manifest
from ochat_train.training.setup import deepspeed_configuration, peak_learning_rate

OPENCHAT_RECIPE = Path(__file__).parent.parent / "recipes" / "openchat_v3.2_super_13b.yaml"

Lengths = npt.NDArray[np.int32]
Bins = list[list[int]]
no_deadline = settings(deadline=None)  # shared machines pause
seeds = st.none() | st.integers(0, 2**63 - 1)


@dataclass(frozen=True)
class Case:
    """A store, and a shape that takes it."""

    lengths: Lengths
    weights: npt.NDArray[np.float64]
    shape: PlanShape
    order: DataOrder

    def steps(self, *, epoch: int = 0, start: int = 0) -> list[StepPlan]:
        planned = plan_epoch(self.lengths, self.weights, self.shape, self.order, epoch=epoch, start=start)
        # A plan of more steps than examples is wrong, and might never end.
        return list(islice(planned, self.order.num_examples(epoch) + 1))

    def run(self, *, num_epochs: int, consumed: int = 0) -> Iterator[StepPlan]:
        plan = RunPlan(self.lengths, self.weights, self.shape, self.order, num_epochs)
        return islice(plan.steps(consumed), plan.num_examples + 1)


def case_of(lengths: Any, shape: PlanShape, *, seed: int | None = None, weight: float = 1.0) -> Case:
    """A store whose tokens all have this weight; without a seed it is planned in its own order."""
    lengths = np.asarray(lengths, np.int32)
    return Case(lengths, lengths * weight, shape, DataOrder(len(lengths), seed))


@st.composite
def orders(draw: st.DrawFn, num: int) -> DataOrder:
    """Every example once an epoch, or of three sources one never, one half, and one twice and a half."""
    seed = draw(seeds)
    if num < 6 or draw(st.booleans()):
        return DataOrder(num, seed)
    shares = [SourceShare("half", np.arange(1, num, 3), 0.5), SourceShare("more", np.arange(2, num, 3), 2.5)]
    return DataOrder(num, seed, shares)


@st.composite
def shapes(draw: st.DrawFn, capacity: int) -> PlanShape:
    """Any shape of this capacity, with costs that are nearly quadratic and such that are nearly the tokens."""
    return PlanShape(
        capacity, draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 60, 768, 10_000]))
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Stores of up to 80 examples. The weights are tenths, which are no fractions of two: their sums need rounding."""
    capacity = draw(st.integers(1, 64))
    lengths = draw(st.lists(st.integers(1, capacity), max_size=80))
    tenths = draw(st.lists(st.integers(0, 10 * capacity), min_size=len(lengths), max_size=len(lengths)))
    return Case(
        np.array(lengths, np.int32),
        np.array(tenths, np.float64) / 10,
        draw(shapes(capacity)),
        draw(orders(len(lengths))),
    )


def bins_of(step: StepPlan) -> Bins:
    return [positions.tolist() for positions in step.bins]


def examples_of(step: StepPlan) -> list[int]:
    return [position for positions in bins_of(step) for position in positions]


def all_examples(steps: list[StepPlan]) -> list[int]:
    return [position for step in steps for position in examples_of(step)]


def as_values(steps: list[StepPlan]) -> list[tuple[Bins, float, int, list[int]]]:
    return [(bins_of(step), step.weight_sum, step.num_tokens, step.costs.tolist()) for step in steps]


def sharegpt_like_lengths(num: int, *, mu: float = 6.8, seed: int = 0) -> Lengths:
    """Lognormal conversation lengths (median e^mu tokens, a tail of thousands), cut at the context length."""
    return np.clip(np.random.default_rng(seed).lognormal(mu, 0.9, num), 8, 4096).astype(np.int32)


# ---- Every plan ----


@given(cases(), st.integers(0, 5))
@no_deadline
def test_the_steps_are_the_order_of_the_epoch_cut_in_pieces(case: Case, epoch: int) -> None:
    position = 0
    for step in case.steps(epoch=epoch):
        assert step.num_examples > 0
        expected = case.order.examples(epoch)[position : position + step.num_examples]
        assert sorted(examples_of(step)) == sorted(expected.tolist())
        position += step.num_examples
    assert position == case.order.num_examples(epoch)


@given(cases(), st.integers(0, 5))
@no_deadline
def test_every_example_is_trained_exactly_once_an_epoch(case: Case, epoch: int) -> None:
    case = replace(case, order=DataOrder(len(case.lengths), seed=epoch))
    assert sorted(all_examples(case.steps(epoch=epoch))) == list(range(len(case.lengths)))


@given(cases())
@no_deadline
def test_no_bin_is_above_capacity_and_every_step_has_all_bins(case: Case) -> None:
    for step in case.steps():
        assert len(step.bins) == case.shape.num_bins
        for positions in step.bins:
            assert positions.dtype == np.int64
            assert int(case.lengths[positions].sum()) <= case.shape.capacity


@given(cases())
@no_deadline
def test_the_sums_of_a_step_are_exact(case: Case) -> None:
    for step in case.steps():
        assert isinstance(step.weight_sum, float)
        assert step.weight_sum == math.fsum(case.weights[examples_of(step)])
        assert step.num_tokens == sum(case.lengths[examples_of(step)].tolist())
        lengths = [case.lengths[positions].tolist() for positions in step.bins]
        q = case.shape.quadratic_length
        assert step.costs.tolist() == [sum(q * length + length**2 for length in held) for held in lengths]


@given(cases(), st.integers(0, 3))
@no_deadline
def test_a_step_takes_as_many_examples_as_can_be_placed(case: Case, epoch: int) -> None:
    position, shape = 0, case.shape
    for step in case.steps(epoch=epoch):
        end = min(position + step.num_examples + 1, case.order.num_examples(epoch))
        lengths = case.lengths[case.order.examples(epoch)[position:end]].astype(np.int64)
        bin_of, _ = pack_step(lengths, shape.capacity, shape.num_bins, shape.quadratic_length)
        assert step.num_examples == len(bin_of)
        position += step.num_examples


@given(cases(), st.integers(0, 3))
@no_deadline
def test_the_same_inputs_give_the_same_plan(case: Case, epoch: int) -> None:
    # The values count, not where they are in memory.
    apart = np.repeat(case.lengths, 3)[::3]
    again = replace(case, lengths=apart, weights=case.weights.copy(), shape=replace(case.shape))
    assert as_values(again.steps(epoch=epoch)) == as_values(case.steps(epoch=epoch))


@given(cases(), st.integers(0, 2), st.sampled_from([1, 7, 64]), st.integers(0, 80))
@no_deadline
def test_how_far_is_read_ahead_changes_nothing(case: Case, epoch: int, window: int, start: int) -> None:
    expected = as_values(case.steps(epoch=epoch, start=start))
    with patch.object(ochat_train.tokens.plan, "_WINDOW", window):
        assert as_values(case.steps(epoch=epoch, start=start)) == expected


# ---- Positions ----


@given(cases(), st.data())
@no_deadline
def test_seeking_to_the_end_of_a_step_gives_the_rest_of_the_unbroken_plan(case: Case, data: st.DataObject) -> None:
    unbroken = case.steps(epoch=1)
    num_steps = data.draw(st.integers(0, len(unbroken)))
    consumed = sum(step.num_examples for step in unbroken[:num_steps])
    assert as_values(case.steps(epoch=1, start=consumed)) == as_values(unbroken[num_steps:])


@given(cases(), st.integers(0, 4), st.data())
@no_deadline
def test_a_run_is_its_epochs_one_after_the_other_and_resumes_anywhere(
    case: Case, num_epochs: int, data: st.DataObject
) -> None:
    unbroken = [step for epoch in range(num_epochs) for step in case.steps(epoch=epoch)]
    assert as_values(list(case.run(num_epochs=num_epochs))) == as_values(unbroken)
    num_steps = data.draw(st.integers(0, len(unbroken)))
    consumed = sum(step.num_examples for step in unbroken[:num_steps])
    assert as_values(list(case.run(num_epochs=num_epochs, consumed=consumed))) == as_values(unbroken[num_steps:])


@given(cases(), st.integers(1, 4), st.data())
@no_deadline
def test_a_run_that_changes_its_shape_again_and_again_trains_every_example_once_an_epoch(
    case: Case, num_epochs: int, data: st.DataObject
) -> None:
    trained: list[int] = []
    total = case.order.total(num_epochs)
    for _ in range(5):
        num_steps = data.draw(st.integers(0, 10), "steps before the next change")
        for step, _ in zip(case.run(num_epochs=num_epochs, consumed=len(trained)), range(num_steps), strict=False):
            trained += examples_of(step)
        capacity = int(case.lengths.max(initial=1)) + data.draw(st.integers(0, 64), "more room than the longest")
        case = replace(case, shape=data.draw(shapes(capacity)))
    trained += all_examples(list(case.run(num_epochs=num_epochs, consumed=len(trained))))
    assert len(trained) == total
    for epoch in range(num_epochs):
        begin, end = case.order.total(epoch), case.order.total(epoch + 1)
        expected = case.order.examples(epoch).tolist()
        assert Counter(trained[begin:end]) == Counter(expected)


@pytest.mark.parametrize(
    "other", [{"world_size": 3}, {"world_size": 16}, {"grad_accum": 4}, {"capacity": 5000}, {"quadratic_length": 10}]
)
def test_with_another_shape_the_remaining_examples_are_trained_once(other: dict[str, int]) -> None:
    case = case_of(sharegpt_like_lengths(500), PlanShape(8192, 4, 2, 62_752), seed=0)
    done = case.steps(epoch=2)[:3]
    consumed = sum(step.num_examples for step in done)
    case = replace(case, shape=replace(case.shape, **other))
    assert sorted(all_examples(done + case.steps(epoch=2, start=consumed))) == list(range(500))


@given(cases(), st.integers(0, 80))
@no_deadline
def test_without_a_seed_each_step_takes_the_next_examples_of_the_store(case: Case, start: int) -> None:
    case = replace(case, order=DataOrder(len(case.lengths), seed=None))
    position = start
    for step in case.steps(epoch=3, start=start):
        assert sorted(examples_of(step)) == list(range(position, position + step.num_examples))
        position += step.num_examples
    assert position == max(start, len(case.lengths))


def test_epochs_and_seeds_have_different_plans() -> None:
    lengths = sharegpt_like_lengths(300)
    plans = {
        tuple(step.checksum for step in case_of(lengths, PlanShape(8192, 2, 1, 62_752), seed=seed).steps(epoch=epoch))
        for seed, epoch in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (None, 0)]
    }
    assert len(plans) == 6


def test_a_position_at_the_end_gives_no_steps() -> None:
    case = case_of([4] * 9, PlanShape(8, 2, 1, 100), seed=0)
    assert case.steps(start=9) == []
    assert list(case.run(num_epochs=2, consumed=18)) == []
    assert [step.num_examples for step in case.run(num_epochs=2, consumed=9)] == [4, 4, 1]


def test_an_empty_store_gives_no_steps() -> None:
    case = case_of([], PlanShape(8, 2, 1, 100), seed=0)
    assert case.steps() == []
    assert list(case.run(num_epochs=3)) == []


# ---- How full steps are ----


def test_the_tail_of_an_epoch_is_a_step() -> None:
    steps = case_of([4] * 9, PlanShape(8, 2, 1, 100), seed=0).steps()
    assert [step.num_examples for step in steps] == [4, 4, 1]


def test_fewer_examples_than_ranks_make_one_step_with_empty_bins() -> None:
    (step,) = case_of([5, 7], PlanShape(16, 8, 1, 100), seed=0).steps()
    assert sorted(map(len, step.bins)) == [0] * 6 + [1, 1]
    assert (step.weight_sum, step.num_tokens) == (12.0, 12)


def test_what_is_left_for_the_last_step_runs_in_its_first_micro_batches() -> None:
    (step,) = case_of([5, 7, 6], PlanShape(16, 4, 2, 100)).steps()
    assert [len(positions) for positions in step.bins[:4]].count(1) == 3
    assert all(len(positions) == 0 for positions in step.bins[4:])


def test_an_example_of_exactly_the_capacity_fits() -> None:
    steps = case_of([8, 8, 8], PlanShape(8, 2, 1, 100), seed=0).steps()
    assert [step.num_examples for step in steps] == [2, 1]


def test_a_step_that_is_filled_to_the_last_token_takes_all() -> None:
    (step,) = case_of([5, 3, 4, 4, 7, 1], PlanShape(8, 3, 1, 100)).steps()
    assert sorted(sorted(positions) for positions in bins_of(step)) == [[0, 1], [2, 3], [4, 5]]


def test_an_example_that_does_not_fit_is_the_first_of_the_next_step() -> None:
    # The last 1 would fit into the first step; it waits for its turn all the same.
    steps = case_of([6, 6, 6, 1], PlanShape(8, 2, 1, 100)).steps()
    assert [sorted(examples_of(step)) for step in steps] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("window", [7, 65_536])
def test_an_overlong_example_is_refused_wherever_it_is(seed: int | None, window: int) -> None:
    with patch.object(ochat_train.tokens.plan, "_WINDOW", window):
        for overlong in range(0, 50, 3):
            case = case_of(np.full(50, 8192), PlanShape(8192, 2, 1, 100), seed=seed)
            case.lengths[overlong] = 8193
            before = []
            message = f"example {overlong} of the store has 8,193 tokens, above the 8,192 of a micro-batch"
            with pytest.raises(ValueError, match=message):
                before.extend(plan_epoch(case.lengths, case.weights, case.shape, case.order, epoch=0))
            assert overlong not in all_examples(before)


def test_an_overlong_example_is_refused_before_the_first_step() -> None:
    case = case_of([8, 9000, 8192], PlanShape(8192, 1, 1, 100))
    with pytest.raises(ValueError, match="example 1 of the store"):
        next(plan_epoch(case.lengths, case.weights, case.shape, case.order, epoch=0))


def test_a_step_whose_costs_are_too_large_for_whole_numbers_is_refused() -> None:
    # 2^30 tokens cost 2^30 (2^30 + 2^30) = 2^61 at q = 2^30; sums of costs stay below 2^63 up to 2^62 for a step.
    assert PlanShape(2**30, 2, 1, 2**30).room == 2**31
    with pytest.raises(ValueError, match=r"a step of 3 micro-batches of 1,073,741,824 tokens .*lower"):
        PlanShape(2**30, 3, 1, 2**30)
    for capacity in (2**32, 2**40, 2**63):  # whose costs are above 2^64
        with pytest.raises(ValueError, match="too large to be planned; lower packing"):
            PlanShape(capacity, 1, 1, 2**32)


# ---- How equal the costs are ----


def test_long_sequences_are_spread_by_cost_not_only_by_tokens() -> None:
    # At q = 10 the long one costs 100 + 1,000 and a short one 25 + 62.5: all six short ones together cost less than the
    # long one, although they have more tokens.
    case = case_of([100, 25, 25, 25, 25, 25, 25], PlanShape(200, 2, 1, 10))
    (step,) = case.steps()
    assert sorted(sorted(case.lengths[positions].tolist()) for positions in step.bins) == [[25] * 6, [100]]
    assert sorted(step.costs.tolist()) == [10 * 6 * 25 + 6 * 25**2, 10 * 100 + 100**2]


def test_the_quadratic_length_is_the_weights_of_a_token_by_the_width_of_attention() -> None:
    # Llama-2-13B: 40 layers of 4 h^2 and 3 h * 13,824 weights and a head, h = 5,120. By hand:
    # 40 * (104,857,600 + 212,336,640) + 163,840,000 = 12,851,609,600, through 40 * 5,120 = 204,800, is 62,752.0.
    llama_2_13b = 40 * (4 * 5120**2 + 3 * 5120 * 13_824) + 32_000 * 5120
    assert quadratic_length(num_weights=llama_2_13b, attention_width=40 * 5120) == 62_752
    assert llama_2_13b == 62_752 * 204_800
    # Llama-3-8B has 8 heads for keys and values beside 32 for queries: its matrices are smaller, attention is not.
    # 32 * (2 * 4096^2 + 2 * 4096 * 1024 + 3 * 4096 * 14,336) + 128,256 * 4096 = 7,504,658,432; / 131,072 = 57,256.
    llama_3_8b = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336) + 128_256 * 4096
    assert quadratic_length(num_weights=llama_3_8b, attention_width=32 * 4096) == 57_256


def test_without_attention_over_the_whole_sequence_costs_are_linear() -> None:
    linear = quadratic_length(num_weights=10**6, attention_width=0)
    # A context of a million tokens costs at most a thousandth more than as many separate ones.
    assert 10**6 / linear <= 1e-3
    # And a step of a million ranks can still be planned.
    assert PlanShape(2**12, 10**6, 1, linear).num_bins == 10**6


def test_the_quadratic_length_is_at_least_one_token() -> None:
    assert quadratic_length(num_weights=1, attention_width=1000) == 1


def test_ranks_wait_for_the_heaviest_at_each_micro_batch() -> None:
    shape = PlanShape(8, 3, 2, 100)
    assert shape.waits(np.array([5, 1, 3, 2, 2, 9])) == 5 + 9
    assert PlanShape(8, 2, 3, 100).waits(np.array([5, 1, 3, 2, 2, 9])) == 5 + 3 + 9
    assert PlanShape(8, 6, 1, 100).waits(np.array([5, 1, 3, 2, 2, 9])) == 9
    assert PlanShape(8, 1, 6, 100).waits(np.array([5, 1, 3, 2, 2, 9])) == 22


def least_waits(costs: list[int], world_size: int) -> int:
    """The least that all ways to group the micro-batches by `world_size` make ranks wait."""
    if not costs:
        return 0
    first, rest = costs[0], costs[1:]
    return min(
        max([first, *(rest[place] for place in beside)])
        + least_waits([cost for place, cost in enumerate(rest) if place not in beside], world_size)
        for beside in combinations(range(len(rest)), world_size - 1)
    )


@given(cases(), st.sampled_from([(1, 4), (2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (4, 2), (5, 1)]))
@no_deadline
def test_micro_batches_that_run_together_are_of_like_cost(case: Case, ranks_and_accumulation: tuple[int, int]) -> None:
    world_size, grad_accum = ranks_and_accumulation
    case = replace(case, shape=replace(case.shape, world_size=world_size, grad_accum=grad_accum))
    for step in case.steps():
        assert case.shape.waits(step.costs) == least_waits(step.costs.tolist(), world_size)
        # In each group the rank of the least sum gets the heaviest, so sums differ by no more than costs in a group do.
        groups = step.costs.reshape(grad_accum, world_size)
        sums = groups.sum(axis=0)
        assert sums.max() - sums.min() <= (groups.max(axis=1) - groups.min(axis=1)).max()


def test_a_rank_that_ran_a_heavy_micro_batch_gets_a_light_one_next() -> None:
    case = case_of([8, 7, 6, 5, 4, 3, 2, 1], PlanShape(8, 2, 4, 10**6))
    (step,) = case.steps()
    assert [case.lengths[positions].tolist() for positions in step.bins] == [[8], [7], [5], [6], [3], [4], [2], [1]]


@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("mu", [6.3, 6.8, 7.3])  # medians of 540, 900 and 1,480 tokens
def test_steps_of_sharegpt_like_lengths_are_full_and_balanced(mu: float, grad_accum: int) -> None:
    shape = PlanShape(32_768, 8, grad_accum, 62_752)
    *full, tail = case_of(sharegpt_like_lengths(5000, mu=mu), shape, seed=0).steps()
    assert len(full) >= 5 and tail.num_examples > 0
    for step in full:
        # A step ends at an example that has no room, of up to 4,096 of the 262,144 tokens of 8 bins, or 1.6 points. As
        # short examples come last, hardly more than that stays open.
        assert step.num_tokens >= 0.98 * shape.room
        # Levelling ends within a 2,048th of the mean, if not before, and an example more is worth a 256th. First-fit
        # has 1.4.
        assert shape.waits(step.costs) * shape.world_size <= (1 + 1 / 256) * int(step.costs.sum())


def test_the_openchat_13b_recipe_is_planned_in_hardly_more_steps_than_its_tokens_need() -> None:
    lengths = sharegpt_like_lengths(80_000)
    case = case_of(lengths, PlanShape(8 * 4096, 8, 1, 62_752), seed=0, weight=0.5)
    steps = case.steps()
    assert sorted(all_examples(steps)) == list(range(80_000))
    assert max(int(lengths[positions].sum()) for step in steps for positions in step.bins) <= 32_768
    # No more than a point of bins' open ends (see above) beyond the tokens themselves, and the tail's step.
    assert len(steps) <= math.ceil(int(lengths.sum()) / (8 * 32_768) / 0.99) + 1
    # The last 20 steps again, by seeking.
    consumed = sum(step.num_examples for step in steps[:-20])
    assert as_values(case.steps(start=consumed)) == as_values(steps[-20:])


# ---- The same everywhere, in little memory ----


def golden_case() -> Case:
    """Numbers that no random generator makes."""
    return case_of(1 + np.arange(60) * 37 % 97, PlanShape(200, 3, 2, 100), seed=7, weight=0.1)


def test_the_plan_is_what_it_was() -> None:
    # A change of these numbers is a change of the plan of all runs: checkpoints would go on with other steps.
    assert [[step.checksum for step in golden_case().steps(epoch=epoch)] for epoch in range(2)] == [
        [4000861671, 1017268254, 2443602773],
        [1590999624, 3480316558, 91215347],
    ]
    first, *_ = golden_case().steps()
    assert bins_of(first) == [
        [16, 37, 47, 59, 35],
        [26, 4, 6, 24, 58],
        [19, 12, 57, 9],
        [54, 36, 22, 40],
        [10, 32, 46, 1],
        [53, 0, 28, 20, 51],
    ]


def test_the_checksum_is_that_of_lengths_and_positions() -> None:
    step = StepPlan((np.array([1, 2]), np.array([300])), 1.0, 10, np.array([5, 5]))
    assert step.checksum == crc32(struct.pack("<5q", 2, 1, 1, 2, 300))


def test_the_checksum_changes_with_order_and_borders() -> None:
    arrangements: list[Bins] = [
        [[1, 2], [3]],
        [[2, 1], [3]],
        [[1], [2, 3]],
        [[3], [1, 2]],
        [[1, 2, 3], []],
        [[], [1, 2, 3]],
        [[1, 2], [3], []],
        [[1, 2], [4]],
    ]
    found = {
        StepPlan(tuple(np.array(positions, np.int64) for positions in bins), 1.0, 10, np.array([5, 5])).checksum
        for bins in arrangements
    }
    assert len(found) == len(arrangements)


FRESH_PROCESS = """
import numpy as np
from ochat_train.tokens.order import DataOrder
from ochat_train.tokens.plan import PlanShape, plan_epoch
lengths = (1 + np.arange(60) * 37 % 97).astype(np.int32)
for step in plan_epoch(lengths, lengths * 0.1, PlanShape(200, 3, 2, 100), DataOrder(60, 7), epoch=1):
    print(([b.tolist() for b in step.bins], step.weight_sum, step.num_tokens, step.costs.tolist()))
"""


def test_a_fresh_process_computes_the_same_plan() -> None:
    for hash_seed in ("0", "12345"):  # salts of hash(), as every process draws one
        done = subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines() == [str(step) for step in as_values(golden_case().steps(epoch=1))]


def test_the_first_step_of_a_huge_store_is_planned_in_the_memory_of_its_order_and_a_window(tmp_path: Path) -> None:
    num_examples = 10_000_000  # 40 MB of lengths
    lengths = np.lib.format.open_memmap(tmp_path / "lengths.npy", "w+", np.int32, (num_examples,))
    lengths[:] = 300
    weights = np.lib.format.open_memmap(tmp_path / "weight_sums.npy", "w+", np.float64, (num_examples,))
    case = Case(lengths, weights, PlanShape(32_768, 8, 1, 62_752), DataOrder(num_examples, seed=0))
    tracemalloc.start()
    steps = case.run(num_epochs=3, consumed=2 * num_examples + 5_000_000)
    assert next(steps).num_examples == 8 * (32_768 // 300)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A window has 65,536 examples: half a megabyte for each array of 8-byte numbers, of which some six live together.
    assert peak < 4 * num_examples + 5_000_000


# ---- The published 13B recipe ----


@pytest.fixture(scope="module")
def openchat() -> Recipe:
    return load_recipe(OPENCHAT_RECIPE)


def llama_2_13b() -> Any:
    return LlamaConfig(
        vocab_size=32_000, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40, num_attention_heads=40
    )


def test_the_openchat_13b_recipe_means_this_deepspeed_configuration(openchat: Recipe) -> None:
    assert deepspeed_configuration(openchat) == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 200_000_000,
            "use_multi_rank_bucket_allreduce": False,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1_000_000_000,
        "timers": {"throughput": {"enabled": False}},
        "checkpoint": {"use_node_local_storage": False, "load_universal": False},
    }


def test_the_openchat_13b_recipe_has_the_published_learning_rate(openchat: Recipe) -> None:
    manifest = Manifest(
        fingerprint="",
        made_from={},
        template="openchat_v3.2",
        conditions=["GPT4", "GPT3"],
        sources=["gpt4", "gpt3"],
        inference_condition="GPT4",
        added_tokens={},
        splits={"train": {"num_tokens": 100_000_000, "num_supervised_tokens": 60_000_000}},
        counts={},
        overlong={},
    )
    # 8 GPUs x 32,768 tokens x 0.6 with a loss = 157,286.4; sqrt(157,286.4 / 4e6) = 0.19829675; x 3e-4.
    # Rounded to 8 digits here.
    assert peak_learning_rate(openchat, llama_2_13b(), manifest, 8).value == pytest.approx(5.9489024e-5, rel=1e-7)
    # A number in the recipe is taken as it is.
    fixed = load_recipe(OPENCHAT_RECIPE, ["optim.lr=2e-5"])
    assert peak_learning_rate(fixed, llama_2_13b(), manifest, 8) == (2e-5, "asked for by the recipe")


def test_extra_deepspeed_keys_are_merged() -> None:
    extra = [
        "deepspeed.zero_optimization.overlap_comm=true",
        "deepspeed.zero_optimization.reduce_bucket_size=1000",
        "deepspeed.zero_optimization.stage=2",  # said twice, but the same
        "deepspeed.wall_clock_breakdown=true",
        "deepspeed.bf16.immediate_grad_update=true",
    ]
    recipe = load_recipe(OPENCHAT_RECIPE, extra)
    config = deepspeed_configuration(recipe)
    assert config["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 1000,
        "use_multi_rank_bucket_allreduce": True,
    }
    assert config["wall_clock_breakdown"] is True
    assert config["bf16"] == {"enabled": True, "immediate_grad_update": True}
    plain = deepspeed_configuration(load_recipe(OPENCHAT_RECIPE))
    assert {key for key in config if config[key] != plain.get(key)} == {
        "zero_optimization",
        "wall_clock_breakdown",
        "bf16",
    }


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("deepspeed.zero_optimization.stage=3", r"deepspeed\.zero_optimization\.stage: 3 contradicts 2"),
        ("deepspeed.gradient_accumulation_steps=2", r"deepspeed\.gradient_accumulation_steps: 2 contradicts 1"),
        ("deepspeed.gradient_clipping=0.5", r"deepspeed\.gradient_clipping: 0\.5 contradicts 1\.0"),
        ("deepspeed.bf16.enabled=false", r"deepspeed\.bf16\.enabled: False contradicts True"),
        ("deepspeed.bf16=false", r"deepspeed\.bf16: False contradicts"),
        ("deepspeed.train_micro_batch_size_per_gpu=4", r"deepspeed\.train_micro_batch_size_per_gpu: 4 contradicts 1"),
        ("deepspeed.data_types.grad_accum_dtype=bf16", r"deepspeed\.data_types\.grad_accum_dtype"),
        # Keys that the configuration does not have, with which DeepSpeed would overrule the recipe.
        ("deepspeed.fp16.enabled=true", r"deepspeed\.fp16: .*other sections decide"),
        ("deepspeed.optimizer.type=Lamb", r"deepspeed\.optimizer: .*decide"),
        ("deepspeed.scheduler.type=WarmupLR", r"deepspeed\.scheduler: .*decide"),
        ("deepspeed.train_batch_size=64", r"deepspeed\.train_batch_size: .*decide"),
    ],
)
def test_an_extra_deepspeed_key_that_contradicts_the_recipe_is_refused(override: str, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        deepspeed_configuration(load_recipe(OPENCHAT_RECIPE, [override]))
