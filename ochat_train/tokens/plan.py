"""The plan: which examples make which micro-batch of which rank at which step.

A pure function of lengths, weights, shape and order: every rank computes the same plan, bit for bit, a window of the
data at a time. A position in it is one number, the examples consumed so far.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from zlib import crc32

import numpy as np
import numpy.typing as npt

from ochat_train.tokens.order import DataOrder, Indices
from ochat_train.tokens.packing import pack_step

Lengths = npt.NDArray[np.int32]
WeightSums = npt.NDArray[np.float64]

_VERSION = 1  # count up when the same inputs give other steps than before
_WINDOW = 65_536  # examples read ahead
_LINEAR = 10**9  # the quadratic length of a model whose costs do not grow with the square: far above any context
_MAX_COST = 2**62  # of all micro-batches of a step together, so that sums of costs are whole numbers of 64 bits


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step.

    bins: i64[...] positions in the store; bins[m * world_size + r] is micro-batch m of rank r, and may be empty.
    weight_sum: the sum of all loss weights of the step, over all ranks and micro-batches, exactly rounded. num_tokens:
    likewise. costs: i64[num_bins], what each micro-batch costs, times the shape's quadratic length.
    """

    bins: tuple[Indices, ...]
    weight_sum: float
    num_tokens: int
    costs: npt.NDArray[np.int64]

    @property
    def num_examples(self) -> int:
        """Examples in the step."""
        return sum(len(positions) for positions in self.bins)

    @property
    def checksum(self) -> int:
        """CRC-32 of the bins, borders and order included."""
        checksum = 0
        for positions in self.bins:
            checksum = crc32(positions.astype("<i8").data, crc32(len(positions).to_bytes(8, "little"), checksum))
        return checksum


@dataclass(frozen=True, slots=True)
class PlanShape:
    """What a step has room for, and what its sequences cost.

    capacity: tokens of one micro-batch. world_size: ranks. grad_accum: micro-batches of each rank in a step.
    quadratic_length: the length q at which attention costs as much as everything else, see `quadratic_length`.
    """

    capacity: int
    world_size: int
    grad_accum: int
    quadratic_length: int

    def __post_init__(self) -> None:
        if self.num_bins * self.capacity * (self.quadratic_length + self.capacity) > _MAX_COST:
            raise ValueError(
                f"a step of {self.num_bins:,} micro-batches of packing.tokens_per_gpu {self.capacity:,} tokens is too "
                "large to be planned; lower it"
            )

    @property
    def num_bins(self) -> int:
        """Micro-batches of a step, over all ranks."""
        return self.world_size * self.grad_accum

    @property
    def room(self) -> int:
        """Tokens that a step has room for."""
        return self.capacity * self.num_bins

    def waits(self, costs: npt.NDArray[np.int64]) -> int:
        """The modelled time of a step: ranks wait for each other at each micro-batch, so its dearest one counts."""
        return int(costs.reshape(self.grad_accum, self.world_size).max(axis=1).sum())

    def efficiency(self, cost: int, waits: int) -> float:
        """The share of the modelled time in which ranks do not wait, in steps of these sums of costs and of waits."""
        return cost / (self.world_size * waits) if waits else 1.0


def quadratic_length(*, num_weights: int, attention_width: int) -> int:
    """q, in tokens, of the cost L + L^2 / q of a sequence of L tokens: where attention costs as much as all else.

    num_weights: entries of all matrices that a token passes, over all layers and the head. attention_width: heads times
    head size, summed over the layers whose attention sees the whole sequence; 0: there are none.

    A matrix of n entries takes 2 n FLOP a token. Attention multiplies each query of width d with its keys, and the
    scores with the values, 4 d FLOP a key; a causal query sees L / 2 keys in the mean, so 2 d L FLOP a token. The
    backward pass doubles both. So a token costs 2 num_weights + 2 attention_width L, and a sequence, in units of
    2 num_weights FLOP, L + L^2 / q with q = num_weights / attention_width.

    Llama-2-13B: 40 layers of 4 * 5120^2 + 3 * 5120 * 13824 weights, a head of 32000 * 5120, and 40 * 5120 of width give
    q = 62,752 tokens, close to 12 times the hidden size, which is q for a plain transformer of 12 h^2 weights a layer.
    A sliding window bounds what its layers cost, so these layers count as linear.
    """
    return max(1, round(num_weights / attention_width)) if attention_width else _LINEAR


def plan_epoch(
    lengths: Lengths, weight_sums: WeightSums, shape: PlanShape, order: DataOrder, *, epoch: int, start: int = 0
) -> Iterator[StepPlan]:
    """The steps of one epoch, from the `start`-th example of its order on.

    lengths: i32[N] tokens. weight_sums: f64[N]. Both may be memory-mapped: what is held is a window of the epoch. Each
    step takes the next examples of the order, as many as can be placed in its micro-batches, at costs as equal as can
    be (see packing.py). With accumulation, the micro-batches that ranks run at the same time are those of like cost,
    and each rank's sum over its own is near the others'. Every example of the epoch is in exactly one step, and the
    last step is as small as it comes. Raises ValueError when an example is longer than `shape.capacity`.
    """
    num_examples = order.num_examples(epoch)
    window, read, here = np.empty(0, np.int64), start, 0
    ends = np.zeros(1, np.int64)  # ends[i]: tokens of the window's first i examples
    while start < num_examples:
        count = int(np.searchsorted(ends, ends[here] + shape.room, side="right")) - 1 - here
        if here + count == len(window) and read < num_examples:
            ahead = order.examples(epoch, read, min(read + _WINDOW, num_examples))
            window, read, here = np.concatenate([window[here:], ahead]), read + len(ahead), 0
            ends = np.concatenate([[0], np.cumsum(lengths[window], dtype=np.int64)])
            if int(np.diff(ends).max()) > shape.capacity:
                raise _overlong(lengths, window, shape.capacity)
            continue
        step = _fill(window[here : here + count], np.diff(ends[here : here + count + 1]), weight_sums, shape)
        num_taken = step.num_examples
        here += num_taken
        start += num_taken
        yield step


@dataclass(frozen=True)
class RunPlan:
    """All that the steps of a run are a function of. lengths i32[N], weight_sums f64[N]; num_epochs of the run."""

    lengths: Lengths
    weight_sums: WeightSums
    shape: PlanShape
    order: DataOrder
    num_epochs: int

    @property
    def num_examples(self) -> int:
        """Examples of all epochs."""
        return self.order.total(self.num_epochs)

    def steps(self, consumed: int = 0) -> Iterator[StepPlan]:
        """The steps behind the first `consumed` examples of the run, which any other shape may have planned."""
        first, start = self.order.seek(consumed)
        for epoch in range(first, self.num_epochs):
            yield from plan_epoch(self.lengths, self.weight_sums, self.shape, self.order, epoch=epoch, start=start)
            start = 0

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that the steps are a function of."""
        digest = sha256(repr((_VERSION, self.shape, self.order.digest, self.num_epochs)).encode())
        digest.update(digest_index(self.lengths, self.weight_sums).encode())
        return digest.hexdigest()


def digest_index(lengths: Lengths, weight_sums: WeightSums) -> str:
    """SHA-256 of the lengths and weight sums of a store's split."""
    digest = sha256(np.ascontiguousarray(lengths, dtype="<i4").data)
    digest.update(np.ascontiguousarray(weight_sums, dtype="<f8").data)
    return digest.hexdigest()


def _overlong(lengths: Lengths, positions: Indices, capacity: int) -> ValueError:
    longest = int(positions[np.argmax(lengths[positions])])
    return ValueError(
        f"example {longest} of the store has {int(lengths[longest]):,} tokens, above packing.tokens_per_gpu "
        f"{capacity:,}; raise it, or lower data.max_tokens and preprocess again"
    )


def _fill(upcoming: Indices, lengths: npt.NDArray[np.int64], weight_sums: WeightSums, shape: PlanShape) -> StepPlan:
    """The step that takes the next examples of `upcoming`, as many as can be placed."""
    arrivals = np.argsort(-lengths, kind="stable")
    members, ends, costs = pack_step(
        lengths[arrivals], arrivals, shape.capacity, shape.num_bins, shape.quadratic_length
    )
    placed = upcoming[members]
    bins = [placed[begin:end] for begin, end in pairwise([0, *ends.tolist()])]
    slots = _arrange(costs, shape)
    return StepPlan(
        bins=tuple(bins[bin] for bin in slots.tolist()),
        weight_sum=math.fsum(weight_sums[placed].tolist()),
        num_tokens=int(lengths[: len(placed)].sum()),
        costs=costs[slots],
    )


def _arrange(costs: npt.NDArray[np.int64], shape: PlanShape) -> Indices:
    """i64[num_bins]: which bin is micro-batch m of rank r, at m * world_size + r.

    The dearest bins run together, then the next; in each such group the dearest goes to the rank of the least sum.
    """
    by_cost = np.argsort(-costs, kind="stable")
    sums = np.zeros(shape.world_size, np.int64)
    slots = np.empty_like(by_cost)
    for group in range(0, shape.num_bins, shape.world_size):
        bins = by_cost[group : group + shape.world_size]
        ranks = np.argsort(sums, kind="stable")
        slots[group + ranks] = bins
        sums[ranks] += costs[bins]
    return slots
