"""The loss head against other ways to the same gradients, and against its matrix products alone.

    python benchmarks/loss_head.py [--sizes C,V,S ...] [--chunks TOKENS ...] [--repeats N]

C is the width of the hidden states, V the vocabulary, and S the number of tokens, all with a loss. Each way computes
the loss and its gradients by hidden states and weight:

    head          LossHead, gradients in its forward pass, in chunks of so many tokens
    compiled      the same after compile_chunk(), in chunks of the usual size
    recomputed    chunks through torch.utils.checkpoint, whose backward pass computes the logits again
    full logits   F.cross_entropy of all logits in fp32
    products      nothing but the three products of [S, V, C], all tokens at once, into memory that is there already

They run in turns, after one run each that is not counted. On a CPU in fp32, in one thread whose CPU time is taken, so
that whoever else computes there disturbs little; where there is a GPU, in bf16, at the size of a 13B, and by the clock.
Memory is the most above the inputs: of all tensors on a CPU, where those of compiled code are not seen, and of torch's
allocator on a GPU. The numbers are printed and written to benchmarks/results/.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe_machine, write_results
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ochat_train.model import loss
from ochat_train.model.activations import live_bytes
from ochat_train.model.loss import LossHead

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
GPU_SIZES, CPU_SIZES = (
    ["5120,32000,16384", "4096,128256,16384"],
    ["512,32000,2048", "1024,32000,2048", "2048,32000,1024"],
)
CHUNKS = [1024, 2048, 4096, 8192] if ON_GPU else [512, 1024, 2048]
USUAL_CHUNK = loss.CHUNK_TOKENS
RECOMPUTED_CHUNK = 1024  # as the head had when it computed its logits again

Way = Callable[[], tuple[Tensor, ...]]  # one run: gradients by hidden states and weight


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=GPU_SIZES if ON_GPU else CPU_SIZES, help="C,V,S each")
    parser.add_argument("--chunks", nargs="+", type=int, default=CHUNKS)
    parser.add_argument("--repeats", type=int, default=10 if ON_GPU else 3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = describe_machine(("torch",))
    results["gpu"] = torch.cuda.get_device_name() if ON_GPU else None
    results["dtype"] = str(DTYPE)
    print({key: value for key, value in results.items() if value is not None})
    results["sizes"] = []
    for size in arguments.sizes:
        results["sizes"].append(measure(size, arguments.chunks, arguments.repeats))
        write_results("loss-head-cuda" if ON_GPU else "loss-head", results)  # whoever stops it keeps what there is


def measure(size: str, chunks: list[int], repeats: int) -> dict[str, Any]:
    """Seconds and bytes of every way at one size."""
    width, vocabulary, num_tokens = map(int, size.split(","))
    ways = make_ways(width, vocabulary, num_tokens, chunks)
    peaks = {name: peak_bytes(name, way) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    products = median(seconds["products"])
    rate = 6 * width * vocabulary * num_tokens / products
    print(f"\nC {width:,}, V {vocabulary:,}, S {num_tokens:,}; the products at {rate / 1e12:.3g} TFLOP/s")
    print(f"{'':18}{'ms':>9}{'from':>9}{'to':>9}{'products':>10}{'MB':>9}")
    for name, all_seconds in seconds.items():
        low, middle, high = (1000 * part for part in (min(all_seconds), median(all_seconds), max(all_seconds)))
        peak = "" if peaks[name] is None else f"{peaks[name] / 1e6:9,.0f}"
        print(f"{name:18}{middle:9,.1f}{low:9,.1f}{high:9,.1f}{middle / 1000 / products:9.3f}x{peak}", flush=True)
    return {"size": [width, vocabulary, num_tokens], "seconds": seconds, "peak_bytes": peaks}


def make_ways(width: int, vocabulary: int, num_tokens: int, chunks: list[int]) -> dict[str, Way]:
    """Every way, by name, on the same random inputs."""
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False, device=DEVICE, dtype=DTYPE)
    hidden = torch.randn(num_tokens, width, device=DEVICE, dtype=DTYPE, requires_grad=True)
    labels = torch.randint(vocabulary, (num_tokens,), device=DEVICE)
    weights = torch.rand(num_tokens, device=DEVICE)
    conditions = torch.zeros(num_tokens, dtype=torch.int32, device=DEVICE)
    positions = torch.arange(num_tokens, device=DEVICE)
    ours, compiled = (LossHead(head, softcap=None, num_conditions=2) for _ in range(2))
    compiled.compile_chunk()

    def by_head(loss_head: LossHead, chunk_tokens: int) -> tuple[Tensor, ...]:
        loss.CHUNK_TOKENS = chunk_tokens
        sums = loss_head(hidden, labels, weights, conditions, positions)
        return torch.autograd.grad(sums.nll, (hidden, head.weight))

    def by_recomputing() -> tuple[Tensor, ...]:
        def nll(states: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(head(states).float(), labels, reduction="none")

        parts = [
            checkpoint(nll, states, part, use_reentrant=False)
            for states, part in zip(hidden.split(RECOMPUTED_CHUNK), labels.split(RECOMPUTED_CHUNK), strict=True)
        ]
        return torch.autograd.grad((torch.cat(parts) * weights).sum(), (hidden, head.weight))

    def by_full_logits() -> tuple[Tensor, ...]:
        nll = F.cross_entropy(head(hidden).float(), labels, reduction="none")
        return torch.autograd.grad((nll * weights).sum(), (hidden, head.weight))

    logits = torch.empty(num_tokens, vocabulary, device=DEVICE, dtype=DTYPE)
    outs = torch.empty_like(hidden), torch.empty_like(head.weight)

    @torch.no_grad()
    def by_products() -> tuple[Tensor, ...]:
        torch.mm(hidden, head.weight.T, out=logits)
        return torch.mm(logits, head.weight, out=outs[0]), torch.mm(logits.T, hidden, out=outs[1])

    ways: dict[str, Way] = {"products": by_products, "full logits": by_full_logits, "recomputed": by_recomputing}
    for chunk in sorted({min(chunk, num_tokens) for chunk in chunks}):
        ways[f"head {chunk}"] = lambda chunk=chunk: by_head(ours, chunk)
    ways["compiled"] = lambda: by_head(compiled, USUAL_CHUNK)
    return ways


def timed(way: Way) -> float:
    """Seconds of one run."""
    if not ON_GPU:
        started = time.process_time()
        way()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    way()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(name: str, way: Way) -> int | None:
    """Bytes at most above what there was; None where they are not seen. The first run of the way."""
    if ON_GPU:
        way()  # loads and compiles
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way()
        return torch.cuda.max_memory_allocated() - before
    with live_bytes([]) if name != "compiled" else nullcontext() as live:
        way()
    return None if live is None else live.peak


if __name__ == "__main__":
    main()
