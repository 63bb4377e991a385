"""The epoch plan: which examples make which micro-batch of which rank at which step.

A pure function of lengths, weights, seed, epoch and shape: every rank computes the same plan, and a position in it
is one number, the examples consumed so far.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step.

    bins: i64[...] positions in the store; bins[m * world_size + r] is micro-batch m of rank r, and may be empty.
    weight_sum: the sum of all loss weights of the step, over all ranks and micro-batches, in f64.
    """

    bins: tuple[Indices, ...]
    weight_sum: float

    @property
    def num_examples(self) -> int:
        """Examples in the step."""
        return sum(len(positions) for positions in self.bins)


@dataclass(frozen=True, slots=True)
class PlanShape:
    """What a step has room for.

    capacity: tokens of one micro-batch. num_bins: world size * gradient accumulation. quadratic_length: the length q
    at which attention costs as much as everything else, so that a sequence of length L costs L + L^2 / q.
    """

    capacity: int
    num_bins: int
    quadratic_length: float


def quadratic_length(hidden_size: int) -> float:
    """q in the cost L + L^2 / q of a sequence, for a transformer of this hidden size h.

    A layer multiplies by about 12 h^2 weights per token (24 h^2 FLOP); causal attention adds 4 h * L / 2 FLOP per
    token for scores and values. Their ratio is L / (12 h).
    """
    return 12.0 * hidden_size


def plan_epoch(
    lengths: Lengths,
    weight_sums: npt.NDArray[np.float64],
    shape: PlanShape,
    *,
    seed: int | None,
    epoch: int,
    start: int = 0,
) -> Iterator[StepPlan]:
    """The steps of one epoch, from its `start`-th example on.

    lengths: i32[N] tokens. weight_sums: f64[N]. Each step takes the next examples of the epoch's permutation (of the
    store's order when `seed` is None), as many as can be placed; inside the step the longest go first, each to the
    bin of least cost that has room. Every example is in exactly one step, the last step is as small as it comes, no
    bin holds more than `shape.capacity` tokens. Raises ValueError when an example is longer than that.
    """
    if len(lengths) and (longest := int(lengths.max())) > shape.capacity:
        raise ValueError(
            f"example {int(lengths.argmax())} of the store has {longest:,} tokens, above packing.tokens_per_gpu "
            f"{shape.capacity:,}; raise it, or lower data.max_tokens and preprocess again"
        )
    order: Indices = np.arange(len(lengths), dtype=np.int64)
    if seed is not None:
        order = np.random.default_rng([seed, epoch]).permutation(order)
    position = start
    while position < len(order):
        bins = _fill_step(order[position:], lengths, shape)
        step = StepPlan(bins, float(sum(weight_sums[positions].sum() for positions in bins)))
        position += step.num_examples
        yield step


def plan_digest(lengths: Lengths, weight_sums: npt.NDArray[np.float64], shape: PlanShape, *, seed: int) -> str:
    """SHA-256 of everything the plan is a function of, and of its first step as this machine computes it."""
    digest = sha256(repr((shape, seed, len(lengths))).encode())
    digest.update(np.ascontiguousarray(lengths).tobytes())
    digest.update(np.ascontiguousarray(weight_sums).tobytes())
    first = next(plan_epoch(lengths, weight_sums, shape, seed=seed, epoch=0), None)
    for positions in first.bins if first is not None else ():
        digest.update(positions.tobytes() + b"|")
    return digest.hexdigest()


def _fill_step(upcoming: Indices, lengths: Lengths, shape: PlanShape) -> tuple[Indices, ...]:
    """Bins for the longest run of upcoming examples that can be placed, found by bisection."""
    # No more can fit than the tokens allow; the shortest sequence has one token.
    window = upcoming[: shape.num_bins * shape.capacity]
    tokens = np.cumsum(lengths[window], dtype=np.int64)
    most = int(np.searchsorted(tokens, shape.num_bins * shape.capacity, side="right"))
    if (bins := _place(window[:most], lengths, shape)) is not None:
        return bins
    placed, failed = 1, most
    best = _place(window[:1], lengths, shape)
    assert best is not None
    while failed - placed > 1:
        middle = (placed + failed) // 2
        if (bins := _place(window[:middle], lengths, shape)) is None:
            failed = middle
        else:
            placed, best = middle, bins
    return best


def _place(examples: Indices, lengths: Lengths, shape: PlanShape) -> tuple[Indices, ...] | None:
    """Longest first, each into the bin of least cost that has room; None when one finds no room.

    Longest-processing-time scheduling with a capacity.

    Source: R. L. Graham, Bounds on Multiprocessing Timing Anomalies, 1969.
    """
    by_length = examples[np.argsort(-lengths[examples], kind="stable")]
    costs = np.zeros(shape.num_bins)
    rooms = np.full(shape.num_bins, shape.capacity, dtype=np.int64)
    bin_of = np.empty(len(by_length), dtype=np.int64)
    for rank, length in enumerate(lengths[by_length].tolist()):
        target = int(np.argmin(np.where(rooms >= length, costs, np.inf)))
        if rooms[target] < length:
            return None
        bin_of[rank] = target
        rooms[target] -= length
        costs[target] += length + length * length / shape.quadratic_length
    return tuple(by_length[bin_of == bin_] for bin_ in range(shape.num_bins))
