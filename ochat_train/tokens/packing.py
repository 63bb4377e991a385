"""One step's examples into its micro-batches: as many as fit, at costs as equal as can be.

Compiled by numba, since placing one example after the other is no array operation; the first call in a new environment
compiles for some seconds, later processes read the result from numba's cache. All arithmetic is in whole numbers, so
every machine comes to the same placement.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ochat_train.tokens.compiled import compiled

Numbers = npt.NDArray[np.int64]

_NONE = -1
_MAX_ROUNDS = 40
_ENOUGH = 2048  # costs that differ by this part of the whole are equal
_GOOD = 64  # an exchange that misses the middle by this part of the difference is taken at once
_WORTH = 256  # the part of the costs by which they may differ for one more example
_MAX_SWAPS = 64  # to collect room for it


class _Bins(NamedTuple):
    """The state of a placement of n examples in b bins.

    Of each bin: rooms i64[b] tokens, costs i64[b], first i64[b] its first example. Of each example: bin_of i64[n], and
    follow i64[n] the next one in its bin.
    """

    rooms: Numbers
    costs: Numbers
    first: Numbers
    bin_of: Numbers
    follow: Numbers


@compiled
def cost_of(length: int, quadratic_length: int) -> int:
    """The cost L + L^2 / q of a sequence times q, which makes it a whole number."""
    return length * (quadratic_length + length)


@compiled
def pack_step(
    lengths: Numbers, arrivals: Numbers, capacity: int, num_bins: int, quadratic_length: int
) -> tuple[Numbers, Numbers, Numbers]:
    """Bins for as many of the first arrivals as can be placed.

    lengths: i64[n], longest first, each from 1 to `capacity`. arrivals: i64[n], each one's place in the order of the
    data, a permutation of range(n). Returns the k arrivals placed, which are range(k), bin by bin, i64[k]; where each
    bin ends among them, i64[num_bins]; and the bins' costs, i64[num_bins].

    First k is found from above, by doubling steps and bisection on longest-processing-time scheduling by cost, and
    raised while scheduling by length places one more. Then the costs are levelled, and single arrivals squeezed in.
    """
    num_all = len(lengths)
    taken = np.empty(num_all, np.int64)
    bins = _Bins(
        rooms=np.empty(num_bins, np.int64),
        costs=np.empty(num_bins, np.int64),
        first=np.empty(num_bins, np.int64),
        bin_of=np.empty(num_all, np.int64),
        follow=np.empty(num_all, np.int64),
    )
    count, failed, step = num_all, num_all + 1, 1
    while not _place(lengths, arrivals, count, capacity, quadratic_length, taken, bins):
        failed = count
        count = max(1, num_all - step)
        step = 2 * step + 1
    while failed - count > 1:
        middle = (count + failed) // 2
        if _place(lengths, arrivals, middle, capacity, quadratic_length, taken, bins):
            count = middle
        else:
            failed = middle
    by = quadratic_length  # or 0: by length
    while count < num_all and _place(lengths, arrivals, count + 1, capacity, 0, taken, bins):
        count += 1
        by = 0
    _place(lengths, arrivals, count, capacity, by, taken, bins)
    _level(taken[:count], quadratic_length, bins)
    placed = np.empty(num_all, np.int64)
    by_arrival = np.empty(num_all, np.int64)
    num_placed = 0
    for index in range(num_all):
        by_arrival[arrivals[index]] = lengths[index]
        if arrivals[index] < count:
            placed[num_placed] = arrivals[index]
            num_placed += 1
    while count < num_all and _squeeze_in(by_arrival[count], count, quadratic_length, taken, bins):
        placed[count] = count
        count += 1
    members, ends = _by_bin(placed[:count], bins.bin_of, num_bins)
    return members, ends, bins.costs


@compiled
def _by_bin(placed: Numbers, bin_of: Numbers, num_bins: int) -> tuple[Numbers, Numbers]:
    """What is placed, sorted by its bin and else as it was; where each bin ends in it."""
    ends = np.zeros(num_bins, np.int64)
    for index in range(len(placed)):
        ends[bin_of[index]] += 1
    for bin in range(1, num_bins):
        ends[bin] += ends[bin - 1]
    begins, ordered = ends.copy(), np.empty_like(placed)
    for index in range(len(placed) - 1, -1, -1):
        begins[bin_of[index]] -= 1
        ordered[begins[bin_of[index]]] = placed[index]
    return ordered, ends


@compiled
def _place(
    lengths: Numbers, arrivals: Numbers, count: int, capacity: int, quadratic_length: int, taken: Numbers, bins: _Bins
) -> bool:
    """Whether the first `count` arrivals can be scheduled; then their lengths are in `taken`, and `bins` say how."""
    num_taken = 0
    for index in range(len(lengths)):
        if arrivals[index] < count:
            taken[num_taken] = lengths[index]
            num_taken += 1
    return _schedule(taken[:count], capacity, quadratic_length, bins.rooms, bins.costs, bins.bin_of)


@compiled
def _schedule(
    lengths: Numbers, capacity: int, quadratic_length: int, rooms: Numbers, loads: Numbers, bin_of: Numbers
) -> bool:
    """Longest first, each into the bin of least load that has room; False when one finds no room.

    The load is the cost or, for a `quadratic_length` of 0, the number of tokens.

    Source: R. L. Graham, Bounds on Multiprocessing Timing Anomalies, 1969.
    """
    num_open = len(loads)
    heap = np.arange(num_open)  # of bins, the least loaded on top
    full = np.empty(num_open, np.int64)  # bins without room for the last length; a shorter one may fit again
    num_full, most_room = 0, 0
    loads[:] = 0
    rooms[:] = capacity
    for index in range(len(lengths)):
        length = lengths[index]
        if length <= most_room:
            num_still, most_room = 0, 0
            for place in range(num_full):
                bin = full[place]
                if rooms[bin] >= length:
                    _sift_up(heap, num_open, bin, loads)
                    num_open += 1
                else:
                    full[num_still] = bin
                    num_still += 1
                    most_room = max(most_room, rooms[bin])
            num_full = num_still
        while num_open > 0 and rooms[heap[0]] < length:
            full[num_full] = heap[0]
            num_full += 1
            most_room = max(most_room, rooms[heap[0]])
            num_open -= 1
            if num_open > 0:
                _sift_down(heap, num_open, heap[num_open], loads)
        if num_open == 0:
            return False
        bin = heap[0]
        bin_of[index] = bin
        rooms[bin] -= length
        loads[bin] += cost_of(length, quadratic_length) if quadratic_length else length
        _sift_down(heap, num_open, bin, loads)
    return True


@compiled
def _is_less(bin: int, other: int, loads: Numbers) -> bool:
    return loads[bin] < loads[other] or (loads[bin] == loads[other] and bin < other)


@compiled
def _sift_down(heap: Numbers, size: int, bin: int, loads: Numbers) -> None:
    """Put a bin in place of the top of a heap of `size`."""
    hole = 0
    while True:
        child = 2 * hole + 1
        if child + 1 < size and _is_less(heap[child + 1], heap[child], loads):
            child += 1
        if child >= size or not _is_less(heap[child], bin, loads):
            break
        heap[hole] = heap[child]
        hole = child
    heap[hole] = bin


@compiled
def _sift_up(heap: Numbers, size: int, bin: int, loads: Numbers) -> None:
    """Put a bin into a heap of `size`, which has room for it."""
    hole = size
    while hole > 0 and _is_less(bin, heap[(hole - 1) // 2], loads):
        heap[hole] = heap[(hole - 1) // 2]
        hole = (hole - 1) // 2
    heap[hole] = bin


@compiled
def _level(lengths: Numbers, quadratic_length: int, bins: _Bins) -> None:
    """Lower the largest cost of a bin by exchanges that fit. Takes `rooms` and `bin_of`; sets these and `costs`.

    In a round the dearest bin meets the cheapest, the second dearest the second cheapest, and so on, and each pair
    moves or swaps what makes its costs most equal. The end is when no other bin can relieve the dearest, or when that
    is as cheap as can be: near the mean, or near the cost of the longest sequence.
    """
    num_bins, num_examples = len(bins.rooms), len(lengths)
    costs = bins.costs
    costs[:] = 0
    bins.first[:] = _NONE
    for index in range(num_examples - 1, -1, -1):
        bin = bins.bin_of[index]
        costs[bin] += cost_of(lengths[index], quadratic_length)
        bins.follow[index] = bins.first[bin]
        bins.first[bin] = index
    least = max(costs.sum() // num_bins, cost_of(lengths[0], quadratic_length))
    enough = least // _ENOUGH
    order = np.arange(num_bins)  # dearest first
    for _ in range(_MAX_ROUNDS):
        for place in range(1, num_bins):  # insertion sort: from round to round little changes
            bin, hole = order[place], place
            while hole > 0 and _is_less(order[hole - 1], bin, costs):
                order[hole] = order[hole - 1]
                hole -= 1
            order[hole] = bin
        dearest = order[0]
        is_lower = False
        for place in range(num_bins // 2):
            dear, cheap = order[place], order[num_bins - 1 - place]
            if costs[dear] <= least + enough or costs[dear] - costs[cheap] <= enough:
                break
            is_done = _exchange(dear, cheap, lengths, quadratic_length, bins)
            is_lower |= is_done and place == 0
        place = num_bins - 2
        while not is_lower and place > 0 and costs[dearest] > least + enough:
            is_lower = _exchange(dearest, order[place], lengths, quadratic_length, bins)
            place -= 1
        if not is_lower:
            break


@compiled
def _squeeze_in(length: int, count: int, quadratic_length: int, taken: Numbers, bins: _Bins) -> bool:
    """Place one more behind the `count` that are; False, and these stay as placed, if that fails or is not worth it.

    The rooms that are left add up to an example or two, but lie in all bins. Swaps collect them in one bin, and then
    the costs are levelled. When the largest stays too high above the rest, waiting for it would cost more than one
    example more in a step saves.
    """
    rooms, costs, bin_of = bins.rooms.copy(), bins.costs.copy(), bins.bin_of.copy()
    taken[count] = length
    target = _make_room(length, taken, quadratic_length, bins)
    if target != _NONE:
        bins.bin_of[count] = target
        bins.rooms[target] -= length
        _level(taken[: count + 1], quadratic_length, bins)
        least = max(bins.costs.sum() // len(costs), cost_of(taken[: count + 1].max(), quadratic_length))
        if bins.costs.max() <= max(costs.max(), least + least // _WORTH):
            return True
    bins.rooms[:] = rooms
    bins.costs[:] = costs
    bins.bin_of[:] = bin_of
    return False


@compiled
def _make_room(length: int, lengths: Numbers, quadratic_length: int, bins: _Bins) -> int:
    """A bin with room for `length` tokens, made by swaps if need be; _NONE if they do not suffice.

    The bin of most room gives a longer example for a shorter one of the bin of next most room, which is then full or
    nearly so, and so on.
    """
    if bins.rooms.sum() < length:
        return _NONE
    target = _roomiest(bins.rooms, _NONE)
    for _ in range(_MAX_SWAPS):
        need = length - bins.rooms[target]
        if need <= 0:
            return target
        other = _roomiest(bins.rooms, target)
        given, given_before, got, got_before = _NONE, _NONE, _NONE, _NONE
        most_gain = 0  # of room; more than is needed does not count
        before, index = _NONE, bins.first[target]
        while index != _NONE and other != _NONE:
            other_before, partner = _NONE, bins.first[other]
            while partner != _NONE:
                gain = lengths[index] - lengths[partner]
                if gain <= bins.rooms[other] and min(gain, need) > most_gain:
                    most_gain = min(gain, need)
                    given, given_before, got, got_before = index, before, partner, other_before
                other_before, partner = partner, bins.follow[partner]
            before, index = index, bins.follow[index]
        if given == _NONE:
            return _NONE
        _swap(given, given_before, got, got_before, lengths, quadratic_length, bins)
    return _NONE


@compiled
def _roomiest(rooms: Numbers, but: int) -> int:
    """The bin of most room, or of all but one; _NONE if there is no other."""
    found = _NONE
    for bin in range(len(rooms)):
        if bin != but and (found == _NONE or rooms[bin] > rooms[found]):
            found = bin
    return found


@compiled
def _exchange(dear: int, cheap: int, lengths: Numbers, quadratic_length: int, bins: _Bins) -> bool:
    """Move an example from the dear to the cheap bin, or swap it for a shorter one; False when that helps nothing."""
    gap = bins.costs[dear] - bins.costs[cheap]
    least_miss = gap - gap // _ENOUGH  # by which twice the cost that changes sides misses the gap
    given, given_before, got, got_before = _NONE, _NONE, _NONE, _NONE
    before, index = _NONE, bins.first[dear]
    while index != _NONE and least_miss > gap // _GOOD:
        cost = cost_of(lengths[index], quadratic_length)
        if lengths[index] <= bins.rooms[cheap] and abs(2 * cost - gap) < least_miss:
            least_miss = abs(2 * cost - gap)
            given, given_before, got = index, before, _NONE
        other_before, other = _NONE, bins.first[cheap]
        while other != _NONE:
            if 0 < lengths[index] - lengths[other] <= bins.rooms[cheap]:
                miss = abs(2 * (cost - cost_of(lengths[other], quadratic_length)) - gap)
                if miss < least_miss:
                    least_miss = miss
                    given, given_before, got, got_before = index, before, other, other_before
            other_before, other = other, bins.follow[other]
        before, index = index, bins.follow[index]
    if given == _NONE:
        return False
    if got == _NONE:
        _move(given, given_before, cheap, lengths, quadratic_length, bins)
    else:
        _swap(given, given_before, got, got_before, lengths, quadratic_length, bins)
    return True


@compiled
def _swap(
    one: int, one_before: int, other: int, other_before: int, lengths: Numbers, quadratic_length: int, bins: _Bins
) -> None:
    """Let two examples change their bins."""
    source, target = bins.bin_of[one], bins.bin_of[other]
    _move(other, other_before, source, lengths, quadratic_length, bins)
    if one_before == _NONE:  # what came in stands at the front now
        one_before = other
    _move(one, one_before, target, lengths, quadratic_length, bins)


@compiled
def _move(index: int, before: int, target: int, lengths: Numbers, quadratic_length: int, bins: _Bins) -> None:
    """Take an example out of its bin, where it follows `before`, and put it at the front of bin `target`."""
    source, cost = bins.bin_of[index], cost_of(lengths[index], quadratic_length)
    if before == _NONE:
        bins.first[source] = bins.follow[index]
    else:
        bins.follow[before] = bins.follow[index]
    bins.follow[index] = bins.first[target]
    bins.first[target] = index
    bins.bin_of[index] = target
    bins.rooms[source] += lengths[index]
    bins.rooms[target] -= lengths[index]
    bins.costs[source] -= cost
    bins.costs[target] += cost
