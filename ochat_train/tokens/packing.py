"""One step's examples into its micro-batches: as many as fit, at costs as equal as can be.

Compiled by numba, since placing one example after the other is no array operation; the first call in a new environment
compiles for some seconds, later processes read the result from numba's cache. All arithmetic is in whole numbers, so
every machine comes to the same placement.
"""

import heapq

import numpy as np
import numpy.typing as npt

from ochat_train.tokens.compiled import compiled

Numbers = npt.NDArray[np.int64]

_NONE = -1
_ENOUGH = 2048  # costs that differ by this part of the whole are equal
_NUM_LIGHT = 8  # the lightest bins that are tried as partners of the heaviest
_MAX_EXCHANGES = 16  # for each bin; 3 were enough for all steps that were tried


@compiled
def cost_of(length: int, quadratic_length: int) -> int:
    """The cost L + L^2 / q of a sequence times q, which makes it a whole number."""
    return length * (quadratic_length + length)


@compiled
def pack_step(lengths: Numbers, capacity: int, num_bins: int, quadratic_length: int) -> tuple[Numbers, Numbers]:
    """Bins for as many of the next examples as can be placed.

    lengths: i64[n], in the order of the data, each from 1 to `capacity`. Returns the bin of each of the first k >= 1
    examples, i64[k], and the bins' costs, i64[num_bins].

    k is found from above, by doubling steps and bisection, as the number of examples that longest-processing-time
    scheduling by cost places. Exchanges between bins then lower the largest cost.
    """
    num_all = len(lengths)
    longest_first = np.argsort(-lengths, kind="mergesort")
    bin_of = np.empty(num_all, np.int64)
    count, failed, distance = num_all, num_all + 1, 1
    while not _schedule(lengths, longest_first, count, capacity, num_bins, quadratic_length, bin_of):
        failed = count
        count = max(1, num_all - distance)
        distance = 2 * distance + 1
    while failed - count > 1:
        middle = (count + failed) // 2
        if _schedule(lengths, longest_first, middle, capacity, num_bins, quadratic_length, bin_of):
            count = middle
        else:
            failed = middle
    _schedule(lengths, longest_first, count, capacity, num_bins, quadratic_length, bin_of)
    bin_of = bin_of[:count]
    return bin_of, _level(lengths[:count], capacity, num_bins, quadratic_length, bin_of)


@compiled
def _schedule(
    lengths: Numbers,
    longest_first: Numbers,
    count: int,
    capacity: int,
    num_bins: int,
    quadratic_length: int,
    bin_of: Numbers,
) -> bool:
    """Place the first `count` examples, the longest first, each into the bin of least cost that has room.

    Writes `bin_of`. Returns False when an example finds no room.

    Source: R. L. Graham, Bounds on Multiprocessing Timing Anomalies, 1969.
    """
    rooms = np.full(num_bins, capacity)
    heap = [(np.int64(0), np.int64(bin)) for bin in range(num_bins)]  # (cost, bin), the least on top
    aside = heap[:0]  # bins without room for the last length; a shorter one may fit again
    most_room = 0  # of those
    for index in longest_first:
        if index >= count:
            continue
        length = lengths[index]
        if length <= most_room:
            most_room = 0
            while len(aside) > 0:
                heapq.heappush(heap, aside.pop())
        while len(heap) > 0 and rooms[heap[0][1]] < length:
            most_room = max(most_room, rooms[heap[0][1]])
            aside.append(heapq.heappop(heap))
        if len(heap) == 0:
            return False
        cost, bin = heap[0]
        heapq.heapreplace(heap, (cost + cost_of(length, quadratic_length), bin))
        rooms[bin] -= length
        bin_of[index] = bin
    return True


@compiled
def _level(lengths: Numbers, capacity: int, num_bins: int, quadratic_length: int, bin_of: Numbers) -> Numbers:
    """Lower the largest cost by exchanges of the heaviest bin with one of the lightest; changes `bin_of`.

    Returns the costs, i64[num_bins]. It ends when none of the lightest bins can relieve the heaviest, or when that is
    as light as can be: near the mean, or near the cost of the longest sequence.
    """
    rooms = np.full(num_bins, capacity)
    costs = np.zeros(num_bins, np.int64)
    for index in range(len(lengths)):
        rooms[bin_of[index]] -= lengths[index]
        costs[bin_of[index]] += cost_of(lengths[index], quadratic_length)
    least = max(costs.sum() // num_bins, cost_of(lengths.max(), quadratic_length))
    for _ in range(_MAX_EXCHANGES * num_bins):
        heavy = costs.argmax()
        if costs[heavy] <= least + least // _ENOUGH:
            break
        held = np.flatnonzero(bin_of == heavy)
        given, got, light = _NONE, _NONE, heavy
        not_tried = costs.copy()
        for _ in range(min(_NUM_LIGHT, num_bins - 1)):
            light = not_tried.argmin()
            not_tried[light] = costs[heavy]
            others = np.flatnonzero(bin_of == light)
            gap = costs[heavy] - costs[light]
            given, got = _best_exchange(held, others, lengths, quadratic_length, gap, rooms[light])
            if given != _NONE:
                break
        if given == _NONE:
            break
        length, cost = lengths[given], cost_of(lengths[given], quadratic_length)
        bin_of[given] = light
        if got != _NONE:
            length -= lengths[got]
            cost -= cost_of(lengths[got], quadratic_length)
            bin_of[got] = heavy
        rooms[heavy] += length
        rooms[light] -= length
        costs[heavy] -= cost
        costs[light] += cost
    return costs


@compiled
def _best_exchange(
    held: Numbers, others: Numbers, lengths: Numbers, quadratic_length: int, gap: int, room: int
) -> tuple[int, int]:
    """The example of a heavy bin, and the shorter one of a light bin, whose swap makes the two costs most equal.

    held, others: the examples in the heavy and in the light bin. gap: by how much the costs differ. room: tokens that
    the light bin has left. The second of the pair is _NONE where moving the first is best, both are _NONE where nothing
    that fits helps.
    """
    least_miss = gap - gap // _ENOUGH  # by which twice the cost that changes sides misses the gap
    given, got = _NONE, _NONE
    for index in held:
        length, cost = lengths[index], cost_of(lengths[index], quadratic_length)
        if length <= room and abs(2 * cost - gap) < least_miss:
            least_miss, given, got = abs(2 * cost - gap), index, _NONE
        for other in others:
            if lengths[other] < length <= room + lengths[other]:
                miss = abs(2 * (cost - cost_of(lengths[other], quadratic_length)) - gap)
                if miss < least_miss:
                    least_miss, given, got = miss, index, other
    return given, got
