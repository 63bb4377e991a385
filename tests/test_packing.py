"""A step's examples into its micro-batches: as many as fit, none too full, at costs as equal as can be."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ochat_train.tokens.packing import _schedule, cost_of, pack_step
from tests.interpreted import run_both_ways

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
    arrivals = np.argsort(-lengths, kind="stable")
    members, ends, costs = pack_step(lengths[arrivals], arrivals, step.capacity, step.num_bins, step.quadratic_length)
    assert (len(ends), ends[-1]) == (step.num_bins, len(members))
    return [members[begin:end].tolist() for begin, end in pairwise([0, *ends.tolist()])], costs.tolist()


def lengths_in(step: Step) -> list[list[int]]:
    """The lengths in each bin, sorted, the bins sorted too."""
    return sorted(sorted(step.lengths[arrival] for arrival in arrivals) for arrivals in pack(step)[0])


def schedule(step: Step, count: int, *, by_cost: bool) -> list[list[int]] | None:
    """The naive schedule of the first `count`: the longest first, each into the bin of least load that has room."""
    bins: list[list[int]] = [[] for _ in range(step.num_bins)]
    for arrival in sorted(range(count), key=lambda arrival: -step.lengths[arrival]):
        with_room = [bin for bin in range(step.num_bins) if step.room(bins[bin]) >= step.lengths[arrival]]
        if not with_room:
            return None
        loads = [step.bin_cost(bins[bin]) if by_cost else -step.room(bins[bin]) for bin in with_room]
        bins[with_room[loads.index(min(loads))]].append(arrival)
    return bins


def find_schedule(step: Step) -> list[list[int]]:
    """The schedule of most examples as the search finds it: by cost, from above; then by length, one more at a time."""
    num_all = len(step.lengths)
    count, failed, distance = num_all, num_all + 1, 1
    while schedule(step, count, by_cost=True) is None:
        failed, count, distance = count, max(1, num_all - distance), 2 * distance + 1
    while failed - count > 1:
        middle = (count + failed) // 2
        if schedule(step, middle, by_cost=True) is None:
            failed = middle
        else:
            count = middle
    found = schedule(step, count, by_cost=True)
    while count < num_all and (more := schedule(step, count + 1, by_cost=False)) is not None:
        found, count = more, count + 1
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

# By length, two bins of 10 tokens are filled with 5 + 3 + 2 and 3 + 3 + 2 + 2. By cost, all three 3s go beside each
# other, as the 5 costs 30 and two of them only 24, and the last 2 has no room. The 1 is one too many for both.
BY_LENGTH = Step([2, 3, 2, 5, 3, 2, 3, 1], capacity=10, num_bins=2, quadratic_length=1)

# With 9 tokens it is the other way round: by cost 5 + 2 + 2 and 3 + 3 + 3, by length 5 + 3 and 3 + 3 + 2. The 9 has a
# bin for itself, the two 1s are too many. As there are 9, 7 are found by bisection between 6 and 8.
BY_COST = Step([9, 3, 3, 2, 5, 2, 3, 1, 1], capacity=9, num_bins=3, quadratic_length=1)


# ---- Which are placed ----


@given(steps)
@example(BY_LENGTH)
@example(BY_COST)
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
@example(BY_LENGTH)
@example(BY_COST)
@no_deadline
def test_as_many_are_placed_as_a_schedule_by_cost_or_by_length_can_place(step: Step) -> None:
    num_placed = sum(map(len, pack(step)[0]))
    if num_placed < len(step.lengths):
        assert schedule(step, num_placed + 1, by_cost=True) is None
        assert schedule(step, num_placed + 1, by_cost=False) is None


@given(steps, st.booleans())
@example(BY_LENGTH, False)
@example(BY_COST, True)
@example(Step([4, 3, 2, 2, 1], 6, 2, 1), True)  # the bin of 3 + 2 is too full for the second 2, not for the 1
@example(
    Step([9, 7, 6, 5, 3, 3, 2, 1], 12, 3, 1), True
)  # two bins are too full for a 3; one takes the 2, the other the 1
@settings(no_deadline, max_examples=1000)  # bins that are full for one length and not for the next are seldom
def test_the_schedule_takes_the_bin_of_least_load_that_has_room(step: Step, by_cost: bool) -> None:
    lengths = np.sort(np.array(step.lengths, np.int64))[::-1].copy()
    rooms, loads = np.empty((2, step.num_bins), np.int64)
    bin_of = np.empty(len(lengths), np.int64)
    is_placed = _schedule(lengths, step.capacity, step.quadratic_length if by_cost else 0, rooms, loads, bin_of)
    longest_first = Step(lengths.tolist(), step.capacity, step.num_bins, step.quadratic_length)
    expected = schedule(longest_first, len(lengths), by_cost=by_cost)
    assert is_placed == (expected is not None)
    if expected is not None:
        assert [np.flatnonzero(bin_of == bin).tolist() for bin in range(step.num_bins)] == expected
        assert rooms.tolist() == [longest_first.room(arrivals) for arrivals in expected]
        costs = [longest_first.bin_cost(arrivals) for arrivals in expected]
        assert loads.tolist() == (costs if by_cost else (step.capacity - rooms).tolist())


def test_the_better_of_two_schedules_is_taken() -> None:
    assert schedule(BY_LENGTH, 7, by_cost=True) is None
    assert lengths_in(BY_LENGTH) == [[2, 2, 3, 3], [2, 3, 5]]
    assert schedule(BY_COST, 7, by_cost=False) is None
    assert lengths_in(BY_COST) == [[2, 2, 5], [3, 3, 3], [9]]


@given(steps, st.randoms(use_true_random=False))
@no_deadline
def test_in_which_order_the_placed_arrived_changes_nothing(step: Step, shuffler: random.Random) -> None:
    num_placed = sum(map(len, pack(step)[0]))
    assume(sum(map(len, find_schedule(step))) == num_placed)  # those squeezed in are the last ones
    placed, rest = step.lengths[:num_placed], step.lengths[num_placed:]
    shuffler.shuffle(placed)
    assert lengths_in(replace(step, lengths=placed + rest)) == lengths_in(step)


# ---- How equal the costs are ----


@given(steps)
@example(BY_LENGTH)
@example(BY_COST)
@no_deadline
def test_the_largest_cost_is_that_of_the_schedule_or_less_or_worth_what_is_squeezed_in(step: Step) -> None:
    bins, costs = pack(step)
    scheduled = find_schedule(step)
    limit = max(map(step.bin_cost, scheduled))
    if sum(map(len, scheduled)) < sum(map(len, bins)):  # it may differ by a 256th for one example more
        limit = max(limit, least_cost(step, bins, costs) * 257 // 256)
    assert max(costs) <= limit


def gains(step: Step, dear: list[int], cheap: list[int]) -> Iterator[int]:
    """By how much each move and each swap that fits lowers the larger cost of two bins; below 0 where it raises it."""
    larger = step.bin_cost(dear)
    for given_away in dear:
        for got in [None, *cheap]:
            length = step.lengths[given_away] - (0 if got is None else step.lengths[got])
            if length <= step.room(cheap):
                difference = step.cost(step.lengths[given_away]) - (0 if got is None else step.cost(step.lengths[got]))
                yield larger - max(larger - difference, step.bin_cost(cheap) + difference)


def is_dearest_stuck(step: Step) -> bool:
    """Whether no move and no swap lowers the cost of the dearest bin, or it is as low as it can be, and near enough."""
    bins, costs = pack(step)
    largest, least = max(costs), least_cost(step, bins, costs)
    if largest <= least + least // 2048:
        return True
    # An exchange must close more than a 2,048th of the gap to be worth it, and each of the two gets half. Of several
    # dearest bins it is enough that one is stuck.
    return any(
        all(
            2 * gain <= (largest - cost) // 2048
            for other, cost in zip(bins, costs, strict=True)
            for gain in gains(step, dearest, other)
        )
        for dearest, its_cost in zip(bins, costs, strict=True)
        if its_cost == largest
    )


@given(steps)
@example(BY_LENGTH)
@example(BY_COST)
@no_deadline
def test_no_move_and_no_swap_relieves_the_dearest_bin(step: Step) -> None:
    # The end of levelling, not its limit of rounds: half of its 40 were enough for 54,000 random steps of this size.
    assume(len(step.lengths) <= 40)
    assert is_dearest_stuck(step)


def test_many_bins_are_levelled_to_the_end_too() -> None:
    # Of 100 such steps, 16 need more than 20 rounds, and none more than 40.
    for seed in range(50):
        lengths = np.random.default_rng(seed).integers(1, 501, 192).tolist()
        assert is_dearest_stuck(Step(lengths, 1000, 32, 10_000))


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


# ---- What is squeezed in ----

# Either schedule has 7 + 2 + 2 and 6 + 3 + 2 beside each other, of 12 tokens, so that there are two rooms of one token
# and none for the last 2. A swap of the 7 for the 6, or of a 3 for a 2, makes one room of two.
SQUEEZED = Step([7, 6, 3, 2, 2, 2, 2], capacity=12, num_bins=2, quadratic_length=1000)


def test_the_rooms_of_several_bins_are_collected_for_one_more() -> None:
    assert len(SQUEEZED.lengths) == 7 and sum(SQUEEZED.lengths) == 24
    assert schedule(SQUEEZED, 7, by_cost=True) is None and schedule(SQUEEZED, 7, by_cost=False) is None
    assert all(step_room == 0 for step_room in map(SQUEEZED.room, pack(SQUEEZED)[0]))


def test_rooms_that_swaps_cannot_collect_stay_open() -> None:
    # The rooms, of 1 and 3 tokens or of 1 and 2, would do for the last 4 or 3 if they were one. In the first step no
    # swap gives more room to the bin of most; in the second it would need a token more than the other bin has.
    assert lengths_in(Step([6, 4, 4], 7, 2, 1)) == [[4], [6]]
    assert lengths_in(Step([5, 3, 3, 1, 3], 5, 3, 1)) == [[1, 3], [3], [5]]


def test_one_more_is_left_for_the_next_step_where_ranks_would_wait_too_long_for_it() -> None:
    # At q = 1 the costs are of the squares: 24 tokens in two bins are then uneven by more than a 256th.
    uneven = replace(SQUEEZED, quadratic_length=1)
    assert schedule(uneven, 7, by_cost=True) is None and schedule(uneven, 7, by_cost=False) is None
    assert sum(map(len, pack(uneven)[0])) == 6


def test_most_steps_of_many_short_examples_leave_no_room_for_the_next() -> None:
    num_full = 0
    for seed in range(100):
        lengths = np.random.default_rng(seed).integers(1, 60, 200).tolist()
        step = Step(lengths, 500, 8, 10_000)
        bins, _ = pack(step)
        num_placed = sum(map(len, bins))
        num_full += sum(map(step.room, bins)) < lengths[num_placed]
    # Without squeezing it is 89 of 100.
    assert num_full >= 98


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
    arrivals = np.argsort(-lengths, kind="stable")
    print(len(lengths), *(values.tolist() for values in pack_step(lengths[arrivals], arrivals, capacity, num_bins, q)))
"""


def test_compiled_and_interpreted_the_placement_is_the_same() -> None:
    assert len(run_both_ways(PLACEMENTS)) == 40
