"""The order of the data: every epoch a permutation, every source at its share."""

import math
import tracemalloc
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import chain, combinations, count, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import ochat_train.tokens.order
from ochat_train.tokens.order import DataOrder, Indices, SourceShare

no_deadline = settings(deadline=None)  # shared machines pause
seeds = st.none() | st.integers(0, 2**63 - 1)


def whole(order: DataOrder, epoch: int) -> Indices:
    found = order.examples(epoch)
    assert found.dtype == np.int32
    return found.astype(np.int64)


def is_permutation(found: Indices, size: int) -> bool:
    return np.array_equal(np.sort(found), np.arange(size))


# ---- One permutation an epoch ----


def test_every_epoch_of_every_small_store_is_a_permutation() -> None:
    for size in range(1, 2001):
        assert is_permutation(whole(DataOrder(size, seed=size), epoch=size % 3), size), size


@given(st.integers(1, 2000), seeds, st.integers(0, 10**6))
@no_deadline
def test_every_epoch_of_every_seed_is_a_permutation(size: int, seed: int | None, epoch: int) -> None:
    assert is_permutation(whole(DataOrder(size, seed), epoch), size)


@pytest.mark.parametrize("size", [65_536, 1_000_000, 1_000_003, 2**21 + 1])  # square, even, prime, uneven
def test_an_epoch_of_a_large_store_is_a_permutation(size: int) -> None:
    assert is_permutation(whole(DataOrder(size, seed=1), epoch=0), size)


@pytest.mark.parametrize("seed", [None, 0])
def test_an_empty_store_has_no_examples(seed: int | None) -> None:
    order = DataOrder(0, seed)
    assert (order.num_examples(0), order.total(5), order.seek(0)) == (0, 0, (0, 0))
    assert order.examples(0).tolist() == []


def test_seeds_and_epochs_have_orders_that_share_nothing() -> None:
    orders = [whole(DataOrder(1000, seed), epoch) for seed in (0, 1, 2**40) for epoch in (0, 1, 2)]
    for one, other in combinations(orders, 2):
        # Two random orders agree in 1 place in the mean, Poisson distributed: above 15 places once in 2e13 pairs.
        assert np.count_nonzero(one == other) <= 15


@given(st.integers(1, 100), st.integers(0, 100))
@no_deadline
def test_without_a_seed_every_epoch_has_the_order_of_the_store(size: int, epoch: int) -> None:
    assert whole(DataOrder(size, seed=None), epoch).tolist() == list(range(size))


def test_an_epoch_takes_four_bytes_an_example() -> None:
    order = DataOrder(1_000_000, seed=3)
    tracemalloc.start()
    order.examples(7)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000  # with half a megabyte of random numbers at a time


def test_an_epoch_of_shares_takes_twelve_bytes_an_example() -> None:
    members = np.arange(1_000_000)
    order = DataOrder(1_000_000, 3, [SourceShare("all", members, 1.5)])
    tracemalloc.start()
    assert len(order.examples(1)) == 1_500_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000 + 6_000_000  # the source's own order, and the epoch


def test_positions_in_a_store_of_more_than_two_thousand_million_examples_are_kept() -> None:
    order = DataOrder(2**31 + 5, 0, [SourceShare("few", np.array([3, 2**31 + 1]), 1.0)])
    assert sorted(order.examples(0).tolist()) == [3, 2**31 + 1]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000, 70_000])
def test_an_epoch_is_the_shuffle_of_a_random_state(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ochat_train.tokens.order, "_DRAWN", 1000)  # in several parts
    for seed, epoch in [(0, 0), (0, 1), (2**63 - 1, 5)]:
        expected = np.arange(size, dtype=np.int32)
        bits = np.random.PCG64(np.random.SeedSequence([seed, 0, epoch]))
        np.random.RandomState(bits).shuffle(expected)
        assert np.array_equal(whole(DataOrder(size, seed), epoch), expected)


def test_a_memory_mapped_source_is_shuffled_as_one_in_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "members.npy", np.arange(1, 100, 2))
    mapped = np.load(tmp_path / "members.npy", mmap_mode="r")
    orders = [DataOrder(100, 0, [SourceShare("odd", members, 0.5)]) for members in (mapped, np.array(mapped))]
    assert np.array_equal(*(whole(order, 3) for order in orders))


def test_the_first_examples_are_what_they_were() -> None:
    # A change of these numbers is a change of the order of all runs: checkpoints would go on with other data.
    order = DataOrder(1000, seed=0)
    assert whole(order, 0)[:10].tolist() == [459, 206, 222, 162, 711, 814, 350, 890, 518, 264]
    assert whole(order, 1)[:10].tolist() == [735, 130, 39, 566, 847, 263, 443, 666, 832, 303]
    last = whole(DataOrder(1000, seed=2**63 - 1), 0)[990:]
    assert last.tolist() == [353, 206, 180, 262, 872, 136, 637, 380, 273, 276]
    assert whole(DataOrder(1_000_000, seed=0), 0)[500_000:500_003].tolist() == [149005, 353409, 780313]
    assert whole(DataOrder(10, seed=0), 0).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]
    shares = [SourceShare("a", np.arange(0, 20, 2), 0.5), SourceShare("b", np.arange(1, 20, 2), 0.7)]
    mixed = DataOrder(20, seed=0, shares=shares)
    assert [whole(mixed, epoch).tolist() for epoch in range(2)] == [
        [3, 6, 1, 14, 5, 17, 18, 16, 15, 13, 9, 2],
        [15, 9, 0, 19, 7, 4, 10, 1, 5, 11, 8, 12],
    ]


# ---- Each order as likely as the others ----

# How likely each of the chi-square tests below is to fail for a perfect shuffle. As the seeds are fixed, it does so
# always or never.
FALSE_ALARM = 1e-9
NUM_SEEDS = 20_000


def chi_square_tail(value: float, freedom: int) -> float:
    """The probability that a chi-square variable is above `value`: Q(freedom / 2, value / 2), by Q's recurrence."""
    if not value:
        return 1.0
    half = value / 2
    order, tail = (0.5, math.erfc(math.sqrt(half))) if freedom % 2 else (1.0, math.exp(-half))
    while order < freedom / 2:
        tail += math.exp(order * math.log(half) - half - math.lgamma(order + 1))
        order += 1
    return tail


def likelihood(found: Iterable[Hashable], num_classes: int) -> float:
    """How likely it is that counts in classes of equal chance differ as much as those found."""
    counts = Counter(found)
    assert len(counts) <= num_classes
    expected = counts.total() / num_classes
    assert expected >= 20  # the distribution is an approximation; 5 is the usual least
    missing = (num_classes - len(counts)) * expected
    return chi_square_tail(missing + sum((n - expected) ** 2 / expected for n in counts.values()), num_classes - 1)


def test_the_chi_square_distribution_is_that_of_the_tables() -> None:
    for value, freedom in [(3.8415, 1), (5.9915, 2), (11.0705, 5), (124.3421, 100)]:
        assert chi_square_tail(value, freedom) == pytest.approx(0.05, rel=1e-4)  # the tables have four places
    assert likelihood([*range(10)] * 100, 10) == 1.0
    assert likelihood([*range(9)] * 100, 10) < 1e-9


def orders_of(size: int) -> list[tuple[int, ...]]:
    return [tuple(DataOrder(size, seed).examples(0).tolist()) for seed in range(NUM_SEEDS)]


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_all_orders_of_a_few_examples_are_equally_likely(size: int) -> None:
    orders = orders_of(size)
    assert likelihood(orders, math.factorial(size)) > FALSE_ALARM
    assert likelihood([order.index(0) for order in orders], size) > FALSE_ALARM
    for one, other in pairwise(range(size)):
        distances = [(order[other] - order[one]) % size for order in orders]
        assert likelihood(distances, size - 1) > FALSE_ALARM


@pytest.mark.parametrize("size", [7, 10, 20, 100])
def test_the_first_example_is_anywhere_and_its_neighbour_at_any_distance(size: int) -> None:
    orders = orders_of(size)
    assert likelihood([order.index(0) for order in orders], size) > FALSE_ALARM
    assert likelihood([(order[1] - order[0]) % size for order in orders], size - 1) > FALSE_ALARM
    assert likelihood([(order[-1] - order[-2]) % size for order in orders], size - 1) > FALSE_ALARM


@pytest.mark.parametrize("size", [7, 8, 9, 10, 16, 24, 25, 49])
def test_even_and_odd_permutations_are_equally_likely(size: int) -> None:
    # Half of all orders come about by an even number of swaps.
    orders = [DataOrder(size, seed).examples(0).tolist() for seed in range(2000)]
    is_odd = [sum(one > other for one, other in combinations(order, 2)) % 2 for order in orders]
    assert likelihood(is_odd, 2) > FALSE_ALARM


@pytest.mark.parametrize("epoch", [0, 1])
def test_neighbours_in_a_large_epoch_are_at_any_distance(epoch: int) -> None:
    size = 200_001
    pairs = whole(DataOrder(size, seed=5), epoch)[: size - 1].reshape(-1, 2)
    distances = (pairs[:, 1] - pairs[:, 0]) % size - 1  # below size - 1
    assert likelihood((distances * 100 // (size - 1)).tolist(), 100) > FALSE_ALARM


# ---- Sources with shares ----


@dataclass(frozen=True)
class Mixture:
    """A store of several sources: of each the members, and how many percent of them an epoch draws."""

    num_stored: int
    members: list[list[int]]
    percents: list[int]
    num_epochs: int

    def order(self, seed: int | None) -> DataOrder:
        shares = [
            SourceShare(f"source {number}", np.array(members), percent / 100)
            for number, (members, percent) in enumerate(zip(self.members, self.percents, strict=True))
        ]
        return DataOrder(self.num_stored, seed, shares)

    def num_drawn(self, source: int, num_epochs: int) -> int:
        """In whole numbers: the percents of all members, over so many epochs."""
        return self.percents[source] * len(self.members[source]) * num_epochs // 100


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    """Up to four sources whose members interleave, each drawn at least once."""
    num_epochs = draw(st.integers(1, 6))
    source_of = draw(st.lists(st.integers(0, 3), min_size=1, max_size=60))
    members = [[position for position, source in enumerate(source_of) if source == number] for number in range(4)]
    kept = [(found, draw(st.sampled_from([1, 7, 25, 29, 50, 100, 150, 200, 330]))) for found in members if found]
    kept = [(found, percent) for found, percent in kept if len(found) * percent * num_epochs >= 100]
    assume(kept)
    return Mixture(len(source_of), [found for found, _ in kept], [percent for _, percent in kept], num_epochs)


@given(mixtures(), seeds)
@no_deadline
def test_every_epoch_draws_exactly_its_share_of_every_source(mixture: Mixture, seed: int | None) -> None:
    order = mixture.order(seed)
    assert order.total(0) == 0
    for epoch in range(mixture.num_epochs):
        found = whole(order, epoch).tolist()
        assert len(found) == order.num_examples(epoch) == order.total(epoch + 1) - order.total(epoch)
        expected = 0
        for source, members in enumerate(mixture.members):
            num_drawn = mixture.num_drawn(source, epoch + 1) - mixture.num_drawn(source, epoch)
            assert sum(position in members for position in found) == num_drawn
            expected += num_drawn
        assert len(found) == expected  # nothing of other sources


@given(mixtures(), seeds)
@no_deadline
def test_no_example_is_ahead_of_another_of_its_source_by_more_than_one_draw(mixture: Mixture, seed: int | None) -> None:
    order, drawn = mixture.order(seed), np.zeros(mixture.num_stored, np.int64)
    for epoch in range(mixture.num_epochs):
        drawn += np.bincount(whole(order, epoch), minlength=mixture.num_stored)
        for source, members in enumerate(mixture.members):
            passes, rest = divmod(mixture.num_drawn(source, epoch + 1), len(members))
            assert Counter(drawn[members].tolist()) == +Counter({passes: len(members) - rest, passes + 1: rest})


@given(mixtures())
@example(Mixture(2, [[0, 1]], [25], 4))  # draws 0, 1, 0 and 1
@example(Mixture(3, [[0], [1, 2]], [29, 50], 4))  # the first source draws in the fourth epoch only
@no_deadline
def test_seeking_finds_the_next_example_across_epochs_that_draw_nothing(mixture: Mixture) -> None:
    order, places = mixture.order(0), []
    for epoch in count():  # until after the end of the run
        if len(places) > order.total(mixture.num_epochs):
            break
        places += [(epoch, place) for place in range(order.num_examples(epoch))]
    for consumed in range(order.total(mixture.num_epochs) + 1):
        assert order.seek(consumed) == places[consumed]
    assert order.seek(order.total(mixture.num_epochs))[0] >= mixture.num_epochs


def test_seeking_without_shares_is_division() -> None:
    order = DataOrder(7, seed=0)
    assert [order.seek(consumed) for consumed in (0, 6, 7, 20, 21)] == [(0, 0), (0, 6), (1, 0), (2, 6), (3, 0)]
    assert DataOrder(10**9, seed=0).seek(10**12 + 1) == (1000, 1)


@pytest.mark.parametrize("seed", [None, 0])
def test_a_quarter_of_a_source_an_epoch_is_all_of_it_in_four(seed: int | None) -> None:
    members = np.arange(3, 33, 3)  # ten: 2.5 an epoch
    order = DataOrder(40, seed, [SourceShare("quarter", members, 0.25)])
    drawn = [whole(order, epoch).tolist() for epoch in range(8)]
    assert [len(epoch) for epoch in drawn] == [2, 3, 2, 3, 2, 3, 2, 3]
    assert sorted(chain(*drawn[:4])) == members.tolist()
    # The next four go through it in the same order again.
    assert [set(epoch) for epoch in drawn[4:]] == [set(epoch) for epoch in drawn[:4]]


def test_several_passes_an_epoch_draw_every_example_as_often() -> None:
    order = DataOrder(10, 0, [SourceShare("twice", np.arange(4), 2.0), SourceShare("more", np.arange(4, 10), 2.5)])
    assert np.bincount(whole(order, 0)).tolist()[:4] == [2] * 4
    assert sorted(np.bincount(whole(order, 0)).tolist()[4:]) == [2, 2, 2, 3, 3, 3]
    both = np.bincount(np.concatenate([whole(order, 0), whole(order, 1)]))
    assert both.tolist() == [4] * 4 + [5] * 6


def test_shares_are_counted_in_decimals_not_in_binary_fractions() -> None:
    assert int(100 * 0.29) == 28  # as floating-point numbers have it
    assert SourceShare("a", np.arange(100), 0.29).num_drawn(1) == 29
    assert SourceShare("a", np.arange(10**6), 0.1).num_drawn(10**12) == 10**17
    assert SourceShare("a", np.arange(10**6), 1e-06).num_drawn(3) == 3


def test_without_a_seed_sources_are_read_one_behind_the_other_and_go_round() -> None:
    shares = [SourceShare("even", np.array([0, 2, 4]), 1.5), SourceShare("odd", np.array([1, 3, 5]), 0.5)]
    order = DataOrder(6, None, shares)
    assert whole(order, 0).tolist() == [0, 2, 4, 0, 1]
    assert whole(order, 1).tolist() == [2, 4, 0, 2, 4, 3, 5]


def test_sources_are_shuffled_together() -> None:
    shares = [SourceShare("even", np.arange(0, 1000, 2), 1.0), SourceShare("odd", np.arange(1, 1000, 2), 1.0)]
    half = whole(DataOrder(1000, 0, shares), 0)[:500]
    # 250 in the mean, standard deviation 7.9: seven of them.
    assert abs(np.count_nonzero(half % 2) - 250) < 55


def test_another_seed_draws_another_part_of_a_source() -> None:
    share = SourceShare("tenth", np.arange(1000), 0.1)
    one, other = (set(whole(DataOrder(1000, seed, [share]), 0).tolist()) for seed in (0, 1))
    # 10 of the 100 in the mean, standard deviation 2.8.
    assert len(one & other) < 30


def test_two_sources_of_one_size_are_drawn_in_orders_of_their_own() -> None:
    shares = [SourceShare("low", np.arange(1000), 0.1), SourceShare("high", np.arange(1000, 2000), 0.1)]
    drawn = set(whole(DataOrder(2000, 0, shares), 0).tolist())
    assert sum(position + 1000 in drawn for position in range(1000) if position in drawn) < 30  # 10 in the mean


def test_a_source_of_which_an_epoch_is_less_than_one_example_is_drawn_now_and_then() -> None:
    shares = [SourceShare("all", np.arange(10), 1.0), SourceShare("rare", np.arange(10, 15), 0.04)]
    order = DataOrder(15, 0, shares)
    assert [order.num_examples(epoch) for epoch in range(10)] == [10, 10, 10, 10, 11] * 2


@pytest.mark.parametrize("seed", [None, 0])
def test_a_source_without_examples_takes_no_part(seed: int | None) -> None:
    shares = [SourceShare("none", np.arange(0), 1.0), SourceShare("all", np.arange(5), 1.0)]
    assert sorted(whole(DataOrder(5, seed, shares), 0).tolist()) == list(range(5))


def test_the_digest_changes_with_everything_the_order_depends_on() -> None:
    a, b = SourceShare("a", np.arange(0, 10, 2), 1.0), SourceShare("b", np.arange(1, 10, 2), 1.0)
    orders = [
        DataOrder(10, 0),
        DataOrder(11, 0),
        DataOrder(10, 1),
        DataOrder(10, None),
        DataOrder(10, 0, [a]),
        DataOrder(10, 0, [a, b]),
        DataOrder(10, 0, [b, a]),
        DataOrder(10, 1, [a, b]),
        DataOrder(10, 0, [a, SourceShare("b", b.members, 0.5)]),
        DataOrder(10, 0, [a, SourceShare("b", np.array([1, 3, 5, 7]), 1.0)]),
        DataOrder(10, 0, [a, SourceShare("b", np.array([1, 3, 5, 7, 8]), 1.0)]),
        DataOrder(10, 0, [a, SourceShare("b", np.array([1, 2, 5, 7, 9]), 1.0)]),
    ]
    assert len({order.digest for order in orders}) == len(orders)


def test_orders_that_are_alike_have_one_digest() -> None:
    members = np.arange(0, 20, 2)
    one = DataOrder(20, 0, [SourceShare("a", members, 1.0)])
    other = DataOrder(20, 0, [SourceShare("another name", np.arange(20)[::2], 1.0)])
    assert one.digest == other.digest
    assert np.array_equal(whole(one, 3), whole(other, 3))
