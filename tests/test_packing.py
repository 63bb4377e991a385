"""A step's examples into its micro-batches: as many as fit, none too full, at costs as equal as can be."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ochat_train.tokens.packing import _schedule, cost_of, pack_step

no_deadline = settings(deadline=None, max_examples=500)  # shared machines pause; each example is fast


@dataclass(frozen=True)
class Step:
    """What pack_step is asked for: lengths in the order of the data, and the room there is."""

    lengths: list[int]
    capacity: int
    num_bins: int
    quadratic_length: int

    def cost(self, length: int) -> int:
        return length * self.quadratic_length + length**2

    def bin_cost(self, arrivals: Sequence[int]) -> int:
        return sum(self.cost(self.lengths[arrival]) for arrival in arrivals)

    def room(self, arrivals: Sequence[int]) -> int:
        return self.capacity - sum(self.lengths[arrival] for arrival in arrivals)


def pack(step: Step) -> tuple[list[list[int]], list[int]]:
    """The arrivals in each bin, and the bins' costs, as pack_step has them."""
    lengths = np.array(step.lengths, np.int64)
    bin_of, costs = pack_step(lengths, step.capacity, step.num_bins, step.quadratic_length)
    return [np.flatnonzero(bin_of == bin).tolist() for bin in range(step.num_bins)], costs.tolist()


def lengths_in(step: Step) -> list[list[int]]:
    """The lengths in each bin, sorted, the bins sorted too."""
    return sorted(sorted(step.lengths[arrival] for arrival in arrivals) for arrivals in pack(step)[0])


def schedule(step: Step, count: int) -> list[list[int]] | None:
    """The naive schedule of the first `count`: the longest first, each into the bin of least cost that has room."""
    bins: list[list[int]] = [[] for _ in range(step.num_bins)]
    for arrival in sorted(range(count), key=lambda arrival: -step.lengths[arrival]):
        with_room = [bin for bin in range(step.num_bins) if step.room(bins[bin]) >= step.lengths[arrival]]
        if not with_room:
            return None
        costs = [step.bin_cost(bins[bin]) for bin in with_room]
        bins[with_room[costs.index(min(costs))]].append(arrival)
    return bins


def find_schedule(step: Step) -> list[list[int]]:
    """The schedule of most examples as the search finds it, from above."""
    num_all = len(step.lengths)
    count, failed, distance = num_all, num_all + 1, 1
    while schedule(step, count) is None:
        failed, count, distance = count, max(1, num_all - distance), 2 * distance + 1
    while failed - count > 1:
        middle = (count + failed) // 2
        if schedule(step, middle) is None:
            failed = middle
        else:
            count = middle
    found = schedule(step, count)
    assert found is not None
    return found


def least_cost(step: Step, bins: list[list[int]], costs: list[int]) -> int:
    """No placement of these examples has a smaller largest cost."""
    longest = max(step.lengths[arrival] for arrivals in bins for arrival in arrivals)
    return max(sum(costs) // step.num_bins, step.cost(longest))


@st.composite
def small_steps(draw: st.DrawFn) -> Step:
    """Steps that are too small, just enough and too large for their examples, of long, short and equal lengths."""
    capacity = draw(st.integers(1, 100))
    longest = draw(st.integers(1, capacity))
    shortest = draw(st.integers(1, longest))
    num_bins = draw(st.integers(1, 8))
    mean = max(1, (shortest + longest) // 2)
    lengths = st.lists(st.integers(shortest, longest), min_size=1, max_size=min(40, num_bins * capacity // mean + 3))
    return Step(draw(lengths), capacity, num_bins, draw(st.sampled_from([1, 10, 100, 10_000])))


def random_step(seed: int) -> Step:
    """A step about as full as it can be, which hypothesis would seldom find; with rooms of few tokens, or of many."""
    shuffler = random.Random(seed)
    capacity, num_bins = int(10 ** shuffler.uniform(0.7, 3)), shuffler.randint(2, 8)
    longest = max(1, capacity // shuffler.choice([1, 1, 2, 4, 8]))
    part_short = shuffler.choice([0, 0.5, 0.7])
    fill, most_examples = shuffler.uniform(0.7, 1.2), shuffler.choice([20, 40, 120])
    lengths = [longest]
    while sum(lengths) < capacity * num_bins * fill and len(lengths) < most_examples:
        is_short = shuffler.random() < part_short
        lengths.append(shuffler.randint(1, max(1, longest // 3) if is_short else longest))
    shuffler.shuffle(lengths)
    return Step(lengths, capacity, num_bins, shuffler.choice([1, 10, 100, 10_000]))


steps = small_steps() | st.integers(0, 2**32).map(random_step)

# By cost, all three 3s go beside each other, as the 5 costs 30 and two of them only 24: the last 2 has no room.
BY_COST = Step([2, 3, 2, 5, 3, 2, 3, 1], capacity=10, num_bins=2, quadratic_length=1)

# The 9 has a bin for itself, the two 1s are too many. As there are 9, 7 are found by bisection between 6 and 8.
BISECTED = Step([9, 3, 3, 2, 5, 2, 3, 1, 1], capacity=9, num_bins=3, quadratic_length=1)


# ---- Which are placed ----


@given(steps)
@example(BY_COST)
@example(BISECTED)
@no_deadline
def test_the_first_arrivals_are_placed_once_in_bins_that_hold_them(step: Step) -> None:
    bins, costs = pack(step)
    assert len(bins) == len(costs) == step.num_bins
    num_placed = sum(map(len, bins))
    assert num_placed >= 1
    assert sorted(arrival for arrivals in bins for arrival in arrivals) == list(range(num_placed))
    assert all(step.room(arrivals) >= 0 for arrivals in bins)
    assert costs == [step.bin_cost(arrivals) for arrivals in bins]


@given(steps)
@example(BY_COST)
@example(BISECTED)
@no_deadline
def test_as_many_are_placed_as_a_schedule_by_cost_can_place(step: Step) -> None:
    num_placed = sum(map(len, pack(step)[0]))
    assert num_placed == sum(map(len, find_schedule(step)))
    if num_placed < len(step.lengths):
        assert schedule(step, num_placed + 1) is None


@given(steps)
@example(BY_COST)
@example(BISECTED)
@example(Step([4, 3, 2, 2, 1], 6, 2, 1))  # the bin of 3 + 2 is too full for the second 2, not for the 1
@example(Step([9, 7, 6, 5, 3, 3, 2, 1], 12, 3, 1))  # two bins are too full for a 3; one takes the 2, the other the 1
@settings(no_deadline, max_examples=1000)  # bins that are full for one length and not for the next are seldom
def test_the_schedule_takes_the_bin_of_least_cost_that_has_room(step: Step) -> None:
    lengths, num_all = np.array(step.lengths, np.int64), len(step.lengths)
    longest_first = np.argsort(-lengths, kind="stable")
    for count in {num_all, (num_all + 1) // 2}:
        bin_of = np.empty(num_all, np.int64)
        is_placed = _schedule(
            lengths, longest_first, count, step.capacity, step.num_bins, step.quadratic_length, bin_of
        )
        expected = schedule(step, count)
        assert is_placed == (expected is not None)
        if expected is not None:
            found = [np.flatnonzero(bin_of[:count] == bin).tolist() for bin in range(step.num_bins)]
            assert found == [sorted(arrivals) for arrivals in expected]


def test_a_schedule_by_cost_leaves_what_one_by_length_could_place() -> None:
    # By length, two bins of 10 tokens are filled with 5 + 3 + 2 and 3 + 3 + 2 + 2.
    assert schedule(BY_COST, 7) is None
    assert lengths_in(BY_COST) == [[2, 2, 3, 3], [2, 5]]
    assert lengths_in(BISECTED) == [[2, 2, 5], [3, 3, 3], [9]]


@given(steps, st.randoms(use_true_random=False))
@no_deadline
def test_in_which_order_the_placed_arrived_changes_nothing(step: Step, shuffler: random.Random) -> None:
    num_placed = sum(map(len, pack(step)[0]))
    placed, rest = step.lengths[:num_placed], step.lengths[num_placed:]
    shuffler.shuffle(placed)
    assert lengths_in(replace(step, lengths=placed + rest)) == lengths_in(step)


# ---- How equal the costs are ----


@given(steps)
@example(BY_COST)
@example(BISECTED)
@no_deadline
def test_the_largest_cost_is_that_of_the_schedule_or_less(step: Step) -> None:
    assert max(pack(step)[1]) <= max(map(step.bin_cost, find_schedule(step)))


def gains(step: Step, heavy: list[int], light: list[int]) -> Iterator[int]:
    """By how much each move and each swap that fits lowers the larger cost of two bins; below 0 where it raises it."""
    larger = step.bin_cost(heavy)
    for given_away in heavy:
        for got in [None, *light]:
            length = step.lengths[given_away] - (0 if got is None else step.lengths[got])
            if length <= step.room(light):
                difference = step.cost(step.lengths[given_away]) - (0 if got is None else step.cost(step.lengths[got]))
                yield larger - max(larger - difference, step.bin_cost(light) + difference)


def is_heaviest_stuck(step: Step) -> bool:
    """Whether no exchange with the lightest bins lowers the largest cost, or it is as low as it can be, or nearly."""
    bins, costs = pack(step)
    largest, least = max(costs), least_cost(step, bins, costs)
    if largest <= least + least // 2048:
        return True
    # An exchange must close more than a 2,048th of the gap to be worth it, and each of the two gets half. Of several
    # heaviest bins it is enough that one is stuck.
    lightest = sorted(range(step.num_bins), key=lambda bin: costs[bin])[:8]
    return any(
        all(
            2 * gain <= (largest - costs[light]) // 2048
            for light in lightest
            for gain in gains(step, heaviest, bins[light])
        )
        for heaviest, its_cost in zip(bins, costs, strict=True)
        if its_cost == largest
    )


@given(steps)
@example(BY_COST)
@example(BISECTED)
@no_deadline
def test_no_move_and_no_swap_with_one_of_the_lightest_relieves_the_heaviest_bin(step: Step) -> None:
    # The end of levelling, not its limit of 16 exchanges a bin: 2 were enough for 3,000 random steps.
    assert is_heaviest_stuck(step)


def test_many_bins_are_levelled_to_the_end_too() -> None:
    for seed in range(50):
        lengths = np.random.default_rng(seed).integers(1, 501, 192).tolist()
        assert is_heaviest_stuck(Step(lengths, 1000, 32, 10_000))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(2, 3), st.sampled_from([1, 10, 100, 10_000]))
@no_deadline
def test_costs_are_near_the_best_of_all_placements(lengths: list[int], num_bins: int, quadratic_length: int) -> None:
    step = Step(lengths, sum(lengths), num_bins, quadratic_length)
    bins, costs = pack(step)
    assert sum(map(len, bins)) == len(lengths)
    best = min(
        max(
            sum(step.cost(length) for length, bin in zip(lengths, bin_of, strict=True) if bin == number)
            for number in range(num_bins)
        )
        for bin_of in product(range(num_bins), repeat=len(lengths))
    )
    # Graham's bound for the longest processing time, 4/3 - 1/(3 m) on m machines; levelling only lowers the costs.
    assert best * 3 * num_bins <= max(costs) * 3 * num_bins <= best * (4 * num_bins - 1)


def test_a_long_sequence_is_alone_in_its_bin() -> None:
    # At q = 10 the long one costs 100 + 1,000 and a short one 25 + 62.5: all six short ones together cost less than the
    # long one, although they have more tokens.
    assert lengths_in(Step([25, 25, 100, 25, 25, 25, 25], 200, 2, 10)) == [[25] * 6, [100]]


def test_levelling_finds_what_the_schedule_misses() -> None:
    # At this q the cost is that of the tokens. The schedule has 9 + 8 + 8 = 25 beside 9 + 8 = 17.
    assert lengths_in(Step([8, 9, 8, 9, 8], 100, 2, 10**6)) == [[8, 8, 8], [9, 9]]


def test_nothing_is_moved_to_where_it_lacks_one_token_of_room() -> None:
    # The costs are 62 and 54. With the 2 in the other bin they were 56 and 60, but that has 9 tokens of 10.
    assert lengths_in(Step([6, 7, 2, 3], 10, 2, 1)) == [[2, 7], [3, 6]]


# ---- At the edges ----


def test_one_bin_takes_the_first_that_fit() -> None:
    step = Step([4, 3, 2, 2, 1], 10, 1, 100)
    assert pack(step) == ([[0, 1, 2]], [step.cost(4) + step.cost(3) + step.cost(2)])
    assert lengths_in(replace(step, capacity=4)) == [[4]]


def test_as_many_bins_as_examples_have_one_each() -> None:
    assert lengths_in(Step([1, 9, 4, 4], 18, 4, 100)) == [[1], [4], [4], [9]]


def test_more_bins_than_examples_leave_empty_bins() -> None:
    bins, costs = pack(Step([5, 7], 16, 6, 1))
    assert sorted(bins) == [[], [], [], [], [0], [1]]
    assert sorted(costs) == [0, 0, 0, 0, 30, 56]


def test_examples_of_one_token_are_dealt_out_by_the_thousand() -> None:
    for num_examples, num_placed in [(7_999, 7_999), (8_000, 8_000), (12_345, 8_000)]:
        bins, costs = pack(Step([1] * num_examples, 1_000, 8, 1))
        assert sum(map(len, bins)) == num_placed
        assert max(costs) - min(costs) <= 2  # at most one example more, which costs 1 + 1


def test_examples_of_exactly_the_capacity_have_a_bin_each() -> None:
    assert lengths_in(Step([64] * 9, 64, 4, 10)) == [[64]] * 4


def test_of_examples_just_above_half_the_capacity_no_two_share_a_bin() -> None:
    assert lengths_in(Step([33, 34, 33, 35, 33], 65, 4, 10)) == [[33], [33], [34], [35]]
    assert lengths_in(Step([33, 34, 33, 35, 33], 66, 4, 10)) == [[33], [33, 33], [34], [35]]


def test_costs_are_whole_numbers_however_large() -> None:
    # Near the largest that the plan lets through, 2^62: in floating point, the last token would be lost.
    step = Step([2**30, 2**30 - 1], 2**30, 2, 2**30)
    assert pack(step)[1] == [2**61, (2**30 - 1) * (2**31 - 1)]


def test_the_cost_is_the_one_of_the_docstring() -> None:
    assert cost_of(300, 100) == 100 * (300 + 300**2 // 100)


PLACEMENTS = """
import numpy as np
from ochat_train.tokens.packing import pack_step
for seed in range(40):
    random = np.random.default_rng(seed)
    num_bins, capacity, q = int(random.integers(1, 12)), int(random.integers(50, 400)), 10 ** int(random.integers(0, 6))
    longest = capacity // int(random.integers(1, 6))
    lengths = random.integers(1, longest + 1, int(random.integers(1, 2 * num_bins * capacity // longest + 2)))
    print(len(lengths), *(values.tolist() for values in pack_step(lengths, capacity, num_bins, q)))
"""


def run(program: str, **environment: str) -> list[str]:
    """The lines that a new process prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_compiled_and_interpreted_the_placement_is_the_same() -> None:
    program = f"import numba; print(numba.config.DISABLE_JIT)\n{PLACEMENTS}"
    (is_off, *compiled), (is_on, *interpreted) = (run(program, NUMBA_DISABLE_JIT=value) for value in ("0", "1"))
    assert (is_off, is_on) == ("0", "1")
    assert compiled == interpreted
    assert len(compiled) == 40


# Whoever runs the tests may write everywhere, so that numba is told here that it finds no place.
WITHOUT_A_PLACE = """
import numba.core.caching as caching
import numpy as np
for locator in caching.CacheImpl._locator_classes:
    locator.from_function = classmethod(lambda cls, *arguments: None)
from ochat_train.tokens.packing import pack_step
print(pack_step(np.array([5, 4, 3]), 8, 2, 10)[0].tolist())
try:
    import numba
    numba.njit(cache=True)(pack_step.py_func)
except RuntimeError as error:
    print(error)
"""


def test_without_a_place_for_the_cache_each_process_compiles_for_itself() -> None:
    first, second = run(WITHOUT_A_PLACE)
    assert first == "[0, 1, 1]"
    assert second.startswith("cannot cache function")  # what numba says of its own accord


def test_without_room_for_the_compiled_functions_they_are_compiled_each_time(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(2**23))
    assert run(PLACEMENTS, NUMBA_CACHE_DIR=str(small_disk)) == run(PLACEMENTS)
