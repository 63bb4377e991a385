"""How good the epoch plan is and how fast it is made, beside the packing of other projects, in one run.

    python benchmarks/packing.py [--repeats 5] [--sizes 80000 1000000 10000000] [--dir DIR] [--sharegpt FILE]

- The plans: a table for each input, with a row for each way to pack. Each way gets the same examples, other ways than
  ours also in the order of our epoch, whose making is thus part of our time alone. All that is slow is compiled.
- The scale: our plan of larger and larger stores, each in a process of its own, from memory-mapped files: seconds to
  the first step and for all, memory. 100,000,000 takes minutes, and 1.2 GB in --dir.
- Why there is a compiler: the same packing as plain Python; how long importing and compiling take.
- The aims, and whether each is met.

What the columns say, of a plan with R ranks, where a sequence of L tokens costs L + L^2 / q (Llama-2-13B's q):

    over bound   steps above ceil(tokens of all examples / room of a step); a way that drops examples may get below
    fill         tokens / room
    tokens, cost balance: mean over the ranks / largest, of a step; for more micro-batches than one, sums over them
    efficiency   (cost of what is trained / R) / sum of the largest cost of a rank, over all steps and micro-batches:
                 the share of its time that a rank works, if it waits for the others at each micro-batch
    dropped      examples that are in no step
    CPU ms, ms   to make the plan, medians of the repeats; the former is what counts while others use the machine

Fill and balance are means over all steps but the last. Padding costs; it counts in costs and balance, not in fill.
The row `limit` has the fewest steps, and their fill, of any plan whose steps take the next examples of the order; and
the best cost balance of any placement within our steps, where a long example may be more than a rank's share.
The tables are printed, and all numbers are written to benchmarks/results/. Needs psutil.
"""

import argparse
import heapq
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import orjson
from machine import ROOT, describe_machine, write_results
from numba import njit

from ochat_train.tokens.order import DataOrder
from ochat_train.tokens.packing import pack_step
from ochat_train.tokens.plan import Lengths, PlanShape, StepPlan, plan_epoch, quadratic_length

Numbers = npt.NDArray[np.int64]
Slots = Numbers  # of each example: step * bins of a step + bin; DROPPED for none
Packer = Callable[[Numbers, PlanShape], Slots]

DROPPED = -1
SEED = 0
Q = quadratic_length(num_weights=40 * (4 * 5120**2 + 3 * 5120 * 13824) + 32000 * 5120, attention_width=40 * 5120)
NUM_EXAMPLES = 80_000
PIECE = 1_000_000  # examples that are made at once
SAMPLE_STEPS = 32  # between two looks at the memory
PLAIN_STEPS = {(8, 32_768): 20, (64, 8192): 20, (1024, 8192): 3}  # that are packed without a compiler
PACKAGES = ("numpy", "numba", "llvmlite")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything, print the tables and write the numbers down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of each plan, after one that does not count")
    parser.add_argument("--sizes", type=int, nargs="*", default=[80_000, 1_000_000, 10_000_000], help="of the stores")
    parser.add_argument("--dir", type=Path, help="folder for the files of the stores, 12 bytes an example")
    parser.add_argument(
        "--sharegpt",
        type=Path,
        default=ROOT.parent / "shared/data/sharegpt_v1_token_lengths.json",
        help="a JSON list of lengths; left out if it is not there",
    )
    options = parser.parse_args(arguments)
    results = describe_machine(PACKAGES)
    print(orjson.dumps(results, option=orjson.OPT_INDENT_2).decode())

    comparisons = []
    for data in make_inputs(options.sharegpt):
        comparisons.append(compare(data, options.repeats))
        show_comparison(comparisons[-1])
    print(f"\n{'our plan, 64 x 8,192':>20} {SCALE_HEADER}")
    scales = []
    for size in sorted(options.sizes):
        scales.append(measure_scale(size, options.dir))
        show_scale(scales[-1])
    compiler = measure_compiler()
    show_compiler(compiler)
    aims = check_aims(comparisons, scales)
    show_aims(aims)

    results["inputs"] = [asdict(comparison) for comparison in comparisons]
    results["scale"] = [asdict(scale) for scale in scales]
    results["compiler"] = asdict(compiler)
    results["aims"] = [asdict(aim) for aim in aims]
    write_results("packing", results)


# ---- Inputs ----


@dataclass(frozen=True, slots=True)
class Input:
    """Examples to plan, and the steps to plan them for. lengths: i32[N] tokens."""

    name: str
    lengths: Lengths
    shape: PlanShape

    @property
    def bound(self) -> int:
        """Fewer steps have no room for all tokens."""
        return -(-int(self.lengths.sum(dtype=np.int64)) // self.shape.room)


def shape_of(world_size: int, capacity: int, grad_accum: int = 1) -> PlanShape:
    """A step of so many ranks, for Llama-2-13B."""
    return PlanShape(capacity=capacity, world_size=world_size, grad_accum=grad_accum, quadratic_length=Q)


def draw_lengths(rng: np.random.Generator, size: int, mu: float, sigma: float, longest: int) -> Lengths:
    """i32[size]: lognormal lengths of conversations, from 8 tokens to where they are cut."""
    return np.clip(rng.lognormal(mu, sigma, size), 8, longest).astype(np.int32)


def sharegpt_like(rng: np.random.Generator, size: int) -> Lengths:
    """i32[size]: lengths as those of ShareGPT's conversations, cut at 4,096 tokens."""
    return draw_lengths(rng, size, 6.8, 0.9, 4096)


def long_tail(rng: np.random.Generator) -> Lengths:
    """i32[20,000]: one of twenty examples may have up to 131,072 tokens."""
    return np.concatenate([sharegpt_like(rng, 19_000), draw_lengths(rng, 1_000, 10, 1, 131_072)])


def make_inputs(sharegpt: Path) -> list[Input]:
    """All that is compared."""
    inputs = []
    if sharegpt.exists():
        lengths = np.array(json.loads(sharegpt.read_text()), np.int32)
        inputs += [Input("ShareGPT, cut at 2,048", lengths, shape_of(8, capacity)) for capacity in (12 * 2048, 16_384)]
    lengths = sharegpt_like(np.random.default_rng(SEED), NUM_EXAMPLES)
    shapes = ((8, 32_768), (8, 8192), (64, 8192), (1024, 8192), (8, 32_768, 4))
    inputs += [Input("lognormal, cut at 4,096", lengths, shape_of(*shape)) for shape in shapes]
    inputs.append(Input("long tail", long_tail(np.random.default_rng(SEED)), shape_of(8, 131_072)))
    return inputs


def weight_sums_of(lengths: Lengths) -> npt.NDArray[np.float64]:
    """f64[N]: some weights; the plan adds them up and looks at them no further."""
    return lengths.astype(np.float64) * 0.1


# ---- Ways to pack. Each takes lengths i64[N] in the order of the epoch, and says where each example goes ----


def pack_by_padding(lengths: Numbers, shape: PlanShape) -> Slots:
    """Batches of equal numbers of examples, each padded to its longest: what a plain data loader does.

    A batch has as many examples as fit if all were as long as the longest of the whole set. Nothing is dropped.
    """
    batch = shape.capacity // int(lengths.max())
    return np.arange(len(lengths)) // batch


def pack_by_multipack(lengths: Numbers, shape: PlanShape) -> Slots:
    """OpenChat's first Multipack: as many next examples as first-fit-decreasing packs into the bins of a step.

    Their number is found by bisection. The last examples, which leave a bin of their step empty, are dropped.

    Source: multipack_dataloader.py of OpenChat (github.com/imoneoi/openchat), July 2023.
    """
    return _multipack(lengths, shape.capacity, shape.num_bins, False)


def pack_by_multipack_v2(lengths: Numbers, shape: PlanShape) -> Slots:
    """OpenChat's later Multipack: the same by longest-processing-time, each to the bin of fewest tokens.

    It ends, and drops what is left, when a step has fewer examples than bins.

    Source: multipack_sampler.py of OpenChat (github.com/imoneoi/multipack_sampler), August 2023.
    """
    return _multipack(lengths, shape.capacity, shape.num_bins, True)


def pack_by_bfd(lengths: Numbers, shape: PlanShape) -> Slots:
    """Best-fit-decreasing over the whole set, then the bins in random order; what does not fill a step is dropped.

    A step is thus no random sample of the examples: those of like length meet in the same bins.

    Source: `pack_dataset(strategy="bfd")` of TRL (github.com/huggingface/trl), which does it for each 1,000 examples
    that it maps at once, and knows nothing of steps; shuffling and dropping are those of a data loader on top of it.
    """
    bin_of, num_bins = _best_fit(lengths, shape.capacity)
    slots = np.random.default_rng(SEED).permutation(num_bins)[bin_of]
    slots[slots >= num_bins // shape.num_bins * shape.num_bins] = DROPPED
    return slots


PACKERS: dict[str, Packer] = {
    "padding": pack_by_padding,
    "multipack": pack_by_multipack,
    "multipack_v2": pack_by_multipack_v2,
    "bfd": pack_by_bfd,
}


@njit(cache=True, nogil=True)
def _multipack(lengths: Numbers, capacity: int, num_bins: int, is_lpt: bool) -> Slots:
    slots = np.full(len(lengths), DROPPED)
    bin_of = np.empty(len(lengths), np.int64)
    ends = np.zeros(len(lengths) + 1, np.int64)
    ends[1:] = np.cumsum(lengths)
    start, num_steps = 0, 0
    while start < len(lengths):
        count = 1
        failed = np.searchsorted(ends, ends[start] + capacity * num_bins, side="right") - start
        while failed - count > 1:
            middle = (count + failed) // 2
            longest_first = -np.sort(-lengths[start : start + middle])
            if _fits(longest_first, capacity, num_bins, is_lpt, bin_of):
                count = middle
            else:
                failed = middle
        window = lengths[start : start + count]
        by_length = np.argsort(-window, kind="mergesort")
        _fits(window[by_length], capacity, num_bins, is_lpt, bin_of)
        is_last = count < num_bins if is_lpt else bin_of[:count].max() + 1 < num_bins
        if is_last:
            break
        slots[start + by_length] = num_steps * num_bins + bin_of[:count]
        start += count
        num_steps += 1
    return slots


@njit(cache=True, nogil=True)
def _fits(lengths: Numbers, capacity: int, num_bins: int, is_lpt: bool, bin_of: Numbers) -> bool:
    if is_lpt:
        return _longest_processing_time(lengths, capacity, num_bins, bin_of)
    return _first_fit(lengths, capacity, num_bins, bin_of)


@njit(cache=True, nogil=True)
def _first_fit(lengths: Numbers, capacity: int, num_bins: int, bin_of: Numbers) -> bool:
    """Each to the first bin that has room; False when one finds none."""
    rooms = np.full(num_bins, capacity)
    for index in range(len(lengths)):
        bin = 0
        while bin < num_bins and rooms[bin] < lengths[index]:
            bin += 1
        if bin == num_bins:
            return False
        rooms[bin] -= lengths[index]
        bin_of[index] = bin
    return True


@njit(cache=True, nogil=True)
def _longest_processing_time(lengths: Numbers, capacity: int, num_bins: int, bin_of: Numbers) -> bool:
    """Each to the bin of fewest tokens; False when that has no room for it."""
    heap = [np.int64(bin) for bin in range(num_bins)]  # tokens * num_bins + bin
    for index in range(len(lengths)):
        fewest, bin = heap[0] // num_bins, heap[0] % num_bins
        if fewest + lengths[index] > capacity:
            return False
        bin_of[index] = bin
        heapq.heapreplace(heap, heap[0] + lengths[index] * num_bins)
    return True


@njit(cache=True, nogil=True)
def _best_fit(lengths: Numbers, capacity: int) -> tuple[Numbers, int]:
    """Longest first, each to the bin with the least room that is enough, or to a new one: (bin of each, bins).

    Bins of equal room lie on a stack for each room. A binary tree over the rooms says which have any, so that an
    example takes a few steps up and down that tree, however many bins there are.
    """
    num_leaves = 1
    while num_leaves <= capacity:
        num_leaves *= 2
    has_bins = np.zeros(2 * num_leaves, np.bool_)  # of a node of the tree; its leaf of room r is at num_leaves + r
    top = np.full(capacity + 1, -1)  # of each room
    below = np.empty(len(lengths), np.int64)  # of each bin
    bin_of = np.empty(len(lengths), np.int64)
    num_bins = 0
    for index in np.argsort(-lengths, kind="mergesort"):
        room = _least_room(has_bins, num_leaves, lengths[index])
        if room < 0:
            room, bin = capacity, num_bins
            num_bins += 1
        else:
            bin = top[room]
            top[room] = below[bin]
            if top[room] < 0:
                node = num_leaves + room
                has_bins[node] = False
                while node > 1 and not has_bins[node ^ 1]:
                    node //= 2
                    has_bins[node] = False
        bin_of[index] = bin
        room -= lengths[index]
        below[bin] = top[room]
        top[room] = bin
        node = num_leaves + room
        while node > 0 and not has_bins[node]:
            has_bins[node] = True
            node //= 2
    return bin_of, num_bins


@njit(cache=True, nogil=True)
def _least_room(has_bins: npt.NDArray[np.bool_], num_leaves: int, length: int) -> int:
    """The least room of a bin from `length` on, or -1."""
    node = num_leaves + length
    if has_bins[node]:
        return length
    while node % 2 == 1 or not has_bins[node + 1]:  # up, until there is something to the right
        node //= 2
        if node <= 1:
            return -1
    node += 1
    while node < num_leaves:
        node = 2 * node if has_bins[2 * node] else 2 * node + 1
    return node - num_leaves


# ---- Comparing them ----


@dataclass(frozen=True, slots=True)
class Measures:
    """How good one plan is; see the top of this file. seconds, cpu_seconds: of each repeat."""

    name: str
    num_steps: int
    over_bound: float
    fill: float
    token_balance: float
    cost_balance: float
    efficiency: float
    num_dropped: int
    seconds: list[float]
    cpu_seconds: list[float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All plans of one input.

    prefix_limit: the fewest steps of any plan whose steps take the next examples of the order, see `fill_prefixes`;
    prefix_fill: the fill of these. open_tokens: what such a step should leave open in the mean, E[L^2] / (2 E[L]): the
    example that does not fit any more is met in proportion to its length, and half of it would have fitted.
    balance_limit: the cost balance that our steps would have at best, see `limit_balance`.
    """

    name: str
    world_size: int
    capacity: int
    grad_accum: int
    num_examples: int
    num_tokens: int
    longest: int
    bound: int
    prefix_limit: int
    prefix_fill: float
    open_tokens: float
    balance_limit: float
    rows: list[Measures]

    def row(self, name: str) -> Measures:
        """The row of one way to pack."""
        return next(row for row in self.rows if row.name == name)


def compare(data: Input, repeats: int) -> Comparison:
    """All plans of one input, each made once more than is counted."""
    shape, num_examples = data.shape, len(data.lengths)
    examples = DataOrder(num_examples, SEED).examples(0)
    in_order = data.lengths[examples].astype(np.int64)
    rows = []
    for name, pack in PACKERS.items():
        slots, *seconds = _repeat(partial(pack, in_order, shape), repeats)
        rows.append(measure(name, in_order, slots, data, *seconds, is_padded=pack is pack_by_padding))
    steps, *seconds = _repeat(partial(plan_all, data), repeats)
    lengths, slots = data.lengths.astype(np.int64), slots_of(steps, num_examples)
    rows.append(measure("ours", lengths, slots, data, *seconds))
    prefix_limit, prefix_fill = fill_prefixes(in_order, shape.room)
    return Comparison(
        name=data.name,
        world_size=shape.world_size,
        capacity=shape.capacity,
        grad_accum=shape.grad_accum,
        num_examples=num_examples,
        num_tokens=int(in_order.sum()),
        longest=int(in_order.max()),
        bound=data.bound,
        prefix_limit=prefix_limit,
        prefix_fill=prefix_fill,
        open_tokens=float((in_order**2).sum() / (2 * in_order.sum())),
        balance_limit=limit_balance(lengths, slots, shape),
        rows=rows,
    )


def plan_all(data: Input) -> list[StepPlan]:
    """Our plan, its order included."""
    order = DataOrder(len(data.lengths), SEED)
    return list(plan_epoch(data.lengths, weight_sums_of(data.lengths), data.shape, order, epoch=0))


def slots_of(steps: Sequence[StepPlan], num_examples: int) -> Slots:
    """Our plan as the others say it."""
    bins = [positions for step in steps for positions in step.bins]
    slots = np.full(num_examples, DROPPED)
    slots[np.concatenate(bins)] = np.repeat(np.arange(len(bins)), [len(positions) for positions in bins])
    return slots


def measure(
    name: str,
    lengths: Numbers,
    slots: Slots,
    data: Input,
    seconds: list[float],
    cpu_seconds: list[float],
    *,
    is_padded: bool = False,
) -> Measures:
    """How good a plan is that puts an example of lengths[i] tokens, i64[N], into slots[i]."""
    shape = data.shape
    is_placed = slots != DROPPED
    lengths, slots = lengths[is_placed], slots[is_placed]
    num_steps = int(slots.max()) // shape.num_bins + 1
    num_full = max(1, num_steps - 1)
    paid = lengths  # tokens that are computed
    if is_padded:
        longest = np.zeros(num_steps * shape.num_bins, np.int64)
        np.maximum.at(longest, slots, lengths)
        paid = longest[slots]

    def by_bin(amounts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:  # [steps, micro-batches, ranks]
        sums = np.bincount(slots, amounts, num_steps * shape.num_bins).astype(np.float64)
        return sums.reshape(num_steps, shape.grad_accum, shape.world_size)

    def balance(amounts: npt.NDArray[np.float64]) -> float:
        full = amounts[:num_full]
        return float((full.mean(axis=2).sum(axis=1) / full.max(axis=2).sum(axis=1)).mean())

    costs = by_bin(cost_of(paid))
    return Measures(
        name=name,
        num_steps=num_steps,
        over_bound=num_steps / data.bound - 1,
        fill=float(by_bin(lengths)[:num_full].sum()) / (num_full * shape.room),
        token_balance=balance(by_bin(paid)),
        cost_balance=balance(costs),
        efficiency=float(cost_of(lengths).sum() / shape.world_size / costs.max(axis=2).sum()),
        num_dropped=int((~is_placed).sum()),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
    )


def cost_of(lengths: Numbers) -> npt.NDArray[np.float64]:
    """What sequences cost, in tokens."""
    return lengths + lengths.astype(np.float64) ** 2 / Q


def fill_prefixes(lengths: Numbers, room: int) -> tuple[int, float]:
    """(steps, fill) if only their tokens limited steps: each takes the next examples as long as their sum has room.

    No plan whose steps take the next examples has fewer: by induction, none is further after any number of steps.
    """
    ends = np.cumsum(lengths)
    num_steps, num_taken, num_tokens = 0, 0, [0]
    while num_taken < len(lengths):
        num_taken = int(np.searchsorted(ends, num_tokens[-1] + room, side="right"))
        num_tokens.append(int(ends[num_taken - 1]))
        num_steps += 1
    num_full = max(1, num_steps - 1)
    return num_steps, num_tokens[num_full] / (num_full * room)


def limit_balance(lengths: Numbers, slots: Slots, shape: PlanShape) -> float:
    """The largest cost balance of any other placement within the same steps: an example cannot be divided."""
    steps, costs = slots // shape.num_bins, cost_of(lengths)
    means = np.bincount(steps, costs) / shape.world_size
    heaviest = np.zeros_like(means)
    np.maximum.at(heaviest, steps, costs)
    return float((means / np.maximum(means, heaviest))[: max(1, len(means) - 1)].mean())


def _repeat(function: Callable[[], Any], repeats: int) -> tuple[Any, list[float], list[float]]:
    """(result, seconds, CPU seconds) of each repeat, after a warm-up."""
    seconds, cpu_seconds = [], []
    for _ in range(1 + repeats):
        started, cpu_started = time.perf_counter(), time.process_time()
        result = function()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    return result, seconds[1:], cpu_seconds[1:]


# ---- The scale ----


@dataclass(frozen=True, slots=True)
class Scale:
    """Our plan of a store of `num_examples`, 64 ranks of 8,192 tokens, in a process of its own. All memory is in bytes.

    imported: resident after all imports. own: the most that was allocated, looked at every few steps. resident: the
    most altogether, with those pages of the mapped files that the system keeps as long as nobody else needs the memory.
    """

    num_examples: int
    num_steps: int
    over_bound: float
    first_seconds: float
    seconds: float
    cpu_seconds: float
    imported: int
    own: int
    resident: int


def measure_scale(num_examples: int, folder: Path | None = None) -> Scale:
    """Make a store's index in `folder`, plan an epoch of it in a new process, and remove it."""
    shape = shape_of(64, 8192)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        num_tokens = write_index(Path(name), num_examples)
        measured = _in_process("plan_index", name, shape.world_size, shape.capacity)
    bound = -(-num_tokens // shape.room)
    return Scale(num_examples=num_examples, over_bound=measured["num_steps"] / bound - 1, **measured)


def write_index(folder: Path, num_examples: int) -> int:
    """Write lengths.npy, i32, and weight_sums.npy, f64, as a store has them. Returns the tokens."""
    rng = np.random.default_rng(SEED)
    create = partial(np.lib.format.open_memmap, mode="w+", shape=(num_examples,))
    lengths = create(folder / "lengths.npy", dtype=np.int32)
    weight_sums = create(folder / "weight_sums.npy", dtype=np.float64)
    num_tokens = 0
    for start in range(0, num_examples, PIECE):
        piece = sharegpt_like(rng, min(PIECE, num_examples - start))
        lengths[start : start + len(piece)] = piece
        weight_sums[start : start + len(piece)] = weight_sums_of(piece)
        num_tokens += int(piece.sum())
    return num_tokens


def plan_index(folder: str, world_size: int, capacity: int) -> dict[str, Any]:
    """What one process needs to plan the index in `folder`; compiling does not count."""
    imported = memory("VmRSS")
    plan_all(Input("warm-up", np.full(1000, 100, np.int32), shape_of(world_size, capacity)))
    lengths, weight_sums = (np.load(Path(folder, f"{name}.npy"), mmap_mode="r") for name in ("lengths", "weight_sums"))
    own, num_steps, first_seconds = 0, 0, 0.0
    started, cpu_started = time.perf_counter(), time.process_time()
    order = DataOrder(len(lengths), SEED)
    for _ in plan_epoch(lengths, weight_sums, shape_of(world_size, capacity), order, epoch=0):
        num_steps += 1
        if num_steps == 1:
            first_seconds = time.perf_counter() - started
        if num_steps % SAMPLE_STEPS == 1:
            own = max(own, memory("RssAnon"))
    return {
        "num_steps": num_steps,
        "first_seconds": first_seconds,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "imported": imported,
        "own": own,
        "resident": memory("VmHWM"),
    }


def memory(field: str) -> int:
    """Bytes, by /proc, whose peak is of this process alone; `getrusage` also counts the one that it was forked from."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))


def _in_process(function: str, *arguments: Any, **environment: str) -> Any:
    """What a function of this file returns in a new process."""
    code = (
        "import json, sys\n"
        "function, arguments = json.loads(sys.argv[1])\n"
        "import packing\n"
        "print(json.dumps(getattr(packing, function)(*arguments)))"
    )
    command = [sys.executable, "-c", code, json.dumps([function, arguments])]
    folders = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": folders} | environment
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


# ---- Why there is a compiler ----


@dataclass(frozen=True, slots=True)
class PackTime:
    """Packing some steps, of `num_examples` together, with and without the compiler; is_equal: to the same bins."""

    world_size: int
    capacity: int
    num_examples: int
    compiled_seconds: list[float]
    plain_seconds: list[float]
    is_equal: bool


@dataclass(frozen=True, slots=True)
class StartTime:
    """From a new process to its first step, in seconds."""

    numpy: float
    rest_of_import: float
    first_step: float
    second_step: float


@dataclass(frozen=True, slots=True)
class Compiler:
    """What numba gains, and what it costs: at the first start in an environment, and at each later one."""

    packing: list[PackTime]
    first_start: StartTime
    later_start: StartTime


START = """
import time
times = [time.perf_counter()]
import numpy as np
times.append(time.perf_counter())
from ochat_train.tokens.order import DataOrder
from ochat_train.tokens.plan import PlanShape, plan_epoch
times.append(time.perf_counter())
lengths = np.arange(1, 2001, dtype=np.int32)
plan = plan_epoch(lengths, lengths * 0.1, PlanShape(8192, 8, 1, 62752), DataOrder(2000, 0), epoch=0)
for _ in range(2):
    next(plan)
    times.append(time.perf_counter())
print(*np.diff(times))
"""


def measure_compiler() -> Compiler:
    """All of it, in new processes."""
    packing = []
    for (world_size, capacity), num_steps in PLAIN_STEPS.items():
        compiled, plain = (
            _in_process("time_packing", world_size, capacity, num_steps, NUMBA_DISABLE_JIT=is_disabled)
            for is_disabled in ("0", "1")
        )
        packing.append(
            PackTime(
                world_size=world_size,
                capacity=capacity,
                num_examples=compiled["num_examples"],
                compiled_seconds=compiled["seconds"],
                plain_seconds=plain["seconds"],
                is_equal=compiled["checksum"] == plain["checksum"],
            )
        )
    with tempfile.TemporaryDirectory() as cache:
        return Compiler(packing=packing, first_start=_time_start(cache), later_start=_time_start(cache))


def time_packing(world_size: int, capacity: int, num_steps: int) -> dict[str, Any]:
    """The packing of the first steps of ShareGPT-like examples; a call that does not count comes before."""
    shape = shape_of(world_size, capacity)
    lengths = sharegpt_like(np.random.default_rng(SEED), NUM_EXAMPLES).astype(np.int64)
    pack_step(lengths[:1], shape.capacity, shape.num_bins, shape.quadratic_length)
    start, seconds, checksum = 0, [], 0
    for _ in range(num_steps):
        within = np.cumsum(lengths[start:]) <= shape.room
        upcoming = lengths[start : start + int(within.sum())]
        started = time.perf_counter()
        bin_of, _ = pack_step(upcoming, shape.capacity, shape.num_bins, shape.quadratic_length)
        seconds.append(time.perf_counter() - started)
        start += len(bin_of)
        checksum = crc32(bin_of.data, checksum)
    return {"num_examples": start, "seconds": seconds, "checksum": checksum}


def _time_start(cache: str) -> StartTime:
    environment = os.environ | {"NUMBA_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", START], env=environment, check=True, stdout=subprocess.PIPE)
    return StartTime(*map(float, result.stdout.split()))


# ---- The aims ----


@dataclass(frozen=True, slots=True)
class Aim:
    """What our plan should reach, and what it reaches."""

    aim: str
    reached: str
    is_met: bool


def check_aims(comparisons: Sequence[Comparison], scales: Sequence[Scale]) -> list[Aim]:
    """Every aim that was measured."""
    aims = []
    for comparison in comparisons:
        ours, where = comparison.row("ours"), title(comparison)
        if (comparison.world_size, comparison.capacity, comparison.grad_accum) == (8, 32_768, 1):
            aims += [
                Aim(
                    f"at most 0.5 % more steps than the bound: {where}",
                    f"{100 * ours.over_bound:.2f} %, {ours.num_steps} for {comparison.bound}; the limit is "
                    f"{comparison.prefix_limit}",
                    ours.over_bound <= 0.005,
                ),
                Aim(f"cost balance at least 0.995: {where}", f"{ours.cost_balance:.4f}", ours.cost_balance >= 0.995),
            ]
        other = comparison.row("multipack_v2").cost_balance
        aims.append(
            Aim(
                f"cost balance not below multipack_v2: {where}",
                f"{ours.cost_balance:.4f} and {other:.4f}",
                ours.cost_balance >= other,
            )
        )
        if comparison.num_examples == NUM_EXAMPLES:
            seconds, cpu_seconds = median(ours.seconds), median(ours.cpu_seconds)
            aims.append(
                Aim(
                    f"80,000 examples in at most 0.1 s: {where}",
                    f"{seconds:.3f} s, {cpu_seconds:.3f} s of CPU",
                    seconds <= 0.1,
                )
            )
    dropped = sum(comparison.row("ours").num_dropped for comparison in comparisons)
    aims.append(Aim("nothing is dropped", f"{dropped:,} examples", dropped == 0))
    for scale in scales:
        if scale.num_examples == 10_000_000:
            reached = f"{scale.seconds:.2f} s, {scale.cpu_seconds:.2f} s of CPU"
            aims.append(Aim("10 M examples in at most 10 s", reached, scale.seconds <= 10))
        if scale.num_examples == 100_000_000:
            own, resident = (f"{amount / 1e6:,.0f} MB" for amount in (scale.own, scale.resident))
            aims += [
                Aim("100 M examples in less than 1 GB, allocated", own, scale.own < 1e9),
                Aim("100 M examples in less than 1 GB, with pages of mapped files", resident, scale.resident < 1e9),
            ]
    return aims


# ---- Tables ----

SCALE_HEADER = (
    f"{'steps':>9} {'over bound':>10} {'first s':>9} {'all s':>9} {'CPU s':>9} {'examples/s':>11} {'MB imported':>11} "
    f"{'MB own':>8} {'MB resident':>11}"
)


def title(comparison: Comparison) -> str:
    """An input in few words."""
    micro_batches = f" x {comparison.grad_accum} micro-batches" if comparison.grad_accum > 1 else ""
    return f"{comparison.name}, {comparison.world_size} x {comparison.capacity:,}{micro_batches}"


def show_comparison(comparison: Comparison) -> None:
    """A line for each way to pack."""
    print(
        f"\n{title(comparison)}: {comparison.num_examples:,} examples, {comparison.num_tokens:,} tokens, longest "
        f"{comparison.longest:,}, bound {comparison.bound:,} steps"
    )
    print(
        f"{'':14} {'steps':>7} {'over bound':>10} {'fill':>7} {'tokens':>7} {'cost':>7} {'efficiency':>10} "
        f"{'dropped':>8} {'CPU ms':>8} {'ms':>8}   from - to"
    )
    for row in comparison.rows:
        low, high = 1000 * min(row.seconds), 1000 * max(row.seconds)
        print(
            f"{row.name:14} {row.num_steps:7,} {100 * row.over_bound:8.2f} % {row.fill:7.4f} {row.token_balance:7.4f} "
            f"{row.cost_balance:7.4f} {row.efficiency:10.4f} {row.num_dropped:8,} "
            f"{1000 * median(row.cpu_seconds):8.1f} {1000 * median(row.seconds):8.1f}   {low:.1f} - {high:.1f}"
        )
    over = 100 * (comparison.prefix_limit / comparison.bound - 1)
    room = comparison.capacity * comparison.world_size * comparison.grad_accum
    print(
        f"{'limit':14} {comparison.prefix_limit:7,} {over:8.2f} % {comparison.prefix_fill:7.4f} {'':7} "
        f"{comparison.balance_limit:7.4f}   if the next examples fill each step; "
        f"{comparison.open_tokens:,.0f} tokens stay open: {1 - comparison.open_tokens / room:.4f}"
    )


def show_scale(scale: Scale) -> None:
    """A line for a store."""
    sizes = [f"{amount / 1e6:,.0f}" for amount in (scale.imported, scale.own, scale.resident)]
    print(
        f"{scale.num_examples:20,} {scale.num_steps:9,} {100 * scale.over_bound:8.2f} % {scale.first_seconds:9.3f} "
        f"{scale.seconds:9.2f} {scale.cpu_seconds:9.2f} {scale.num_examples / scale.seconds:11,.0f} "
        f"{sizes[0]:>11} {sizes[1]:>8} {sizes[2]:>11}"
    )


def show_compiler(compiler: Compiler) -> None:
    """What is gained, then what it costs."""
    print(f"\n{'packing a step':20} {'examples':>9} {'compiled ms':>11} {'plain ms':>11} {'times':>7}   equal")
    for time_of in compiler.packing:
        num_steps = len(time_of.plain_seconds)
        compiled, plain = (1000 * sum(each) / num_steps for each in (time_of.compiled_seconds, time_of.plain_seconds))
        print(
            f"{f'{time_of.world_size} x {time_of.capacity:,}':20} {time_of.num_examples // num_steps:9,} "
            f"{compiled:11.2f} {plain:11.1f} {plain / compiled:7.0f}   {'yes' if time_of.is_equal else 'NO'}"
        )
    print(f"\n{'seconds of a start':20} {'numpy':>9} {'the rest':>11} {'first step':>11} {'second step':>11}")
    for name, start in (("first, compiling", compiler.first_start), ("later", compiler.later_start)):
        print(
            f"{name:20} {start.numpy:9.2f} {start.rest_of_import:11.2f} {start.first_step:11.3f} "
            f"{start.second_step:11.4f}"
        )


def show_aims(aims: Sequence[Aim]) -> None:
    """A line for each aim."""
    print()
    for aim in aims:
        print(f"{'met' if aim.is_met else 'MISSED':8} {aim.aim}: {aim.reached}")


if __name__ == "__main__":
    main()
