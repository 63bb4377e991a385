"""The plan: which examples make which micro-batch of which rank at which step.

A pure function of lengths, weights, shape and order: every rank computes the same plan, bit for bit. A position in it
is one number, the examples consumed so far. A table of all steps, with exact totals and a hash, is made before step 1.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from threading import Thread
from zlib import crc32

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ochat_train.tokens.order import DataOrder, Indices
from ochat_train.tokens.packing import pack_step

Lengths = npt.NDArray[np.int32]
WeightSums = npt.NDArray[np.float64]
Rows = npt.NDArray[np.void]

_VERSION = 2  # count up when the same inputs give other steps than before
_WINDOW = 65_536  # examples whose lengths are read at once
_LINEAR = 10**9  # the quadratic length of a model whose costs do not grow with the square: far above any context
_MAX_COST = 2**62  # of all micro-batches of a step together, so that sums of costs are whole numbers of 64 bits
_ROW = np.dtype(
    [
        ("num_examples", "<i8"),
        ("num_tokens", "<i8"),
        ("weight_sum", "<f8"),
        ("cost", "<i8"),
        ("waits", "<i8"),
        ("checksum", "<u4"),
    ]
)


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
        """CRC-32 of the number of examples in each bin, then of the positions, all as 64-bit numbers."""
        sizes = np.array([len(positions) for positions in self.bins], "<i8")
        return crc32(np.concatenate(self.bins).astype("<i8").data, crc32(sizes.data))


@dataclass(frozen=True, slots=True)
class PlanShape:
    """What a step has room for, and what its sequences cost.

    capacity: tokens of one micro-batch. world_size: ranks; of those that share micro-batches, one counts. grad_accum:
    micro-batches of each rank in a step. quadratic_length: the length q at which attention costs as much as everything
    else, see `quadratic_length`.
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
        """The modelled time of a step: ranks wait for each other at each micro-batch, so its heaviest one counts."""
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

    lengths: i32[N] tokens. weight_sums: f64[N]. Both may be memory-mapped: of them, only a window of the epoch is held.
    Each step takes the next examples of the order, as many as can be placed in its micro-batches, at costs as equal as
    can be (see packing.py). With accumulation, the micro-batches that ranks run at the same time are those of like
    cost, and each rank's sum over its own is near the others'. Every example of the epoch is in exactly one step, and
    the last step is as small as it comes. Raises ValueError when an example is longer than `shape.capacity`.
    """
    examples = order.examples(epoch)
    first = num_read = start  # the window is that of the examples from `first` to `num_read`
    tokens, ends = np.empty(0, np.int64), np.zeros(1, np.int64)  # ends[i]: tokens of the window's first i examples
    while start < len(examples):
        here = start - first
        stop = first + int(np.searchsorted(ends, ends[here] + shape.room, side="right")) - 1
        if stop == num_read < len(examples):  # more examples may fit than were read
            first, num_read = start, min(num_read + _WINDOW, len(examples))
            tokens = lengths[examples[first:num_read]].astype(np.int64)
            if (longest := int(tokens.max())) > shape.capacity:
                raise ValueError(
                    f"example {examples[first + int(tokens.argmax())]} of the store has {longest:,} tokens, above "
                    f"packing.tokens_per_gpu {shape.capacity:,}; raise it, or lower data.max_tokens and preprocess "
                    "again"
                )
            ends = np.concatenate([[0], np.cumsum(tokens)])
            continue
        upcoming = examples[start:stop].astype(np.int64)
        step = _fill(upcoming, tokens[here : stop - first], weight_sums, shape)
        start += step.num_examples
        yield step


def _fill(upcoming: Indices, lengths: npt.NDArray[np.int64], weight_sums: WeightSums, shape: PlanShape) -> StepPlan:
    """The step that takes the next examples of `upcoming`, as many as can be placed."""
    bin_of, costs = pack_step(lengths, shape.capacity, shape.num_bins, shape.quadratic_length)
    slots = _arrange(costs, shape)
    slot_of = np.argsort(slots)[bin_of]
    placed = upcoming[np.argsort(slot_of, kind="stable")]
    ends = np.cumsum(np.bincount(slot_of, minlength=shape.num_bins)).tolist()
    return StepPlan(
        bins=tuple(placed[begin:end] for begin, end in pairwise([0, *ends])),
        weight_sum=math.fsum(weight_sums[placed].tolist()),
        num_tokens=int(lengths[: len(bin_of)].sum()),
        costs=costs[slots],
    )


def _arrange(costs: npt.NDArray[np.int64], shape: PlanShape) -> Indices:
    """i64[num_bins]: which bin is micro-batch m of rank r, at m * world_size + r.

    The heaviest bins run together, then the next; in each such group the heaviest goes to the rank of the least sum.
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


@dataclass(frozen=True)
class RunPlan:
    """Everything that the steps of a run are a function of. lengths: i32[N] tokens. weight_sums: f64[N]."""

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
        """The steps after the first `consumed` examples of the run, which any other shape may have planned."""
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


@dataclass(frozen=True, slots=True)
class PlanTable:
    """A row for each step: num_examples, num_tokens, weight_sum, cost, waits, checksum.

    cost is what the step's sequences cost together, waits what its ranks wait for (see PlanShape), checksum that of its
    bins: so equal tables are equal plans, bit for bit.
    """

    rows: Rows
    shape: PlanShape

    @property
    def num_steps(self) -> int:
        """Steps."""
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps."""
        return int(self.rows["num_tokens"].sum())

    @property
    def weight_sum(self) -> float:
        """The sum of all loss weights of all steps."""
        return math.fsum(self.rows["weight_sum"].tolist())

    @property
    def cost(self) -> int:
        """What all sequences cost, times the shape's quadratic length."""
        return sum(self.rows["cost"].tolist())  # of a long run it is no number of 64 bits

    @property
    def waits(self) -> int:
        """What ranks wait for in all steps: the modelled time, in the unit of costs."""
        return sum(self.rows["waits"].tolist())

    @property
    def fill(self) -> float:
        """Tokens / room of the micro-batches, over all steps."""
        return self.num_tokens / (self.shape.room * max(self.num_steps, 1))

    @property
    def efficiency(self) -> float:
        """The share of the modelled time in which ranks do not wait, over all steps."""
        return self.shape.efficiency(self.cost, self.waits)

    @property
    def digest(self) -> str:
        """SHA-256 of the table."""
        return sha256(np.ascontiguousarray(self.rows).data).hexdigest()

    def check(self, number: int, step: StepPlan) -> None:
        """Raises RuntimeError when the step `number`, from 0, is not the planned one."""
        if step.checksum != self.rows["checksum"][number]:
            raise RuntimeError(
                f"step {number + 1} of the plan is not the one agreed on: were the store's files changed meanwhile?"
            )


def make_table(plan: RunPlan, consumed: int = 0) -> PlanTable:
    """The table of the steps after the first `consumed` examples."""

    def rows() -> Iterator[tuple[float, ...]]:
        with tqdm(total=plan.num_examples - consumed, unit=" examples", desc="plan", delay=5) as bar:
            for step in plan.steps(consumed):
                cost, waits = int(step.costs.sum()), plan.shape.waits(step.costs)
                yield step.num_examples, step.num_tokens, step.weight_sum, cost, waits, step.checksum
                bar.update(step.num_examples)

    return PlanTable(np.fromiter(rows(), _ROW), plan.shape)


def start_table(plan: RunPlan, consumed: int = 0) -> Future[PlanTable]:
    """The table of the steps after the first `consumed` examples, which a thread makes while the model loads."""
    future: Future[PlanTable] = Future()

    def make() -> None:
        try:
            future.set_result(make_table(plan, consumed))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=make, name="plan", daemon=True).start()  # a process that fails need not wait for a daemon
    return future
