"""The benchmark of packing compares with what others really do, and measures what it says."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import packing as benchmark

CAPACITY = 20
each_packer = pytest.mark.parametrize("name", benchmark.PACKERS)
some_lengths = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60)


def arrays(lengths: list[int]) -> benchmark.Numbers:
    return np.array(lengths, np.int64)


def bins_of(slots: benchmark.Slots, lengths: list[int]) -> dict[int, list[int]]:
    """The lengths in each slot, longest first."""
    bins: dict[int, list[int]] = {}
    for slot, length in zip(slots.tolist(), lengths, strict=True):
        if slot != benchmark.DROPPED:
            bins.setdefault(slot, []).append(length)
    return {slot: sorted(held, reverse=True) for slot, held in bins.items()}


# ---- Naive versions ----


def first_fit(lengths: list[int], num_bins: int) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for length in sorted(lengths, reverse=True):
        fitting = [held for held in bins if sum(held) + length <= CAPACITY]
        if not fitting:
            return None
        fitting[0].append(length)
    return bins


def longest_processing_time(lengths: list[int], num_bins: int) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for length in sorted(lengths, reverse=True):
        emptiest = min(bins, key=sum)
        if sum(emptiest) + length > CAPACITY:
            return None
        emptiest.append(length)
    return bins


def multipack(
    lengths: list[int],
    num_bins: int,
    fit: Callable[[list[int], int], list[list[int]] | None],
    is_last: Callable[[list[list[int]]], bool],
) -> list[list[list[int]]]:
    """The bins of each step, by bisection between one example and too many tokens."""
    steps = []
    while lengths:
        low, high = 1, len(lengths) + 1
        while sum(lengths[: high - 1]) > CAPACITY * num_bins:
            high -= 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fit(lengths[:middle], num_bins) else (low, middle)
        bins = fit(lengths[:low], num_bins)
        assert bins is not None
        if is_last(bins):
            break
        steps.append(bins)
        lengths = lengths[low:]
    return steps


def best_fit(lengths: list[int]) -> list[list[int]]:
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [held for held in bins if sum(held) + length <= CAPACITY]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    return bins


# ---- Ways to pack ----


@settings(deadline=None, max_examples=200)
@given(lengths=some_lengths, num_bins=st.integers(1, 4))
def test_both_multipacks_are_the_naive_ones(lengths: list[int], num_bins: int) -> None:
    shape = benchmark.shape_of(num_bins, CAPACITY)
    first = multipack(lengths, num_bins, first_fit, lambda bins: not bins[-1])
    slots = benchmark.pack_by_multipack(arrays(lengths), shape)
    assert bins_of(slots, lengths) == dict(enumerate(held for step in first for held in step))
    later = multipack(lengths, num_bins, longest_processing_time, lambda bins: sum(map(len, bins)) < num_bins)
    slots = benchmark.pack_by_multipack_v2(arrays(lengths), shape)
    assert bins_of(slots, lengths) == dict(enumerate(held for step in later for held in step))


@settings(deadline=None, max_examples=200)
@given(lengths=some_lengths, num_bins=st.integers(1, 4))
def test_best_fit_fills_bins_as_the_naive_one_and_drops_less_than_a_step(lengths: list[int], num_bins: int) -> None:
    naive = sorted(map(sum, best_fit(lengths)))
    slots = benchmark.pack_by_bfd(arrays(lengths), benchmark.shape_of(1, CAPACITY))
    assert sorted(map(sum, bins_of(slots, lengths).values())) == naive
    slots = benchmark.pack_by_bfd(arrays(lengths), benchmark.shape_of(num_bins, CAPACITY))
    assert set(bins_of(slots, lengths)) == set(range(len(naive) // num_bins * num_bins))


def test_best_fit_takes_the_fullest_bin_that_has_room() -> None:
    slots = benchmark.pack_by_bfd(arrays([14, 12, 11, 8, 6, 5]), benchmark.shape_of(1, CAPACITY))
    assert sorted(bins_of(slots, [14, 12, 11, 8, 6, 5]).values()) == [[11, 5], [12, 8], [14, 6]]


def test_padding_makes_batches_of_one_size_that_fit_whatever_is_in_them() -> None:
    lengths = [6, 1, 2, 3, 4, 5, 6, 1]
    slots = benchmark.pack_by_padding(arrays(lengths), benchmark.shape_of(2, CAPACITY))
    assert slots.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


@each_packer
@settings(deadline=None, max_examples=50)
@given(lengths=some_lengths, num_bins=st.integers(1, 4))
def test_no_bin_is_over_capacity_and_no_step_is_left_out(name: str, lengths: list[int], num_bins: int) -> None:
    slots = benchmark.PACKERS[name](arrays(lengths), benchmark.shape_of(num_bins, CAPACITY))
    assert len(slots) == len(lengths)
    bins = bins_of(slots, lengths)
    assert all(sum(held) <= CAPACITY for held in bins.values())
    if name == "padding":
        assert all(held[0] * len(held) <= CAPACITY for held in bins.values())
    steps = {slot // num_bins for slot in bins}
    assert steps == set(range(len(steps)))


@pytest.mark.parametrize("name", ["multipack", "multipack_v2"])
@settings(deadline=None, max_examples=50)
@given(lengths=some_lengths, num_bins=st.integers(1, 4))
def test_multipacks_take_the_next_examples_and_drop_the_last(name: str, lengths: list[int], num_bins: int) -> None:
    slots = benchmark.PACKERS[name](arrays(lengths), benchmark.shape_of(num_bins, CAPACITY))
    kept = slots[slots != benchmark.DROPPED]
    assert kept.tolist() == slots[: len(kept)].tolist()
    steps = kept // num_bins
    assert np.all(np.diff(steps) >= 0)


def test_our_slots_are_our_plan() -> None:
    data = benchmark.Input("some", np.arange(1, 101, dtype=np.int32), benchmark.shape_of(3, 128, 2))
    steps = benchmark.plan_all(data)
    slots = benchmark.slots_of(steps, 100)
    for number, step in enumerate(steps):
        for bin, positions in enumerate(step.bins):
            assert set(np.flatnonzero(slots == 6 * number + bin)) == set(positions.tolist())
    assert (slots != benchmark.DROPPED).all()


# ---- Measures ----


def cost(*lengths: int) -> float:
    return sum(length + length**2 / benchmark.Q for length in lengths)


def test_measures_of_a_plan_made_by_hand() -> None:
    lengths = [10, 4, 6, 8, 2, 9, 3, 5]
    #     step 0: 10 | 4, 6     step 1: 8 | 2, 9     last step: 3 | nothing     dropped: 5
    slots = arrays([0, 1, 1, 2, 3, 3, 4, benchmark.DROPPED])
    data = benchmark.Input("by hand", np.array(lengths, np.int32), benchmark.shape_of(2, 16))
    got = benchmark.measure("by hand", arrays(lengths), slots, data, [0.5], [0.4])
    assert (got.num_steps, got.num_dropped, got.seconds, got.cpu_seconds) == (3, 1, [0.5], [0.4])
    assert data.bound == 2
    assert got.over_bound == pytest.approx(3 / 2 - 1)
    assert got.fill == pytest.approx((10 + 10 + 8 + 11) / (2 * 32))
    assert got.token_balance == pytest.approx((1 + 9.5 / 11) / 2)
    balances = [cost(10, 4, 6) / 2 / cost(10), cost(8, 2, 9) / 2 / cost(2, 9)]
    assert got.cost_balance == pytest.approx(sum(balances) / 2)
    waits = cost(10) + cost(2, 9) + cost(3)
    assert got.efficiency == pytest.approx(cost(*lengths[:-1]) / 2 / waits)


def test_ranks_wait_for_each_other_at_each_micro_batch() -> None:
    lengths = [10, 4, 2, 6, 1]
    slots = arrays([0, 1, 2, 3, 4])  # 10 | 4, then 2 | 6; last step: 1
    data = benchmark.Input("by hand", np.array(lengths, np.int32), benchmark.shape_of(2, 16, 2))
    got = benchmark.measure("by hand", arrays(lengths), slots, data, [], [])
    assert got.num_steps == 2
    assert got.token_balance == pytest.approx((7 + 4) / (10 + 6))
    assert got.efficiency == pytest.approx(cost(*lengths) / 2 / (cost(10) + cost(6) + cost(1)))


def test_padding_counts_in_costs_and_not_in_fill() -> None:
    lengths = [4, 2, 3, 3]
    data = benchmark.Input("by hand", np.array(lengths, np.int32), benchmark.shape_of(2, 8))
    got = benchmark.measure("padding", arrays(lengths), arrays([0, 0, 1, 1]), data, [], [], is_padded=True)
    assert got.fill == pytest.approx(12 / 16)
    assert got.token_balance == pytest.approx((8 + 6) / 2 / 8)
    assert got.cost_balance == pytest.approx(cost(4, 4, 3, 3) / 2 / cost(4, 4))
    assert got.efficiency == pytest.approx(cost(*lengths) / 2 / cost(4, 4))


def test_the_limit_of_prefixes_is_that_of_tokens_alone() -> None:
    #     6, 3 | 5, 5 | 9 | 2
    steps, fill = benchmark.fill_prefixes(arrays([6, 3, 5, 5, 9, 2]), 10)
    assert (steps, fill) == (4, pytest.approx((9 + 10 + 9) / 30))


@settings(deadline=None, max_examples=50)
@given(lengths=some_lengths, num_bins=st.integers(1, 4))
def test_our_plan_is_within_its_limits(lengths: list[int], num_bins: int) -> None:
    data = benchmark.Input("some", np.array(lengths, np.int32), benchmark.shape_of(num_bins, CAPACITY))
    slots = benchmark.slots_of(benchmark.plan_all(data), len(lengths))
    ours = benchmark.measure("ours", arrays(lengths), slots, data, [], [])
    assert ours.num_dropped == 0
    examples = benchmark.DataOrder(len(lengths), benchmark.SEED).examples(0)
    prefix_limit, _ = benchmark.fill_prefixes(arrays(lengths)[examples], data.shape.room)
    assert data.bound <= prefix_limit <= ours.num_steps
    balance_limit = benchmark.limit_balance(arrays(lengths), slots, data.shape)
    assert 0 < ours.cost_balance <= balance_limit + 1e-12  # rounding of the mean


def test_a_comparison_has_a_row_for_each_way_to_pack() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500).astype(np.int32)
    compared = benchmark.compare(benchmark.Input("some", lengths, benchmark.shape_of(2, 256)), 2)
    assert [row.name for row in compared.rows] == [*benchmark.PACKERS, "ours"]
    assert all(len(row.seconds) == len(row.cpu_seconds) == 2 for row in compared.rows)
    assert compared.num_tokens == lengths.sum()


# ---- The rest of it ----


def test_a_seed_gives_the_same_inputs_and_lengths_are_within_bounds(tmp_path: Path) -> None:
    inputs, again = (benchmark.make_inputs(tmp_path / "missing.json") for _ in range(2))
    assert len(inputs) == 6
    for first, other in zip(inputs, again, strict=True):
        assert np.array_equal(first.lengths, other.lengths)
        assert 8 <= first.lengths.min() <= first.lengths.max() <= first.shape.capacity
    (tmp_path / "lengths.json").write_text("[5, 7]")
    assert benchmark.make_inputs(tmp_path / "lengths.json")[0].lengths.tolist() == [5, 7]


def test_a_store_is_planned_in_a_process_of_its_own(tmp_path: Path) -> None:
    scale = benchmark.measure_scale(3000, tmp_path)
    assert not list(tmp_path.iterdir())
    lengths = benchmark.sharegpt_like(np.random.default_rng(benchmark.SEED), 3000)
    data = benchmark.Input("some", lengths, benchmark.shape_of(64, 8192))
    assert scale.num_steps == len(benchmark.plan_all(data))
    assert scale.over_bound == scale.num_steps / data.bound - 1
    assert 0 < scale.first_seconds <= scale.seconds
    assert scale.cpu_seconds > 0
    assert 10e6 < scale.own < scale.resident < 1e9
    assert scale.imported < scale.resident


def test_the_process_without_a_compiler_makes_the_same_bins() -> None:
    arguments = ("time_packing", 8, 8192, 2)
    compiled, plain = (benchmark._in_process(*arguments, NUMBA_DISABLE_JIT=is_off) for is_off in ("0", "1"))
    assert compiled["checksum"] == plain["checksum"]
    assert len(plain["seconds"]) == 2
    assert min(plain["seconds"]) > min(compiled["seconds"])  # a hundredfold; a pause would have to hit all of one


def test_an_aim_is_met_or_missed_by_what_was_measured() -> None:
    def row(name: str, over_bound: float, cost_balance: float, seconds: float) -> benchmark.Measures:
        return benchmark.Measures(name, 101, over_bound, 1.0, 1.0, cost_balance, 1.0, 0, [seconds], [0.0])

    def aims(over_bound: float, cost_balance: float, seconds: float, size: int) -> list[bool]:
        rows = [row("multipack_v2", 0.0, 0.996, 0.0), row("ours", over_bound, cost_balance, seconds)]
        compared = benchmark.Comparison("some", 8, 32_768, 1, 80_000, 10**8, 4096, 100, 100, 1.0, 1000.0, 1.0, rows)
        scales = [
            benchmark.Scale(10_000_000, 1, 0.0, 0.0, 100 * seconds, 0.0, 0, 0, 0),
            benchmark.Scale(100_000_000, 1, 0.0, 0.0, 1.0, 1.0, 0, size, size),
        ]
        return [aim.is_met for aim in benchmark.check_aims([compared], scales)]

    assert aims(0.005, 0.996, 0.1, 10**8) == [True] * 8
    assert aims(0.006, 0.994, 0.11, 10**9) == [False, False, False, False, True, False, False, False]
